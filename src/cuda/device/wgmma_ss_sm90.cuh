// wgmma with both operands in shared memory, and what keeps several of them in flight.
#pragma once
#include <cstdint>

#include "cuda/device/wgmma_operands_sm90.cuh"
#include "cuda/device/wgmma_sm90.cuh"

namespace fsattn::device {

// Waits until all but the newest kPending groups of the warpgroup are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Accumulators are written behind the compiler's back: reads stay behind the wait before this line,
// and no value is kept elsewhere.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// clang-format off
#define FSATTN_WGMMA_SS_N64(TYPE, MN_MAJOR) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
      FSATTN_WGMMA_D32 \
      "}, %32, %33, p, 1, 1, 0, " MN_MAJOR ";\n}" \
      : \
        FSATTN_WGMMA_D32_OUTPUTS \
      : "l"(a), "l"(b), "r"(accumulate))
// clang-format on

// D[64 x 64] (+)= A B; A is [64 rows][k] and B [64 columns][k], k contiguous in both.
template <class Element>
__device__ __forceinline__ void wgmma_ss_m64n64k16(float (&d)[32], uint64_t a, uint64_t b,
                                                   int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_SS_N64("bf16", "0");
  } else {
    FSATTN_WGMMA_SS_N64("f16", "0");
  }
}

// D[64 x 64] (+)= A B; A is [64 rows][k] with k contiguous, B is [k][64 columns] with the columns
// contiguous.
template <class Element>
__device__ __forceinline__ void wgmma_ss_m64n64k16_mn_major(float (&d)[32], uint64_t a, uint64_t b,
                                                            int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_SS_N64("bf16", "1");
  } else {
    FSATTN_WGMMA_SS_N64("f16", "1");
  }
}

#undef FSATTN_WGMMA_SS_N64

}  // namespace fsattn::device
