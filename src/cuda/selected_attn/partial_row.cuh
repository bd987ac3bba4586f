// A partial row of bf16 in 12 bits a value (wgmma kernel to merge): 192 bytes instead of 256.
//
// A normalised row is an average of rows of V of its part, so no value of it is larger than the largest
// of them. Divided by a power of two that puts that one into the highest of the 16 lowest binades of
// bf16, the values keep what rounding to bf16 gives them (denormal numbers included), and the upper four
// bits of every exponent are zero. So a value keeps the 7 mantissa bits of bf16 down to 2^-14 of the largest
// |V| of its part, and below that is off by at most 2^-22 of it.
//
// The power of two is the same for all rows of a part: its window. It travels in the statistics of the
// row, whose sum needs neither a sign nor half of its exponent.
//
// Infinities and NaN of V: the window then ends a binade higher, so that the exponent 15 is free for them,
// and a bit of the statistics tells the merge to look.
#pragma once
#include <cstdint>

namespace fsattn::selected {

inline constexpr int kPackedRowBytes = 192;  // of 128 values

// 2^n for n from -126 to 127.
__device__ __forceinline__ float power_of_two(int n) {
  return __uint_as_float(static_cast<uint32_t>(n + 127) << 23);
}

// Where the four bits are free in both halves of a pair.
inline constexpr uint32_t kFreeBits = 0x78007800u;

// Infinities and NaN have all bits of the exponent set; the lowest four are what is kept of them.
__device__ __forceinline__ void keep_special(uint32_t (&pair)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) pair[i] &= ~kFreeBits;
}

// A pair's 24 bits go to the free bits of three others, which are zero: exponents, upper and lower half of
// the mantissa. The lowest three of a half go together with the sign of the other half, which the rotation
// brings next to them.
__device__ __forceinline__ void hide_pair(uint32_t pair, uint32_t (&host)[3]) {
  host[0] |= pair << 4 & kFreeBits;
  host[1] |= pair << 8 & kFreeBits;
  host[2] |= __funnelshift_l(pair, pair, 12) & kFreeBits;
}

// The three pairs and the hidden one.
__device__ __forceinline__ void find_pairs(const uint32_t (&host)[3], uint32_t (&pair)[4]) {
  pair[3] = (host[0] >> 4 & (kFreeBits >> 4)) | (host[1] >> 8 & (kFreeBits >> 8)) |
            (__funnelshift_r(host[2], host[2], 12) & 0x80078007u);
#pragma unroll
  for (int i = 0; i < 3; ++i) pair[i] = host[i] & ~kFreeBits;
}

// Whether a value of a found pair stands for an infinity or a NaN, where the window says that there are
// some; `shift`: 0 or 16.
__device__ __forceinline__ float special_value(uint32_t pair, int shift) {
  const uint32_t half = pair << (16 - shift) & 0xffff0000u;
  return (half & 0x07800000u) == 0x07800000u ? __uint_as_float(half | 0x7f800000u) : 0.f;
}

// The exponent field that the largest values of a part may have; they are stored as if it was 15.
struct Window {
  static constexpr int kTop = 15;
  int exponent;      // 15 .. 255
  bool has_special;  // infinities or NaN

  // `largest`: bits of the largest finite |V|. Rounded probabilities and their sum let an average
  // exceed it a little: the two uppermost mantissas count for the next binade.
  static __device__ __forceinline__ Window of(uint32_t largest, bool has_special) {
    const int exponent = max(static_cast<int>((largest + 2) >> 7), kTop) + has_special;
    return {min(exponent, 255), has_special};
  }

  // What values are multiplied by before they are rounded. Parts with values from 2^14 on need a step
  // before that one, so that both are floats.
  static constexpr int kFar = 126 + kTop;
  __device__ __forceinline__ bool is_far() const { return exponent > kFar; }
  __device__ __forceinline__ float first_step() const { return power_of_two(kFar - exponent); }
  __device__ __forceinline__ float step() const { return power_of_two(kTop - min(exponent, kFar)); }

  // Sums of probabilities are in [2^-8, 2^7]: the headroom of 64 keys makes the largest term 2^-6, but the
  // rounding of a shift of 2^26 makes it 2^-8, that of a larger one 1. Four bits of exponent tell them
  // apart; 19 bits of mantissa are kept. Window and sum share a word that is never kNoPartial.
  static constexpr uint32_t kSumBits = 0x07fffff0u, kSumBase = 119u << 23;
  static constexpr float kMinSum = 0x1p-8f, kMaxSum = 128.f;
  __device__ __forceinline__ uint32_t code() const {
    const auto x = static_cast<uint32_t>(exponent);
    return (x >> 3 << 27 | (x & 7) << 1 | has_special) - kSumBase;
  }
  static __device__ __forceinline__ Window from(uint32_t word) {
    return {static_cast<int>((word >> 24 & 0xf8u) | (word >> 1 & 7u)), (word & 1) != 0};
  }
  static __device__ __forceinline__ float sum_of(uint32_t word) {
    return __uint_as_float((word & kSumBits) + kSumBase);
  }
};

// {shift, sum} of a row with the code of its window. A NaN of the sum goes to the shift.
__device__ __forceinline__ float2 pack_stats(float shift, float sum, uint32_t window_code) {
  const uint32_t bits = __float_as_uint(fmaxf(fminf(sum, Window::kMaxSum), Window::kMinSum));
  const bool is_nan = sum != sum && shift > -INFINITY;
  return {is_nan ? sum : shift, __uint_as_float(((bits + 8) & ~15u) + window_code)};
}

}  // namespace fsattn::selected
