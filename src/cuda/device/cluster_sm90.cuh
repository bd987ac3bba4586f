// Clusters: CTAs that run together and write each other's shared memory (sm_90). Elsewhere a CTA is
// a cluster of its own.
#pragma once
#include <cstdint>

#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/math.cuh"

namespace fsattn::device {

// Volatile: a special register is read anew rather than kept in another one.
__device__ __forceinline__ int cluster_rank() {
  uint32_t x = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
#endif
  return static_cast<int>(x);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t x = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
#endif
  return static_cast<int>(x);
}

// Every thread of the cluster arrives, then waits; what it wrote before is visible afterwards.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to the place in the shared memory of CTA `rank` that has address `at` in one's own.
__device__ __forceinline__ void store_cluster(uint32_t at, int rank, uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.u32 [a], %2; }" ::"r"(
          at),
      "r"(rank), "r"(x)
      : "memory");
#else
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
#endif
}

// The warp's writes are there for whoever of the cluster waits.
__device__ __forceinline__ void arrive_cluster(const uint64_t& flag, int ctas) {
  __syncwarp();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const int lane = threadIdx.x % kWarpSize;
  if (lane < ctas) {
    asm volatile(
        "{ .reg .b32 a; fence.acq_rel.cluster; mapa.shared::cluster.u32 a, %0, %1; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" ::"r"(smem_address(&flag)),
        "r"(lane)
        : "memory");
  }
#endif
}

__device__ __forceinline__ void wait_cluster(const uint64_t& flag) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .pred done;\n"
      "WAIT:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      " @done bra.uni DONE;\n bra.uni WAIT;\nDONE:\n}" ::"r"(smem_address(&flag))
      : "memory");
#endif
}

// Writes to the shared memory of CTA `rank`; the bytes arrive on its flag, no one waits for them here.
__device__ __forceinline__ void send_cluster(uint32_t at, int rank, uint32_t x,
                                             const uint64_t& flag) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 a, f; mapa.shared::cluster.u32 a, %0, %1; mapa.shared::cluster.u32 f, %2, %1; "
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [a], %3, [f]; }" ::"r"(at),
      "r"(rank), "r"(smem_address(&flag)), "r"(x)
      : "memory");
#endif
}

__device__ __forceinline__ void send_cluster(uint32_t at, int rank, const float4& x,
                                             const uint64_t& flag) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 a, f; mapa.shared::cluster.u32 a, %0, %1; mapa.shared::cluster.u32 f, %2, %1; "
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3, %4, %5, %6}, "
      "[f]; }" ::"r"(at),
      "r"(rank), "r"(smem_address(&flag)), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
#endif
}

}  // namespace fsattn::device
