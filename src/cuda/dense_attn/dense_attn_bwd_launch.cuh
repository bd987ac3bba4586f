// The backward of compressed attention and window attention: delta, then dQ, then dK and dV, or all
// three by one kernel on sm_90a, and the sum of the parts of dK and dV when the heads of a group were split.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_dkv_sm80.cuh"
#include "cuda/dense_attn/dense_attn_bwd_dq_sm80.cuh"
#include "cuda/dense_attn/dense_attn_bwd_sm90.cuh"
#include "cuda/dense_attn/dense_attn_delta.cuh"
#include "cuda/dense_attn/dense_attn_reduce.cuh"
#include "cuda/dense_attn/dense_attn_round_dq.cuh"

namespace fsattn {

template <class Element>
void launch_dense_attn_delta(const AttnBwdTensors& tensors, float* delta, cudaStream_t stream) {
  const int64_t ctas =
      ceil_div(tensors.packing.total_q, int64_t{kDeltaTokens}) * tensors.shape.num_heads_q;
  dense_attn_delta_kernel<Element>
      <<<static_cast<unsigned>(ctas), kDeltaThreads, 0, stream>>>(tensors, delta);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <DenseAttnConfig kConfig>
void launch_dense_attn_dq(const AttnBwdTensors& tensors, const device::KeySet& keys,
                          const float* delta, cudaStream_t stream) {
  using Traits = DenseDqTraits<kConfig>;
  const Packing& packing = tensors.packing;
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                       tensors.shape.num_heads_q;
  auto* kernel = dense_attn_bwd_dq_kernel<Traits>;
  allow_shared_memory(kernel, Traits::kSmemBytes);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, Traits::kSmemBytes, stream>>>(
      tensors, keys, delta);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <class Traits, class Kernel, class... More>
void launch_key_tiles(Kernel* kernel, const AttnBwdTensors& tensors, const device::KeySet& keys,
                      const DenseBwdBuffers& buffers, cudaStream_t stream, const More&... more) {
  const int64_t ctas =
      device::num_tile_slots(keys.total_keys, tensors.packing.batch, Traits::kTileKv) *
      buffers.splits * tensors.shape.num_heads_kv;
  allow_shared_memory(kernel, Traits::kSmemBytes);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, Traits::kSmemBytes, stream>>>(
      tensors, keys, buffers, more...);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

// A map of Q or dO for the tiles of one kernel; unused where there are no rows.
inline CUtensorMap make_query_map(const AttnBwdTensors& tensors, const Rows& rows, int64_t dim) {
  const int64_t tokens = tensors.packing.total_q;
  if (tokens == 0) return {};
  return device::make_rows_map(rows, tensors.shape.dtype, tokens, tensors.shape.num_heads_q, dim,
                               kTurnQueries);
}

inline int num_sms() {
  int device = 0, sms = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  return sms;
}

// All gradients by one kernel, whose CTAs take turns in adding to dQ.
template <DenseAttnConfig kConfig>
void launch_dense_attn_fused(const AttnBwdTensors& tensors, const device::KeySet& keys,
                             const DenseBwdBuffers& buffers, cudaStream_t stream) {
  using Traits = DenseBwdSm90Traits<kConfig>;
  const Packing& packing = tensors.packing;
  FSATTN_CUDA_CHECK(cudaMemsetAsync(buffers.turns, 0,
                                    static_cast<size_t>(buffers.num_turns) * sizeof(int), stream));
  if (keys.total_keys > 0) {
    const AttnShape& shape = tensors.shape;
    const int64_t tiles = keys.total_keys / std::max<int64_t>(1, packing.batch) / Traits::kTileKv;
    const KeyTileOrder order =
        key_tile_order(keys.band.reach == device::Band::kUnlimited, tiles,
                       static_cast<int>(shape.num_heads_kv) * buffers.splits, num_sms());
    launch_key_tiles<Traits>(dense_attn_bwd_sm90_kernel<Traits>, tensors, keys, buffers, stream,
                             order, make_query_map(tensors, tensors.q, shape.head_dim),
                             make_query_map(tensors, tensors.dout, shape.head_dim_v));
  }
  // Shared sums are selected attention's to round.
  if (packing.total_q == 0 || tensors.shared_dq.sums != nullptr) return;
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, kTurnQueries) *
                       tensors.shape.num_heads_q;
  dense_attn_round_dq_kernel<typename Traits::Element>
      <<<static_cast<unsigned>(ctas), kRoundThreads, 0, stream>>>(tensors, keys, buffers);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <DenseAttnConfig kConfig>
void launch_dense_attn_separate(const AttnBwdTensors& tensors, const device::KeySet& keys,
                                const DenseBwdBuffers& buffers, cudaStream_t stream) {
  if (tensors.packing.total_q > 0) {
    launch_dense_attn_dq<kConfig>(tensors, keys, buffers.delta, stream);
  }
  if (keys.total_keys > 0) {
    using Traits = DenseDkvTraits<kConfig>;
    launch_key_tiles<Traits>(dense_attn_bwd_dkv_kernel<Traits>, tensors, keys, buffers, stream);
  }
}

template <class Element>
void launch_dense_attn_reduce(const DenseReduceParams& params, cudaStream_t stream) {
  const int64_t threads = params.rows * params.heads * (params.cols / 8);
  const int64_t ctas = ceil_div(threads, int64_t{kReduceThreads});
  dense_attn_reduce_kernel<Element>
      <<<static_cast<unsigned>(ctas), kReduceThreads, 0, stream>>>(params);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <DenseAttnConfig kConfig>
void launch_dense_attn_bwd(const AttnBwdTensors& tensors, const device::KeySet& key_set,
                           const DenseBwdBuffers& buffers, Stream stream_handle) {
  using Element = device::ElementOf<kConfig.dtype>;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  device::KeySet keys = key_set;
  if (buffers.splits > 1) keys.total_keys = std::min(keys.total_keys, buffers.partial_rows);
  if (tensors.packing.total_q > 0 && tensors.row_stats == nullptr) {
    launch_dense_attn_delta<Element>(tensors, buffers.delta, stream);
  }
  if constexpr (kConfig.arch == Arch::kSm90a) {
    launch_dense_attn_fused<kConfig>(tensors, keys, buffers, stream);
  } else {
    launch_dense_attn_separate<kConfig>(tensors, keys, buffers, stream);
  }
  if (key_set.total_keys == 0 || buffers.splits == 1) return;
  DenseReduceParams reduce{};
  reduce.splits = buffers.splits;
  reduce.partial_rows = buffers.partial_rows;
  reduce.rows = key_set.total_keys;
  reduce.heads = static_cast<int>(tensors.shape.num_heads_kv);
  reduce.accumulate = tensors.accumulate_dkv;
  reduce.partial = buffers.partial_dk;
  reduce.out = tensors.dk;
  reduce.cols = static_cast<int>(tensors.shape.head_dim);
  launch_dense_attn_reduce<Element>(reduce, stream);
  reduce.partial = buffers.partial_dv;
  reduce.out = tensors.dv;
  reduce.cols = static_cast<int>(tensors.shape.head_dim_v);
  launch_dense_attn_reduce<Element>(reduce, stream);
}

}  // namespace fsattn
