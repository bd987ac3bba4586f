// Tensor cores of sm_90a: wgmma with A in registers and B in shared memory (128-byte swizzle), and the
// instructions around it.
#pragma once
#include <cstdint>

#include "cuda/device/element.cuh"

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

__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
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
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
      "}, {%32,%33,%34,%35}, %36, p, 1, 1, " MN_MAJOR ";\n}" \
      : \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define FSATTN_WGMMA_N128_MN_MAJOR(TYPE) \
  asm volatile( \
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" \
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}" \
      : \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
        "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), \
        "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
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
