// Tensor cores of sm_90a: wgmma with A in registers and B in shared memory (128-byte swizzle), and the
// instructions around it.
#pragma once
#include <cstdint>

#include "cuda/device/element.cuh"
#include "cuda/device/wgmma_operands_sm90.cuh"

namespace fsattn::device {

// Descriptor of a B operand whose 8-row groups (1024 bytes, 128-byte rows) lie 1024 bytes apart.
// `panel_bytes`: distance of the next 64 columns of an MN-major operand; K-major ones ignore it.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupStride | (uint64_t{panel_bytes >> 4} << 16) |
         ((address & 0x3ffff) >> 4);
}

// The descriptor `bytes` behind that of an operand, for constant `bytes`: one addition, where a new
// descriptor takes four instructions that depend on each other.
__device__ __forceinline__ uint64_t wgmma_descriptor_behind(uint64_t operand, int bytes) {
  return (operand >> 32 << 32) |
         (static_cast<uint32_t>(operand) + static_cast<uint32_t>(bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                            uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// Each 8 x 8 matrix is stored transposed.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1,
                                                  uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// clang-format off
#define FSATTN_WGMMA_N64(TYPE, MN_MAJOR) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
      FSATTN_WGMMA_D32 \
      "}, {%32,%33,%34,%35}, %36, p, 1, 1, " MN_MAJOR ";\n}" \
      : \
        FSATTN_WGMMA_D32_OUTPUTS \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define FSATTN_WGMMA_N128_MN_MAJOR(TYPE) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
      FSATTN_WGMMA_D64 \
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}" \
      : \
        FSATTN_WGMMA_D64_OUTPUTS \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
// clang-format on

// D[64 x 64] (+)= A B; B is [64 columns][k] with k contiguous.
template <class Element>
__device__ __forceinline__ void wgmma_m64n64k16_k_major(float (&d)[32], const uint32_t (&a)[4],
                                                        uint64_t b, int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_N64("bf16", "0");
  } else {
    FSATTN_WGMMA_N64("f16", "0");
  }
}

// D[64 x 64] (+)= A B; B is [k][64 columns] with the columns contiguous.
template <class Element>
__device__ __forceinline__ void wgmma_m64n64k16_mn_major(float (&d)[32], const uint32_t (&a)[4],
                                                         uint64_t b, int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_N64("bf16", "1");
  } else {
    FSATTN_WGMMA_N64("f16", "1");
  }
}

// D[64 x 128] (+)= A B; B is [k][128 columns] with the columns contiguous.
template <class Element>
__device__ __forceinline__ void wgmma_m64n128k16_mn_major(float (&d)[64], const uint32_t (&a)[4],
                                                          uint64_t b, int accumulate) {
  if constexpr (kIsBf16<Element>) {
    FSATTN_WGMMA_N128_MN_MAJOR("bf16");
  } else {
    FSATTN_WGMMA_N128_MN_MAJOR("f16");
  }
}

#undef FSATTN_WGMMA_N64
#undef FSATTN_WGMMA_N128_MN_MAJOR

}  // namespace fsattn::device
