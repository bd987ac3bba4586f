// Tiles of 64 rows and 128 columns as wgmma reads them: two panels of 64 columns, rows of 128
// bytes, 128-byte swizzle.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/device/wgmma_ss_sm90.cuh"

namespace fsattn::device {

inline constexpr int kPanelRows = 64, kPanelDim = 128;
inline constexpr int kPanelBytes = kPanelRows * 128, kPanelTileBytes = 2 * kPanelBytes;

// Starts the copy of 64 rows from row `first` on. Rows and columns outside the matrix are zero.
template <int kThreads, class Element>
__device__ __forceinline__ void load_panels(uint32_t tile, const MatrixView<Element>& part,
                                            int first, int thread) {
  constexpr int kStep = kThreads / 8;
  const uint32_t dst = tile + tile_offset<64>(thread / 8, thread % 8);
  const Element* src = part.data + first * part.stride;
#pragma unroll
  for (int i = 0; i < kPanelRows / kStep; ++i) {
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      cp_async_16(dst + panel * kPanelBytes + i * kStep * 128, src + panel * 64,
                  first + i * kStep < part.rows && panel * 64 < part.cols);
    }
    src += kStep * part.stride;
    asm volatile("" : "+l"(src));  // keeps one address alive instead of one a row
  }
}

// Clears the rows of a tile of kRows rows from row `first` on.
template <int kRows>
__device__ __forceinline__ void clear_panel_rows(uint32_t tile, int first, int lane) {
  for (int i = first * 8 + lane; i < kRows * 8; i += kWarpSize) {
    for (int panel = 0; panel < 2; ++panel) {
      asm volatile(
          "st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(tile + panel * kRows * 128 + i * 16), "r"(0)
          : "memory");
    }
  }
}

// Operand descriptors (wgmma_descriptor) as their low word, which a step of the address is simply
// added to. It has to be the same value in all lanes and known to be: then the additions run in the
// uniform datapath. Derived from one address a product, they cost as many issue slots as the softmax.
__device__ __forceinline__ uint32_t operand(uint32_t tile, uint32_t panel_bytes) {
  return __shfl_sync(kFullMask, tile >> 4 | panel_bytes >> 4 << 16, 0);
}
__device__ __forceinline__ uint32_t k_major(uint32_t tile) { return operand(tile, 16); }
__device__ __forceinline__ uint32_t mn_major(uint32_t tile) { return operand(tile, kPanelBytes); }

__device__ __forceinline__ uint64_t descriptor(uint32_t low_word) {
  // 128-byte swizzle, groups of 8 rows 1024 bytes apart.
  return uint64_t{0x40000040} << 32 | low_word;
}

// Issues acc = A B^T over 128 columns; A and B are panel tiles of 64 rows. The caller commits.
template <class Element>
__device__ __forceinline__ void panel_product(float (&acc)[32], uint32_t a, uint32_t b) {
  const uint32_t a_word = k_major(a), b_word = k_major(b);
#pragma unroll
  for (int kk = 0; kk < kPanelDim / 16; ++kk) {
    const uint32_t at = (kk / 4 * kPanelBytes + kk % 4 * 32) >> 4;
    wgmma_ss_m64n64k16<Element>(acc, descriptor(a_word + at), descriptor(b_word + at), kk > 0);
  }
}

// Issues acc += P B. P: packed accumulators of 64 columns; B: a panel tile, 64 rows. The caller
// commits.
template <class Element>
__device__ __forceinline__ void packed_product(float (&acc)[64], const uint32_t (&p)[1][8][2],
                                               uint32_t b) {
  const uint32_t b_word = mn_major(b);
#pragma unroll
  for (int kk = 0; kk < kPanelRows / 16; ++kk) {
    const uint32_t a[4] = {p[0][2 * kk][0], p[0][2 * kk][1], p[0][2 * kk + 1][0],
                           p[0][2 * kk + 1][1]};
    wgmma_m64n128k16_mn_major<Element>(acc, a, descriptor(b_word + kk * (2048 >> 4)), 1);
  }
}

__device__ __forceinline__ void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Accumulators of a warpgroup as the mma fragments of its warps.
__device__ __forceinline__ auto& as_fragments(float (&x)[32]) {
  return reinterpret_cast<float(&)[1][8][4]>(x);
}
__device__ __forceinline__ auto& as_fragments(float (&x)[64]) {
  return reinterpret_cast<float(&)[1][16][4]>(x);
}

}  // namespace fsattn::device
