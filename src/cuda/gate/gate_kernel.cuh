// gate: the weighted sum of the three branches, and its gradients.
//
// Math    forward   o = g0 * o_cmp + g1 * o_sel + g2 * o_win
//         backward  do_x = g_x * do,  dg_x = <do, o_x>,  dlogit_x = g_x * (1 - g_x) * dg_x
//         g = sigmoid(gates) or gates. Gates per token: their gradient is summed over the heads.
// Shapes  params/gate.h. head_dim a multiple of 8, rows 16-byte aligned.
// Tiles   forward: a thread owns 8 elements (16 bytes) of one (token, head) row.
//         backward: as many lanes as a row has pieces of 16 bytes (8, 16 or 32) own one (token, head),
//         for gates per token one head of the token after the other; dg is added up in a fixed order.
// Memory  no shared memory.
// Bound   HBM: forward 4, backward 7 passes over [total, heads, head_dim]. At 64K tokens, 32 heads, 128,
//         bf16: 2.1 and 3.8 GB, 0.50 and 0.87 ms at 4.3 TB/s.
// Numbers fp32 arithmetic, one rounding at each store.
#pragma once
#include <algorithm>

#include "base/check.h"
#include "base/cuda_check.h"
#include "base/math.h"
#include "cuda/device/fast_div.cuh"
#include "cuda/device/gate.cuh"
#include "cuda/device/math.cuh"
#include "cuda/gate/gate.h"

namespace fsattn {
namespace device {

inline constexpr int kGateThreads = 256;
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
  const uint4 cmp = load_chunk<Element>(p.o_cmp, token, head, column);
  const uint4 sel = load_chunk<Element>(p.o_sel, token, head, column);
  const uint4 win = load_chunk<Element>(p.o_win, token, head, column);
  mix_branches<Element>(g, cmp, sel, win).store(row_pointer<Element>(p.o, token, head, column));
}

// What the host tells the backward beside its tensors. A unit owns one value of dgates.
struct GateBwdUnits {
  int64_t first_token;
  int count;
  int heads_a_unit;  // 1, or all heads, which then share their gates
  FastDiv units_a_token;
};

// One piece of a (token, head): writes the branch gradients and adds its part of <do, o_x>. All loads
// go out before the first store, behind which the compiler may not move them.
template <class Element>
__device__ __forceinline__ void gate_bwd_piece(const GateBwdParams& p, int64_t token, int64_t head,
                                               int64_t column, const float (&g)[kBranches],
                                               float (&dot)[kBranches]) {
  using Vector = Vector8<Element>;
  const Vector dout = Vector::load(row_pointer<Element>(p.dout, token, head, column));
  const Vector o[kBranches] = {Vector::load(row_pointer<Element>(p.o_cmp, token, head, column)),
                               Vector::load(row_pointer<Element>(p.o_sel, token, head, column)),
                               Vector::load(row_pointer<Element>(p.o_win, token, head, column))};
  const Rows* gradients[kBranches] = {&p.do_cmp, &p.do_sel, &p.do_win};
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    Vector grad;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dot[b] += dout.x[i] * o[b].x[i];
      grad.x[i] = g[b] * dout.x[i];
    }
    grad.store(row_pointer<Element>(*gradients[b], token, head, column));
  }
}

// The gradient of the gates (or of their logits) at (token, head), from their sum over a row.
template <class Element>
__device__ void store_gate_gradient(const GateBwdParams& p, int64_t token, int64_t head,
                                    const float (&g)[kBranches], const float (&dot)[kBranches]) {
  Element* to = static_cast<Element*>(p.dgates.data) + token * p.dgates.token_stride +
                head * p.dgates.head_stride;
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const bool is_logit = p.shape.activation == GateActivation::kSigmoid;
    to[b] = Element(is_logit ? dot[b] * g[b] * (1.f - g[b]) : dot[b]);
  }
}

template <class Element, int kLanes>
__global__ void __launch_bounds__(kGateThreads)
    gate_bwd_kernel(const __grid_constant__ GateBwdParams p,
                    const __grid_constant__ GateBwdUnits units) {
  constexpr int kUnits = kGateThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int own = blockIdx.x * kUnits + threadIdx.x / kLanes;
  const bool is_unit = own < units.count;  // no thread leaves: units of a warp add up together
  const int unit = is_unit ? own : 0;
  const int in_chunk = units.units_a_token.quotient(unit);
  const int64_t token = units.first_token + in_chunk;
  const int64_t first_head =
      int64_t{units.units_a_token.remainder(unit, in_chunk)} * units.heads_a_unit;
  const int column = lane * kVector;

  float g[kBranches], dot[kBranches] = {};
  load_gates<Element>(p.gates, p.shape.activation, token, first_head, g);
  if (is_unit && column < p.shape.head_dim) {
    for (int64_t head = first_head; head < first_head + units.heads_a_unit; ++head) {
      gate_bwd_piece<Element>(p, token, head, column, g, dot);
    }
  }
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      dot[b] += __shfl_xor_sync(kFullMask, dot[b], offset);
    }
  }
  if (is_unit && lane == 0) store_gate_gradient<Element>(p, token, first_head, g, dot);
}

template <class Element, int kLanes>
void launch_gate_bwd_units(const GateBwdParams& p, const GateBwdUnits& units, cudaStream_t stream) {
  constexpr int kUnits = kGateThreads / kLanes;
  const auto ctas = static_cast<unsigned>(ceil_div(units.count, kUnits));
  gate_bwd_kernel<Element, kLanes><<<ctas, kGateThreads, 0, stream>>>(p, units);
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
  const int64_t units_a_token = shape.num_heads / heads_a_unit;
  FSATTN_ASSERT(shape.head_dim <= 32 * device::kVector);
  const auto launch = shape.head_dim <= 64    ? device::launch_gate_bwd_units<Element, 8>
                      : shape.head_dim <= 128 ? device::launch_gate_bwd_units<Element, 16>
                                              : device::launch_gate_bwd_units<Element, 32>;
  // Units are counted in 31 bits; a launch takes as many tokens as that allows.
  constexpr int64_t kMaxUnits = (int64_t{1} << 31) - 1 - device::kGateThreads;
  const int64_t chunk = kMaxUnits / units_a_token;
  for (int64_t first = 0; first < shape.total; first += chunk) {
    const int64_t tokens = std::min(chunk, shape.total - first);
    launch(params,
           {first, static_cast<int>(tokens * units_a_token), static_cast<int>(heads_a_unit),
            device::FastDiv(units_a_token)},
           static_cast<cudaStream_t>(stream));
    FSATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace fsattn
