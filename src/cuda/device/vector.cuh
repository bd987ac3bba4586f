// Eight 16-bit elements as fp32: what one 16-byte access carries.
#pragma once
#include "cuda/device/element.cuh"
#include "params/common.h"

namespace fsattn::device {

inline constexpr int kVector = 8;

template <class Element>
struct Vector8 {
  float x[kVector] = {};

  __device__ static Vector8 load(const Element* from) {
    return unpack(*reinterpret_cast<const uint4*>(from));
  }

  __device__ static Vector8 unpack(const uint4& raw) {
    const uint32_t pairs[] = {raw.x, raw.y, raw.z, raw.w};
    Vector8 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair<Element>(pairs[i]);
      v.x[2 * i] = pair.x;
      v.x[2 * i + 1] = pair.y;
    }
    return v;
  }

  __device__ void store(Element* to) const {
    *reinterpret_cast<uint4*>(to) =
        uint4{pack_pair<Element>(x[0], x[1]), pack_pair<Element>(x[2], x[3]),
              pack_pair<Element>(x[4], x[5]), pack_pair<Element>(x[6], x[7])};
  }

  __device__ void add_scaled(float scale, const Vector8& other) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] += scale * other.x[i];
  }
};

// Address of element `column` of (token, head).
template <class Element>
__device__ __forceinline__ Element* row_pointer(const Rows& rows, int64_t token, int64_t head,
                                                int64_t column = 0) {
  return static_cast<Element*>(rows.data) + token * rows.token_stride + head * rows.head_stride +
         column;
}

}  // namespace fsattn::device
