// The row loops of every instruction set: conversions bit for bit, sums against fp64.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/row_kernels.h"
#include "support/test.h"

namespace {

using fsattn::cpu::BFloat16;
using fsattn::cpu::Float16;
using fsattn::cpu::GemmTile;
using fsattn::cpu::Isa;
using fsattn::cpu::row_kernels;

template <class F>
void for_each_isa(const F& f) {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (fsattn::cpu::is_supported(isa)) f(isa);
  }
}

// Every bit pattern, in vectors of eight and in a tail of three.
template <class T>
void expect_loads_like_scalars(Isa isa) {
  std::vector<T> from(65536);
  for (size_t i = 0; i < from.size(); ++i) from[i].bits = static_cast<uint16_t>(i);
  std::vector<float> to(from.size());
  const auto kernels = row_kernels<T>(isa);
  kernels.load(from.data(), to.data(), static_cast<int64_t>(from.size()) - 5);
  kernels.load(from.data() + from.size() - 5, to.data() + from.size() - 5, 5);
  for (size_t i = 0; i < from.size(); ++i) {
    const float expected = fsattn::cpu::load(from[i]);
    EXPECT_TRUE(to[i] == expected || (std::isnan(to[i]) && std::isnan(expected)));
  }
}

// Values around every rounding border of the 16-bit formats, from subnormal to NaN.
template <class T>
void expect_stores_like_scalars(Isa isa) {
  std::vector<float> from;
  for (uint32_t high = 0; high < 65536; ++high) {
    for (const uint32_t low : {0x0000U, 0x0fffU, 0x1000U, 0x1001U, 0x7fffU, 0x8000U, 0x8001U}) {
      from.push_back(fsattn::cpu::float_of_bits(high << 16 | low));
    }
  }
  std::vector<T> to(from.size());
  row_kernels<T>(isa).store(from.data(), to.data(), static_cast<int64_t>(from.size()));
  for (size_t i = 0; i < from.size(); ++i) {
    T expected;
    fsattn::cpu::store(expected, from[i]);
    const bool both_nan =
        std::isnan(fsattn::cpu::load(to[i])) && std::isnan(fsattn::cpu::load(expected));
    EXPECT_TRUE(to[i].bits == expected.bits || both_nan);
  }
}

template <class Acc>
void expect_tile_product(Isa isa) {
  constexpr int64_t kRows = GemmTile<Acc>::kRows, kColumns = GemmTile<Acc>::kColumns, kDepth = 19;
  std::mt19937 rng(3);
  std::uniform_int_distribution<int> pick(-8, 8);  // small whole numbers: every sum is exact
  std::vector<Acc> a(kRows * kDepth), b(kDepth * kColumns), sums(kRows * kColumns, Acc{5});
  for (Acc& value : a) value = static_cast<Acc>(pick(rng));
  for (Acc& value : b) value = static_cast<Acc>(pick(rng));
  row_kernels<Acc>(isa).gemm_tile(kDepth, a.data(), kDepth, 1, b.data(), kColumns, sums.data(),
                                  kColumns);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < kColumns; ++c) {
      Acc expected = 5;
      for (int64_t k = 0; k < kDepth; ++k) {
        expected +=
            a[static_cast<size_t>(r * kDepth + k)] * b[static_cast<size_t>(k * kColumns + c)];
      }
      EXPECT_EQ(sums[static_cast<size_t>(r * kColumns + c)], expected);
    }
  }
}

}  // namespace

TEST(fp16_conversions) {
  for_each_isa(expect_loads_like_scalars<Float16>);
  for_each_isa(expect_stores_like_scalars<Float16>);
}

TEST(bf16_conversions) {
  for_each_isa(expect_loads_like_scalars<BFloat16>);
  for_each_isa(expect_stores_like_scalars<BFloat16>);
}

TEST(tile_product) {
  for_each_isa(expect_tile_product<float>);
  for_each_isa(expect_tile_product<double>);
}

FSATTN_TEST_MAIN()
