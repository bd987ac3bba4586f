// dense_attn_bwd, sm_90a: all gradients of attention over an interval of keys in one kernel, with
// wgmma.
//
// Math     as dense_attn_bwd_dkv_sm80.cuh, and dQ = softmax_scale dS K: five products.
// Shapes   head_dim and head_dim_v up to 128.
// Tiles    one CTA per (128 keys of a sequence, KV head, part of the group's heads), 64 queries a
//          step.
// Roles    two warpgroups of 64 keys each: S^T and dP^T with both operands in shared memory, dV and
//          dK with P^T and dS^T in registers. dS^T of both goes to shared memory, where a third
//          warpgroup takes it for dQ, 64 columns at a time. They wait for each other's data alone,
//          so that one's exponentials run during another's products. One warp brings Q, dO, lse and
//          delta. Two threads add the dQ of a step to the sum in global memory. A warpgroup whose
//          keys no query of a step sees passes it over.
// Order    the CTAs that see the same queries add to their dQ in the order of their keys, each when
//          the one before has announced that it is done: the result does not depend on timing. Work
//          is numbered in the order in which CTAs start, so that a CTA waits for running ones alone
//          (dense_attn_bwd_order_sm90.cuh).
// Memory   K and V 64 KB, three stages of Q and dO 96 KB, two of dS 32 KB, dQ 32 KB: one CTA an SM.
// Regs     dK 64, dV 64, S or dP 32, P and dS 32: 208 a thread of the keys. dQ 32: 64.
// Bound    tensor cores: 1280 FLOP a (query, key) at head_dim 128.
// Numbers  as dense_attn_bwd_dkv_sm80.cuh; sums over keys in dQ are fp32, rounded by
//          dense_attn_round_dq.cuh.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_movers_sm90.cuh"
#include "cuda/device/wgmma_mn_sm90.cuh"

namespace fsattn {

// dS = P * (dP - delta), from the packed P.
template <class Element>
__device__ __forceinline__ void pack_score_gradient(uint32_t (&ds)[1][8][2],
                                                    const float (&dp)[1][8][4],
                                                    const uint32_t (&prob)[1][8][2],
                                                    const float2* delta, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 d = delta[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = device::unpack_pair<Element>(prob[0][n][half]);
      ds[0][n][half] = device::pack_pair<Element>(x.x * (dp[0][n][2 * half] - d.x),
                                                  x.y * (dp[0][n][2 * half + 1] - d.y));
    }
  }
}

// Writes dS^T of a warp's 16 keys as the operand of dQ.
__device__ __forceinline__ void store_score_gradient(uint32_t tile, const uint32_t (&ds)[1][8][2]) {
  using namespace device;
  const int thread = reread_thread_index(), lane = thread % kWarpSize;
  const uint32_t to = lane_rows16<64>(tile + thread / kWarpSize * 2048, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    stmatrix_x4(chunk_pair(to, i), ds[0][2 * i][0], ds[0][2 * i][1], ds[0][2 * i + 1][0],
                ds[0][2 * i + 1][1]);
  }
}

// acc = dS K: 64 queries, kKeys keys from those of half `half` on, the 64 columns of a panel.
template <class Traits, int kKeys>
__device__ __forceinline__ void query_gradient_product(const DenseBwdSm90Smem<Traits>& smem, int n,
                                                       int half, int panel, float (&acc)[32]) {
  device::wgmma_fence();
  const uint32_t ds = device::mn_major(smem.scores(n) + half * device::kPanelRows * 128);
  const uint32_t k = device::mn_major(smem.keys(0, half) + panel * device::kPanelBytes);
#pragma unroll
  for (int kk = 0; kk < kKeys / 16; ++kk) {
    const uint32_t key_at = (kk / 4 * device::kPanelTileBytes + kk % 4 * 2048) >> 4;
    device::wgmma_mn_m64n64k16<typename Traits::Element>(
        acc, device::descriptor(ds + kk * (2048 >> 4)), device::descriptor(k + key_at), kk > 0);
  }
  device::wgmma_commit();
  device::wgmma_wait_group<0>();
  device::pin_registers(acc);
}

// Writes the 64 columns of a panel of dQ for the threads that add it to the sums: rows of 512 bytes,
// chunks of 32 bytes swizzled by the row, which spreads the eight rows of a warp's store over all
// banks. The sums keep this order.
template <class Traits>
__device__ __forceinline__ void store_query_gradient(const DenseBwdSm90Smem<Traits>& smem,
                                                     int panel, const float (&dq)[32]) {
  const int thread = device::reread_thread_index(), lane = thread % device::kWarpSize;
  const int row = thread / device::kWarpSize % 4 * 16 + lane / 4;
  const uint32_t to = smem.dq() + row * device::kPanelDim * 4 + panel * 256 + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t at = to + ((i ^ lane / 4) << 5);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(at + half * 8 * device::kPanelDim * 4),
                   "f"(dq[4 * i + 2 * half]), "f"(dq[4 * i + 2 * half + 1])
                   : "memory");
    }
  }
}

// The warpgroup of dQ.
template <class Traits>
__device__ __forceinline__ void consume_scores(const DenseBwdSm90Smem<Traits>& smem,
                                               const HalvedTileWork& work) {
  using namespace device;
  const int lane = threadIdx.x % kWarpSize;
  int n = 0;
  for (Step at = first_step(work); at.head <= work.last_head; at = next_step(work, at), ++n) {
    const bool first = work.sees(0, at.index), second = work.sees(1, at.index);
    mbarrier_wait(smem.scores_full(n), n / 2 & 1);
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      float dq[32];
      if (first && second) {
        query_gradient_product<Traits, 128>(smem, n, 0, panel, dq);
      } else {
        query_gradient_product<Traits, 64>(smem, n, second ? 1 : 0, panel, dq);
      }
      if (panel == 0) {
        mbarrier_wait(smem.dq_empty(), (n & 1) ^ 1);
      } else if (lane == 0) {
        mbarrier_arrive(smem.scores_empty(n));
      }
      store_query_gradient(smem, panel, dq);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem.dq_full(n));
  }
}

// Hands over dS^T of step n.
template <class Traits>
__device__ __forceinline__ void hand_over_scores(const DenseBwdSm90Smem<Traits>& smem, int n,
                                                 const uint32_t (&ds)[1][8][2], int lane) {
  using namespace device;
  mbarrier_wait(smem.scores_empty(n), (n / 2 & 1) ^ 1);
  store_score_gradient(smem.scores(n), ds);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(smem.scores_full(n));
}

// Clears P where a query does not see a key of the warp. Few steps come here: nothing that only they
// need should live in registers.
template <class Traits>
__device__ __forceinline__ void mask_step(uint32_t (&prob)[1][8][2], int reach,
                                          const HalvedTileWork& work, int first_query) {
  const int thread = device::reread_thread_index(), lane = thread % device::kWarpSize;
  const int* full = work.full[thread / 128];
  if (first_query >= full[0] && first_query + Traits::kTileQ - 1 <= full[1]) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int lane_query = first_query + lane % 4 * 2;
    const int start = work.starts[thread / device::kWarpSize * 16 + i * 8 + lane / 4];
    const int low = start - lane_query;
    const int high = min(start + reach, work.num_queries - 1) - lane_query;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (n * 8 < low || n * 8 > high) prob[0][n][i] &= 0xffff0000u;
      if (n * 8 + 1 < low || n * 8 + 1 > high) prob[0][n][i] &= 0x0000ffffu;
    }
  }
}

// A half of the keys that nobody sees in this step. The waits keep a warp from arriving twice in
// one phase.
template <class Traits>
__device__ __forceinline__ void skip_step(const DenseBwdSm90Smem<Traits>& smem, int n, int lane) {
  using namespace device;
  const int stage = n % Traits::kStages;
  mbarrier_wait(smem.full(stage), n / Traits::kStages & 1);
  mbarrier_wait(smem.scores_empty(n), (n / 2 & 1) ^ 1);
  if (lane != 0) return;
  mbarrier_arrive(smem.scores_full(n));
  mbarrier_arrive(smem.empty(stage));
}

// A warpgroup of the keys: 64 of them over all steps.
template <class Traits>
__device__ __forceinline__ void consume_queries(const DenseBwdSm90Smem<Traits>& smem,
                                                const device::Band& band,
                                                const HalvedTileWork& work, float (&dk)[64],
                                                float (&dv)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, group = threadIdx.x / 128;
  int n = 0;
  for (Step at = first_step(work); at.head <= work.last_head; at = next_step(work, at), ++n) {
    if (!work.sees(reread_thread_index() / 128, at.index)) {
      skip_step(smem, n, lane);
      continue;
    }
    const int stage = n % Traits::kStages;
    const uint32_t q_tile = smem.queries(0, stage), dout_tile = smem.queries(1, stage);
    mbarrier_wait(smem.full(stage), n / Traits::kStages & 1);
    float s[32];
    wgmma_fence();
    device::panel_product<Element>(s, smem.keys(0, group), q_tile);
    wgmma_commit();
    wgmma_wait_group<0>();
    pin_registers(s);
    uint32_t prob[1][8][2];
    probabilities<Traits>(prob, device::as_fragments(s), smem.stats(0, stage), work.scale_log2,
                          lane);
    mask_step<Traits>(prob, band.reach, work, at.index * Traits::kTileQ);
    float dp[32];  // not before S has been used: there are no registers for both
    wgmma_fence();
    device::panel_product<Element>(dp, smem.keys(1, group), dout_tile);
    wgmma_commit();
    device::packed_product<Element>(dv, prob, dout_tile);
    wgmma_commit();
    wgmma_wait_group<1>();  // dP; dV goes on
    pin_registers(dp);
    uint32_t ds[1][8][2];
    pack_score_gradient<Element>(ds, device::as_fragments(dp), prob, smem.stats(1, stage), lane);
    hand_over_scores(smem, n, ds, lane);
    wgmma_fence();
    device::packed_product<Element>(dk, ds, q_tile);
    wgmma_commit();
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(smem.empty(stage));
  }
  pin_registers(dk);
  pin_registers(dv);
}

// Writes the 16 rows of one warp, staged over the tile of its warpgroup.
template <class Traits>
__device__ __forceinline__ void store_key_gradient(const DenseBwdSm90Smem<Traits>& smem,
                                                   const AttnBwdTensors& p,
                                                   const DenseBwdBuffers& buffers,
                                                   const KeyTileWork& work, int operand,
                                                   float (&acc)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, row = warp * 16;
  const Rows& rows = operand == 0 ? p.dk : p.dv;
  const int cols = static_cast<int>(operand == 0 ? p.shape.head_dim : p.shape.head_dim_v);
  const int64_t partial_stride = p.shape.num_heads_kv * cols;
  float* partial = nullptr;
  if (buffers.splits > 1) {
    partial = (operand == 0 ? buffers.partial_dk : buffers.partial_dv) +
              (int64_t{work.split} * buffers.partial_rows + work.key_row + row) * partial_stride +
              work.kv_head * cols;
  }
  store_gradient(
      device::as_fragments(acc), operand == 0 ? static_cast<float>(p.shape.softmax_scale) : 1.f,
      OutputRows<Element>{static_cast<Element*>(rows.data) +
                              (int64_t{work.key_row} + row) * rows.token_stride +
                              work.kv_head * rows.head_stride,
                          rows.token_stride, work.num_keys - row, cols, p.accumulate_dkv},
      partial, partial_stride,
      smem.keys(operand, warp / 4) + tile_bytes<device::kPanelDim>(warp % 4 * 16), lane);
}

// Copies the 64 rows of K and V of a consumer warpgroup, and waits for the calling thread's part.
template <class Traits>
__device__ __forceinline__ void load_key_group(const DenseBwdSm90Smem<Traits>& smem,
                                               const AttnBwdTensors& p, const KeyTileWork& work,
                                               int group) {
  using namespace device;
  using Element = typename Traits::Element;
  const int thread = threadIdx.x % 128;
  const MatrixView<Element> k{static_cast<const Element*>(p.k.data) + work.k_offset,
                              p.k.token_stride, work.num_keys, static_cast<int>(p.shape.head_dim)};
  const MatrixView<Element> v{static_cast<const Element*>(p.v.data) + work.v_offset,
                              p.v.token_stride, work.num_keys,
                              static_cast<int>(p.shape.head_dim_v)};
  device::load_panels<128>(smem.keys(0, group), thread_part(k, thread), group * device::kPanelRows,
                           thread);
  device::load_panels<128>(smem.keys(1, group), thread_part(v, thread), group * device::kPanelRows,
                           thread);
  cp_async_commit();
  cp_async_wait<0>();
  fence_async_proxy();
}

// The warpgroup of dQ tells those of dK, dV that its last product has read K. An arrival, since all who
// wait at an aligned barrier must do so in one instruction.
template <class Traits>
__device__ __forceinline__ void announce_keys_read() {
  asm volatile("bar.arrive %0, %1;" ::"n"(Traits::kGroups + 1), "n"(Traits::kConsumerThreads)
               : "memory");
}

template <class Traits>
__device__ __forceinline__ void wait_keys_read() {
  asm volatile("bar.sync %0, %1;" ::"n"(Traits::kGroups + 1), "n"(Traits::kConsumerThreads)
               : "memory");
}

template <class Traits>
__device__ __forceinline__ void run_key_group(const DenseBwdSm90Smem<Traits>& smem,
                                              const AttnBwdTensors& p, const device::Band& band,
                                              const DenseBwdBuffers& buffers,
                                              HalvedTileWork& work) {
  const int group = threadIdx.x / 128;
  float dk[64] = {}, dv[64] = {};
  if (work.first_query <= work.last_query) {
    const int key = threadIdx.x % 128;
    if (key < device::kPanelRows) find_start(work, band, group * device::kPanelRows + key);
    load_key_group(smem, p, work, group);
    device::sync_warpgroup(group);  // all four warps have loaded their part of K and V
    consume_queries<Traits>(smem, band, work, dk, dv);
    wait_keys_read<Traits>();  // by any wgmma: the output is staged there
  }
  store_key_gradient<Traits>(smem, p, buffers, work, 0, dk);
  store_key_gradient<Traits>(smem, p, buffers, work, 1, dv);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_bwd_sm90_kernel(const __grid_constant__ AttnBwdTensors p,
                               const __grid_constant__ device::KeySet keys,
                               const __grid_constant__ DenseBwdBuffers buffers,
                               const __grid_constant__ KeyTileOrder order,
                               const __grid_constant__ CUtensorMap q_map,
                               const __grid_constant__ CUtensorMap dout_map) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ HalvedTileWork work;
  const DenseBwdSm90Smem<Traits> smem{memory, smem_address(memory)};
  if (threadIdx.x == 0) {
    const int parts = static_cast<int>(p.shape.num_heads_kv) * buffers.splits;
    const KeyTileIndex index = find_key_tile_index(
        atomicAdd(buffers.turns, 1), static_cast<int>(gridDim.x) / parts, parts, order);
    static_cast<KeyTileWork&>(work) =
        find_key_tile<Traits::kTileKv>(p, keys, buffers.splits, index);
    work.walk = find_walk(work, index.part, parts, keys.band.reach == Band::kUnlimited,
                          Traits::kTileKv, Traits::kTileQ);
    find_halves<Traits>(work, keys.band);
    init_barriers(smem);
  }
  __syncthreads();
  if (work.num_keys <= 0) return;
  const bool has_steps = work.first_query <= work.last_query;
  if (threadIdx.x < Traits::kKeyThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kKeyRegisters));
    run_key_group<Traits>(smem, p, keys.band, buffers, work);
  } else if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kQueryRegisters));
    if (!has_steps) return;
    consume_scores<Traits>(smem, work);
    announce_keys_read<Traits>();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kMoverRegisters));
    if (!has_steps) return;
    const int warp = (threadIdx.x - Traits::kConsumerThreads) / kWarpSize;
    if (warp == 0) {
      produce_queries<Traits>(smem, p, &q_map, &dout_map, buffers.delta, work);
    } else if (warp >= 2 && threadIdx.x % kWarpSize == 0) {
      add_query_gradients<Traits>(smem, p, keys.band, buffers, work);
    }
  }
}

}  // namespace fsattn
