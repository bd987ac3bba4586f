// gate: the weighted sum of the three branches, and its gradients.
//
// Math    forward   o = g0 * o_cmp + g1 * o_sel + g2 * o_win
//         backward  do_x = g_x * do,  dg_x = <do, o_x>,  dlogit_x = g_x * (1 - g_x) * dg_x
//         g = sigmoid(gates) or gates. Gates per token: their gradient is summed over the heads.
// Shapes  params/gate.h. head_dim a multiple of 8, rows 16-byte aligned.
// Tiles   forward: a thread owns 8 elements (16 bytes) of one (token, head) row.
//         backward: a warp owns one (token, head), for gates per token all heads of a token; its lanes
//         walk over the row in 16-byte pieces and add up dg in a fixed order.
// Memory  no shared memory.
// Bound   HBM: forward 4, backward 7 passes over [total, heads, head_dim]. At 64K tokens, 32 heads, 128,
//         bf16: 2.1 and 3.8 GB, 0.50 and 0.87 ms at 4.3 TB/s.
// Numbers fp32 arithmetic, one rounding at each store.
#pragma once
#include "base/cuda_check.h"
#include "base/math.h"
#include "cuda/device/math.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/gate/gate.h"

namespace fsattn {
namespace device {

inline constexpr int kGateThreads = 256;
inline constexpr int kBranches = 3;

// The three gates of one row after their activation.
template <class Element>
__device__ void load_gates(const Rows& gates, GateActivation activation, int64_t token,
                           int64_t head, float (&g)[kBranches]) {
  const Element* from = static_cast<const Element*>(gates.data) + token * gates.token_stride +
                        head * gates.head_stride;
#pragma unroll
  for (int i = 0; i < kBranches; ++i) {
    const float x = static_cast<float>(from[i]);
    g[i] = activation == GateActivation::kSigmoid ? 1.f / (1.f + __expf(-x)) : x;
  }
}

template <class Element>
__global__ void __launch_bounds__(kGateThreads)
    gate_fwd_kernel(const __grid_constant__ GateFwdParams p, int64_t num_vectors) {
  const int64_t index = int64_t{blockIdx.x} * kGateThreads + threadIdx.x;
  if (index >= num_vectors) return;
  const int64_t vectors_a_row = p.shape.head_dim / kVector;
  const int64_t row = index / vectors_a_row;
  const int64_t column = index % vectors_a_row * kVector;
  const int64_t token = row / p.shape.num_heads;
  const int64_t head = row % p.shape.num_heads;

  float g[kBranches];
  load_gates<Element>(p.gates, p.shape.activation, token, head, g);
  const auto cmp = Vector8<Element>::load(row_pointer<Element>(p.o_cmp, token, head, column));
  const auto sel = Vector8<Element>::load(row_pointer<Element>(p.o_sel, token, head, column));
  const auto win = Vector8<Element>::load(row_pointer<Element>(p.o_win, token, head, column));
  Vector8<Element> o;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    o.x[i] = g[0] * cmp.x[i] + g[1] * sel.x[i] + g[2] * win.x[i];
  }
  o.store(row_pointer<Element>(p.o, token, head, column));
}

// One (token, head): writes the branch gradients of the row and returns <do, o_x> of this lane's part.
template <class Element>
__device__ void gate_bwd_row(const GateBwdParams& p, int64_t token, int64_t head,
                             const float (&g)[kBranches], float (&dot)[kBranches]) {
  const Rows* outputs[kBranches] = {&p.o_cmp, &p.o_sel, &p.o_win};
  const Rows* gradients[kBranches] = {&p.do_cmp, &p.do_sel, &p.do_win};
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t column = lane * kVector; column < p.shape.head_dim; column += kWarpSize * kVector) {
    const auto dout = Vector8<Element>::load(row_pointer<Element>(p.dout, token, head, column));
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      const auto o = Vector8<Element>::load(row_pointer<Element>(*outputs[b], token, head, column));
      Vector8<Element> grad;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        dot[b] += dout.x[i] * o.x[i];
        grad.x[i] = g[b] * dout.x[i];
      }
      grad.store(row_pointer<Element>(*gradients[b], token, head, column));
    }
  }
}

// Lane 0 writes the gradient of the gates (or of their logits) at (token, head).
template <class Element>
__device__ void store_gate_gradient(const GateBwdParams& p, int64_t token, int64_t head,
                                    const float (&g)[kBranches], float (&dot)[kBranches]) {
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      dot[b] += __shfl_xor_sync(kFullMask, dot[b], offset);
    }
  }
  if (threadIdx.x % kWarpSize != 0) return;
  Element* to = static_cast<Element*>(p.dgates.data) + token * p.dgates.token_stride +
                head * p.dgates.head_stride;
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const bool is_logit = p.shape.activation == GateActivation::kSigmoid;
    to[b] = Element(is_logit ? dot[b] * g[b] * (1.f - g[b]) : dot[b]);
  }
}

template <class Element>
__global__ void __launch_bounds__(kGateThreads)
    gate_bwd_kernel(const __grid_constant__ GateBwdParams p, int64_t num_units, int heads_a_unit) {
  const int64_t unit = (int64_t{blockIdx.x} * kGateThreads + threadIdx.x) / kWarpSize;
  if (unit >= num_units) return;
  const int64_t units_a_token = p.shape.num_heads / heads_a_unit;
  const int64_t token = unit / units_a_token;
  const int64_t first_head = unit % units_a_token * heads_a_unit;

  // heads_a_unit is 1, or all heads: then they share their gates.
  float g[kBranches], dot[kBranches] = {};
  load_gates<Element>(p.gates, p.shape.activation, token, first_head, g);
  for (int64_t head = first_head; head < first_head + heads_a_unit; ++head) {
    gate_bwd_row<Element>(p, token, head, g, dot);
  }
  store_gate_gradient<Element>(p, token, first_head, g, dot);
}

}  // namespace device

template <GateConfig kConfig>
void launch_gate_fwd(const GateFwdParams& params, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const GateShape& shape = params.shape;
  const int64_t num_vectors = shape.total * shape.num_heads * (shape.head_dim / device::kVector);
  if (num_vectors == 0) return;
  const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(num_vectors, device::kGateThreads));
  device::gate_fwd_kernel<Element>
      <<<ctas, device::kGateThreads, 0, static_cast<cudaStream_t>(stream)>>>(params, num_vectors);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <GateConfig kConfig>
void launch_gate_bwd(const GateBwdParams& params, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const GateShape& shape = params.shape;
  // Gates per head may be broadcast over them; their gradient never is.
  const bool is_per_token = params.dgates.head_stride == 0;
  const int64_t heads_a_unit = is_per_token ? shape.num_heads : 1;
  const int64_t num_units = shape.total * (shape.num_heads / heads_a_unit);
  if (num_units == 0) return;
  const auto ctas =
      static_cast<unsigned>(ceil_div<int64_t>(num_units * device::kWarpSize, device::kGateThreads));
  device::gate_bwd_kernel<Element>
      <<<ctas, device::kGateThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          params, num_units, static_cast<int>(heads_a_unit));
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
