// dense_attn_fwd, sm_90a: attention over an interval of keys with wgmma and producer warps.
//
// Math     S = softmax_scale Q K^T over the visible keys,  P = exp(S - lse),  O = P V,
//          lse = log sum exp S. No visible key: O = 0, lse = -inf.
// Shapes   params/attention.h, head_dim and head_dim_v up to 128; the visible interval:
//          device/band.h.
// Tiles    one CTA an SM takes every n-th tile (192 queries of a sequence, head); 128 keys a step, or
//          64 where the ends of the interval need no more.
// Roles    three consumer warpgroups of 64 queries: S with both operands in shared memory, O with P
//          in registers; while one does its softmax, the other two keep the tensor cores busy. One
//          producer warp finds the tiles of the CTA, one brings K and V and one the queries, by
//          tensor copies; both run ahead into the next tile. Tensor copies bring the output home.
// Memory   two buffers of Q 96 KB, two stages of K and of V 128 KB.
// Regs     O 64, S or P 64: 160 a consumer thread, 32 a producer thread.
// Bound    tensor cores: 512 FLOP a (query, key) at head_dim 128; behind them shared memory, from
//          which S of 128 keys at a time takes 48 bytes where S of 64 takes 64.
// Numbers  scores, sums and output fp32; P rounded to the input type before P V.
#pragma once
#include "cuda/dense_attn/dense_attn_fwd_movers_sm90.cuh"
#include "cuda/device/bulk_sm90.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/wgmma_ss_n128_sm90.cuh"

namespace fsattn {

// This warp has left a tile of K or V.
template <class Traits>
__device__ __forceinline__ void release(const DenseFwdSm90Smem<Traits>& smem, int operand, int n) {
  if (threadIdx.x % device::kWarpSize == 0) {
    device::mbarrier_arrive(smem.empty(operand, n % Traits::kStages));
  }
}

// Passes over steps in which no query of the group sees a key. The waits keep a warp from arriving
// twice in one phase.
template <class Traits>
__device__ __forceinline__ void skip_steps(const DenseFwdSm90Smem<Traits>& smem, int begin,
                                           int end) {
#pragma unroll 1
  for (int n = begin; n < end; ++n) {
    const int stage = n % Traits::kStages, parity = n / Traits::kStages & 1;
    for (int operand = 0; operand < 2; ++operand) {
      device::mbarrier_wait(smem.full(operand, stage), parity);
      release(smem, operand, n);
    }
  }
}

// Issues S = Q K^T over kKeys keys.
template <class Traits, int kKeys>
__device__ __forceinline__ void issue_scores(uint32_t queries, uint32_t keys,
                                             float (&s)[kKeys / 2]) {
  using Element = typename Traits::Element;
  // Keeps the eight descriptors of the queries from being kept in registers over the loop.
  asm volatile("" : "+r"(queries));
  device::wgmma_fence();
  const uint32_t q = device::k_major(queries), k = device::k_major(keys);
#pragma unroll
  for (int kk = 0; kk < device::kPanelDim / 16; ++kk) {
    const uint32_t q_at = (kk / 4 * device::kPanelBytes + kk % 4 * 32) >> 4;
    const uint32_t k_at = (kk / 4 * Traits::kPanelBytes + kk % 4 * 32) >> 4;
    const uint64_t a = device::descriptor(q + q_at), b = device::descriptor(k + k_at);
    if constexpr (kKeys == 128) {
      device::wgmma_ss_m64n128k16<Element>(s, a, b, kk > 0);
    } else {
      device::wgmma_ss_m64n64k16<Element>(s, a, b, kk > 0);
    }
  }
  device::wgmma_commit();
}

// Issues O += P V of step n.
template <class Traits, int kKeys>
__device__ __forceinline__ void issue_output(const DenseFwdSm90Smem<Traits>& smem, int n, int first,
                                             const uint32_t (&prob)[kKeys / 8][2], float (&o)[64]) {
  const int stage = n % Traits::kStages;
  device::mbarrier_wait(smem.full(1, stage), n / Traits::kStages & 1);
  device::wgmma_fence();
  const uint32_t v = device::operand(smem.keys(1, stage) + first * 128, Traits::kPanelBytes);
#pragma unroll
  for (int kk = 0; kk < kKeys / 16; ++kk) {
    const uint32_t p[4] = {prob[2 * kk][0], prob[2 * kk][1], prob[2 * kk + 1][0],
                           prob[2 * kk + 1][1]};
    device::wgmma_m64n128k16_mn_major<typename Traits::Element>(
        o, p, device::descriptor(v + kk * (2048 >> 4)), 1);
  }
  device::wgmma_commit();
}

// Of the 16 queries of the calling warp, for its masks.
template <class Traits>
__device__ __forceinline__ void find_limits(const DenseFwdSm90Smem<Traits>& smem,
                                            const device::Band& band, const FwdTileWork& work) {
  const int lane = threadIdx.x % device::kWarpSize;
  if (lane < 16) {
    const int query = threadIdx.x / device::kWarpSize * 16 + lane;
    const bool exists = query < work.num_queries;
    const int first = exists ? band.first_key(work.position + query) : 1 << 30;
    const int last = exists ? min(band.last_key(work.position + query), work.num_keys - 1) : -1;
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(smem.limits(query)), "r"(first), "r"(last)
                 : "memory");
  }
  __syncwarp();
}

// Sets scores outside the visible interval of their row to -inf. Few tiles come here: nothing that
// only they need should live in registers.
template <class Traits, int kN>
__device__ __forceinline__ void mask_keys(const DenseFwdSm90Smem<Traits>& smem, float (&s)[kN][4],
                                          int first_key) {
  const int thread = device::reread_thread_index(), lane = thread % device::kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int low, high;
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                 : "=r"(low), "=r"(high)
                 : "r"(smem.limits(thread / device::kWarpSize * 16 + i * 8 + lane / 4)));
    // Relative to the lane's first key, so that the others are compared with constants.
    low -= first_key + lane % 4 * 2;
    high -= first_key + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (n * 8 + e < low || n * 8 + e > high) s[n][2 * i + e] = -INFINITY;
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void wait_for_keys(const DenseFwdSm90Smem<Traits>& smem, int n) {
  device::mbarrier_wait(smem.full(0, n % Traits::kStages), n / Traits::kStages & 1);
}

// One step of a warpgroup: kKeys keys from the `first`-th of its tile on. Its keys are there, and then
// those of the next step are. What the tensor cores need not wait for is done while they work.
template <class Traits, int kKeys>
__device__ __forceinline__ void consume_step(
    const DenseFwdSm90Smem<Traits>& smem, const FwdTileWork& work, uint32_t queries,
    float scale_log2, uint32_t& keys, int n, int first,
    device::OnlineSoftmax<typename Traits::Element, 1>& softmax, float (&o)[64]) {
  using namespace device;
  float s[kKeys / 2];
  auto& frag = reinterpret_cast<float(&)[kKeys / 8][4]>(s);
  issue_scores<Traits, kKeys>(queries, kKeys == 128 ? keys : keys + first * 128, s);
  const int base =
      (work.first_step + work.last_key / Traits::kTileKv - n) * Traits::kTileKv + first;
  const int* full = work.full[reread_thread_index() / 128];
  int masked = 0;
#pragma unroll
  for (int half = 0; half < kKeys / 64; ++half) {
    const int key = base + half * 64;
    if (key < full[0] || key + 63 > full[1]) masked |= 1 << half;
  }
  wgmma_wait_group<0>();
  pin_registers(s);
  release(smem, 0, n);
  if (masked != 0) {
#pragma unroll
    for (int half = 0; half < kKeys / 64; ++half) {
      if ((masked >> half & 1) == 0) continue;
      mask_keys(smem, reinterpret_cast<float(&)[8][4]>(frag[half * 8]), base + half * 64);
    }
  }
  float keep[2];
  if (softmax.adapt(0, frag, scale_log2, keep)) softmax.rescale(as_fragments(o)[0], keep);
  uint32_t prob[kKeys / 8][2];
  softmax.exponentiate_and_pack(0, frag, prob, scale_log2);
  issue_output<Traits, kKeys>(smem, n, first, prob, o);
  keys = smem.keys(0, (n + 1) % Traits::kStages);
  asm volatile("" : "+r"(keys));
  if (n + 1 < work.steps[reread_thread_index() / 128][1]) wait_for_keys(smem, n + 1);
  wgmma_wait_group<0>();
  pin_registers(o);
  release(smem, 1, n);
}

// One warpgroup: 64 queries over all steps of a tile in which some of them sees a key.
template <class Traits>
__device__ __forceinline__ void consume(const DenseFwdSm90Smem<Traits>& smem,
                                        const FwdTileWork& work, uint32_t queries, float scale_log2,
                                        device::OnlineSoftmax<typename Traits::Element, 1>& softmax,
                                        float (&o)[64]) {
  using namespace device;
  const int group = threadIdx.x / 128;
  int n = work.steps[group][0];
  skip_steps(smem, work.first_step, n);
  if (n == work.steps[group][1]) return;
  wait_for_keys(smem, n);
  uint32_t keys = smem.keys(0, n % Traits::kStages);
  // At both ends of the interval half a tile may be enough.
#pragma unroll 1
  for (int end = 0; end < 2; ++end) {
    const int half = work.halves[reread_thread_index() / 128][end];
    if (half >= 0) {
      consume_step<Traits, 64>(smem, work, queries, scale_log2, keys, n++, half, softmax, o);
    }
    if (end == 1) break;
    const int stop = work.steps[group][1] - (work.halves[group][1] >= 0 ? 1 : 0);
    for (; n < stop; ++n) {
      consume_step<Traits, 128>(smem, work, queries, scale_log2, keys, n, 0, softmax, o);
    }
  }
}

inline constexpr int kWarpQueries = 16;  // what one tensor copy of the output covers

// Writes the rows of one warp that exist when a tensor store, which knows no sequences, may not.
template <class Traits>
__device__ __forceinline__ void store_cut_rows(const DenseFwdSm90Smem<Traits>& smem,
                                               const AttnFwdTensors& p, const FwdTileWork& work,
                                               uint32_t stage, int row) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, cols = static_cast<int>(p.shape.head_dim_v);
  Element* out = static_cast<Element*>(p.o.data) + (work.token + row) * p.o.token_stride +
                 work.head * p.o.head_stride;
  for (int r = lane / 16; r < min(kWarpQueries, work.num_queries - row); r += 2) {
    const int chunk = lane % 16;
    if (chunk * 8 >= cols) continue;
    *reinterpret_cast<uint4*>(out + r * p.o.token_stride + chunk * 8) =
        load_shared_u128(stage + chunk / 8 * kPanelBytes + tile_offset<64>(r, chunk % 8));
  }
}

// Writes lse and the output of one warp, staged over its queries.
template <class Traits>
__device__ __forceinline__ void store_output(
    const DenseFwdSm90Smem<Traits>& smem, const AttnFwdTensors& p, const CUtensorMap* o_map,
    const FwdTileWork& work, int tile, device::OnlineSoftmax<typename Traits::Element, 1>& softmax,
    float (&o)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * kWarpQueries;
  float lse[2];
  auto& frag = as_fragments(o);
  softmax.finish(frag, lse);
  float* lse_out =
      static_cast<float*>(p.lse.data) + work.head * p.lse.head_stride + work.token + row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = i * 8 + lane / 4;
    if (lane % 4 == 0 && row + r < work.num_queries) lse_out[r] = lse[i];
  }
  const uint32_t stage = smem.queries(tile, row / kPanelRows) + row % kPanelRows * 128;
  const uint32_t to = lane_rows16<64>(stage, lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto& f = frag[0][2 * i + j / 2];
      x[j] = pack_pair<Element>(f[j % 2 * 2], f[j % 2 * 2 + 1]);
    }
    stmatrix_x4(chunk_pair(to, i % 4) + i / 4 * kPanelBytes, x[0], x[1], x[2], x[3]);
  }
  fence_async_proxy();
  __syncwarp();
  if (row + kWarpQueries > work.num_queries) {
    store_cut_rows(smem, p, work, stage, row);
    fence_async_proxy();
    __syncwarp();
  } else if (lane == 0) {
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      tma_store_3d(o_map, stage + panel * kPanelBytes, panel * kTmaColumns, work.head,
                   static_cast<int>(work.token) + row);
    }
  }
  if (lane == 0) bulk_commit();
}

// One consumer warpgroup over all tiles of the CTA.
template <class Traits>
__device__ __forceinline__ void run_consumer(const DenseFwdSm90Smem<Traits>& smem,
                                             const AttnFwdTensors& p, const CUtensorMap* o_map,
                                             const device::Band& band, const FwdTileWork* works,
                                             const FwdSchedule& schedule) {
  using namespace device;
  const int group = threadIdx.x / 128, lane = threadIdx.x % kWarpSize;
  for (int tile = 0; schedule.has(tile); ++tile) {
    const FwdTileWork& work = wait_for_work(smem, works, tile);
    find_limits(smem, band, work);
    mbarrier_wait(smem.queries_full(tile, group), tile / 2 & 1);
    if (tile > 0 && lane == 0) {
      bulk_wait_read();
      mbarrier_arrive(smem.queries_empty(tile - 1, group));
    }
    float o[64] = {};
    OnlineSoftmax<typename Traits::Element, 1> softmax;
    softmax.init();
    consume(smem, work, smem.queries(tile, group), schedule.scale_log2, softmax, o);
    skip_steps(smem, work.steps[group][1], work.first_step + work.num_steps);
    sync_warpgroup(group);  // nobody's wgmma reads these queries any more
    store_output(smem, p, o_map, work, tile, softmax, o);
    release_work(smem, tile);
  }
  if (lane == 0) bulk_wait_read();
}

// kPaged: keys.pages are defined. Kernels of their own, so that one does not take registers from the other.
template <class Traits, bool kPaged>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_fwd_sm90_kernel(const __grid_constant__ AttnFwdTensors p,
                               const __grid_constant__ device::KeySet keys,
                               const __grid_constant__ CUtensorMap q_map,
                               const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map,
                               const __grid_constant__ CUtensorMap o_map,
                               const __grid_constant__ FwdSchedule schedule) {
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
      mbarrier_init(smem.work_full(i), Traits::kGroups);
      mbarrier_init(smem.work_empty(i), Traits::kConsumerThreads / kWarpSize + 2);
    }
    for (int i = 0; i < 2 * Traits::kGroups; ++i) {
      mbarrier_init(smem.queries_full(i / Traits::kGroups, i % Traits::kGroups), 1);
      mbarrier_init(smem.queries_empty(i / Traits::kGroups, i % Traits::kGroups), 4);
    }
    mbarrier_init(smem.tail(), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    run_consumer<Traits>(smem, p, &o_map, keys.band, works, schedule);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    const int warp = (threadIdx.x - Traits::kConsumerThreads) / kWarpSize;
    if (warp == 0) {
      run_producer<Traits, kPaged>(smem, keys.pages, &k_map, &v_map, works, schedule);
    } else if (warp == 1) {
      find_works<Traits>(smem, p, keys, works, schedule);
    } else if (warp == 2 && threadIdx.x % kWarpSize == 0) {
      load_queries<Traits>(smem, &q_map, works, schedule);
    }
  }
}

}  // namespace fsattn
