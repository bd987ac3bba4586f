// The launch of a forward row: mma.sync on sm_80 and newer, wgmma on sm_90a.
#pragma once
#include <algorithm>

#include "cuda/dense_attn/dense_attn_fwd_sm80.cuh"
#include "cuda/dense_attn/dense_attn_fwd_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
auto dense_attn_fwd_traits() {
  if constexpr (kConfig.arch == Arch::kSm90a) {
    return DenseFwdSm90Traits<kConfig>{};
  } else {
    return DenseFwdTraits<kConfig>{};
  }
}

template <DenseAttnConfig kConfig>
void launch_dense_attn_fwd(const AttnFwdTensors& tensors, const device::KeySet& keys,
                           Stream stream) {
  using Traits = decltype(dense_attn_fwd_traits<kConfig>());
  const Packing& packing = tensors.packing;
  if (packing.total_q == 0) return;
  const int64_t tiles = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                        tensors.shape.num_heads_q;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if constexpr (kConfig.arch == Arch::kSm90a) {
    int device = 0, num_sms = 0;
    FSATTN_CUDA_CHECK(cudaGetDevice(&device));
    FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    auto* kernel = keys.pages.defined() ? dense_attn_fwd_sm90_kernel<Traits, true>
                                        : dense_attn_fwd_sm90_kernel<Traits, false>;
    allow_shared_memory(kernel, Traits::kSmemBytes);
    const auto ctas = static_cast<unsigned>(std::min<int64_t>(tiles, num_sms));
    const AttnShape& shape = tensors.shape;
    const auto make_map = [&](const Rows& rows, int64_t tokens, int64_t heads, int64_t dim,
                              int box_tokens) {
      if (tokens == 0) return CUtensorMap{};  // unused
      return device::make_rows_map(rows, shape.dtype, tokens, heads, dim, box_tokens);
    };
    const auto query_map = [&](const Rows& rows, int64_t dim, int box_tokens) {
      return make_map(rows, packing.total_q, shape.num_heads_q, dim, box_tokens);
    };
    const auto key_map = [&](const Rows& rows, int64_t dim) {
      if (const PagedKeys& pages = keys.pages; pages.defined()) {
        const int64_t heads = pages.head_rows > 0 ? 1 : shape.num_heads_kv;
        return make_map(rows, pages.total_rows, heads, dim, kDensePageKeys);
      }
      return make_map(rows, keys.total_keys, shape.num_heads_kv, dim, Traits::kTileKv);
    };
    const FwdSchedule schedule{static_cast<int>(tiles),
                               static_cast<float>(shape.softmax_scale) * device::kLog2E};
    kernel<<<ctas, Traits::kThreads, Traits::kSmemBytes, cuda_stream>>>(
        tensors, keys, query_map(tensors.q, shape.head_dim, device::kPanelRows),
        key_map(tensors.k, shape.head_dim), key_map(tensors.v, shape.head_dim_v),
        query_map(tensors.o, shape.head_dim_v, kWarpQueries), schedule);
  } else {
    FSATTN_ASSERT(!keys.pages.defined());
    auto* kernel = dense_attn_fwd_kernel<Traits>;
    allow_shared_memory(kernel, Traits::kSmemBytes);
    kernel<<<static_cast<unsigned>(tiles), Traits::kThreads, Traits::kSmemBytes, cuda_stream>>>(
        tensors, keys);
  }
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
