// Programmatic dependent launch (sm_90): a kernel whose CTAs start before the kernel in front of it in
// the stream has finished. Older GPUs run one kernel after the other, and these do nothing.
#pragma once

namespace fsattn::device {

// Waits until the kernel in front has finished and its writes are visible. Read them with ld.global
// that is not .nc: the CTA may be older than they are.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every CTA has called this or ended, CTAs of the next kernel may start.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fsattn::device
