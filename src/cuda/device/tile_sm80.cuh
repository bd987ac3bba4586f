// Tiles of 16-bit elements in shared memory and the two products that attention makes of them.
//
// A tile has rows of kCols elements, 16-byte chunks of a row swizzled by its lowest three bits, so
// that the eight rows of one ldmatrix touch all 32 banks. kCols is a multiple of 64.
#pragma once
#include <cstdint>

#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/mma_sm80.cuh"

namespace fsattn::device {

template <int kCols>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  static_assert(kCols % 64 == 0);
  return static_cast<uint32_t>(row * kCols * 2 + ((chunk ^ (row & 7)) << 4));
}

template <int kCols>
__host__ __device__ constexpr int tile_bytes(int rows) {
  return rows * kCols * 2;
}

// Chunks of a row are visited in pairs: pair i of the address that `lane_*` returned. The lowest
// bits of a chunk are swizzled, the others are an offset that folds into the instruction.
__device__ __forceinline__ uint32_t chunk_pair(uint32_t lane_address, int i) {
  return (lane_address ^ (i * 32 & 127)) + (i * 32 & ~127);
}

// The lane's row of an A operand or of a transposed B operand (16 rows), first chunk pair.
template <int kCols>
__device__ __forceinline__ uint32_t lane_rows16(uint32_t tile, int lane) {
  return tile + tile_offset<kCols>(lane % 16, lane / 16);
}

// The lane's row of a B operand: two n8 tiles, each with both k halves.
template <int kCols>
__device__ __forceinline__ uint32_t lane_rows8x2(uint32_t tile, int lane) {
  return tile + tile_offset<kCols>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// threadIdx.x, read anew: what is derived from it is not kept in registers across a loop.
__device__ __forceinline__ int reread_thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A matrix in global memory whose rows are `stride` elements apart. Rows at or behind `rows` and
// columns at or behind `cols` read as zero.
template <class Element>
struct MatrixView {
  const Element* data;
  int64_t stride;
  int rows;
  int cols;
};

// The part of a matrix that a thread copies: eight threads share the 128 bytes of a row, so that
// all copies of a thread have the same swizzle.
template <class Element>
__device__ __forceinline__ MatrixView<Element> thread_part(const MatrixView<Element>& m,
                                                           int thread) {
  const int row = thread / 8, col = thread % 8 * 8;
  return {m.data + row * m.stride + col, m.stride, m.rows - row, m.cols - col};
}

// Starts the copy of kRows rows from row `first` on; the caller commits. `part`: thread_part().
template <int kRows, int kCols, int kThreads, class Element>
__device__ __forceinline__ void load_tile(uint32_t tile, const MatrixView<Element>& part, int first,
                                          int thread) {
  constexpr int kStep = kThreads / 8;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);
  const Element* src = part.data + first * part.stride;
  const uint32_t dst = tile + tile_offset<kCols>(thread / 8, thread % 8);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
#pragma unroll
    for (int j = 0; j < kCols / 64; ++j) {
      cp_async_16(dst + tile_bytes<kCols>(i * kStep) + j * 128, src + j * 64,
                  first + i * kStep < part.rows && j * 64 < part.cols);
    }
    src += kStep * part.stride;
    asm volatile("" : "+l"(src));  // keeps one address alive instead of one a row
  }
}

// acc += A B^T over kDepth columns. `a`: lane_rows16 of 16 kM rows, `b`: lane_rows8x2 of 8 kN rows,
// both kCols wide.
template <class Element, int kCols, int kDepth, int kM, int kN>
__device__ __forceinline__ void mma_a_bt(float (&acc)[kM][kN][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int kk = 0; kk < kDepth / 16; ++kk) {
    uint32_t af[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix_x4(af[m], chunk_pair(a, kk) + tile_bytes<kCols>(m * 16));
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t bf[4];
      ldmatrix_x4(bf, chunk_pair(b, kk) + tile_bytes<kCols>(n * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<Element>(acc[m][2 * n], af[m], bf[0], bf[1]);
        mma_m16n8k16<Element>(acc[m][2 * n + 1], af[m], bf[2], bf[3]);
      }
    }
  }
}

// acc += P B. P: packed accumulators of an earlier product (16 kM rows, 8 kK columns), `b`:
// lane_rows16 of 8 kK rows, kCols wide, of which the first 8 kN columns are used.
template <class Element, int kCols, int kM, int kN, int kK>
__device__ __forceinline__ void mma_p_b(float (&acc)[kM][kN][4], const uint32_t (&p)[kM][kK][2],
                                        uint32_t b) {
#pragma unroll
  for (int kk = 0; kk < kK / 2; ++kk) {
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t bf[4];
      ldmatrix_x4_trans(bf, chunk_pair(b, n) + tile_bytes<kCols>(kk * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t af[4] = {p[m][2 * kk][0], p[m][2 * kk][1], p[m][2 * kk + 1][0],
                                p[m][2 * kk + 1][1]};
        mma_m16n8k16<Element>(acc[m][2 * n], af, bf[0], bf[1]);
        mma_m16n8k16<Element>(acc[m][2 * n + 1], af, bf[2], bf[3]);
      }
    }
  }
}

template <class Element>
__device__ __forceinline__ uint4 add_packed(uint4 x, uint4 y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  uint32_t sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack_pair<Element>(a[i]), v = unpack_pair<Element>(b[i]);
    sum[i] = pack_pair<Element>(u.x + v.x, u.y + v.y);
  }
  return {sum[0], sum[1], sum[2], sum[3]};
}

// Where a warp's 16 kM output rows go.
template <class Element>
struct OutputRows {
  Element* data;  // the warp's first row
  int64_t stride;
  int rows;  // rows of the warp that exist; may be negative
  int cols;
  bool accumulate;
};

// Rounds the accumulators and writes them as 16-byte chunks, through `stage`: shared memory of this
// warp alone, 16 kM rows of 8 kN columns.
template <class Element, int kM, int kN>
__device__ __forceinline__ void store_rows(const OutputRows<Element>& out, uint32_t stage,
                                           const float (&acc)[kM][kN][4], int lane) {
  constexpr int kCols = kN * 8, kChunks = kN;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int row = m * 16 + lane / 4;
      store_shared_u32(stage + tile_offset<kCols>(row, n) + lane % 4 * 4,
                       pack_pair<Element>(acc[m][n][0], acc[m][n][1]));
      store_shared_u32(stage + tile_offset<kCols>(row + 8, n) + lane % 4 * 4,
                       pack_pair<Element>(acc[m][n][2], acc[m][n][3]));
    }
  }
  __syncwarp();
  for (int c = lane; c < kM * 16 * kChunks; c += kWarpSize) {
    const int row = c / kChunks, chunk = c % kChunks;
    if (row >= out.rows || chunk * 8 >= out.cols) continue;
    uint4* to = reinterpret_cast<uint4*>(out.data + row * out.stride + chunk * 8);
    const uint4 x = load_shared_u128(stage + tile_offset<kCols>(row, chunk));
    *to = out.accumulate ? add_packed<Element>(*to, x) : x;
  }
}

}  // namespace fsattn::device
