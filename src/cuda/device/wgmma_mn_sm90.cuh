// wgmma whose operands in shared memory are both transposed.
#pragma once
#include <cstdint>

#include "cuda/device/element.cuh"
#include "cuda/device/wgmma_operands_sm90.cuh"

namespace fsattn::device {

// clang-format off
#define FSATTN_WGMMA_MN_N64(TYPE) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
      FSATTN_WGMMA_D32 \
      "}, %32, %33, p, 1, 1, 1, 1;\n}" \
      : \
        FSATTN_WGMMA_D32_OUTPUTS \
      : "l"(a), "l"(b), "r"(accumulate))
// clang-format on

// D[64 x 64] (+)= A B; A is [k][64 rows] and B [k][64 columns], rows and columns contiguous.
template <class Element>
__device__ __forceinline__ void wgmma_mn_m64n64k16(float (&d)[32], uint64_t a, uint64_t b,
                                                   int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_MN_N64("bf16");
  } else {
    FSATTN_WGMMA_MN_N64("f16");
  }
}

#undef FSATTN_WGMMA_MN_N64

}  // namespace fsattn::device
