// The two input types of the kernels and the conversions between them and fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "base/dtype.h"

namespace fsattn::device {

template <DType kDType>
using ElementOf = std::conditional_t<kDType == DType::kBFloat16, __nv_bfloat16, __half>;

template <class Element>
inline constexpr bool kIsBf16 = std::is_same_v<Element, __nv_bfloat16>;

// Two fp32 values to a packed pair; `low` lands in the lower half. fp16 saturates nothing: the
// caller keeps values in range.
template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t r;
  if constexpr (kIsBf16<Element>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

template <class Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (kIsBf16<Element>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

}  // namespace fsattn::device
