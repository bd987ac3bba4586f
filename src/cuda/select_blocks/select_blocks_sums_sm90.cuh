// From the products of the Hopper kernel of select_blocks to block scores: probabilities, their sum over
// the heads of a group, and the sum over the windows of a block. l / d = 2 and S / d = 4: a block's windows
// weigh 1, 2, 2, 2, 1, and the first of them is the last of the block before.
//
// A thread has 32 windows side by side in rows r and r + 8 of a product; window 4 b + w of a row is
// window w of the lane's block b.
#pragma once
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"
#include "cuda/select_blocks/select_blocks_pick.cuh"

namespace fsattn::device {

// The probability of window i of row 0 or 1 of a product; bias: -lse in bits.
__device__ __forceinline__ float window_probability(const float (&s)[64], float scale_log2,
                                                    const float (&bias)[2], int i, int row) {
  return exp2_approx(fmaf(s[i / 2 * 4 + row * 2 + i % 2], scale_log2, bias[row]));
}

// What the block before adds to a lane's first block; carry: the last value of the tile before.
__device__ __forceinline__ float from_lane_before(float last, float& carry, int lane) {
  const float x =
      __shfl_sync(kFullMask, lane % 4 == 3 ? carry : last, (lane & ~3) | ((lane + 3) & 3));
  carry = last;
  return x;
}

// Sums over pairs of heads of one query, by block: half the registers of sums by window.
struct BlockSums {
  float inner[kLaneBlocks];  // the windows that count twice
  float last[kLaneBlocks];   // the window that counts in the next block, too

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < kLaneBlocks; ++b) inner[b] = last[b] = 0.f;
  }

  __device__ __forceinline__ void add(const float (&s)[64], float scale_log2,
                                      const float (&bias)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) {
#pragma unroll
        for (int w = 0; w < 3; ++w)
          inner[b] += window_probability(s, scale_log2, bias, 4 * b + w, row);
        last[b] += window_probability(s, scale_log2, bias, 4 * b + 3, row);
      }
    }
  }

  // carry: what the tile before adds to the quad's first block.
  __device__ __forceinline__ void make_scores(float (&carry)[1], int lane,
                                              int (&score)[1][kLaneBlocks]) const {
    float before = from_lane_before(last[kLaneBlocks - 1], carry[0], lane);
#pragma unroll
    for (int b = 0; b < kLaneBlocks; ++b) {
      score[0][b] = __float_as_int(fmaf(2.f, inner[b], before + last[b]));
      before = last[b];
    }
  }
};

// Makes the probabilities of a product's windows behind `limit` zero.
__device__ __forceinline__ void hide_windows(float (&s)[64], int limit) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (i > limit) s[i / 2 * 4 + i % 2] = s[i / 2 * 4 + 2 + i % 2] = -INFINITY;
  }
}

// Probabilities by window, of one query and all heads, or of two queries.
template <int kRows>
struct WindowSums {
  float p[kRows][32];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[r][i] = 0.f;
    }
  }

  // Of a pair of heads.
  __device__ __forceinline__ void add(const float (&s)[64], float scale_log2,
                                      const float (&bias)[2], bool takes_larger) {
    const auto x = [&](int i, int row) { return window_probability(s, scale_log2, bias, i, row); };
    if (takes_larger) {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[0][i] = fmaxf(fmaxf(p[0][i], x(i, 0)), x(i, 1));
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[0][i] = p[0][i] + x(i, 0) + x(i, 1);
    }
  }

  // Of a single head, in two steps.
  __device__ __forceinline__ void scale(const float (&s)[64], float scale_log2,
                                        const float (&bias)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        p[r][i] = fmaf(s[i / 2 * 4 + r * 2 + i % 2], scale_log2, bias[r]);
    }
  }
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (float& x : p[r]) x = exp2_approx(x);
    }
  }

  __device__ __forceinline__ void hide(int r, int limit) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i > limit) p[r][i] = 0.f;
    }
  }

  __device__ __forceinline__ void make_scores(float (&carry)[kRows], int lane,
                                              int (&score)[kRows][kLaneBlocks]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float before = from_lane_before(p[r][31], carry[r], lane);
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) {
        const float* w = p[r] + 4 * b;
        score[r][b] = __float_as_int(fmaf(2.f, w[0] + w[1] + w[2], before + w[3]));
        before = w[3];
      }
    }
  }
};

template <int kRows>
__device__ __forceinline__ void round_scores(int (&score)[kRows][kLaneBlocks]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int b = 0; b < kLaneBlocks; ++b) {
      const float x = __int_as_float(score[r][b]);
      score[r][b] = __float_as_int(__bfloat162float(__float2bfloat16_rn(x)));
    }
  }
}

}  // namespace fsattn::device
