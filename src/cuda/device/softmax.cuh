// The running softmax of a query-stationary loop, in base 2.
#pragma once
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"

namespace fsattn::device {

// Probabilities are kept below 2^-kHeadroom until finish(), so that sums of P V stay finite for
// every finite bf16 value whose average is. P keeps its precision: bf16 has the exponents of fp32.
// fp16 values cannot overflow fp32 sums, and fp16 probabilities have no exponents to spare.
template <class Element>
inline constexpr int kHeadroom = kIsBf16<Element> ? 24 : 0;

// P of the backward, from the statistics of the forward. It is at most 1, but where logits reach 1e7
// the digits of lse are so coarse that the exponent may come out at +10, at 1e9 at +64.
__device__ __forceinline__ float probability(float score, float scale_log2, float lse_log2) {
  return exp2_approx(fminf(fmaf(score, scale_log2, -lse_log2), 0.f));
}

// Two of them, packed: one instruction bounds both.
template <class Element>
__device__ __forceinline__ uint32_t probability_pair(float2 score, float scale_log2,
                                                     float2 lse_log2) {
  const uint32_t pair = pack_pair<Element>(exp2_approx(fmaf(score.x, scale_log2, -lse_log2.x)),
                                           exp2_approx(fmaf(score.y, scale_log2, -lse_log2.y)));
  uint32_t bounded;
  if constexpr (kIsBf16<Element>) {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(bounded) : "r"(pair), "r"(0x3f803f80u));
  } else {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(bounded) : "r"(pair), "r"(0x3c003c00u));
  }
  return bounded;
}

// A warp's rows: accumulator row 2 m + h of a lane is row m * 16 + h * 8 + lane / 4.
template <class Element, int kM>
struct OnlineSoftmax {
  static constexpr float kScaleUp = 1 << kHeadroom<Element>;
  // P stays below 2^kSlack: far inside both ranges.
  static constexpr float kSlack = 8;
  static constexpr float kMaxExponent = 15;  // what fp16 holds, with room for kSlack
  float max[2 * kM];                         // the reference: a scaled score of the row
  float sum[2 * kM];                         // this lane's columns only, until finish()

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.f;
    }
  }

  // Turns scores into packed probabilities.
  template <int kN, int kNo>
  __device__ __forceinline__ void step(float (&s)[kM][kN][4], uint32_t (&p)[kM][kN][2],
                                       float (&o)[kM][kNo][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float keep[2];
      if (adapt(m, s[m], scale_log2, keep)) rescale(o[m], keep);
      exponentiate(m, s[m], scale_log2);
      pack(p[m], s[m]);
    }
  }

  // Moves the reference of the rows of m16 tile `m` when a maximum has grown by more than 2^kSlack,
  // which after the first steps is rare. Then it returns true, and o has to be scaled by `keep`.
  template <int kN>
  __device__ __forceinline__ bool adapt(int m, const float (&s)[kN][4], float scale_log2,
                                        float (&keep)[2]) {
    float top[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      top[0] = fmaxf(top[0], fmaxf(s[n][0], s[n][1]));
      top[1] = fmaxf(top[1], fmaxf(s[n][2], s[n][3]));
    }
    top[0] = reference(quad_max(top[0]), scale_log2);
    top[1] = reference(quad_max(top[1]), scale_log2);
    const bool is_outgrown = top[0] > max[2 * m] + kSlack || top[1] > max[2 * m + 1] + kSlack;
    if (!__any_sync(kFullMask, is_outgrown)) return false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * m + half;
      const float next = fmaxf(max[i], top[half]);
      keep[half] = next == -INFINITY ? 1.f : exp2_approx(max[i] - next);
      max[i] = next;
      sum[i] *= keep[half];
    }
    return true;
  }

  template <int kNo>
  static __device__ __forceinline__ void rescale(float (&o)[kNo][4], const float (&keep)[2]) {
#pragma unroll
    for (int n = 0; n < kNo; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] *= keep[e / 2];
    }
  }

  // The reference is a rounded product, so P of the best key is off by a power of two: up to half a
  // digit of it, 2^64 at logits of 1e9. It cancels in o, for which fp16 has not the exponents. There
  // the reference is rounded down, and what is above it by no more than a digit counts as equal.
  static __device__ __forceinline__ float reference(float top, float scale_log2) {
    return kIsBf16<Element> ? top * scale_log2 : __fmul_rd(top, scale_log2);
  }
  static __device__ __forceinline__ float power(float score, float scale_log2, float shift) {
    const float exponent = fmaf(score, scale_log2, -shift);
    return exp2_approx(kIsBf16<Element> ? exponent : fminf(exponent, kMaxExponent));
  }

  // Scores to probabilities, in place.
  template <int kN>
  __device__ __forceinline__ void exponentiate(int m, float (&s)[kN][4], float scale_log2) {
    // A row that has seen no key yet: shift by 0, so that 2^(-inf) is 0 and not NaN.
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift[half] = max[2 * m + half] == -INFINITY ? 0.f : max[2 * m + half];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part = 0.f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[n][e] = power(s[n][e], scale_log2, shift[half]);
        }
        part += s[n][2 * half] + s[n][2 * half + 1];
      }
      sum[2 * m + half] += part;
    }
  }

  template <int kN>
  static __device__ __forceinline__ void pack(uint32_t (&p)[kN][2], const float (&s)[kN][4]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      p[n][0] = scale_down(pack_pair<Element>(s[n][0], s[n][1]));
      p[n][1] = scale_down(pack_pair<Element>(s[n][2], s[n][3]));
    }
  }

  // Both at once, column by column: P may take the registers of the scores that it has used.
  template <int kN>
  __device__ __forceinline__ void exponentiate_and_pack(int m, const float (&s)[kN][4],
                                                        uint32_t (&p)[kN][2], float scale_log2) {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift[half] = max[2 * m + half] == -INFINITY ? 0.f : max[2 * m + half];
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = power(s[n][2 * half], scale_log2, shift[half]);
        const float y = power(s[n][2 * half + 1], scale_log2, shift[half]);
        sum[2 * m + half] += x + y;
        p[n][half] = scale_down(pack_pair<Element>(x, y));
      }
    }
  }

  // One instruction a pair; scaling the fp32 values would take two, scaling in the exponent would cost
  // the lse its last bits.
  static __device__ __forceinline__ uint32_t scale_down(uint32_t pair) {
    if constexpr (kHeadroom<Element> == 0) {
      return pair;
    } else {
      constexpr uint32_t kFactor = (127u - kHeadroom<Element>) << 7,
                         kPair = kFactor << 16 | kFactor;
      uint32_t scaled;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(kPair), "r"(0x80008000u));
      return scaled;
    }
  }

  // Normalises o; returns the natural-log lse of each row.
  template <int kNo>
  __device__ __forceinline__ void finish(float (&o)[kM][kNo][4], float (&lse)[2 * kM]) {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const float total = quad_sum(sum[i]);
      // In this order: 1 / total is at most 1, its product with the sum of scaled values then too small
      // to overflow before it is scaled up.
      const float inverse = total == 0.f ? 0.f : 1.f / total;
      lse[i] = total == 0.f ? -INFINITY : (max[i] + log2_approx(total)) * kLn2;
#pragma unroll
      for (int n = 0; n < kNo; ++n) {
        o[i / 2][n][i % 2 * 2] = o[i / 2][n][i % 2 * 2] * inverse * kScaleUp;
        o[i / 2][n][i % 2 * 2 + 1] = o[i / 2][n][i % 2 * 2 + 1] * inverse * kScaleUp;
      }
    }
  }
};

}  // namespace fsattn::device
