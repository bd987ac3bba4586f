// gate_stats: the backward of the gate where the branches take their gate as a factor of P.
//
// Math    delta_x = <do, o_x> a row, dlogit_x = g_x * (1 - g_x) * delta_x, lse_x - ln g_x: see
//         BranchStats in params/gate.h. Gates per token: their gradient is summed over the heads.
// Shapes  params/gate.h. head_dim a multiple of 8, rows 16-byte aligned.
// Tiles   a CTA takes 16 tokens of 4 heads, for gates per token of all heads, 4 at a time. As many
//         lanes as a row has pieces of 16 bytes (8, 16 or 32) own a row at a time; the sums go through
//         shared memory, so that statistics leave 16 tokens of a head at a time.
// Bound   HBM: 4 passes over [total, heads, head_dim]. At 64K tokens, 32 heads, 128, bf16: 2.1 GB,
//         0.50 ms at 4.3 TB/s.
// Numbers fp32 sums in a fixed order.
#pragma once
#include "cuda/device/packing.cuh"
#include "cuda/gate/gate_kernel.cuh"

namespace fsattn {
namespace device {

inline constexpr int kStatsTokens = 16, kStatsHeads = 4;
inline constexpr int kStatsRows = kStatsTokens * kStatsHeads;

// A CTA's place: its first token, and the heads it walks over.
struct StatsTile {
  int64_t token;
  int first_head, last_head;
};

// Sigmoid of a logit and its logarithm, which does not underflow with it.
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float log_sigmoid(float x) {
  return fminf(x, 0.f) - log1pf(__expf(-fabsf(x)));
}

// <do, o_x> of the rows of 4 heads from `head0` on: sums[branch][head][token].
template <class Element, int kLanes>
__device__ __forceinline__ void sum_rows(const GateStatsParams& p, const StatsTile& tile, int head0,
                                         float (&sums)[kBranches][kStatsHeads][kStatsTokens]) {
  using Vector = Vector8<Element>;
  constexpr int kUnits = kGateThreads / kLanes;
  const int lane = threadIdx.x % kLanes, column = lane * kVector;
  const Rows* rows[kBranches] = {&p.cmp.o, &p.sel.o, &p.win.o};
#pragma unroll 2
  for (int unit = threadIdx.x / kLanes; unit < kStatsRows; unit += kUnits) {
    const int h = unit % kStatsHeads, t = unit / kStatsHeads;
    const int64_t token = tile.token + t, head = head0 + h;
    float dot[kBranches] = {};
    if (token < p.shape.total && head < tile.last_head && column < p.shape.head_dim) {
      const Vector dout = Vector::load(row_pointer<Element>(p.dout, token, head, column));
      Vector o[kBranches];
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
        o[b] = Vector::load(row_pointer<Element>(*rows[b], token, head, column));
      }
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) dot[b] = fmaf(dout.x[i], o[b].x[i], dot[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        dot[b] += __shfl_xor_sync(kFullMask, dot[b], offset);
      }
      if (lane == 0) sums[b][h][t] = dot[b];
    }
  }
}

__device__ __forceinline__ void store_row_stats(const BranchStats& branch, bool is_selected,
                                                const GateShape& shape, int64_t token, int64_t head,
                                                float lse, float log_gate, float delta) {
  // A row without keys: its o is 0 and its lse stays -inf, whatever the gate and dO.
  const bool has_keys = lse != -INFINITY;
  const float gated = has_keys ? lse - log_gate : lse;
  if (!has_keys) delta = 0.f;
  if (is_selected) {
    reinterpret_cast<float2*>(branch.row_stats)[token * shape.num_heads + head] = {gated * kLog2E,
                                                                                   delta};
  } else {
    branch.gated_lse[head * shape.total + token] = gated;
    branch.row_stats[head * shape.total + token] = delta;
  }
}

// The gradient of the logit of gate b at (token, head); its place in the tensor of the gates.
template <class Element>
__device__ __forceinline__ float logit_of(const GateStatsParams& p, int64_t token, int64_t head,
                                          int b) {
  return static_cast<float>(static_cast<const Element*>(
      p.gates.data)[token * p.gates.token_stride + head * p.gates.head_stride + b]);
}

template <class Element>
__device__ __forceinline__ void store_logit_gradient(const GateStatsParams& p, int64_t token,
                                                     int64_t head, int b, float gradient) {
  static_cast<Element*>(
      p.dgates.data)[token * p.dgates.token_stride + head * p.dgates.head_stride + b] =
      Element(gradient);
}

template <class Element, int kLanes>
__global__ void __launch_bounds__(kGateThreads)
    gate_stats_kernel(const __grid_constant__ GateStatsParams p, int head_chunks) {
  static_assert(kBranches * kStatsRows <= kGateThreads);
  __shared__ float sums[kBranches][kStatsHeads][kStatsTokens];
  const int num_heads = static_cast<int>(p.shape.num_heads);
  const bool is_per_token = p.dgates.head_stride == 0;
  const int chunk = blockIdx.x % head_chunks;
  const StatsTile tile{int64_t{blockIdx.x / head_chunks} * kStatsTokens, chunk * kStatsHeads,
                       head_chunks == 1 ? num_heads : min((chunk + 1) * kStatsHeads, num_heads)};
  // After the sums a thread owns one (branch, head, token).
  const int b = threadIdx.x / kStatsRows, h = threadIdx.x / kStatsTokens % kStatsHeads;
  const int t = threadIdx.x % kStatsTokens;
  const int64_t token = tile.token + t;
  const bool has_token = b < kBranches && token < p.shape.total;
  const BranchStats& branch = b == 0 ? p.cmp : b == 1 ? p.sel : p.win;
  float total = 0.f;  // over all heads, for gates per token: of threads with h = 0
  for (int head0 = tile.first_head; head0 < tile.last_head; head0 += kStatsHeads) {
    const bool has_row = has_token && head0 + h < tile.last_head;
    const int64_t head = head0 + h;
    float x = 0.f, lse = 0.f;  // under way while the rows are
    if (has_row) {
      x = logit_of<Element>(p, token, head, b);
      lse = static_cast<const float*>(branch.lse.data)[head * branch.lse.head_stride + token];
    }
    sum_rows<Element, kLanes>(p, tile, head0, sums);
    __syncthreads();
    if (has_row) {
      const float g = sigmoid(x);
      store_row_stats(branch, b == 1, p.shape, token, head, lse, log_sigmoid(x), sums[b][h][t]);
      if (!is_per_token) {
        store_logit_gradient<Element>(p, token, head, b, sums[b][h][t] * g * (1.f - g));
      }
    }
    if (is_per_token && has_token && h == 0) {
      for (int i = 0; i < min(kStatsHeads, tile.last_head - head0); ++i) total += sums[b][i][t];
    }
    __syncthreads();
  }
  if (is_per_token && has_token && h == 0) {
    const float g = sigmoid(logit_of<Element>(p, token, 0, b));
    store_logit_gradient<Element>(p, token, 0, b, total * g * (1.f - g));
  }
}

}  // namespace device

template <GateConfig kConfig>
void launch_gate_bwd_stats(const GateStatsParams& params, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const GateShape& shape = params.shape;
  if (shape.total == 0 || shape.num_heads == 0) return;
  FSATTN_ASSERT(shape.head_dim <= 32 * device::kVector);
  const bool is_per_token = params.dgates.head_stride == 0;
  const int64_t chunks = is_per_token ? 1 : ceil_div(shape.num_heads, int64_t{device::kStatsHeads});
  const int64_t ctas = ceil_div(shape.total, int64_t{device::kStatsTokens}) * chunks;
  FSATTN_ASSERT(ctas < (int64_t{1} << 31));
  const auto kernel = shape.head_dim <= 64    ? device::gate_stats_kernel<Element, 8>
                      : shape.head_dim <= 128 ? device::gate_stats_kernel<Element, 16>
                                              : device::gate_stats_kernel<Element, 32>;
  kernel<<<static_cast<unsigned>(ctas), device::kGateThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(params, static_cast<int>(chunks));
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
