// The bodies of cpu/row_kernels.h. Included by row_kernels_<isa>.cpp alone, which defines
// FSATTN_ISA_NAMESPACE: no function of this file may be shared between instruction sets.
#pragma once
#include <cstring>

#include "cpu/row_kernels.h"

namespace fsattn::cpu::FSATTN_ISA_NAMESPACE {

// Eight numbers: what every dim is a multiple of.
template <class Acc>
struct Octet {
  typedef Acc Vec __attribute__((vector_size(8 * sizeof(Acc))));
};
template <class Acc>
using Vec8 = typename Octet<Acc>::Vec;

// Eight conversions at once, bit for bit those of cpu/simd.h. Vectors go by reference: by value they
// would have an ABI that depends on the instruction set.
typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef float Float8 __attribute__((vector_size(32)));

FSATTN_FORCE_INLINE void load_words(const void* from, Word8& to) {
  Half8 halves;
  std::memcpy(&halves, from, sizeof(halves));
  to = __builtin_convertvector(halves, Word8);
}

FSATTN_FORCE_INLINE void store_words(const Word8& from, void* to) {
  const Half8 halves = __builtin_convertvector(from, Half8);
  std::memcpy(to, &halves, sizeof(halves));
}

FSATTN_FORCE_INLINE void load8(const double* from, Vec8<double>& to) {
  std::memcpy(&to, from, sizeof(to));
}
FSATTN_FORCE_INLINE void load8(const float* from, Float8& to) {
  std::memcpy(&to, from, sizeof(to));
}
FSATTN_FORCE_INLINE void load8(const BFloat16* from, Float8& to) {
  Word8 words;
  load_words(from, words);
  to = reinterpret_cast<Float8>(words << 16);
}
FSATTN_FORCE_INLINE void load8(const Float16* from, Float8& to) {
  Word8 words;
  load_words(from, words);
  const Word8 magnitude = (words & 0x7fffU) << 13, sign = (words & 0x8000U) << 16;
  const Word8 exponent = magnitude & 0x0f800000U;
  const Word8 normal = magnitude + (112U << 23);
  const Word8 special = magnitude + (224U << 23);  // Inf, NaN
  const Word8 shifted = magnitude + (113U << 23);
  const float smallest_normal = float_of_bits(113U << 23);
  const Word8 subnormal =
      reinterpret_cast<Word8>(reinterpret_cast<Float8>(shifted) - smallest_normal);
  const Word8 finite = exponent == 0U ? subnormal : normal;
  to = reinterpret_cast<Float8>((exponent == 0x0f800000U ? special : finite) | sign);
}

FSATTN_FORCE_INLINE void store8(const Vec8<double>& from, double* to) {
  std::memcpy(to, &from, sizeof(from));
}
FSATTN_FORCE_INLINE void store8(const Float8& from, float* to) {
  std::memcpy(to, &from, sizeof(from));
}
FSATTN_FORCE_INLINE void store8(const Float8& from, BFloat16* to) {
  const Word8 bits = reinterpret_cast<Word8>(from);
  const Word8 rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const Word8 quiet_nan = (bits >> 16) | 0x40U;
  const Word8 magnitude = bits & 0x7fffffffU;
  store_words(magnitude > 0x7f800000U ? quiet_nan : rounded, to);
}
FSATTN_FORCE_INLINE void store8(const Float8& from, Float16* to) {
  const Word8 bits = reinterpret_cast<Word8>(from);
  const Word8 sign = (bits >> 16) & 0x8000U, magnitude = bits & 0x7fffffffU;
  const Word8 normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  const Word8 subnormal =
      reinterpret_cast<Word8>(reinterpret_cast<Float8>(magnitude) + 0.5F) - (126U << 23);
  const Word8 infinity = Word8{} + 0x7c00U, quiet_nan = Word8{} + 0x7e00U;
  Word8 half = magnitude < (113U << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000U ? infinity : half;
  half = magnitude > 0x7f800000U ? quiet_nan : half;
  store_words(half | sign, to);
}

template <class T>
struct Rows8 {
  using Acc = Compute<T>;
  using Vec = Vec8<Acc>;

  // A fixed tree, so that every instruction set but for FMA gives the same sum.
  static FSATTN_FORCE_INLINE Acc total(const Vec& v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }

  // Any dim.
  static void load(const T* from, Acc* to, int64_t dim) {
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8) {
      Vec value;
      load8(from + i, value);
      std::memcpy(to + i, &value, sizeof(value));
    }
    for (; i < dim; ++i) to[i] = cpu::load(from[i]);
  }

  static void load_sum(const T* from, const T* addend, Acc* to, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 8) {
      Vec a, b;
      load8(from + i, a);
      load8(addend + i, b);
      a += b;
      std::memcpy(to + i, &a, sizeof(a));
    }
  }

  // Any dim.
  static void store(const Acc* from, T* to, int64_t dim) {
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8) {
      Vec value;
      std::memcpy(&value, from + i, sizeof(value));
      store8(value, to + i);
    }
    for (; i < dim; ++i) cpu::store(to[i], from[i]);
  }

  // Four octets at a time: their sums stay in registers over all rows.
  template <int kOctets>
  static FSATTN_FORCE_INLINE void weighted_columns(const T* x, int64_t x_stride, const Acc* weight,
                                                   int64_t weight_stride, int64_t count, Acc* sum) {
    Vec sums[kOctets];
    std::memcpy(sums, sum, sizeof(sums));
    for (int64_t row = 0; row < count; ++row) {
      for (int i = 0; i < kOctets; ++i) {
        Vec value;
        load8(x + row * x_stride + 8 * i, value);
        sums[i] += weight[row * weight_stride] * value;
      }
    }
    std::memcpy(sum, sums, sizeof(sums));
  }

  static void weighted_sum(const T* x, int64_t x_stride, const Acc* weight, int64_t weight_stride,
                           int64_t count, Acc* sum, int64_t dim) {
    int64_t column = 0;
    for (; column + 32 <= dim; column += 32) {
      weighted_columns<4>(x + column, x_stride, weight, weight_stride, count, sum + column);
    }
    for (; column < dim; column += 8) {
      weighted_columns<1>(x + column, x_stride, weight, weight_stride, count, sum + column);
    }
  }

  static void dots(const T* x, int64_t x_stride, int64_t count, const Acc* y, Acc* sums,
                   int64_t dim) {
    for (int64_t row = 0; row < count; ++row) {
      Vec sum{};
      for (int64_t i = 0; i < dim; i += 8) {
        Vec a, b;
        load8(x + row * x_stride + i, a);
        std::memcpy(&b, y + i, sizeof(b));
        sum += a * b;
      }
      sums[row] += total(sum);
    }
  }

  static void gemm_tile(int64_t depth, const Acc* a, int64_t a_row, int64_t a_depth, const Acc* b,
                        int64_t b_depth, Acc* sums, int64_t sums_row) {
    typedef Acc Line __attribute__((vector_size(64)));
    constexpr int64_t kRows = GemmTile<Acc>::kRows;
    Line tile[kRows];
    for (int64_t r = 0; r < kRows; ++r) std::memcpy(&tile[r], sums + r * sums_row, 64);
    for (int64_t k = 0; k < depth; ++k) {
      Line line;
      std::memcpy(&line, b + k * b_depth, 64);
      for (int64_t r = 0; r < kRows; ++r) tile[r] += a[r * a_row + k * a_depth] * line;
    }
    for (int64_t r = 0; r < kRows; ++r) std::memcpy(sums + r * sums_row, &tile[r], 64);
  }

  static void gate(const Acc* gates, const T* const* branches, T* o, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 8) {
      Vec cmp, sel, win;
      load8(branches[0] + i, cmp);
      load8(branches[1] + i, sel);
      load8(branches[2] + i, win);
      const Vec sum = gates[0] * cmp + gates[1] * sel + gates[2] * win;
      store8(sum, o + i);
    }
  }

  static void gate_grad(const Acc* gates, const T* dout, const T* const* branches,
                        T* const* d_branches, Acc* dots, int64_t dim) {
    for (int branch = 0; branch < 3; ++branch) {
      Vec sum{};
      for (int64_t i = 0; i < dim; i += 8) {
        Vec d, value;
        load8(dout + i, d);
        load8(branches[branch] + i, value);
        sum += d * value;
        const Vec scaled = gates[branch] * d;
        store8(scaled, d_branches[branch] + i);
      }
      dots[branch] = total(sum);
    }
  }
};

template <class T>
RowKernels<T> row_kernels() {
  using R = Rows8<T>;
  return {&R::load, &R::load_sum,  &R::store, &R::weighted_sum,
          &R::dots, &R::gemm_tile, &R::gate,  &R::gate_grad};
}

template RowKernels<double> row_kernels<double>();
template RowKernels<float> row_kernels<float>();
template RowKernels<Float16> row_kernels<Float16>();
template RowKernels<BFloat16> row_kernels<BFloat16>();

}  // namespace fsattn::cpu::FSATTN_ISA_NAMESPACE
