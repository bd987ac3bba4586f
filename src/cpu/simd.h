// Storage types of the CPU backend and their conversions. Every function is forced inline: this header
// is also compiled with AVX flags, and an out-of-line copy of such a function could be the one that the
// linker keeps for the baseline code.
#pragma once
#include <cstdint>

#include "fsattn/tensor.h"

#define FSATTN_FORCE_INLINE inline __attribute__((always_inline))

namespace fsattn::cpu {

// Bit patterns in memory; arithmetic happens in Compute<T>.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// fp64 for fp64, fp32 for everything else.
template <class T>
using Compute = typename ComputeType<T>::type;

FSATTN_FORCE_INLINE float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FSATTN_FORCE_INLINE uint32_t bits_of_float(float x) { return __builtin_bit_cast(uint32_t, x); }

FSATTN_FORCE_INLINE double load(const double& x) { return x; }
FSATTN_FORCE_INLINE float load(const float& x) { return x; }
FSATTN_FORCE_INLINE float load(const BFloat16& x) {
  return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}

// Both sides of each choice are computed, so that loops over this function vectorise. A subnormal is
// rebuilt by a subtraction of normal numbers, which is exact even where the CPU flushes subnormals.
FSATTN_FORCE_INLINE float load(const Float16& x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffU) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000U) << 16;
  const uint32_t exponent = magnitude & 0x0f800000U;
  const uint32_t rebias = exponent == 0x0f800000U ? 224U << 23 : 112U << 23;  // Inf, NaN: to 255
  const uint32_t subnormal =
      bits_of_float(float_of_bits(magnitude + (113U << 23)) - float_of_bits(113U << 23));
  return float_of_bits((exponent == 0 ? subnormal : magnitude + rebias) | sign);
}

FSATTN_FORCE_INLINE void store(double& to, double x) { to = x; }
FSATTN_FORCE_INLINE void store(float& to, float x) { to = x; }

// To nearest, ties to even; a NaN stays a (quiet) NaN.
FSATTN_FORCE_INLINE void store(BFloat16& to, float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40U;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet_nan : rounded);
}

// To nearest, ties to even; above 65519 becomes Inf, a NaN stays a NaN.
FSATTN_FORCE_INLINE void store(Float16& to, float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // Adding 0.5 leaves the fp16 subnormal, rounded by the addition, in the low bits of the sum.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5F) - (126U << 23);
  uint32_t half = magnitude < (113U << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000U ? 0x7c00U : half;
  half = magnitude > 0x7f800000U ? 0x7e00U : half;
  to.bits = static_cast<uint16_t>(sign | half);
}

// Calls f.template operator()<T>() with the storage type of a floating dtype.
template <class F>
FSATTN_FORCE_INLINE void with_storage_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kFloat16:
      return f.template operator()<Float16>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
    case DType::kInt32:
      return;
  }
}

}  // namespace fsattn::cpu
