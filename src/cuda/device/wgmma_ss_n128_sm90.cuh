// wgmma of 64 rows and 128 columns with both operands in shared memory.
#pragma once
#include <cstdint>

#include "cuda/device/element.cuh"
#include "cuda/device/wgmma_operands_sm90.cuh"

namespace fsattn::device {

// The descriptor of what lies `bytes` behind; the sum must not leave shared memory.
__device__ __forceinline__ uint64_t wgmma_descriptor_at(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & ~uint64_t{0xffffffff}) | low;
}

// clang-format off
#define FSATTN_WGMMA_SS_N128(TYPE) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
      FSATTN_WGMMA_D64 \
      "}, %64, %65, p, 1, 1, 0, 0;\n}" \
      : \
        FSATTN_WGMMA_D64_OUTPUTS \
      : "l"(a), "l"(b), "r"(accumulate))
// clang-format on

// D[64 x 128] (+)= A B; A is [64 rows][k] and B [128 columns][k], k contiguous in both.
template <class Element>
__device__ __forceinline__ void wgmma_ss_m64n128k16(float (&d)[64], uint64_t a, uint64_t b,
                                                    int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_SS_N128("bf16");
  } else {
    FSATTN_WGMMA_SS_N128("f16");
  }
}

#undef FSATTN_WGMMA_SS_N128

}  // namespace fsattn::device
