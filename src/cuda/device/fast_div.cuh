// Division by a number that only the host knows, without the integer division of the device.
#pragma once
#include <cstdint>

namespace fsattn::device {

// n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31: one widening multiply and a shift.
// With c = ceil(log2 divisor) and m = ceil(2^(31 + c) / divisor), m < 2^32 and the error n * (m *
// divisor - 2^(31 + c)) stays below 2^(31 + c), so the quotient is exact.
struct FastDiv {
  uint32_t magic = 0;
  uint32_t shift = 31;
  uint32_t divisor = 1;

  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic) >> shift);
  }
  __device__ __forceinline__ int remainder(int n, int quotient) const {
    return n - quotient * static_cast<int>(divisor);
  }
};

}  // namespace fsattn::device
