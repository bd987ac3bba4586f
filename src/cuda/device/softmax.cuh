// The running softmax of a query-stationary loop, in base 2.
#pragma once
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"

namespace fsattn::device {

// A warp's rows: accumulator row 2 m + h of a lane is row m * 16 + h * 8 + lane / 4.
template <int kM>
struct OnlineSoftmax {
  float max[2 * kM];  // of the scaled scores
  float sum[2 * kM];  // this lane's columns only, until finish()

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.f;
    }
  }

  // Turns scores into probabilities against the new maximum and rescales what was accumulated.
  template <class Element, int kN, int kNo>
  __device__ __forceinline__ void step(const float (&s)[kM][kN][4], uint32_t (&p)[kM][kN][2],
                                       float (&o)[kM][kNo][4], float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const int m = i / 2, half = i % 2 * 2;
      float top = s[m][0][half];
#pragma unroll
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[m][n][half], s[m][n][half + 1]));
      top = fmaxf(max[i], quad_max(top) * scale_log2);
      // A row that has seen no key yet: shift by 0, so that 2^(-inf) is 0 and not NaN.
      const float shift = top == -INFINITY ? 0.f : top;
      const float keep = exp2_approx(max[i] - shift);
      max[i] = top;
      float part = 0.f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float p0 = exp2_approx(fmaf(s[m][n][half], scale_log2, -shift));
        const float p1 = exp2_approx(fmaf(s[m][n][half + 1], scale_log2, -shift));
        part += p0 + p1;
        p[m][n][i % 2] = pack_pair<Element>(p0, p1);
      }
      sum[i] = fmaf(sum[i], keep, part);
#pragma unroll
      for (int n = 0; n < kNo; ++n) {
        o[m][n][half] *= keep;
        o[m][n][half + 1] *= keep;
      }
    }
  }

  // Normalises o; returns the natural-log lse of each row.
  template <int kNo>
  __device__ __forceinline__ void finish(float (&o)[kM][kNo][4], float (&lse)[2 * kM]) {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const float total = quad_sum(sum[i]);
      const float inverse = total == 0.f ? 0.f : 1.f / total;
      lse[i] = total == 0.f ? -INFINITY : (max[i] + log2_approx(total)) * kLn2;
#pragma unroll
      for (int n = 0; n < kNo; ++n) {
        o[i / 2][n][i % 2 * 2] *= inverse;
        o[i / 2][n][i % 2 * 2 + 1] *= inverse;
      }
    }
  }
};

}  // namespace fsattn::device
