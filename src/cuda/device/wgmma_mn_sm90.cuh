// wgmma whose operands in shared memory are both transposed.
#pragma once
#include <cstdint>

#include "cuda/device/element.cuh"

namespace fsattn::device {

// clang-format off
#define FSATTN_WGMMA_MN_N64(TYPE) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
      "}, %32, %33, p, 1, 1, 1, 1;\n}" \
      : \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
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
