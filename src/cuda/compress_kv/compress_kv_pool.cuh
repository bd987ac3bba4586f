// compress_kv, kinds mean, weighted and softmax: every window becomes a weighted sum of its tokens.
//
// Math    y[i] = sum_t w[t] * x[i*d + t] + bias,  bias = sum_t w[t] * pos_emb[t]
//         backward  dx[j] = sum over windows i that cover j of w[j - i*d] * dy[i]
//                   dw[t] = sum_i <dy[i], x[i*d + t] + pos_emb[t]>,  dpos_emb[t] = w[t] * sum_i dy[i]
//         softmax: w = softmax(weight), dweight = w * (dw - sum_t w[t] dw[t]). mean: w = 1 / l.
// Shapes  params/compress_kv.h.
// Tiles   a thread owns 8 elements (16 bytes) of one (row, head); neighbouring threads read
//         neighbouring addresses. dw: a CTA owns (token of the window, head, chunk of rows). The mean
//         of a few sequences is one launch: its weights are constant, and a row walks over the
//         sequences.
// Memory  none shared but for the reduction of dw. Each token is read l / d times, from L2 after the
//         first.
// Bound   HBM: forward 1 + 1/d passes over x. At 64K tokens, 8 heads, 128, bf16: 0.14 GB, 0.03 ms.
// Numbers fp32 sums in a fixed order, one rounding; sums over rows in chunks that are added in order.
#pragma once
#include "base/math.h"
#include "cuda/compress_kv/compress_kv.h"
#include "cuda/device/fast_div.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/packing.cuh"
#include "cuda/device/sequence_tile.cuh"
#include "cuda/device/vector.cuh"

namespace fsattn::device {

inline constexpr int kCompressThreads = 256;

// Where row `row` of x_cmp comes from. `is_window` is false behind the last sequence.
struct WindowSource {
  int first_token;
  bool is_window;
};

__device__ __forceinline__ WindowSource find_window(const CompressKvShape& shape,
                                                    const int32_t* cu_seqlens,
                                                    const int32_t* cu_cmp, int64_t row) {
  const int batch = static_cast<int>(shape.batch);
  const int seq = find_sequence(cu_cmp, batch, static_cast<int>(row));
  if (seq >= batch) return {0, false};
  const int64_t i = row - __ldg(cu_cmp + seq);
  const int64_t first = __ldg(cu_seqlens + seq) + i * shape.kernel_stride;
  // cu_seqlens is the caller's and unseen by the host: no address may leave x.
  if (first < 0 || first + shape.kernel_size > shape.total) return {0, false};
  return {static_cast<int>(first), true};
}

// With so few sequences a row finds its own without cu_cmp.
inline constexpr int64_t kFewSequences = 8;

// As find_window(), from the lengths.
__device__ __forceinline__ WindowSource walk_windows(const CompressKvShape& shape,
                                                     const FastDiv& stride,
                                                     const int32_t* cu_seqlens, int64_t row) {
  int64_t start = 0;  // first row of the sequence
  for (int b = 0; b < shape.batch; ++b) {
    const int first = __ldg(cu_seqlens + b),
              spare = __ldg(cu_seqlens + b + 1) - first - static_cast<int>(shape.kernel_size);
    const int64_t next = start + (spare < 0 ? 0 : stride.quotient(spare) + 1);
    if (row < next) {
      const int64_t token = first + (row - start) * shape.kernel_stride;
      if (token < 0 || token + shape.kernel_size > shape.total) return {0, false};
      return {static_cast<int>(token), true};
    }
    start = next;
  }
  return {0, false};
}

// cu_cmp of sequences first .. last - 1, which `start` windows come before.
__device__ __forceinline__ void write_cu_cmp(const CompressKvShape& shape,
                                             const int32_t* cu_seqlens, int32_t* cu_cmp,
                                             int64_t first, int64_t last, int64_t start) {
  if (first == 0) cu_cmp[0] = 0;
  for (int64_t b = first; b < last; ++b) {
    start += num_windows(cu_seqlens[b + 1] - cu_seqlens[b], shape.kernel_size, shape.kernel_stride);
    cu_cmp[b + 1] = static_cast<int32_t>(min(start, shape.rows_cmp));
  }
}

// cu_cmp: exclusive sums of the numbers of windows, capped at the rows of x_cmp. One CTA.
static __global__ void __launch_bounds__(kCompressThreads)
    cu_seqlens_cmp_kernel(const __grid_constant__ CompressKvShape shape, const int32_t* cu_seqlens,
                          int32_t* cu_cmp) {
  __shared__ int64_t sums[kCompressThreads];
  const int64_t a_thread = ceil_div<int64_t>(shape.batch, kCompressThreads);
  const int64_t first = threadIdx.x * a_thread;
  const int64_t last = min(first + a_thread, shape.batch);
  int64_t sum = 0;
  for (int64_t b = first; b < last; ++b) {
    sum += num_windows(cu_seqlens[b + 1] - cu_seqlens[b], shape.kernel_size, shape.kernel_stride);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  int64_t start = 0;
  for (unsigned i = 0; i < threadIdx.x; ++i) start += sums[i];
  write_cu_cmp(shape, cu_seqlens, cu_cmp, first, last, start);
}

// The weights of a window in fp32, one CTA a head.
template <class Element>
__global__ void __launch_bounds__(kWarpSize)
    window_weights_kernel(const __grid_constant__ CompressKvShape shape, const void* weight,
                          float* out) {
  const int64_t l = shape.kernel_size, head = blockIdx.x;
  const Element* w = static_cast<const Element*>(weight) + head * l;
  float* to = out + head * l;
  float largest = -INFINITY, sum = 0.f;
  if (shape.kind == CompressKind::kSoftmax) {
    for (int64_t t = 0; t < l; ++t) largest = fmaxf(largest, static_cast<float>(w[t]));
    for (int64_t t = 0; t < l; ++t) sum += expf(static_cast<float>(w[t]) - largest);
  }
  for (int64_t t = threadIdx.x; t < l; t += kWarpSize) {
    switch (shape.kind) {
      case CompressKind::kSoftmax:
        to[t] = expf(static_cast<float>(w[t]) - largest) / sum;
        break;
      case CompressKind::kWeighted:
        to[t] = static_cast<float>(w[t]);
        break;
      default:
        to[t] = 1.f / static_cast<float>(l);
    }
  }
}

// bias[head, column] = sum_t w[head, t] * pos_emb[head, t, column].
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    pool_bias_kernel(const __grid_constant__ CompressKvShape shape, const float* w,
                     const void* pos_emb, float* bias) {
  const int64_t l = shape.kernel_size, dim = shape.head_dim, head = blockIdx.x;
  const Element* pe = static_cast<const Element*>(pos_emb) + head * l * dim;
  for (int64_t column = threadIdx.x; column < dim; column += kCompressThreads) {
    float sum = 0.f;
    for (int64_t t = 0; t < l; ++t)
      sum += w[head * l + t] * static_cast<float>(pe[t * dim + column]);
    bias[head * dim + column] = sum;
  }
}

// A thread's place in a [rows, heads, dim / 8] grid. Divisions by numbers that only the host knows,
// but for one of 64 bits: there may be more than 2^31 vectors.
struct VectorPlace {
  int64_t row;
  int head;
  int column;
};

struct PoolDivisors {
  FastDiv row, head, stride;  // vectors of a row, vectors of a head, kernel_stride

  explicit PoolDivisors(const CompressKvShape& shape)
      : row(shape.num_heads * (shape.head_dim / kVector)),
        head(shape.head_dim / kVector),
        stride(shape.kernel_stride) {}

  __device__ __forceinline__ VectorPlace place() const {
    const int64_t first = int64_t{blockIdx.x} * kCompressThreads, first_row = first / row.divisor;
    const int in_rows = static_cast<int>(first - first_row * row.divisor) + threadIdx.x;
    const int rows = row.quotient(in_rows), in_row = row.remainder(in_rows, rows);
    const int at_head = head.quotient(in_row);
    return {first_row + rows, at_head, head.remainder(in_row, at_head) * kVector};
  }
};

// The weighted sum of the l tokens of a window; w is null for their mean.
template <class Element>
__device__ __forceinline__ Vector8<Element> sum_window(const Element* x, int64_t token_stride,
                                                       const float* w, int l) {
  constexpr int kInFlight = 16;
  const float mean = 1.f / static_cast<float>(l);
  Vector8<Element> y;
  for (int t0 = 0; t0 < l; t0 += kInFlight) {
    uint4 tokens[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (t0 + i < l) tokens[i] = *reinterpret_cast<const uint4*>(x + (t0 + i) * token_stride);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (t0 + i >= l) break;
      y.add_scaled(w == nullptr ? mean : __ldg(w + t0 + i), Vector8<Element>::unpack(tokens[i]));
    }
  }
  return y;
}

// kWritesLengths: the grid also writes cu_cmp, of a few sequences.
template <class Element, bool kWritesLengths>
__global__ void __launch_bounds__(kCompressThreads)
    pool_fwd_kernel(const __grid_constant__ CompressKvFwdParams p,
                    const __grid_constant__ PoolDivisors divisors, const float* w,
                    const float* bias) {
  const CompressKvShape& shape = p.shape;
  if (kWritesLengths && blockIdx.x == 0 && threadIdx.x == 0) {
    write_cu_cmp(shape, p.cu_seqlens, p.cu_seqlens_cmp, 0, shape.batch, 0);
  }
  const VectorPlace at = divisors.place();
  if (at.row >= shape.rows_cmp) return;
  const WindowSource source = kWritesLengths
                                  ? walk_windows(shape, divisors.stride, p.cu_seqlens, at.row)
                                  : find_window(shape, p.cu_seqlens, p.cu_seqlens_cmp, at.row);
  Vector8<Element> y;
  if (source.is_window) {
    const int l = static_cast<int>(shape.kernel_size);
    y = sum_window(row_pointer<const Element>(p.x, source.first_token, at.head, at.column),
                   p.x.token_stride, w == nullptr ? w : w + at.head * l, l);
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) y.x[i] += bias[at.head * shape.head_dim + at.column + i];
    }
  }
  y.store(row_pointer<Element>(p.x_cmp, at.row, at.head, at.column));
}

// The windows that cover the tokens of a stride: `last` - l / d + 1 to `last`, clipped.
struct CoveringWindows {
  int64_t row;  // of window 0 in dx_cmp
  int first, last;
};

// dx of token t of a stride: the sum over the windows that cover it. w is null for a mean.
template <class Element>
__device__ __forceinline__ Vector8<Element> sum_gradients(const CompressKvBwdParams& p,
                                                          const VectorPlace& at,
                                                          const CoveringWindows& windows,
                                                          int stride_index, int t, const float* w) {
  const int l = static_cast<int>(p.shape.kernel_size), d = static_cast<int>(p.shape.kernel_stride);
  const float mean = 1.f / static_cast<float>(l);
  Vector8<Element> dx;
  for (int i = windows.first; i <= windows.last; ++i) {
    const Element* dy = row_pointer<Element>(p.dx_cmp, windows.row + i, at.head, at.column);
    dx.add_scaled(w == nullptr ? mean : __ldg(w + at.head * l + (stride_index - i) * d + t),
                  Vector8<Element>::load(dy));
  }
  return dx;
}

// Place `row` of a thread is a stride of d tokens of a sequence, all of which the same windows cover.
// Tokens behind the last sequence get a zero gradient.
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    pool_dx_kernel(const __grid_constant__ CompressKvBwdParams p,
                   const __grid_constant__ PoolDivisors divisors, const float* w) {
  const CompressKvShape& shape = p.shape;
  const VectorPlace at = divisors.place();
  const int batch = static_cast<int>(shape.batch), d = static_cast<int>(shape.kernel_stride);
  const int64_t slots = num_tile_slots(shape.total, shape.batch, d);
  if (at.row >= slots) return;
  const TileSlot tile = find_tile(p.cu_seqlens, batch, static_cast<int>(at.row), d);
  const RowRange tokens = rows_of(p.cu_seqlens, batch, tile.seq, static_cast<int>(shape.total));
  const int count = min(d, tokens.count - tile.first);
  const int stride_index = divisors.stride.quotient(tile.first);
  CoveringWindows windows{0, 0, -1};
  if (tile.seq < batch) {
    windows.row = __ldg(p.cu_seqlens_cmp + tile.seq);
    const int num = __ldg(p.cu_seqlens_cmp + tile.seq + 1) - static_cast<int>(windows.row);
    windows.first = max(stride_index - static_cast<int>(shape.kernel_size) / d + 1, 0);
    windows.last = min(stride_index, num - 1);
  }
  Vector8<Element> dx;
  for (int t = 0; t < count; ++t) {
    if (w != nullptr || t == 0) {
      dx = sum_gradients<Element>(p, at, windows, stride_index, t, w);
    }
    dx.store(
        row_pointer<Element>(p.dx, int64_t{tokens.begin} + tile.first + t, at.head, at.column));
  }
}

// partial[chunk, head, t] = sum over the chunk's rows i of <dy[i], x[i*d + t] + pos_emb[t]>.
// Grid (l, heads, chunks); warps take the rows in turn and are added in order.
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    pool_dw_kernel(const __grid_constant__ CompressKvBwdParams p, float* partial,
                   int64_t rows_a_chunk) {
  constexpr int kWarps = kCompressThreads / kWarpSize;
  __shared__ float sums[kWarps];
  const CompressKvShape& shape = p.shape;
  const int64_t t = blockIdx.x, head = blockIdx.y, chunk = blockIdx.z;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t last_row = min((chunk + 1) * rows_a_chunk, shape.rows_cmp);
  float sum = 0.f;
  for (int64_t row = chunk * rows_a_chunk + warp; row < last_row; row += kWarps) {
    const WindowSource source = find_window(shape, p.cu_seqlens, p.cu_seqlens_cmp, row);
    if (!source.is_window) break;  // rows behind the last sequence: so are all later ones
    for (int64_t column = lane * kVector; column < shape.head_dim; column += kWarpSize * kVector) {
      const auto dy = Vector8<Element>::load(row_pointer<Element>(p.dx_cmp, row, head, column));
      auto x =
          Vector8<Element>::load(row_pointer<Element>(p.x, source.first_token + t, head, column));
      if (p.pos_emb != nullptr) {
        const Element* pe = static_cast<const Element*>(p.pos_emb);
        x.add_scaled(1.f, Vector8<Element>::load(
                              pe + (head * shape.kernel_size + t) * shape.head_dim + column));
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += dy.x[i] * x.x[i];
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, offset);
  }
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  partial[(chunk * shape.num_heads + head) * shape.kernel_size + t] = total;
}

// dweight[head, t] from the partial sums. One CTA of one warp a head; l <= a few hundred.
template <class Element>
__global__ void __launch_bounds__(kWarpSize)
    pool_dweight_kernel(const __grid_constant__ CompressKvShape shape, const float* w,
                        float* partial, int64_t num_chunks, void* dweight) {
  const int64_t l = shape.kernel_size, head = blockIdx.x;
  const int64_t chunk_stride = shape.num_heads * l;
  float mean = 0.f;  // sum_t w[t] * dw[t]
  for (int64_t t = threadIdx.x; t < l; t += kWarpSize) {
    float sum = 0.f;
    for (int64_t c = 0; c < num_chunks; ++c) sum += partial[c * chunk_stride + head * l + t];
    partial[head * l + t] = sum;
    mean += w[head * l + t] * sum;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    mean += __shfl_xor_sync(kFullMask, mean, offset);
  }
  const bool is_softmax = shape.kind == CompressKind::kSoftmax;
  for (int64_t t = threadIdx.x; t < l; t += kWarpSize) {
    const float dw = partial[head * l + t];
    const float grad = is_softmax ? w[head * l + t] * (dw - mean) : dw;
    static_cast<Element*>(dweight)[head * l + t] = Element(grad);
  }
}

// partial[chunk, head, column] = sum of dy over the chunk's rows. Grid (heads, chunks).
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    dy_sum_kernel(const __grid_constant__ CompressKvBwdParams p, float* partial,
                  int64_t rows_a_chunk) {
  const CompressKvShape& shape = p.shape;
  const int64_t head = blockIdx.x, chunk = blockIdx.y;
  const int64_t rows = __ldg(p.cu_seqlens_cmp + shape.batch);
  const int64_t last_row = min((chunk + 1) * rows_a_chunk, rows);
  for (int64_t column = threadIdx.x; column < shape.head_dim; column += kCompressThreads) {
    float sum = 0.f;
    for (int64_t row = chunk * rows_a_chunk; row < last_row; ++row) {
      sum += static_cast<float>(*row_pointer<Element>(p.dx_cmp, row, head, column));
    }
    partial[(chunk * shape.num_heads + head) * shape.head_dim + column] = sum;
  }
}

// out[i] = sum over chunks of partial[chunk, i], in order.
static __global__ void __launch_bounds__(kCompressThreads)
    add_chunks_kernel(const float* partial, float* out, int64_t count, int64_t num_chunks) {
  const int64_t i = int64_t{blockIdx.x} * kCompressThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int64_t c = 0; c < num_chunks; ++c) sum += partial[c * count + i];
  out[i] = sum;
}

// dpos_emb[head, t, column] = w[head, t] * dy_sum[head, column].
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    pool_dpos_kernel(const __grid_constant__ CompressKvShape shape, const float* w,
                     const float* dy_sum, void* dpos) {
  const int64_t i = int64_t{blockIdx.x} * kCompressThreads + threadIdx.x;
  const int64_t l = shape.kernel_size, dim = shape.head_dim;
  if (i >= shape.num_heads * l * dim) return;
  const int64_t head = i / (l * dim), t = i / dim % l;
  static_cast<Element*>(dpos)[i] = Element(w[head * l + t] * dy_sum[head * dim + i % dim]);
}

}  // namespace fsattn::device
