// paged_append: a few new tokens a sequence into the cache, and the compressed tokens they complete.
//
// Math     as compress_kv over the last l tokens of each completed window, keys before their rotation;
//          the compressed key is rounded, rotated by the window's first position and rounded again.
// Shapes   params/paged.h. Most calls complete no window: one in d, for one token a sequence.
// Tiles    pooling kinds: one CTA per (sequence, KV head), one warp a completed window and tensor, 16
//          bytes a lane, over tokens in shared memory; sums in the order of compress_kv. linear: one CTA per (sequence, head, tensor,
//          32 columns), the window in shared memory, the rows of W shared out over 32 slices.
// Order    windows are read before new tokens overwrite raw keys: a barrier, or a second kernel.
// Bound    latency; linear: l * D * D weights a (sequence, head) from L2.
#pragma once
#include "cuda/decode/paged_append.h"
#include "cuda/decode/paged_copy.cuh"
#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/mma_sm80.cuh"

namespace fsattn {

inline constexpr int kAppendThreads = 128;
inline constexpr int kLinearThreads = 256;
inline constexpr int kLinearColumns = 16;  // of each half of a row, so that a CTA can rotate
inline constexpr int kLinearSlices = kLinearThreads / (2 * kLinearColumns / 4);

namespace device {

// The windows that a call completes: [first, end).
struct WindowSpan {
  int first, end;
};

__device__ __forceinline__ WindowSpan completed_windows(const PagedAppendParams& p,
                                                        const PagedSpan& s) {
  const PagedWriteParams& w = p.write;
  if (p.cmp.k.data == nullptr || s.num_new() <= 0) return {0, 0};
  return {count_windows(s.before, w.kernel_size, w.kernel_stride),
          count_windows(s.total, w.kernel_size, w.kernel_stride)};
}

// Row of token `token` as compression reads it; null reads as zeros.
template <class Element>
__device__ __forceinline__ const Element* window_row(const PagedWriteParams& p, const PagedSpan& s,
                                                     int seq, int head, int token, bool is_value) {
  if (token >= s.before) {
    return row_pointer<Element>(is_value ? p.v : p.k, s.first_row + token - s.before, head);
  }
  const PagePlace place = find_page(p.cache.table, seq, token);
  if (!is_value) return stored_raw_key<Element>(p, place, head);
  return place.page < 0 ? nullptr : page_row<Element>(p.cache.v, place.page, place.row, head);
}

// The weights of a window of one head in fp32.
template <class Element>
__device__ __forceinline__ void load_window_weights(CompressKind kind, const void* weight, int size,
                                                    int head, float* out) {
  const Element* w = static_cast<const Element*>(weight) + head * size;
  float largest = -INFINITY, sum = 0.f;
  if (kind == CompressKind::kSoftmax) {
    for (int t = 0; t < size; ++t) largest = fmaxf(largest, static_cast<float>(w[t]));
    for (int t = 0; t < size; ++t) sum += expf(static_cast<float>(w[t]) - largest);
  }
  for (int t = threadIdx.x; t < size; t += blockDim.x) {
    if (kind == CompressKind::kSoftmax) {
      out[t] = expf(static_cast<float>(w[t]) - largest) / sum;
    } else {
      out[t] = kind == CompressKind::kWeighted ? static_cast<float>(w[t])
                                               : 1.f / static_cast<float>(size);
    }
  }
}

// Where the tokens that completed windows read lie in shared memory: rows of K, then rows of V.
template <class Element>
struct StagedTokens {
  Element* k;
  Element* v;
  int first, count;  // tokens
};

// Starts the copies of all of them at once: one after the other, each would wait for the one before. The
// caller waits and synchronises.
template <class Element>
__device__ __forceinline__ void stage_tokens(const PagedAppendParams& p, const PagedSpan& s,
                                             int seq, int head,
                                             const StagedTokens<Element>& staged) {
  const PagedWriteParams& w = p.write;
  const auto copy_rows = [&](Element* to, int dim, bool is_value) {
    const int vectors = dim / kVector;
    for (int i = threadIdx.x; i < staged.count * vectors; i += blockDim.x) {
      const int t = i / vectors;
      const Element* row = window_row<Element>(w, s, seq, head, staged.first + t, is_value);
      const Element* from = row == nullptr ? static_cast<const Element*>(w.k.data) : row;
      cp_async_16(smem_address(to + i * kVector), from + (i - t * vectors) * kVector,
                  row != nullptr);
    }
  };
  copy_rows(staged.k, static_cast<int>(w.shape.head_dim), false);
  copy_rows(staged.v, static_cast<int>(w.shape.head_dim_v), true);
  cp_async_commit();
}

// Eight columns of one pooled window whose first token is row `tokens` of shared memory.
template <class Element>
__device__ __forceinline__ Vector8<Element> pool_window(const PagedAppendParams& p, int head,
                                                        const Element* tokens, int dim,
                                                        bool is_value, const float* weights,
                                                        int column) {
  const int size = static_cast<int>(p.write.kernel_size);
  const bool has_bias = !is_value && p.pos_emb != nullptr;
  const Element* pos_emb =
      static_cast<const Element*>(p.pos_emb) + static_cast<int64_t>(head) * size * dim + column;
  Vector8<Element> y, bias;
  if (has_bias) {
#pragma unroll 8
    for (int t = 0; t < size; ++t) {
      bias.add_scaled(weights[t], Vector8<Element>::load(pos_emb + static_cast<int64_t>(t) * dim));
    }
  }
#pragma unroll 8
  for (int t = 0; t < size; ++t) {
    y.add_scaled(weights[t], Vector8<Element>::load(tokens + t * dim + column));
  }
  if (has_bias) y.add_scaled(1.f, bias);
  return y;
}

// Place of a compressed token; null where it has none.
template <class Element>
__device__ __forceinline__ Element* compressed_row(const PagedAppendParams& p, int seq, int head,
                                                   int window, bool is_value) {
  const PagePlace place = find_page(p.cmp.table, seq, window);
  if (place.page < 0) return nullptr;
  return page_row<Element>(is_value ? p.cmp.v : p.cmp.k, place.page, place.row, head);
}

}  // namespace device

// Dynamic shared memory: fp32 weights [2, l] of K and V, then the tokens of the windows.
template <class Element>
__global__ void __launch_bounds__(kAppendThreads)
    paged_append_kernel(const __grid_constant__ PagedAppendParams p) {
  using namespace device;
  extern __shared__ __align__(16) float weights[];
  constexpr int kWarps = kAppendThreads / kWarpSize, kMaxDim = 256;
  __shared__ __align__(16) Element rounded[kWarps][kMaxDim];
  const PagedWriteParams& w = p.write;
  const int heads = static_cast<int>(w.shape.num_heads_kv), seq = blockIdx.x / heads;
  const int head = blockIdx.x - seq * heads;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int size = static_cast<int>(w.kernel_size), stride = static_cast<int>(w.kernel_stride);
  const PagedSpan s = find_span(w.packing, seq);
  const WindowSpan windows = completed_windows(p, s);
  if (s.num_new() > w.packing.max_q) return;  // more than the call was made for: not stored
  const bool has_windows = windows.first < windows.end;
  const int dim_k = static_cast<int>(w.shape.head_dim);
  StagedTokens<Element> staged{};
  if (has_windows) {
    staged.first = windows.first * stride;
    staged.count = (windows.end - 1) * stride + size - staged.first;
    staged.k = reinterpret_cast<Element*>(weights + round_up(2 * size, 4));
    staged.v = staged.k + staged.count * dim_k;
    stage_tokens(p, s, seq, head, staged);
    load_window_weights<Element>(p.kind, p.weight_k, size, head, weights);
    load_window_weights<Element>(p.kind, p.weight_v, size, head, weights + size);
    cp_async_wait<0>();
    __syncthreads();  // from here on raw keys may be overwritten
  }
  for (int i = warp; i < s.num_new(); i += kWarps) {
    store_token<Element>(w, seq, s.before + i, s.total, s.first_row + i, head, lane);
  }
  for (int task = kWarps - 1 - warp; task < 2 * (windows.end - windows.first); task += kWarps) {
    const int window = windows.first + task / 2, column = lane * kVector;
    const bool is_value = task % 2 == 1;
    const int dim = is_value ? static_cast<int>(w.shape.head_dim_v) : dim_k;
    const Element* tokens =
        (is_value ? staged.v : staged.k) + (window - windows.first) * stride * dim;
    Element* to = compressed_row<Element>(p, seq, head, window, is_value);
    if (column < dim) {
      const auto y = pool_window<Element>(p, head, tokens, dim, is_value,
                                          weights + (is_value ? size : 0), column);
      y.store(is_value && to != nullptr ? to + column : rounded[warp] + column);
    }
    __syncwarp();
    if (!is_value) copy_rotated(rounded[warp], to, dim, w.rope, window * stride, lane);
    __syncwarp();
  }
}

// Dynamic shared memory: the window in fp32, [l * D].
template <class Element>
__global__ void __launch_bounds__(kLinearThreads, 2)
    paged_append_linear_kernel(const __grid_constant__ PagedAppendParams p, int parts) {
  using namespace device;
  extern __shared__ __align__(16) float window_tokens[];
  __shared__ float4 sums[kLinearThreads];
  __shared__ __align__(16) Element rounded[2 * kLinearColumns];
  const PagedWriteParams& w = p.write;
  const int heads = static_cast<int>(w.shape.num_heads_kv);
  int rest = blockIdx.x / parts;
  const int part = blockIdx.x - rest * parts;
  const bool is_value = rest % 2 == 1;
  rest /= 2;
  const int seq = rest / heads, head = rest - seq * heads;
  const int dim = static_cast<int>(is_value ? w.shape.head_dim_v : w.shape.head_dim);
  const int half = dim / 2, size = static_cast<int>(w.kernel_size);
  // Columns of this thread: four in one of the halves of a row.
  const int quad = threadIdx.x % (2 * kLinearColumns / 4),
            slice = threadIdx.x / (2 * kLinearColumns / 4);
  const int in_half = part * kLinearColumns + quad % (kLinearColumns / 4) * 4;
  const bool is_column = in_half < half;
  const int column = in_half + (quad < kLinearColumns / 4 ? 0 : half);
  const PagedSpan s = find_span(w.packing, seq);
  const WindowSpan windows = completed_windows(p, s);
  if (part * kLinearColumns >= half || s.num_new() > w.packing.max_q) return;
  const Element* weight = static_cast<const Element*>(is_value ? p.weight_v : p.weight_k) +
                          static_cast<int64_t>(head) * size * dim * dim + column;
  for (int window = windows.first; window < windows.end; ++window) {
    const int first = static_cast<int>(window * w.kernel_stride);
    for (int i = threadIdx.x; i < size * dim; i += kLinearThreads) {
      const int t = i / dim, a = i - t * dim;
      const Element* row = window_row<Element>(w, s, seq, head, first + t, is_value);
      float x = row == nullptr ? 0.f : static_cast<float>(row[a]);
      if (!is_value && p.pos_emb != nullptr) {
        x += static_cast<float>(
            static_cast<const Element*>(p.pos_emb)[static_cast<int64_t>(head) * size * dim + i]);
      }
      window_tokens[i] = x;
    }
    __syncthreads();
    float4 sum{};
    if (is_column) {
#pragma unroll 8
      for (int i = slice; i < size * dim; i += kLinearSlices) {
        const uint2 raw = *reinterpret_cast<const uint2*>(weight + static_cast<int64_t>(i) * dim);
        const float2 low = unpack_pair<Element>(raw.x), high = unpack_pair<Element>(raw.y);
        const float x = window_tokens[i];
        sum.x = fmaf(x, low.x, sum.x);
        sum.y = fmaf(x, low.y, sum.y);
        sum.z = fmaf(x, high.x, sum.z);
        sum.w = fmaf(x, high.y, sum.w);
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (slice == 0) {
      for (int i = 1; i < kLinearSlices; ++i) {
        const float4 x = sums[i * (2 * kLinearColumns / 4) + quad];
        sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
      }
      *reinterpret_cast<uint2*>(rounded + quad * 4) = {pack_pair<Element>(sum.x, sum.y),
                                                       pack_pair<Element>(sum.z, sum.w)};
    }
    __syncthreads();
    Element* to = compressed_row<Element>(p, seq, head, window, is_value);
    const int i = threadIdx.x;  // a pair of columns, half a row apart
    const int at = part * kLinearColumns + i;
    if (i < kLinearColumns && at < half && to != nullptr) {
      float x0 = static_cast<float>(rounded[i]),
            x1 = static_cast<float>(rounded[kLinearColumns + i]);
      if (!is_value && w.rope.cos != nullptr) {
        const int64_t angle = static_cast<int64_t>(first) * half + at;
        const float c = static_cast<float>(static_cast<const Element*>(w.rope.cos)[angle]);
        const float sine = static_cast<float>(static_cast<const Element*>(w.rope.sin)[angle]);
        const float y0 = x0 * c - x1 * sine;
        x1 = x1 * c + x0 * sine;
        x0 = y0;
      }
      to[at] = Element(x0);
      to[half + at] = Element(x1);
    }
    __syncthreads();
  }
}

}  // namespace fsattn
