// dense_attn_fwd, sm_90a: attention over an interval of keys with wgmma and producer warps.
//
// Math     S = softmax_scale Q K^T over the visible keys,  P = exp(S - lse),  O = P V,
//          lse = log sum exp S. No visible key: O = 0, lse = -inf.
// Shapes   params/attention.h, head_dim and head_dim_v up to 128; the visible interval:
//          device/band.h.
// Tiles    one CTA per (192 queries of a sequence, head), 64 keys a step.
// Roles    three consumer warpgroups of 64 queries: S with both operands in shared memory, O with P
//          in registers; while one does its softmax, the other two keep the tensor cores busy. Two
//          producer warps copy K and two copy V, by cp.async, since rows behind a sequence must
//          read as zero and a tensor map knows no sequences.
// Memory   Q 48 KB, four stages of K and of V 128 KB, one CTA an SM.
// Regs     O 64, S 32, P 16: 160 a consumer thread, 32 a producer thread.
// Bound    tensor cores: 256 FLOP a (query, key) at head_dim 128.
// Numbers  scores, sums and output fp32; P rounded to the input type before P V.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/panels_sm90.cuh"
#include "cuda/dense_attn/query_tile.cuh"
#include "cuda/device/softmax.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseFwdSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == kPanelDim && kConfig.head_dim_v == kPanelDim);
  static constexpr int kGroups = 3, kTileQ = kGroups * kPanelRows, kTileKv = kPanelRows;
  static constexpr int kStages = 4;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
  static constexpr int kKeysOffset = kGroups * kPanelTileBytes;
  static constexpr int kBarrierOffset = kKeysOffset + 2 * kStages * kPanelTileBytes;
  static constexpr int kSmemBytes = kBarrierOffset + 4 * kStages * 8;
};

// Byte addresses in the shared memory of a CTA. Operand 0 is K, 1 is V.
template <class Traits>
struct DenseFwdSm90Smem {
  uint32_t base;
  __device__ uint32_t queries(int group) const { return base + group * kPanelTileBytes; }
  __device__ uint32_t keys(int operand, int stage) const {
    return base + Traits::kKeysOffset + (operand * Traits::kStages + stage) * kPanelTileBytes;
  }
  __device__ uint32_t full(int operand, int stage) const {
    return base + Traits::kBarrierOffset + (operand * Traits::kStages + stage) * 8;
  }
  __device__ uint32_t empty(int operand, int stage) const {
    return full(operand, stage) + 2 * Traits::kStages * 8;
  }
};

// Two warps bring all tiles of one operand. A tile is announced when the next one is under way.
template <class Traits, class Element>
__device__ __forceinline__ void produce(const DenseFwdSm90Smem<Traits>& smem, int operand,
                                        const device::MatrixView<Element>& matrix, int last_step,
                                        int num_steps) {
  using namespace device;
  const int thread = threadIdx.x % 64, lane = threadIdx.x % kWarpSize;
  const auto part = thread_part(matrix, thread);
  const auto announce = [&](int n) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem.full(operand, n % Traits::kStages));
  };
  for (int n = 0; n < num_steps; ++n) {
    const int stage = n % Traits::kStages;
    // The consumers have left the tile that was here before; passes at once in the first round.
    mbarrier_wait(smem.empty(operand, stage), (n / Traits::kStages & 1) ^ 1);
    load_panels<64>(smem.keys(operand, stage), part, (last_step - n) * Traits::kTileKv, thread);
    cp_async_commit();
    if (n > 0) {
      cp_async_wait<1>();
      announce(n - 1);
    }
  }
  cp_async_wait<0>();
  announce(num_steps - 1);
}

// Passes over steps in which no query of the group sees a key. The waits keep a warp from arriving
// twice in one phase.
template <class Traits>
__device__ __forceinline__ void skip_steps(const DenseFwdSm90Smem<Traits>& smem, int first,
                                           int last) {
  for (int n = first; n <= last; ++n) {
    const int stage = n % Traits::kStages, parity = n / Traits::kStages & 1;
    for (int operand = 0; operand < 2; ++operand) {
      device::mbarrier_wait(smem.full(operand, stage), parity);
      if (threadIdx.x % device::kWarpSize == 0) device::mbarrier_arrive(smem.empty(operand, stage));
    }
  }
}

// Issues S = Q K^T of step n.
template <class Traits>
__device__ __forceinline__ void issue_scores(const DenseFwdSm90Smem<Traits>& smem, int n,
                                             float (&s)[32]) {
  const int stage = n % Traits::kStages;
  device::mbarrier_wait(smem.full(0, stage), n / Traits::kStages & 1);
  device::wgmma_fence();
  panel_product<typename Traits::Element>(s, smem.queries(threadIdx.x / 128), smem.keys(0, stage));
  device::wgmma_commit();
}

// Issues O += P V of step n.
template <class Traits>
__device__ __forceinline__ void issue_output(const DenseFwdSm90Smem<Traits>& smem, int n,
                                             const uint32_t (&prob)[1][8][2], float (&o)[64]) {
  const int stage = n % Traits::kStages;
  device::mbarrier_wait(smem.full(1, stage), n / Traits::kStages & 1);
  device::wgmma_fence();
  packed_product<typename Traits::Element>(o, prob, smem.keys(1, stage));
  device::wgmma_commit();
}

template <class Traits>
__device__ __forceinline__ void release(const DenseFwdSm90Smem<Traits>& smem, int operand, int n) {
  if (threadIdx.x % device::kWarpSize == 0) {
    device::mbarrier_arrive(smem.empty(operand, n % Traits::kStages));
  }
}

// One warpgroup: 64 queries over all steps. P V of a step runs during the softmax of the next one.
template <class Traits>
__device__ __forceinline__ void consume(const DenseFwdSm90Smem<Traits>& smem,
                                        const device::Band& band, const QueryTileWork& work,
                                        int num_steps,
                                        device::OnlineSoftmax<typename Traits::Element, 1>& softmax,
                                        float (&o)[64]) {
  using namespace device;
  constexpr int kTileKv = Traits::kTileKv;
  // The steps in which some query of this group sees a key.
  const int position = work.position + threadIdx.x / 128 * kPanelRows;
  const int last_step = work.last_key / kTileKv;
  const int last_seen = min(band.last_key(position + kPanelRows - 1), work.last_key);
  const int begin = last_seen < 0 ? num_steps : last_step - last_seen / kTileKv;
  const int end = min(last_step - band.first_key(position) / kTileKv, num_steps - 1);
  skip_steps(smem, 0, min(begin, num_steps) - 1);
  if (begin <= end) {
    float s[32];
    uint32_t prob[1][8][2];
    const auto mask = [&](int n) {
      const int base = (last_step - n) * kTileKv;
      if (base < work.full_first || base + kTileKv - 1 > work.full_last) {
        mask_scores(as_fragments(s), band, work, base);
      }
    };
    auto& scores = as_fragments(s)[0];
    issue_scores(smem, begin, s);
    wgmma_wait_group<0>();
    pin_registers(s);
    release(smem, 0, begin);
    mask(begin);
    float keep[2];
    softmax.adapt(0, scores, work.scale_log2, keep);  // there is no output yet
    softmax.exponentiate(0, scores, work.scale_log2);
    softmax.pack(prob[0], scores);
    for (int n = begin; n < end; ++n) {
      issue_scores(smem, n + 1, s);
      issue_output(smem, n, prob, o);
      wgmma_wait_group<1>();
      pin_registers(s);
      release(smem, 0, n + 1);
      mask(n + 1);
      const bool is_moved = softmax.adapt(0, scores, work.scale_log2, keep);
      softmax.exponentiate(0, scores, work.scale_log2);
      wgmma_wait_group<0>();
      pin_registers(o);
      release(smem, 1, n);
      if (is_moved) softmax.rescale(as_fragments(o)[0], keep);
      softmax.pack(prob[0], scores);
    }
    issue_output(smem, end, prob, o);
    wgmma_wait_group<0>();
    pin_registers(o);
    release(smem, 1, end);
  }
  skip_steps(smem, max(begin, end + 1), num_steps - 1);
}

template <class Traits>
__device__ __forceinline__ void run_query_group(const DenseFwdSm90Smem<Traits>& smem,
                                                const AttnFwdTensors& p, const device::Band& band,
                                                const QueryTileWork& work, int num_steps) {
  using namespace device;
  using Element = typename Traits::Element;
  const int thread = threadIdx.x, lane = thread % kWarpSize, row = thread / kWarpSize * 16;
  const int group = thread / 128;
  float o[64] = {};
  OnlineSoftmax<Element, 1> softmax;
  softmax.init();
  if (num_steps > 0) {
    const MatrixView<Element> q{static_cast<const Element*>(p.q.data) +
                                    work.token * p.q.token_stride + work.head * p.q.head_stride,
                                p.q.token_stride, work.num_queries,
                                static_cast<int>(p.shape.head_dim)};
    load_panels<128>(smem.queries(group), thread_part(q, thread % 128), group * kPanelRows,
                     thread % 128);
    cp_async_commit();
    cp_async_wait<0>();
    fence_async_proxy();
    sync_warpgroup(group);  // all four warps have loaded their part of Q
    consume<Traits>(smem, band, work, num_steps, softmax, o);
    sync_warpgroup(group);  // nobody's wgmma reads Q any more: it becomes the output stage
  }
  float lse[2];
  softmax.finish(as_fragments(o), lse);
  const int rows_left = work.num_queries - row;
  float* lse_out =
      static_cast<float*>(p.lse.data) + work.head * p.lse.head_stride + work.token + row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = i * 8 + lane / 4;
    if (lane % 4 == 0 && r < rows_left) lse_out[r] = lse[i];
  }
  store_rows(
      OutputRows<Element>{static_cast<Element*>(p.o.data) + (work.token + row) * p.o.token_stride +
                              work.head * p.o.head_stride,
                          p.o.token_stride, rows_left, static_cast<int>(p.shape.head_dim_v), false},
      smem.queries(group) + tile_bytes<kPanelDim>(row % kPanelRows), as_fragments(o), lane);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_fwd_sm90_kernel(const __grid_constant__ AttnFwdTensors p,
                               const __grid_constant__ device::KeySet keys) {
  using namespace device;
  using Element = typename Traits::Element;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ QueryTileWork work;
  const DenseFwdSm90Smem<Traits> smem{smem_address(memory)};
  if (threadIdx.x == 0) {
    work = find_query_tile<Traits::kTileQ>(p, keys);
    for (int operand = 0; operand < 2; ++operand) {
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        mbarrier_init(smem.full(operand, stage), 2);  // the producer warps of the operand
        mbarrier_init(smem.empty(operand, stage), Traits::kConsumerThreads / kWarpSize);
      }
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (work.num_queries <= 0) return;
  const int last_step = work.last_key / Traits::kTileKv;
  const int num_steps =
      work.first_key <= work.last_key ? last_step - work.first_key / Traits::kTileKv + 1 : 0;
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    run_query_group<Traits>(smem, p, keys.band, work, num_steps);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    if (num_steps == 0) return;
    const int operand = threadIdx.x / 64 % 2;
    const Rows& rows = operand == 0 ? p.k : p.v;
    const MatrixView<Element> matrix{
        static_cast<const Element*>(rows.data) + (operand == 0 ? work.k_offset : work.v_offset),
        rows.token_stride, work.num_keys,
        static_cast<int>(operand == 0 ? p.shape.head_dim : p.shape.head_dim_v)};
    produce<Traits>(smem, operand, matrix, last_step, num_steps);
  }
}

}  // namespace fsattn
