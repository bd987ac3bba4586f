// select_blocks, sm_90a: the same operator with wgmma and producer warps, for the usual geometry.
//
// Math    select_blocks_sm80.cuh, with l / d = 2 and S / d = 4: a block's windows weigh 1, 2, 2, 2, 1.
// Shapes  params/select_blocks.h, head_dim up to the row's, topk up to 32.
// Tiles   128 windows (32 blocks) and 64 queries of one head a product. tile_q 64: two warpgroups share
//         the queries and take turns at the tiles of windows, for groups. tile_q 128: each has its own
//         queries, for groups of one, where the traffic of the keys would be too high.
// Roles   two consumer warpgroups take turns at the tensor cores, one multiplies while the other takes
//         exponentials: P of all heads added in registers, block scores to shared memory. After a chunk of
//         four tiles each warp looks for the best blocks of its rows (select_blocks_pick.cuh). Two producer
//         warps copy keys and two copy queries, by cp.async.
// Layout  the keys of a tile are copied in an order that gives a thread whole blocks: row 16 i + 8 j + 2 q
//         + e holds window 16 i + 4 q + 2 j + e, where 2 q + e is the column of the accumulator.
// Memory  up to four tiles of queries (they stay when the group has no more), three of keys, scores.
// Regs    scores of a tile 64, sum over heads 64: 240 a consumer thread, 24 a producer thread.
// Bound   tensor cores, 2 * D FLOP a (head, query, window), level with ex2, one each.
// Numbers scores fp32; a block's windows are added in a fixed order.
#pragma once
#include "base/cuda_check.h"
#include "cuda/device/wgmma_sm90.cuh"
#include "cuda/device/wgmma_ss_n128_sm90.cuh"
#include "cuda/device/wgmma_ss_sm90.cuh"
#include "cuda/select_blocks/select_blocks_pick.cuh"
#include "cuda/select_blocks/select_blocks_tiles_sm90.cuh"

namespace fsattn {
namespace device {

// One product: a tile of windows and a head.
struct SelectItem {
  int step, head;
  int q_index;  // number of the item, which says where a streamed head lies
};

template <class Traits>
struct SelectConsumer {
  using Element = typename Traits::Element;
  const SelectSm90<Traits>& cta;
  const PickMemory& memory;
  const Band& band;
  int group, warp, lane;  // warp: of the warpgroup

  __device__ int tile_of(int step) const {
    return Traits::kSharesQueries ? 2 * step + group : step;
  }
  // Of the CTA: the first of the thread's two rows, which lie 8 apart.
  __device__ int row() const {
    return (Traits::kSharesQueries ? 0 : group * 64) + warp * 16 + lane / 4;
  }
  __device__ int q_stage(const SelectItem& item) const {
    if (!Traits::kSharesQueries) return group;
    return cta.streams_queries() ? item.q_index % Traits::kQStages : item.head;
  }

  // Warpgroup 0 multiplies one item, then warpgroup 1, then warpgroup 0 again.
  __device__ __forceinline__ void take_turn() const {
    asm volatile("bar.sync %0, 256;" ::"r"(8 + group) : "memory");
  }
  __device__ __forceinline__ void pass_turn() const {
    asm volatile("bar.arrive %0, 256;" ::"r"(9 - group) : "memory");
  }

  __device__ __forceinline__ void wait_operands(const SelectItem& item) const {
    const int tile = tile_of(item.step), k_stage = tile % Traits::kKStages;
    const int stage = q_stage(item);
    if (item.head == 0) mbarrier_wait(cta.k_full(k_stage), tile / Traits::kKStages & 1);
    if (cta.streams_queries()) {
      mbarrier_wait(cta.q_full(stage), item.q_index / Traits::kQStages & 1);
    } else if (item.step == 0) {
      mbarrier_wait(cta.q_full(stage), 0);
    }
    // What cp.async wrote becomes visible to wgmma. The fence waits for all loads of the thread.
    if (item.head == 0 || item.step == 0 || cta.streams_queries()) fence_async_proxy();
  }

  // Starts s = Q K^T of an item.
  __device__ __forceinline__ void issue(const SelectItem& item, float (&s)[64]) const {
    const uint64_t a = wgmma_descriptor(cta.queries(q_stage(item)), 16);
    const uint64_t b = wgmma_descriptor(cta.keys(tile_of(item.step) % Traits::kKStages), 16);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Traits::kDim / 16; ++kk) {
      wgmma_ss_m64n128k16<Element>(
          s, wgmma_descriptor_at(a, kk / 4 * Traits::kQPanelBytes + kk % 4 * 32),
          wgmma_descriptor_at(b, kk / 4 * Traits::kKPanelBytes + kk % 4 * 32), kk > 0);
    }
    wgmma_commit();
  }

  // The item's product is done: what it read may be overwritten.
  __device__ __forceinline__ void release(const SelectItem& item) const {
    if (lane != 0) return;
    if (cta.streams_queries()) mbarrier_arrive(cta.q_empty(q_stage(item)));
    if (item.head == cta.num_heads - 1) {
      mbarrier_arrive(cta.k_empty(tile_of(item.step) % Traits::kKStages));
    }
  }

  __device__ __forceinline__ void load_lse(int head, float (&lse)[2]) const {
    const float* from = static_cast<const float*>(cta.p.lse.data) +
                        (cta.work.first_head + head) * cta.p.lse.head_stride + cta.work.token;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row() + i * 8;
      lse[i] = r < cta.work.num_queries ? __ldg(from + r) : -INFINITY;
    }
  }

  // p (+)= the probabilities of one head. A row without keys has lse -inf and counts nothing.
  __device__ __forceinline__ void add(float (&p)[64], const float (&s)[64], const float (&lse)[2],
                                      bool overwrites) const {
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) bias[i] = lse[i] == -INFINITY ? -INFINITY : -lse[i] * kLog2E;
    const auto each = [&](const auto& combine) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        combine(p[i], exp2_approx(fmaf(s[i], cta.g.scale_log2, bias[i / 2 % 2])));
      }
    };
    if (overwrites) {
      each([](float& sum, float x) { sum = x; });
    } else if (cta.p.group_reduce == GroupReduce::kMax) {
      each([](float& sum, float x) { sum = fmaxf(sum, x); });
    } else {
      each([](float& sum, float x) { sum += x; });
    }
  }

  // Zeros where a query does not see a window of the tile.
  __device__ __forceinline__ void mask(float (&p)[64], int tile) const {
    const int first = tile * Traits::kTileKv;
    if (first + Traits::kTileKv - 1 <= cta.work.full_last) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int last = band.last_key(cta.work.position + row() + half * 8);
      const int limit = min(last, cta.work.num_keys - 1) - first - lane % 4 * 4;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (n / 2 * 16 + n % 2 * 2 + e > limit) p[n * 4 + half * 2 + e] = 0.f;
        }
      }
    }
  }

  // The scores of the 32 blocks of a tile; carry: what the thread's last window adds to the block
  // behind it. Column `tile_in_chunk` of 32.
  __device__ __forceinline__ void store_scores(const float (&p)[64], int tile, int tile_in_chunk,
                                               float (&carry)[2]) const {
    const int source = (lane & ~3) | ((lane + 3) & 3);  // the lane of the block before
    const bool is_last = lane % 4 == 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row() + half * 8;
      float* score = memory.score + r * kChunkBlocks + tile_in_chunk * kWarpSize;
      float before = Traits::kSharesQueries ? 0.f : carry[half];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* w = p + i * 8 + half * 2;  // windows 0, 1 and, four registers on, 2, 3
        const float x = __shfl_sync(kFullMask, is_last ? before : w[5], source);
        score[pick_column(r, i * 4 + lane % 4)] = fmaf(2.f, w[0] + w[1] + w[4], x + w[5]);
        before = w[5];
      }
      carry[half] = before;
      if (Traits::kSharesQueries && is_last) {
        memory.carry[r * kCarryPitch + (tile + 1) % 16] = before;
      }
    }
  }

  // Rows of scores are complete, or free again: the warps that share them meet.
  __device__ __forceinline__ void meet() const {
    if (Traits::kSharesQueries) {
      asm volatile("bar.sync %0, 64;" ::"r"(warp + 1) : "memory");
    } else {
      __syncwarp();
    }
  }

  __device__ int first_pick_row() const {
    return Traits::kSharesQueries ? warp * 16 + group * 8 : group * 64 + warp * 16;
  }

  __device__ __forceinline__ void init_rows() const {
    if (lane < Traits::kRowsPerWarp) {
      const int r = first_pick_row() + lane;
      const SelectRow at = select_row(cta.g, cta.work, r);
      const bool is_query = r < cta.work.num_queries && at.room > 0;
      memory.state[r] = {is_query ? at.num_init : 0, is_query ? at.local_begin : 0, 0, -1};
      memory.room[r] = at.room;
      if (Traits::kSharesQueries) memory.carry[r * kCarryPitch] = 0.f;
    }
    meet();
  }

  // Picks from the chunk that ends with step `last`, which the warps of these rows have scored.
  __device__ __forceinline__ void pick_chunk(int last) const {
    constexpr int kRows = Traits::kPickRows;
    const int first_tile = last * Traits::kTilesPerStep / kChunkTiles * kChunkTiles;
    meet();
    const int thread = reread_thread_index(), lane_now = thread % kWarpSize;
    const int first_row =
        Traits::kSharesQueries ? thread % 128 / 32 * 16 + thread / 128 * 8 : thread / 32 * 16;
#pragma unroll 1
    for (int i = 0; i < Traits::kRowsPerWarp; i += kRows) {
      pick_blocks<kRows, Traits::kSharesQueries>(memory, first_tile, cta.g.rounds_to_bf16,
                                                 first_row + i, lane_now);
    }
    meet();
  }

  // What follows the last head of a tile.
  __device__ __forceinline__ void finish_tile(float (&p)[64], int step, float (&carry)[2]) const {
    const int tile = tile_of(step);
    mask(p, tile);
    store_scores(p, tile, tile % kChunkTiles, carry);
  }

  // Products and sums of all tiles.
  __device__ __forceinline__ void score() const {
    constexpr bool kOneHead = !Traits::kSharesQueries;
    constexpr int kChunkSteps = kChunkTiles / Traits::kTilesPerStep;
    const int num_heads = kOneHead ? 1 : cta.num_heads;
    float s[64], p[kOneHead ? 1 : 64], lse[2], carry[2] = {};
    if (kOneHead) load_lse(0, lse);
    if (group == 1) pass_turn();  // warpgroup 0 begins
    int q_index = 0;
#pragma unroll 1
    for (int step = 0; step < cta.num_steps; ++step) {
#pragma unroll
      for (float& x : p) x = 0.f;
#pragma unroll 1
      for (int head = 0; head < num_heads; ++head, ++q_index) {
        const SelectItem item{step, head, q_index};
        const bool is_last = step == cta.num_steps - 1 && head == num_heads - 1;
        if (!kOneHead) load_lse(head, lse);
        wait_operands(item);
        take_turn();
        issue(item, s);
        wgmma_wait_group<0>();
        pin_registers(s);
        if (!is_last || group == 0) pass_turn();
        release(item);
        if constexpr (kOneHead) {
          add(s, s, lse, true);
        } else {
          add(p, s, lse, false);
        }
      }
      if constexpr (kOneHead) {
        finish_tile(s, step, carry);
      } else {
        finish_tile(p, step, carry);
      }
      if (step % kChunkSteps == kChunkSteps - 1 || step == cta.num_steps - 1) pick_chunk(step);
    }
  }

  __device__ __forceinline__ void run() const {
    init_rows();
    if (cta.num_steps > 0) score();
    int32_t* out =
        cta.p.topk_idx + (cta.work.kv_head * cta.p.packing.total_q + cta.work.token) * cta.p.topk;
    for (int i = 0; i < Traits::kRowsPerWarp; i += Traits::kPickRows) {
      finish_picks<Traits::kPickRows>(memory, first_pick_row() + i, lane);
    }
    const SelectRow mine =
        select_row(cta.g, cta.work, first_pick_row() + lane % Traits::kRowsPerWarp);
#pragma unroll 4
    for (int i = 0; i < Traits::kRowsPerWarp; ++i) {
      const int r = first_pick_row() + i;
      const int num_blocks = __shfl_sync(kFullMask, mine.num_blocks, i);
      const int num_init = __shfl_sync(kFullMask, mine.num_init, i);
      const int num_local = __shfl_sync(kFullMask, mine.num_local, i);
      if (r >= cta.work.num_queries) continue;
      write_picks(out + int64_t{r} * cta.p.topk, num_blocks, num_init, num_local,
                  memory.state[r].count, memory.list + r * kWarpSize, cta.g.topk, lane);
    }
  }
};

static_assert(sizeof(SelectWork) + sizeof(int) <= kSelectSm90WorkBytes);

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    select_blocks_sm90_kernel(const __grid_constant__ SelectBlocksParams p,
                              const __grid_constant__ SelectSm90Smem at,
                              const __grid_constant__ SelectGeometry g,
                              const __grid_constant__ Band band, int num_heads) {
  extern __shared__ __align__(1024) unsigned char select_sm90_smem_base[];
  unsigned char* smem = select_sm90_smem_base;
  SelectWork& work = *reinterpret_cast<SelectWork*>(smem + at.work);
  int& num_steps = *reinterpret_cast<int*>(smem + at.work + sizeof(SelectWork));
  if (threadIdx.x == 0) {
    work = find_select_work<Traits::kTileQ>(p, band);
    // Blocks that compete for some query; a row sees no fewer than the rows before it.
    const SelectRow last = select_row(g, work, work.num_queries - 1);
    const int blocks = g.topk > g.init_blocks + g.local_blocks ? last.local_begin : 0;
    num_steps = ceil_div(blocks, kWarpSize * Traits::kTilesPerStep);
    if (num_heads % 2 == 1) num_steps += num_steps % 2;  // an even number of items
    const SelectSm90<Traits> cta{p, g, at, work, smem_address(smem), num_heads, 0};
    for (int i = 0; i < Traits::kQStages; ++i) {
      mbarrier_init(cta.q_full(i), 64);
      mbarrier_init(cta.q_empty(i), Traits::kConsumerThreads / kWarpSize);
    }
    for (int i = 0; i < Traits::kKStages; ++i) {
      mbarrier_init(cta.k_full(i), 64);
      mbarrier_init(cta.k_empty(i), Traits::kSharesQueries ? 4 : 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (work.num_queries <= 0) return;
  const SelectSm90<Traits> cta{p, g, at, work, smem_address(smem), num_heads, num_steps};
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    const PickMemory memory{
        reinterpret_cast<float*>(smem + at.score), reinterpret_cast<float*>(smem + at.carry),
        reinterpret_cast<Pick*>(smem + at.list), reinterpret_cast<PickState*>(smem + at.state),
        reinterpret_cast<int*>(smem + at.room)};
    const int thread = threadIdx.x;
    // Read from lane 0: the compiler then knows that they are the same in the whole warp.
    const int group = __shfl_sync(kFullMask, thread / 128, 0);
    const int warp = __shfl_sync(kFullMask, thread / 32 % 4, 0);
    SelectConsumer<Traits>{cta, memory, band, group, warp, thread % 32}.run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    const int thread = threadIdx.x % 64;
    if (num_steps > 0) {
      if (threadIdx.x / 64 % 2 == 0) {
        produce_keys(cta, thread);
      } else {
        produce_queries(cta, thread);
      }
      cp_async_commit();
      cp_async_wait<0>();
    }
  }
}

}  // namespace device

template <SelectBlocksConfig kConfig>
void launch_select_blocks_sm90(const SelectBlocksParams& params, Stream stream) {
  using Traits = device::SelectSm90Traits<kConfig>;
  const Packing& packing = params.packing;
  if (packing.total_q == 0) return;
  const int group = static_cast<int>(params.shape.group_size());
  const int num_heads = params.group_reduce == GroupReduce::kFirstHead ? 1 : group;
  const SelectSm90Smem smem = select_sm90_smem(kConfig, num_heads);
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                       params.shape.num_heads_kv;
  auto* kernel = device::select_blocks_sm90_kernel<Traits>;
  allow_shared_memory(kernel, smem.bytes);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, static_cast<size_t>(smem.bytes),
           static_cast<cudaStream_t>(stream)>>>(params, smem, device::make_select_geometry(params),
                                                device::make_select_band(params.mask), num_heads);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
