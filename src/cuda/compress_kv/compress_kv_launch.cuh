// The launchers of compress_kv: which kernels a kind needs, in which order.
#pragma once
#include "base/cuda_check.h"
#include "cuda/compress_kv/compress_kv_linear.cuh"
#include "cuda/compress_kv/compress_kv_pool.cuh"

namespace fsattn {
namespace device {

inline unsigned compress_ctas(int64_t threads) {
  return static_cast<unsigned>(ceil_div<int64_t>(threads, kCompressThreads));
}

inline unsigned linear_tiles(int64_t count, int tile) {
  return static_cast<unsigned>(ceil_div<int64_t>(count, tile));
}

// The scratch memory as named fp32 arrays.
struct CompressKvArrays {
  float *weight, *bias, *bias_partial, *dy_sum, *dy_partial, *dw_partial;

  CompressKvArrays(const CompressKvShape& shape, const Scratch& scratch) {
    const CompressKvScratch s =
        compress_kv_scratch(shape.num_heads, shape.head_dim, shape.kernel_size, shape.rows_cmp);
    float* base = static_cast<float*>(scratch.data);
    weight = base + s.weight;
    bias = base + s.bias;
    bias_partial = base + s.bias_partial;
    dy_sum = base + s.dy_sum;
    dy_partial = base + s.dy_partial;
    dw_partial = base + s.dw_partial;
  }
};

inline void launch_cu_seqlens_cmp(const CompressKvFwdParams& p, cudaStream_t stream) {
  cu_seqlens_cmp_kernel<<<1, kCompressThreads, 0, stream>>>(p.shape, p.cu_seqlens,
                                                            p.cu_seqlens_cmp);
}

template <class Element>
void linear_fwd(const CompressKvFwdParams& p, const CompressKvArrays& s, cudaStream_t stream) {
  const CompressKvShape& shape = p.shape;
  launch_cu_seqlens_cmp(p, stream);
  const auto heads = static_cast<unsigned>(shape.num_heads);
  const float* bias = nullptr;
  if (p.pos_emb != nullptr) {
    const auto tokens = static_cast<unsigned>(shape.kernel_size);
    const int64_t count = shape.num_heads * shape.head_dim;
    linear_bias_kernel<Element><<<dim3(tokens, heads), kCompressThreads, 0, stream>>>(
        shape, p.weight, p.pos_emb, s.bias_partial);
    add_chunks_kernel<<<compress_ctas(count), kCompressThreads, 0, stream>>>(
        s.bias_partial, s.bias, count, shape.kernel_size);
    bias = s.bias;
  }
  allow_shared_memory(&linear_fwd_kernel<Element>, LinearTile::kSmemBytes);
  const dim3 grid(linear_tiles(shape.rows_cmp, LinearTile::kM), heads,
                  linear_tiles(shape.head_dim, LinearTile::kN));
  linear_fwd_kernel<Element>
      <<<grid, LinearTile::kThreads, LinearTile::kSmemBytes, stream>>>(p, bias);
}

// Also writes cu_seqlens_cmp.
template <class Element>
void pool_fwd(const CompressKvFwdParams& p, const CompressKvArrays& s, cudaStream_t stream) {
  const CompressKvShape& shape = p.shape;
  const auto heads = static_cast<unsigned>(shape.num_heads);
  const bool is_plain_mean = shape.kind == CompressKind::kMean && p.pos_emb == nullptr;
  if (!is_plain_mean) {
    window_weights_kernel<Element><<<heads, kWarpSize, 0, stream>>>(shape, p.weight, s.weight);
  }
  if (p.pos_emb != nullptr) {
    pool_bias_kernel<Element>
        <<<heads, kCompressThreads, 0, stream>>>(shape, s.weight, p.pos_emb, s.bias);
  }
  const bool writes_lengths = shape.batch <= kFewSequences;
  if (!writes_lengths) launch_cu_seqlens_cmp(p, stream);
  const int64_t vectors = shape.rows_cmp * shape.num_heads * (shape.head_dim / kVector);
  const auto kernel =
      writes_lengths ? pool_fwd_kernel<Element, true> : pool_fwd_kernel<Element, false>;
  kernel<<<compress_ctas(vectors), kCompressThreads, 0, stream>>>(
      p, PoolDivisors(shape), is_plain_mean ? nullptr : s.weight,
      p.pos_emb == nullptr ? nullptr : s.bias);
}

template <class Element>
void sum_dy(const CompressKvBwdParams& p, const CompressKvArrays& s, cudaStream_t stream) {
  const CompressKvShape& shape = p.shape;
  const int64_t chunks = compress_kv_num_chunks(shape.rows_cmp);
  const int64_t count = shape.num_heads * shape.head_dim;
  const dim3 grid(static_cast<unsigned>(shape.num_heads), static_cast<unsigned>(chunks));
  dy_sum_kernel<Element>
      <<<grid, kCompressThreads, 0, stream>>>(p, s.dy_partial, ceil_div(shape.rows_cmp, chunks));
  add_chunks_kernel<<<compress_ctas(count), kCompressThreads, 0, stream>>>(s.dy_partial, s.dy_sum,
                                                                           count, chunks);
}

template <class Element>
void linear_bwd(const CompressKvBwdParams& p, const CompressKvArrays& s, cudaStream_t stream) {
  const CompressKvShape& shape = p.shape;
  const auto heads = static_cast<unsigned>(shape.num_heads);
  const unsigned n_tiles = linear_tiles(shape.head_dim, LinearTile::kN);
  const int64_t slots = shape.total / shape.kernel_stride + shape.batch + 1;
  allow_shared_memory(&linear_dx_kernel<Element>, LinearTile::kSmemBytes);
  allow_shared_memory(&linear_dw_kernel<Element>, LinearTile::kSmemBytes);
  if (shape.total > 0) {
    const dim3 grid(linear_tiles(slots, LinearTile::kM), heads,
                    n_tiles * static_cast<unsigned>(shape.kernel_stride));
    linear_dx_kernel<Element><<<grid, LinearTile::kThreads, LinearTile::kSmemBytes, stream>>>(p);
  }
  const dim3 grid(static_cast<unsigned>(shape.kernel_size), heads,
                  n_tiles * linear_tiles(shape.head_dim, LinearTile::kM));
  linear_dw_kernel<Element>
      <<<grid, LinearTile::kThreads, LinearTile::kSmemBytes, stream>>>(p, s.dy_sum);
  if (p.dpos_emb != nullptr) {
    const int64_t rows = shape.num_heads * shape.kernel_size * shape.head_dim;
    linear_dpos_kernel<Element><<<compress_ctas(rows * kWarpSize), kCompressThreads, 0, stream>>>(
        shape, p.weight, s.dy_sum, p.dpos_emb);
  }
}

template <class Element>
void pool_bwd(const CompressKvBwdParams& p, const CompressKvArrays& s, cudaStream_t stream) {
  const CompressKvShape& shape = p.shape;
  const auto heads = static_cast<unsigned>(shape.num_heads);
  const bool is_plain_mean = shape.kind == CompressKind::kMean && p.pos_emb == nullptr;
  if (!is_plain_mean) {
    window_weights_kernel<Element><<<heads, kWarpSize, 0, stream>>>(shape, p.weight, s.weight);
  }
  const int64_t strides = num_tile_slots(shape.total, shape.batch, shape.kernel_stride);
  const int64_t vectors = strides * shape.num_heads * (shape.head_dim / kVector);
  if (shape.total > 0) {
    pool_dx_kernel<Element><<<compress_ctas(vectors), kCompressThreads, 0, stream>>>(
        p, PoolDivisors(shape), is_plain_mean ? nullptr : s.weight);
  }
  if (p.dweight != nullptr) {
    const int64_t chunks = compress_kv_num_chunks(shape.rows_cmp);
    const dim3 grid(static_cast<unsigned>(shape.kernel_size), heads, static_cast<unsigned>(chunks));
    pool_dw_kernel<Element>
        <<<grid, kCompressThreads, 0, stream>>>(p, s.dw_partial, ceil_div(shape.rows_cmp, chunks));
    pool_dweight_kernel<Element>
        <<<heads, kWarpSize, 0, stream>>>(shape, s.weight, s.dw_partial, chunks, p.dweight);
  }
  if (p.dpos_emb != nullptr) {
    const int64_t count = shape.num_heads * shape.kernel_size * shape.head_dim;
    pool_dpos_kernel<Element><<<compress_ctas(count), kCompressThreads, 0, stream>>>(
        shape, s.weight, s.dy_sum, p.dpos_emb);
  }
}

}  // namespace device

template <CompressKvConfig kConfig>
void launch_compress_kv_fwd(const CompressKvFwdParams& params, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const device::CompressKvArrays arrays(params.shape, params.scratch);
  if (params.shape.rows_cmp > 0) {
    const bool is_linear = params.shape.kind == CompressKind::kLinear;
    (is_linear ? device::linear_fwd<Element> : device::pool_fwd<Element>)(params, arrays,
                                                                          cuda_stream);
  } else {
    device::launch_cu_seqlens_cmp(params, cuda_stream);
  }
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <CompressKvConfig kConfig>
void launch_compress_kv_bwd(const CompressKvBwdParams& params, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const device::CompressKvArrays arrays(params.shape, params.scratch);
  if (params.pos_emb != nullptr) device::sum_dy<Element>(params, arrays, cuda_stream);
  const bool is_linear = params.shape.kind == CompressKind::kLinear;
  (is_linear ? device::linear_bwd<Element> : device::pool_bwd<Element>)(params, arrays,
                                                                        cuda_stream);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
