// Rows of 12 bits a value against bf16, and what travels beside them.
#include <cmath>

#include "cuda/device/element.cuh"
#include "cuda/selected_attn/partial_row.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"
#include "kernels/kernel_test.cuh"

namespace fsattn::test {
namespace {

using selected::Window;

// A thread's eight values, scaled by the window, to three words and back: eight bf16.
__global__ void round_trip_kernel(const float* in, uint32_t largest, bool has_special,
                                  uint32_t* out, int* exponent) {
  const Window window = Window::of(largest, has_special);
  const float* x = in + threadIdx.x * 8;
  uint32_t pairs[4];
  for (int i = 0; i < 4; ++i) {
    float low = x[2 * i], high = x[2 * i + 1];
    if (window.is_far()) {
      low *= window.first_step();
      high *= window.first_step();
    }
    pairs[i] = device::pack_pair<__nv_bfloat16>(low * window.step(), high * window.step());
  }
  uint32_t host[3] = {pairs[0], pairs[1], pairs[2]};
  if (has_special) selected::keep_special(host);
  selected::hide_pair(pairs[3], host);
  selected::find_pairs(host, pairs);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = pairs[i];
  *exponent = window.exponent;
}

// Numbers whose size goes from `largest` down by up to 30 binades, of both signs, and zeros.
std::vector<float> spread_values(float largest) {
  std::vector<float> x;
  for (uint32_t i = 0; i < 256 * 8; ++i) {
    const int down = small_integer(3 * i, 15) + 15;
    const float part =
        1.f - std::ldexp(static_cast<float>(small_integer(3 * i + 1, 8000) + 8000), -15);
    const float size = std::ldexp(largest * part, -down);
    x.push_back(i % 37 == 5 ? 0.f : small_integer(3 * i + 2, 9) < 0 ? -size : size);
  }
  return x;
}

double value_of(uint32_t bits, int exponent) {  // of a bf16 in a window
  const int field = static_cast<int>(bits >> 7 & 0xff), mantissa = static_cast<int>(bits & 0x7f);
  const double size =
      field == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, field - 134);
  return std::ldexp(bits & 0x8000 ? -size : size, exponent - Window::kTop);
}

void check_window(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, 4);
  const std::vector<float> in = spread_values(largest);
  const DeviceArray<float> din(in);
  const DeviceArray<uint32_t> dout(in.size() / 2);
  const DeviceArray<int> dexponent(1);
  round_trip_kernel<<<1, 256>>>(din.get(), bits >> 16, false, dout.get(), dexponent.get());
  finish_kernel();
  const std::vector<uint32_t> out = dout.host();
  const int exponent = dexponent.host()[0];
  for (size_t i = 0; i < in.size(); ++i) {
    const double x = double{in[i]}, got = value_of(out[i / 2] >> (i % 2 * 16) & 0xffff, exponent);
    // bf16: half a unit of the last of 8 bits, and of the denormal numbers.
    const double unit = std::ldexp(std::abs(x), -8) + std::ldexp(1, -134);
    const double floor = std::ldexp(1, exponent - 127 - Window::kTop - 7);
    // Values below the normal ones of fp32 are rounded twice.
    EXPECT_TRUE(std::abs(got - x) <= std::max(unit, floor) * 1.0001);
    EXPECT_TRUE(floor <= std::max(std::ldexp(double{largest}, -21), std::ldexp(1, -134)));
  }
}

TEST(packed_rows_keep_what_bf16_keeps) {
  for (const float largest : {1.f, 1.9921875f, 1.984375f, 1.9765625f, 3.5f, 0x1p-60f, 0x1.9p-110f,
                              0x1p-126f, 0x1p-130f, 16384.f, 30000.f, 0x1.4p60f, 0x1.fep127f}) {
    check_window(largest);
  }
}

TEST(packed_rows_hold_infinities_and_nan) {
  std::vector<float> in(8 * 8, 1.5f);
  for (size_t i = 0; i < 8; ++i)
    in[i * 8 + i] = i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY;
  const DeviceArray<float> din(in);
  const DeviceArray<uint32_t> dout(in.size() / 2);
  const DeviceArray<int> dexponent(1);
  round_trip_kernel<<<1, 8>>>(din.get(), 0x3fc0, true, dout.get(), dexponent.get());
  finish_kernel();
  const std::vector<uint32_t> out = dout.host();
  for (size_t i = 0; i < in.size(); ++i) {
    const uint32_t half = out[i / 2] >> (i % 2 * 16) & 0xffff;
    EXPECT_EQ((half & 0x780) == 0x780, !std::isfinite(in[i]));
    if (std::isfinite(in[i])) EXPECT_EQ(value_of(half, dexponent.host()[0]), 1.5);
    if (std::isinf(in[i])) EXPECT_EQ(half, in[i] < 0 ? 0x8780u : 0x780u);
    if (std::isnan(in[i])) EXPECT_TRUE((half & 0x7f) != 0);
  }
}

__global__ void stats_kernel(const float* sums, float shift, float2* out, float* sums_back,
                             int* windows) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const Window window{Window::kTop + static_cast<int>(blockIdx.x) / 2, blockIdx.x % 2 == 1};
  out[i] = selected::pack_stats(shift, sums[threadIdx.x], window.code());
  const uint32_t word = __float_as_uint(out[i].y);
  sums_back[i] = Window::sum_of(word);
  windows[i] = Window::from(word).exponent * 2 + Window::from(word).has_special;
}

TEST(statistics_carry_the_window) {
  constexpr unsigned kWindows = 2 * (256 - Window::kTop), kSums = 64;
  std::vector<float> sums;
  for (unsigned i = 0; i + 1 < kSums; ++i) {
    sums.push_back(std::ldexp(1.f + std::ldexp(static_cast<float>(i * 132071 % 8388608), -23),
                              static_cast<int>(i % 15) - 8));
  }
  sums.push_back(NAN);
  const DeviceArray<float> dsums(sums), dback(kWindows * kSums);
  const DeviceArray<float2> dout(kWindows * kSums);
  const DeviceArray<int> dwindows(kWindows * kSums);
  stats_kernel<<<kWindows, kSums>>>(dsums.get(), -7.25f, dout.get(), dback.get(), dwindows.get());
  finish_kernel();
  const std::vector<float2> out = dout.host();
  const std::vector<float> back = dback.host();
  const std::vector<int> windows = dwindows.host();
  for (size_t i = 0; i < out.size(); ++i) {
    uint32_t word;
    std::memcpy(&word, &out[i].y, 4);
    EXPECT_TRUE(word != selected::kNoPartial);
    EXPECT_EQ(windows[i], static_cast<int>(i / kSums) + 2 * Window::kTop);
    const float sum = sums[i % kSums];
    if (std::isnan(sum)) {
      EXPECT_TRUE(std::isnan(out[i].x));
    } else {
      EXPECT_EQ(out[i].x, -7.25f);
      EXPECT_TRUE(std::abs(back[i] - sum) <= std::ldexp(sum, -20));
    }
  }
}

}  // namespace
}  // namespace fsattn::test

FSATTN_KERNEL_TEST_MAIN()
