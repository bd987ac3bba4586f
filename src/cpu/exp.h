// Vector types and exp for the files that are compiled once per instruction set. Everything has
// internal linkage, so that no copy with AVX code can stand in for a baseline one.
//
// FSATTN_VECTOR_BYTES (16, 32 or 64) is defined by the including file.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace fsattn::cpu {
namespace {

template <class Real>
struct IntOf {
  using type = int32_t;
  using unsigned_type = uint32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
  using unsigned_type = uint64_t;
};

template <class Real>
struct Simd {
  using Int = typename IntOf<Real>::type;
  static constexpr int kLanes = FSATTN_VECTOR_BYTES / static_cast<int>(sizeof(Real));
  typedef Real V __attribute__((vector_size(FSATTN_VECTOR_BYTES)));
  typedef Int I __attribute__((vector_size(FSATTN_VECTOR_BYTES)));
  typedef typename IntOf<Real>::unsigned_type U __attribute__((vector_size(FSATTN_VECTOR_BYTES)));
  typedef Real Unaligned
      __attribute__((vector_size(FSATTN_VECTOR_BYTES), aligned(alignof(Real)), may_alias));

  static FSATTN_FORCE_INLINE V load(const Real* p) {
    return *reinterpret_cast<const Unaligned*>(p);
  }
  static FSATTN_FORCE_INLINE void store(Real* p, V x) { *reinterpret_cast<Unaligned*>(p) = x; }
  static FSATTN_FORCE_INLINE V broadcast(Real x) { return x - V{}; }
  static FSATTN_FORCE_INLINE V max(V a, V b) { return a > b ? a : b; }

  // 0, 1, 2, ...
  static FSATTN_FORCE_INLINE I iota() {
    I lanes{};
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes;
  }

  // Halves the distance at each step: the order of the additions is that of a balanced tree.
  static FSATTN_FORCE_INLINE Real sum_of_lanes(V x) {
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) x += __builtin_shuffle(x, iota() ^ step);
    return x[0];
  }
  static FSATTN_FORCE_INLINE Real max_of_lanes(V x) {
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2)
      x = max(x, __builtin_shuffle(x, iota() ^ step));
    return x[0];
  }
};

// exp(x) = 2^n exp(r) with n = round(x / ln 2). Adding kMagic = 1.5 * 2^(mantissa bits) rounds to an
// integer and leaves n in the low bits. ln 2 comes in two parts, the first with trailing zeros, so that
// x - n * kLn2High is exact. Results below the smallest normal number are 0.

// |r| <= ln 2 / 2; c0 = c1 = 1, the others fitted to the least largest relative error: 3e-9.
FSATTN_FORCE_INLINE Simd<float>::V exp_of(Simd<float>::V x) {
  using S = Simd<float>;
  constexpr float kMagic = 12582912.0F;
  constexpr float kLn2High = 0x1.62e4p-1F, kLn2Low = 0x1.7f7d1cp-20F;
  const S::V shifted = x * 1.44269504F + kMagic;
  const S::V n = shifted - kMagic;
  const S::V r = (x - n * kLn2High) - n * kLn2Low;
  S::V y = r * 0x1.6a23cep-10F + 0x1.123a2p-7F;
  y = y * r + 0x1.5558f2p-5F;
  y = y * r + 0x1.555492p-3F;
  y = y * r + 0x1.fffffcp-2F;
  y = y * r + 1.0F;
  y = y * r + 1.0F;
  // 2^n by adding n to the exponent; the shift drops the bits of kMagic.
  const S::V scaled =
      reinterpret_cast<S::V>(reinterpret_cast<S::U>(y) + (reinterpret_cast<S::U>(shifted) << 23));
  return x < -87.0F ? S::V{} : scaled;
}

// Taylor series to r^13 / 13!: the remainder is below 5e-18.
FSATTN_FORCE_INLINE Simd<double>::V exp_of(Simd<double>::V x) {
  using S = Simd<double>;
  constexpr double kMagic = 6755399441055744.0;
  constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  const S::V shifted = x * 1.4426950408889634 + kMagic;
  const S::V n = shifted - kMagic;
  const S::V r = (x - n * kLn2High) - n * kLn2Low;
  constexpr double kInverseFactorials[] = {1.0 / 6227020800,
                                           1.0 / 479001600,
                                           1.0 / 39916800,
                                           1.0 / 3628800,
                                           1.0 / 362880,
                                           1.0 / 40320,
                                           1.0 / 5040,
                                           1.0 / 720,
                                           1.0 / 120,
                                           1.0 / 24,
                                           1.0 / 6,
                                           1.0 / 2,
                                           1.0,
                                           1.0};
  S::V y = S::broadcast(kInverseFactorials[0]);
#pragma GCC unroll 13
  for (int i = 1; i < 14; ++i) y = y * r + kInverseFactorials[i];
  const S::V scaled =
      reinterpret_cast<S::V>(reinterpret_cast<S::U>(y) + (reinterpret_cast<S::U>(shifted) << 52));
  return x < -708.0 ? S::V{} : scaled;
}

}  // namespace
}  // namespace fsattn::cpu
