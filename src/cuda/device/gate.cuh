// The gate of one row: o = g0 * o_cmp + g1 * o_sel + g2 * o_win (params/gate.h).
#pragma once
#include "cuda/device/vector.cuh"
#include "params/gate.h"

namespace fsattn::device {

inline constexpr int kBranches = 3;

// The three gates of one row after their activation.
template <class Element>
__device__ __forceinline__ void load_gates(const Rows& gates, GateActivation activation,
                                           int64_t token, int64_t head, float (&g)[kBranches]) {
  const Element* from = static_cast<const Element*>(gates.data) + token * gates.token_stride +
                        head * gates.head_stride;
#pragma unroll
  for (int i = 0; i < kBranches; ++i) {
    const float x = static_cast<float>(from[i]);
    g[i] = activation == GateActivation::kSigmoid ? 1.f / (1.f + __expf(-x)) : x;
  }
}

// 16 bytes of a row of o from those of the branches.
template <class Element>
__device__ __forceinline__ Vector8<Element> mix_branches(const float (&g)[kBranches],
                                                         const uint4& cmp, const uint4& sel,
                                                         const uint4& win) {
  const auto x = Vector8<Element>::unpack(cmp), y = Vector8<Element>::unpack(sel),
             z = Vector8<Element>::unpack(win);
  Vector8<Element> o;
#pragma unroll
  for (int i = 0; i < kVector; ++i) o.x[i] = g[0] * x.x[i] + g[1] * y.x[i] + g[2] * z.x[i];
  return o;
}

template <class Element>
__device__ __forceinline__ uint4 load_chunk(const Rows& rows, int64_t token, int64_t head,
                                            int64_t column) {
  return *reinterpret_cast<const uint4*>(row_pointer<const Element>(rows, token, head, column));
}

}  // namespace fsattn::device
