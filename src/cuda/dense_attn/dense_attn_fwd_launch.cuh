// The launch of a forward row: mma.sync on sm_80 and newer, wgmma on sm_90a.
#pragma once
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
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                       tensors.shape.num_heads_q;
  void (*kernel)(AttnFwdTensors, device::KeySet);
  if constexpr (kConfig.arch == Arch::kSm90a) {
    kernel = dense_attn_fwd_sm90_kernel<Traits>;
  } else {
    kernel = dense_attn_fwd_kernel<Traits>;
  }
  allow_shared_memory(kernel, Traits::kSmemBytes);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, Traits::kSmemBytes,
           static_cast<cudaStream_t>(stream)>>>(tensors, keys);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
