// Inputs, buffers and the float64 reference of the selected-attention kernel tests. The reference
// walks topk_idx row by row and shares no code with the kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fsattn/tensor.h"

namespace fsattn::test {

#define CUDA_OK(call)                                                                   \
  do {                                                                                  \
    if (const cudaError_t e = (call); e != cudaSuccess) {                               \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

// Device memory, filled with NaN bytes.
template <class T>
struct Buffer {
  explicit Buffer(int64_t n) : size(n) {
    CUDA_OK(cudaMalloc(&data, static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(T)));
    poison();
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t bytes() const { return static_cast<size_t>(size) * sizeof(T); }
  void poison() { CUDA_OK(cudaMemset(data, 0xff, bytes())); }
  void upload(const std::vector<T>& from) {
    CUDA_OK(cudaMemcpy(data, from.data(), bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    std::vector<T> to(static_cast<size_t>(size));
    CUDA_OK(cudaMemcpy(to.data(), data, bytes(), cudaMemcpyDeviceToHost));
    return to;
  }
  T* data = nullptr;
  int64_t size;
};

__host__ __device__ inline uint32_t hash32(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 16);
}

__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ inline void assign(__half& to, float x) { to = __float2half(x); }
__host__ __device__ inline double to_double(__nv_bfloat16 x) {
  return static_cast<double>(__bfloat162float(x));
}
__host__ __device__ inline double to_double(__half x) {
  return static_cast<double>(__half2float(x));
}

// [tokens, heads, dim] in a buffer with gaps between tokens and heads.
template <class Element>
struct Strided {
  Strided(int64_t tokens_, int64_t heads_, int64_t dim_, int64_t head_gap, int64_t token_gap)
      : tokens(tokens_),
        heads(heads_),
        dim(dim_),
        head_stride(dim_ + head_gap),
        token_stride(heads_ * (dim_ + head_gap) + token_gap),
        buffer(tokens_ * token_stride) {}
  int64_t tokens, heads, dim, head_stride, token_stride;
  Buffer<Element> buffer;
};

template <class Element>
__global__ void fill_normal(Element* x, int64_t tokens, int64_t heads, int64_t dim,
                            int64_t token_stride, int64_t head_stride, uint64_t seed, float scale) {
  const int64_t n = tokens * heads * dim;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float u = (hash32(seed * 0x100000001ull + 2 * i) + 1.f) * 2.3283064e-10f;
    const float v = hash32(seed * 0x100000001ull + 2 * i + 1) * 2.3283064e-10f;
    const float value = scale * sqrtf(-2.f * logf(u)) * cospif(2.f * v);
    const int64_t d = i % dim, h = i / dim % heads, t = i / dim / heads;
    assign(x[t * token_stride + h * head_stride + d], value);
  }
}

template <class Element>
void fill(Strided<Element>& x, uint64_t seed, float scale) {
  fill_normal<<<1024, 256>>>(x.buffer.data, x.tokens, x.heads, x.dim, x.token_stride, x.head_stride,
                             seed, scale);
  CUDA_OK(cudaGetLastError());
}

template <class Element>
__global__ void fill_value(Element* x, int64_t tokens, int64_t heads, int64_t dim,
                           int64_t token_stride, int64_t head_stride, float value) {
  const int64_t n = tokens * heads * dim;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    assign(x[i / dim / heads * token_stride + i / dim % heads * head_stride + i % dim], value);
  }
}

template <class Element>
void fill_constant(Strided<Element>& x, float value) {
  fill_value<<<1024, 256>>>(x.buffer.data, x.tokens, x.heads, x.dim, x.token_stride, x.head_stride,
                            value);
  CUDA_OK(cudaGetLastError());
}

static __global__ void fill_floats(float* x, int64_t n, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = hash32(seed * 0x100000001ull + i) * 4.6566129e-10f - 1.f;
  }
}

// A problem as the reference sees it.
template <class Element>
struct ReferenceArgs {
  const Element *q, *k, *v, *dout;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head;
  const int32_t *topk_idx, *cu_q, *cu_k, *q_offset;
  const float* dlse;  // [Hq, total_q] or null
  int batch, total_q, heads_q, heads_kv, dim, dim_v, block_size, topk, stride;
  double scale;
  double* scratch;       // [CTAs, 2 * topk * block_size]
  double *o, *lse;       // [samples, Hq, Dv], [samples, Hq]; every stride-th token
  double *dq, *dk, *dv;  // dq [total_q, Hq, D], dk, dv [total_k, Hkv, D or Dv]; null: forward only
};

inline constexpr int kReferenceThreads = 128;

__device__ inline double cta_sum(double x) {
  __shared__ double parts[kReferenceThreads];
  __syncthreads();
  parts[threadIdx.x] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kReferenceThreads; ++i) sum += parts[i];
  return sum;
}

__device__ inline double cta_max(double x) {
  __shared__ double parts[kReferenceThreads];
  __syncthreads();
  parts[threadIdx.x] = x;
  __syncthreads();
  double top = -INFINITY;
  for (int i = 0; i < kReferenceThreads; ++i) top = fmax(top, parts[i]);
  return top;
}

template <class Element>
__global__ void __launch_bounds__(kReferenceThreads) reference_kernel(ReferenceArgs<Element> a) {
  const int samples = (a.total_q + a.stride - 1) / a.stride, keys = a.topk * a.block_size;
  double* score = a.scratch + int64_t{blockIdx.x} * keys * 2;
  double* grad = score + keys;
  __shared__ int key_of[128];
  for (int row = blockIdx.x; row < samples * a.heads_q; row += gridDim.x) {
    const int t = row / a.heads_q * a.stride, h = row % a.heads_q, g = h / (a.heads_q / a.heads_kv);
    int seq = 0;
    while (seq < a.batch && a.cu_q[seq + 1] <= t) ++seq;
    const bool is_owned = seq < a.batch && a.cu_q[seq] <= t;
    const int k0 = is_owned ? a.cu_k[seq] : 0, len = is_owned ? a.cu_k[seq + 1] - k0 : 0;
    const int offset = !is_owned    ? 0
                       : a.q_offset ? a.q_offset[seq]
                                    : len - (a.cu_q[seq + 1] - a.cu_q[seq]);
    const int position = is_owned ? t - a.cu_q[seq] + offset : -1;
    __syncthreads();
    if (threadIdx.x < a.topk) {
      const int32_t* ids = a.topk_idx + (int64_t{g} * a.total_q + t) * a.topk;
      const int id = ids[threadIdx.x];
      bool is_first = true;
      for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) is_first &= ids[i] != id;
      const bool ok = is_first && id >= 0 && int64_t{id} * a.block_size < len;
      key_of[threadIdx.x] = ok ? id * a.block_size : INT_MAX;
    }
    __syncthreads();
    const Element* q = a.q + t * a.q_token + h * a.q_head;
    double top = -INFINITY;
    for (int i = threadIdx.x; i < keys; i += kReferenceThreads) {
      const int base = key_of[i / a.block_size],
                key = base == INT_MAX ? INT_MAX : base + i % a.block_size;
      double dot = -INFINITY;
      if (key < len && key <= position) {
        const Element* k = a.k + (int64_t{k0} + key) * a.k_token + g * a.k_head;
        dot = 0;
        for (int d = 0; d < a.dim; ++d) dot += to_double(q[d]) * to_double(k[d]);
        dot *= a.scale;
      }
      score[i] = dot;
      top = fmax(top, dot);
    }
    top = cta_max(top);
    double sum = 0;
    for (int i = threadIdx.x; i < keys; i += kReferenceThreads) {
      score[i] = score[i] == -INFINITY ? 0 : exp(score[i] - top);
      sum += score[i];
    }
    sum = cta_sum(sum);
    for (int i = threadIdx.x; i < keys; i += kReferenceThreads)
      score[i] = sum > 0 ? score[i] / sum : 0;
    __syncthreads();
    const int64_t at = int64_t{row};
    for (int d = threadIdx.x; d < a.dim_v; d += kReferenceThreads) {
      double acc = 0;
      for (int i = 0; i < keys; ++i) {
        if (score[i] == 0) continue;
        const int64_t key = int64_t{k0} + key_of[i / a.block_size] + i % a.block_size;
        acc += score[i] * to_double(a.v[key * a.v_token + g * a.v_head + d]);
      }
      a.o[at * a.dim_v + d] = acc;
    }
    if (threadIdx.x == 0) a.lse[at] = sum > 0 ? top + log(sum) : -INFINITY;
    if (a.dq == nullptr) continue;
    __syncthreads();
    const Element* dout = a.dout + t * a.do_token + h * a.do_head;
    double delta = 0;
    for (int d = threadIdx.x; d < a.dim_v; d += kReferenceThreads) {
      delta += to_double(dout[d]) * a.o[at * a.dim_v + d];
    }
    delta = cta_sum(delta) - (a.dlse && sum > 0 ? double{a.dlse[int64_t{h} * a.total_q + t]} : 0);
    for (int i = threadIdx.x; i < keys; i += kReferenceThreads) {
      grad[i] = 0;
      if (score[i] == 0) continue;
      const int64_t key = int64_t{k0} + key_of[i / a.block_size] + i % a.block_size;
      const Element* v = a.v + key * a.v_token + g * a.v_head;
      double dp = 0;
      for (int d = 0; d < a.dim_v; ++d) dp += to_double(dout[d]) * to_double(v[d]);
      grad[i] = score[i] * (dp - delta) * a.scale;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < max(a.dim, a.dim_v); d += kReferenceThreads) {
      double acc = 0;
      for (int i = 0; i < keys; ++i) {
        if (score[i] == 0) continue;
        const int64_t key = int64_t{k0} + key_of[i / a.block_size] + i % a.block_size;
        if (d < a.dim) {
          acc += grad[i] * to_double(a.k[key * a.k_token + g * a.k_head + d]);
          atomicAdd(a.dk + (key * a.heads_kv + g) * a.dim + d, grad[i] * to_double(q[d]));
        }
        if (d < a.dim_v) {
          atomicAdd(a.dv + (key * a.heads_kv + g) * a.dim_v + d, score[i] * to_double(dout[d]));
        }
      }
      if (d < a.dim) a.dq[at * a.dim + d] = acc;
    }
  }
}

// How far a result is from the reference, as a whole and for the worst row.
struct Difference {
  double relative = 0;   // RMS error over RMS reference
  double worst_row = 0;  // largest row error over (row norm + typical row norm)
  int bad = 0;           // values that are not finite although the reference is

  bool ok(double limit) const { return bad == 0 && relative < limit && worst_row < 8 * limit; }
};

// got(row, d) against want[row * dim + d].
template <class Get>
Difference compare_rows(int64_t rows, int64_t dim, const std::vector<double>& want,
                        const Get& get) {
  Difference result;
  double error = 0, norm = 0;
  for (const double w : want) norm += w * w;
  const double typical = rows > 0 ? std::sqrt(norm / static_cast<double>(rows)) : 0;
  for (int64_t r = 0; r < rows; ++r) {
    double row_error = 0, row_norm = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double w = want[static_cast<size_t>(r * dim + d)], g = get(r, d);
      if (!std::isfinite(g)) {
        ++result.bad;
        continue;
      }
      row_error += (g - w) * (g - w);
      row_norm += w * w;
    }
    error += row_error;
    const double scale = std::sqrt(row_norm) + typical;
    if (scale > 0) {
      result.worst_row = std::max(result.worst_row, std::sqrt(row_error) / scale);
    } else if (row_error > 0) {
      ++result.bad;
    }
  }
  result.relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  return result;
}

enum class Pattern {
  kRandom,   // block 0, own block, the one before, the rest uniform without repeats
  kHostile,  // ids from -3 to two past the last block, repeats, future blocks, a hot block, INT_MAX,
             // INT_MIN, empty rows
};

// One row of topk_idx for the query at `position` of a sequence with `blocks` blocks. Of the freely
// chosen blocks of the query before, the row above, a random row keeps about `persistence` percent.
inline void fill_row(int32_t* row, int topk, int64_t position, int block_size, int blocks,
                     Pattern pattern, int persistence, uint64_t& state) {
  const auto draw = [&](int n) {
    return static_cast<int>((uint64_t{hash32(state++)} * static_cast<uint64_t>(n)) >> 32);
  };
  const int own = static_cast<int>(std::clamp<int64_t>(position / block_size, 0, INT_MAX / 2));
  if (pattern == Pattern::kHostile) {
    const bool is_empty = draw(7) == 3;
    const int junk[4] = {-1, blocks + 7, INT_MAX, INT_MIN};
    for (int j = 0; j < topk; ++j) {
      const int kind = draw(4);
      const int hot = 3, anything = draw(blocks + 5) - 3;
      row[j] = is_empty ? junk[kind] : kind == 0 ? hot : kind == 1 ? own : anything;
    }
    return;
  }
  if (own + 1 <= topk) {
    for (int j = 0; j < topk; ++j) row[j] = j <= own ? j : -1;
    return;
  }
  const int must[3] = {0, own, own - 1};
  for (int j = 0; j < topk; ++j) {
    for (bool is_new = false; !is_new;) {
      const int before = j < 3 || persistence == 0 ? -1 : row[j - topk];
      const bool is_kept = before > 0 && before < own - 1 && draw(100) < persistence;
      row[j] = j < 3 ? must[j] : is_kept ? before : 1 + draw(own - 2);
      is_new = true;
      for (int i = 0; i < j; ++i) is_new &= row[i] != row[j];
    }
  }
}

}  // namespace fsattn::test
