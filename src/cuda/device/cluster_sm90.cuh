// Clusters: CTAs that run together and write each other's shared memory (sm_90). Elsewhere a CTA is
// a cluster of its own.
#pragma once
#include <cstdint>

namespace fsattn::device {

__device__ __forceinline__ int cluster_rank() {
  uint32_t x = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
#endif
  return static_cast<int>(x);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t x = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
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

}  // namespace fsattn::device
