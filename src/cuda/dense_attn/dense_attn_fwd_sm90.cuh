// dense_attn_fwd, sm_90a: attention over an interval of keys with wgmma and producer warps.
//
// Math     S = softmax_scale Q K^T over the visible keys,  P = exp(S - lse),  O = P V,
//          lse = log sum exp S. No visible key: O = 0, lse = -inf.
// Shapes   params/attention.h, head_dim and head_dim_v up to 128; the visible interval:
//          device/band.h.
// Tiles    one CTA an SM takes every n-th tile (192 queries of a sequence, head); 128 keys a step.
// Roles    three consumer warpgroups of 64 queries: S with both operands in shared memory, O with P
//          in registers; while one does its softmax, the other two keep the tensor cores busy. One
//          producer warp brings K and V by tensor copies and runs ahead into the next tile, another
//          finds the tiles of the CTA. Queries are copied by the consumers, the next ones while they
//          work on these.
// Memory   two buffers of Q 96 KB, two stages of K and of V 128 KB.
// Regs     O 64, S or P 64: 160 a consumer thread, 32 a producer thread.
// Bound    tensor cores: 256 FLOP a (query, key) at head_dim 128; behind them shared memory, from
//          which S of 128 keys at a time takes 48 bytes where S of 64 takes 64.
// Numbers  scores, sums and output fp32; P rounded to the input type before P V.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/query_tile.cuh"
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/device/wgmma_ss_n128_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseFwdSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == device::kPanelDim && kConfig.head_dim_v == device::kPanelDim);
  static constexpr int kGroups = 3, kTileQ = kGroups * device::kPanelRows, kTileKv = 128;
  static constexpr int kPanelBytes = kTileKv * 128, kKvBytes = 2 * kPanelBytes;
  static constexpr int kStages = 2;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
  static constexpr int kWorkBuffers = 4;
  static constexpr int kKeysOffset = 2 * kGroups * device::kPanelTileBytes;
  static constexpr int kBarrierOffset = kKeysOffset + 2 * kStages * kKvBytes;
  static constexpr int kSmemBytes = kBarrierOffset + (4 * kStages + 2 * kWorkBuffers + 1) * 8;
  using Scores = float[kTileKv / 2];
  using Packed = uint32_t[1][kTileKv / 8][2];
};

// A tile among those of a CTA.
struct FwdTileWork : QueryTileWork {
  int first_step;        // steps are counted on over the tiles
  int group_full[3][2];  // the first and the last key that all queries of a group see
};

// Byte addresses in the shared memory of a CTA. Operand 0 is K, 1 is V.
template <class Traits>
struct DenseFwdSm90Smem {
  uint32_t base;
  __device__ uint32_t queries(int tile, int group) const {
    return base + (tile % 2 * Traits::kGroups + group) * device::kPanelTileBytes;
  }
  __device__ uint32_t keys(int operand, int stage) const {
    return base + Traits::kKeysOffset + (operand * Traits::kStages + stage) * Traits::kKvBytes;
  }
  __device__ uint32_t full(int operand, int stage) const {
    return base + Traits::kBarrierOffset + (operand * Traits::kStages + stage) * 8;
  }
  __device__ uint32_t empty(int operand, int stage) const {
    return full(operand, stage) + 2 * Traits::kStages * 8;
  }
  __device__ uint32_t work_full(int tile) const {
    return base + Traits::kBarrierOffset + (4 * Traits::kStages + tile % Traits::kWorkBuffers) * 8;
  }
  __device__ uint32_t work_empty(int tile) const {
    return work_full(tile) + Traits::kWorkBuffers * 8;
  }
  __device__ uint32_t tail() const {
    return base + Traits::kBarrierOffset + (4 * Traits::kStages + 2 * Traits::kWorkBuffers) * 8;
  }
};

// The tiles of a CTA are counted from 0. Their steps are counted on over all tiles, so that the
// stages of K and V are used in turn.
template <class Traits>
__device__ __forceinline__ int num_steps_of(const FwdTileWork& work) {
  if (work.num_queries <= 0 || work.first_key > work.last_key) return 0;
  return work.last_key / Traits::kTileKv - work.first_key / Traits::kTileKv + 1;
}

template <class Traits>
__device__ __forceinline__ const FwdTileWork& wait_for_work(const DenseFwdSm90Smem<Traits>& smem,
                                                            const FwdTileWork* works, int tile) {
  device::mbarrier_wait(smem.work_full(tile), tile / Traits::kWorkBuffers & 1);
  return works[tile % Traits::kWorkBuffers];
}

template <class Traits>
__device__ __forceinline__ void release_work(const DenseFwdSm90Smem<Traits>& smem, int tile) {
  __syncwarp();
  if (threadIdx.x % device::kWarpSize == 0) device::mbarrier_arrive(smem.work_empty(tile));
}

// Starts the copy of a tile of K or V, which arrives on `bar`.
template <class Traits>
__device__ __forceinline__ void copy_keys(const DenseFwdSm90Smem<Traits>& smem,
                                          const CUtensorMap* map, int operand, int stage, int head,
                                          int row, uint32_t bar) {
  const uint64_t policy = device::l2_evict_last();
  device::mbarrier_arrive_expect(bar, Traits::kKvBytes);
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
    device::tma_load_3d(smem.keys(operand, stage) + panel * Traits::kPanelBytes, map,
                        panel * device::kTmaColumns, head, row, bar, policy);
  }
}

// One warp brings all tiles of K and V.
template <class Traits>
__device__ __forceinline__ void produce(const DenseFwdSm90Smem<Traits>& smem,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        const FwdTileWork& work, uint32_t& tail_parity) {
  using namespace device;
  const int lane = threadIdx.x % kWarpSize;
  const int stop = work.first_step + num_steps_of<Traits>(work);
  int key = work.last_key / Traits::kTileKv * Traits::kTileKv;
  for (int n = work.first_step; n < stop; ++n, key -= Traits::kTileKv) {
    const int stage = n % Traits::kStages, rows = work.num_keys - key;
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      // The consumers have left the tile that was here before; passes at once in the first round.
      mbarrier_wait(smem.empty(operand, stage), (n / Traits::kStages & 1) ^ 1);
      // A tensor map knows no sequences. P of missing keys is 0, but 0 times what the next sequence
      // has there may be NaN.
      const bool is_cut = operand == 1 && rows < Traits::kTileKv;
      if (lane == 0) {
        copy_keys(smem, operand == 0 ? k_map : v_map, operand, stage, work.kv_head,
                  work.key_row + key, is_cut ? smem.tail() : smem.full(operand, stage));
      }
      if (!is_cut) continue;
      mbarrier_wait(smem.tail(), tail_parity);
      tail_parity ^= 1;
      clear_panel_rows<Traits::kTileKv>(smem.keys(operand, stage), rows, lane);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(smem.full(operand, stage));
    }
  }
}

// Finds the work of the CTA, tile by tile.
template <class Traits>
__device__ __forceinline__ void find_works(const DenseFwdSm90Smem<Traits>& smem,
                                           const AttnFwdTensors& p, const device::KeySet& keys,
                                           FwdTileWork* works, int num_tiles) {
  using namespace device;
  int next_step = 0, tile = 0;
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x, ++tile) {
    mbarrier_wait(smem.work_empty(tile), (tile / Traits::kWorkBuffers & 1) ^ 1);
    FwdTileWork& work = works[tile % Traits::kWorkBuffers];
    static_cast<QueryTileWork&>(work) = find_query_tile<Traits::kTileQ>(p, keys, index, num_tiles);
#pragma unroll 1
    for (int group = 0; group < Traits::kGroups; ++group) {
      const int position = work.position + group * device::kPanelRows;
      work.group_full[group][0] = keys.band.first_key(position + device::kPanelRows - 1);
      work.group_full[group][1] = min(keys.band.last_key(position), work.num_keys - 1);
    }
    work.first_step = next_step;
    next_step += num_steps_of<Traits>(work);
    mbarrier_arrive(smem.work_full(tile));
  }
}

template <class Traits>
__device__ __forceinline__ void run_producer(const DenseFwdSm90Smem<Traits>& smem,
                                             const CUtensorMap* k_map, const CUtensorMap* v_map,
                                             const FwdTileWork* works, int num_tiles) {
  int tile = 0;
  uint32_t tail_parity = 0;
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x, ++tile) {
    const FwdTileWork& work = wait_for_work(smem, works, tile);
    produce(smem, k_map, v_map, work, tail_parity);
    release_work(smem, tile);
  }
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
__device__ __forceinline__ void issue_scores(const DenseFwdSm90Smem<Traits>& smem, uint32_t queries,
                                             int n, typename Traits::Scores& s) {
  const int stage = n % Traits::kStages;
  device::mbarrier_wait(smem.full(0, stage), n / Traits::kStages & 1);
  // Keeps the eight descriptors of the queries from being kept in registers over the loop.
  asm volatile("" : "+r"(queries));
  device::wgmma_fence();
  const uint32_t q = device::k_major(queries), k = device::k_major(smem.keys(0, stage));
#pragma unroll
  for (int kk = 0; kk < device::kPanelDim / 16; ++kk) {
    const uint32_t q_at = (kk / 4 * device::kPanelBytes + kk % 4 * 32) >> 4;
    const uint32_t k_at = (kk / 4 * Traits::kPanelBytes + kk % 4 * 32) >> 4;
    device::wgmma_ss_m64n128k16<typename Traits::Element>(s, device::descriptor(q + q_at),
                                                          device::descriptor(k + k_at), kk > 0);
  }
  device::wgmma_commit();
}

// Issues O += P V of step n.
template <class Traits>
__device__ __forceinline__ void issue_output(const DenseFwdSm90Smem<Traits>& smem, int n,
                                             const typename Traits::Packed& prob, float (&o)[64]) {
  const int stage = n % Traits::kStages;
  device::mbarrier_wait(smem.full(1, stage), n / Traits::kStages & 1);
  device::wgmma_fence();
  const uint32_t v = device::operand(smem.keys(1, stage), Traits::kPanelBytes);
#pragma unroll
  for (int kk = 0; kk < Traits::kTileKv / 16; ++kk) {
    const uint32_t p[4] = {prob[0][2 * kk][0], prob[0][2 * kk][1], prob[0][2 * kk + 1][0],
                           prob[0][2 * kk + 1][1]};
    device::wgmma_m64n128k16_mn_major<typename Traits::Element>(
        o, p, device::descriptor(v + kk * (2048 >> 4)), 1);
  }
  device::wgmma_commit();
}

template <class Traits>
__device__ __forceinline__ void release(const DenseFwdSm90Smem<Traits>& smem, int operand, int n) {
  if (threadIdx.x % device::kWarpSize == 0) {
    device::mbarrier_arrive(smem.empty(operand, n % Traits::kStages));
  }
}

// One warpgroup: 64 queries over all steps of a tile in which some of them sees a key. Returns the first
// and the last of the steps behind those, which it still has to pass over.
template <class Traits>
__device__ __forceinline__ int consume(const DenseFwdSm90Smem<Traits>& smem,
                                       const device::Band& band, const FwdTileWork& work,
                                       uint32_t queries,
                                       device::OnlineSoftmax<typename Traits::Element, 1>& softmax,
                                       float (&o)[64]) {
  using namespace device;
  constexpr int kTileKv = Traits::kTileKv;
  // The steps in which some query of this group sees a key.
  const int stop = work.first_step + num_steps_of<Traits>(work);
  const int position = work.position + threadIdx.x / 128 * device::kPanelRows;
  const auto key_tile = [&](int n) { return work.first_step + work.last_key / kTileKv - n; };
  const int last_seen = min(band.last_key(position + device::kPanelRows - 1), work.last_key);
  const int begin = last_seen < 0 ? stop : min(key_tile(last_seen / kTileKv), stop);
  const int end = min(key_tile(band.first_key(position) / kTileKv), stop - 1);
  skip_steps(smem, work.first_step, begin - 1);
  typename Traits::Scores s;
  auto& frag = reinterpret_cast<float(&)[1][kTileKv / 8][4]>(s);
  const int rest = max(begin, end + 1);
  for (int n = begin; n < rest; ++n) {
    issue_scores(smem, queries, n, s);
    wgmma_wait_group<0>();
    pin_registers(s);
    release(smem, 0, n);
    const int base = key_tile(n) * kTileKv;
    const int* full = work.group_full[reread_thread_index() / 128];
    if (base < full[0] || base + kTileKv - 1 > full[1]) mask_scores(frag, band, work, base);
    float keep[2];
    if (softmax.adapt(0, frag[0], work.scale_log2, keep)) {
      softmax.rescale(device::as_fragments(o)[0], keep);
    }
    typename Traits::Packed prob;
    softmax.exponentiate_and_pack(0, frag[0], prob[0], work.scale_log2);
    issue_output(smem, n, prob, o);
    wgmma_wait_group<0>();
    pin_registers(o);
    release(smem, 1, n);
  }
  return rest;
}

// Starts the copy of a group's queries.
template <class Traits>
__device__ __forceinline__ void load_group_queries(const DenseFwdSm90Smem<Traits>& smem,
                                                   const AttnFwdTensors& p, const FwdTileWork& work,
                                                   int tile) {
  using namespace device;
  using Element = typename Traits::Element;
  const int thread = threadIdx.x % 128, group = threadIdx.x / 128;
  if (work.num_queries > 0) {
    const MatrixView<Element> q{static_cast<const Element*>(p.q.data) +
                                    work.token * p.q.token_stride + work.head * p.q.head_stride,
                                p.q.token_stride, work.num_queries,
                                static_cast<int>(p.shape.head_dim)};
    device::load_panels<128>(smem.queries(tile, group), thread_part(q, thread),
                             group * device::kPanelRows, thread);
  }
  cp_async_commit();
}

// Writes lse and the output of one warp, staged over its queries.
template <class Traits>
__device__ __forceinline__ void store_output(
    const DenseFwdSm90Smem<Traits>& smem, const AttnFwdTensors& p, const FwdTileWork& work,
    int tile, device::OnlineSoftmax<typename Traits::Element, 1>& softmax, float (&o)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * 16;
  float lse[2];
  softmax.finish(device::as_fragments(o), lse);
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
      smem.queries(tile, row / device::kPanelRows) +
          tile_bytes<device::kPanelDim>(row % device::kPanelRows),
      device::as_fragments(o), lane);
}

// One consumer warpgroup over all tiles of the CTA.
template <class Traits>
__device__ __forceinline__ void run_consumer(const DenseFwdSm90Smem<Traits>& smem,
                                             const AttnFwdTensors& p, const device::Band& band,
                                             const FwdTileWork* works, int num_tiles) {
  using namespace device;
  const int group = threadIdx.x / 128;
  const auto index_of = [](int tile) { return static_cast<int>(blockIdx.x + tile * gridDim.x); };
  load_group_queries(smem, p, wait_for_work(smem, works, 0), 0);
  for (int tile = 0; index_of(tile) < num_tiles; ++tile) {
    const FwdTileWork& work = works[tile % Traits::kWorkBuffers];
    cp_async_wait<0>();
    fence_async_proxy();
    device::sync_warpgroup(group);  // all warps have loaded their queries and left the tile before
    if (index_of(tile + 1) < num_tiles) {
      load_group_queries(smem, p, wait_for_work(smem, works, tile + 1), tile + 1);
    }
    float o[64] = {};
    OnlineSoftmax<typename Traits::Element, 1> softmax;
    softmax.init();
    const int rest = consume(smem, band, work, smem.queries(tile, group), softmax, o);
    device::sync_warpgroup(group);  // nobody's wgmma reads these queries any more
    store_output(smem, p, work, tile, softmax, o);
    skip_steps(smem, rest,
               work.first_step + num_steps_of<Traits>(work) -
                   1);  // behind the output: others still work on them
    release_work(smem, tile);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_fwd_sm90_kernel(const __grid_constant__ AttnFwdTensors p,
                               const __grid_constant__ device::KeySet keys,
                               const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map, int num_tiles) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ FwdTileWork works[Traits::kWorkBuffers];
  const DenseFwdSm90Smem<Traits> smem{smem_address(memory)};
  if (threadIdx.x == 0) {
    for (int operand = 0; operand < 2; ++operand) {
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        mbarrier_init(smem.full(operand, stage), 1);
        mbarrier_init(smem.empty(operand, stage), Traits::kConsumerThreads / kWarpSize);
      }
    }
    for (int i = 0; i < Traits::kWorkBuffers; ++i) {
      mbarrier_init(smem.work_full(i), 1);
      mbarrier_init(smem.work_empty(i), Traits::kConsumerThreads / kWarpSize + 1);
    }
    mbarrier_init(smem.tail(), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    run_consumer<Traits>(smem, p, keys.band, works, num_tiles);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    const int warp = (threadIdx.x - Traits::kConsumerThreads) / kWarpSize;
    if (warp == 0) {
      run_producer<Traits>(smem, &k_map, &v_map, works, num_tiles);
    } else if (warp == 1 && threadIdx.x % kWarpSize == 0) {
      find_works<Traits>(smem, p, keys, works, num_tiles);
    }
  }
}

}  // namespace fsattn
