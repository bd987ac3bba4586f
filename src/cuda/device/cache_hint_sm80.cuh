// Copies that copy_sm80.cuh lacks: with an L2 eviction priority and zero fill, and of 4 and
// 8 bytes.
#pragma once
#include <cstdint>

namespace fsattn::device {

// Copies `bytes` (0 or 16) and fills the rest of the 16 bytes with zeros.
__device__ __forceinline__ void cp_async_16_zero_fill(uint32_t dst, const void* src, int bytes,
                                                      uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(dst),
               "l"(src), "r"(bytes), "l"(policy)
               : "memory");
}

// Brings the line of an address to L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ void cp_async_4(uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}

__device__ __forceinline__ void cp_async_8(uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(dst), "l"(src) : "memory");
}

}  // namespace fsattn::device
