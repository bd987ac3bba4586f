// dense_attn_delta: the first step of the backward.
//
// Math    delta = rowsum(dO * O) - dlse, so that dS = P * (dP - delta). A row without visible keys
//         gets 0: its P is 0, and a dlse that is not finite there must not reach the products.
// Tiles   half a warp a row; a CTA takes 16 tokens of one head, so that it writes 64 contiguous
//         bytes.
// Bound   memory: dO and O once.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/dense_attn.h"
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"

namespace fsattn {

inline constexpr int kDeltaTokens = 16, kDeltaThreads = 256;

template <class Element>
__global__ void __launch_bounds__(kDeltaThreads)
    dense_attn_delta_kernel(const __grid_constant__ AttnBwdTensors p, float* delta) {
  const int num_heads = static_cast<int>(p.shape.num_heads_q);
  const int head = blockIdx.x % num_heads, lane = threadIdx.x % 16;
  const int64_t token = int64_t{blockIdx.x / num_heads} * kDeltaTokens + threadIdx.x / 16;
  const bool is_inside = token < p.packing.total_q;
  float sum = 0.f;
  if (is_inside) {
    const Element* o =
        static_cast<const Element*>(p.o.data) + token * p.o.token_stride + head * p.o.head_stride;
    const Element* dout = static_cast<const Element*>(p.dout.data) + token * p.dout.token_stride +
                          head * p.dout.head_stride;
    for (int col = lane * 8; col < p.shape.head_dim_v; col += 128) {
      const uint4 x = *reinterpret_cast<const uint4*>(o + col);
      const uint4 y = *reinterpret_cast<const uint4*>(dout + col);
      const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 u = device::unpack_pair<Element>(a[i]), v = device::unpack_pair<Element>(b[i]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
      }
    }
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(device::kFullMask, sum, offset);
  }
  if (!is_inside || lane != 0) return;
  const float lse = static_cast<const float*>(p.lse.data)[head * p.lse.head_stride + token];
  if (lse == -INFINITY) {
    sum = 0.f;
  } else if (p.dlse.data != nullptr) {
    sum -= static_cast<const float*>(p.dlse.data)[head * p.dlse.head_stride + token];
  }
  delta[head * p.packing.total_q + token] = sum;
}

}  // namespace fsattn
