// select_blocks, sm_90a: the same operator with wgmma and producer warps, for the usual geometry.
//
// Math    select_blocks_sm80.cuh, with l / d = 2 and S / d = 4: a block's windows weigh 1, 2, 2, 2, 1.
// Shapes  params/select_blocks.h, head_dim and topk up to the row's.
// Tiles   a product is 64 rows and 128 windows (32 blocks). The rows are 64 queries of one head for groups
//         of one, else 32 queries of two heads, 8 apart, so that a thread adds the heads of a query in
//         registers. Each consumer warpgroup has its own queries; all use the same tiles of windows.
// Roles   two or three consumer warpgroups: products, exponentials, block scores
//         (select_blocks_sums_sm90.cuh), ranking (select_blocks_lists_sm90.cuh). A product starts when the scores
//         of the one before it have been read, and runs beside their exponentials and the ranking. Two
//         producer warps copy keys and two copy queries, by cp.async. A CTA an SM goes through the work
//         items, longest first; the producers are ahead.
// Kinds   queries of up to two pairs of heads stay in shared memory; those of more come again for each two
//         tiles of windows. Maxima over heads and rounded scores have kernels of their own.
// Layout  the keys of a tile are copied in an order that gives a thread whole blocks, see load_keys().
// Memory  up to two tiles of queries a warpgroup, two or three of keys, the lists of the ranking.
// Regs    scores of a tile 64, exponents 64 or less, sums 16 a tile: 152 a consumer thread of three
//         warpgroups, 56 a producer.
// Bound   tensor cores, 2 * D FLOP a (head, query, window), level with ex2, one each.
// Numbers scores fp32; heads and windows are added in a fixed order.
#pragma once
#include <type_traits>

#include "base/cuda_check.h"
#include "cuda/device/wgmma_sm90.cuh"
#include "cuda/device/wgmma_ss_n128_sm90.cuh"
#include "cuda/device/wgmma_ss_sm90.cuh"
#include "cuda/select_blocks/select_blocks_lists_sm90.cuh"
#include "cuda/select_blocks/select_blocks_sums_sm90.cuh"
#include "cuda/select_blocks/select_blocks_tiles_sm90.cuh"

namespace fsattn {
namespace device {

template <class Traits>
struct SelectConsumer {
  using Element = typename Traits::Element;
  using Lists = QueryList<Traits::kSlots, Traits::kRows>[Traits::kRows];
  using KPosition = RingPosition<Traits::kKStages>;
  static constexpr int kRows = Traits::kRows;
  static constexpr bool kByBlock = Traits::kPairs && !Traits::kGeneral;
  using Sums = std::conditional_t<kByBlock, BlockSums, WindowSums<kRows>>;

  const SelectSm90<Traits>& cta;
  const Band& band;
  int group, warp, lane;  // warp: of the warpgroup
  RingPosition<Traits::kQStages> q_at = {};
  KPosition k_at = {};
  // Of the item: the tiles whose blocks compete for all queries of the warp, and the next one at which the
  // lists are planned to be shortened.
  int inside_begin = 0, inside_end = 0, next_plan = 0;

  // Of the item: the first of the thread's queries, which lie 8 apart.
  __device__ int row() const {
    return group * Traits::kGroupQueries + warp * (8 * kRows) + lane / 4;
  }

  // Where a pair of heads lies whose queries stay.
  __device__ int q_stage(int pair) const {
    return Traits::kPairCount == Traits::kQStages ? pair : q_at.stage;
  }

  // Starts s = Q K^T.
  __device__ __forceinline__ void issue(float (&s)[64], int q_stage, int k_stage) const {
    const uint64_t a = wgmma_descriptor(cta.queries(group, q_stage), 16);
    const uint64_t b = wgmma_descriptor(cta.keys(k_stage), 16);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Traits::kDim / 16; ++kk) {
      wgmma_ss_m64n128k16<Element>(
          s, wgmma_descriptor_at(a, kk / 4 * Traits::kQPanelBytes + kk % 4 * 32),
          wgmma_descriptor_at(b, kk / 4 * Traits::kKPanelBytes + kk % 4 * 32), kk > 0);
    }
    wgmma_commit();
  }

  // lse of the thread's first row of a product of an item's first heads. Rows that are no queries have
  // one that keeps their sums finite.
  __device__ __forceinline__ const float* lse_of(const SelectWork& work) const {
    return static_cast<const float*>(cta.p.lse.data) + work.token +
           min(row(), work.num_queries - 1) + work.first_head * cta.p.lse.head_stride;
  }

  // lse of the two rows of a pair of heads.
  __device__ __forceinline__ void load_lse(const float* from, int pair, float (&lse)[2]) const {
    lse[0] = __ldg(from);
    lse[1] = 2 * pair + 1 < cta.num_heads ? __ldg(from + cta.p.lse.head_stride) : -INFINITY;
  }

  // -lse in bits. A row that counts nothing: -inf.
  __device__ __forceinline__ static void make_bias(const float (&lse)[2], float (&bias)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) bias[i] = lse[i] == -INFINITY ? -INFINITY : -lse[i] * kLog2E;
  }

  __device__ __forceinline__ void add(Sums& sums, const SelectWork& work, int tile, int full_tiles,
                                      float (&s)[64], const float (&bias)[2]) const {
    if constexpr (Traits::kGeneral) {
      sums.add(s, cta.g.scale_log2, bias, cta.p.group_reduce == GroupReduce::kMax);
    } else {
      if (tile >= full_tiles) hide_windows(s, last_window(work, tile, 0));
      sums.add(s, cta.g.scale_log2, bias);
    }
  }

  // Of the lane's windows of a tile, the last that its query r sees.
  __device__ __forceinline__ int last_window(const SelectWork& work, int tile, int r) const {
    const int log_stride = cta.g.log_block_size - 2;
    const int seen = (work.position + row() + r * 8 + 1 - (2 << log_stride)) >> log_stride;
    const int last = min(seen, work.num_keys - 1);
    return last - tile * Traits::kTileKv - lane % 4 * 32;
  }

  __device__ __forceinline__ void await_keys(const KPosition& at) const {
    mbarrier_wait(cta.k_full(at.stage), at.parity);
  }
  __device__ __forceinline__ void await_queries() const {
    mbarrier_wait(cta.q_full(group, q_at.stage), q_at.parity);
  }

  // The first block that competes for a query and the one behind the last; none: 0 and 0.
  __device__ __forceinline__ void competing(const SelectWork& work, int query, int& begin,
                                            int& end) const {
    const SelectRow r = select_row(cta.g, work, query);
    const bool competes = query < work.num_queries && r.room > 0;
    begin = competes ? r.num_init : 0;
    end = competes ? r.local_begin : 0;
  }

  // Blocks that do not compete for a query must not be picked.
  __device__ __forceinline__ void drop_outside(const SelectWork& work, int tile,
                                               int (&score)[kRows][kLaneBlocks]) const {
    const int first = tile * kWarpSize + lane % 4 * kLaneBlocks;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int begin, end;
      competing(work, row() + r * 8, begin, end);
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        if (first + i < begin || first + i >= end) score[r][i] = -1;
      }
    }
  }

  // The block scores of a tile, and their ranking.
  __device__ __forceinline__ void finish_tile(const SelectWork& work, int tile, int full_tiles,
                                              Sums& sums, float (&carry)[kRows], Lists& list) {
    int score[kRows][kLaneBlocks];
    const int lane = renewed(this->lane);
    if constexpr (!kByBlock) {
      if (tile >= full_tiles) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums.hide(r, last_window(work, tile, r));
      }
    }
    sums.make_scores(carry, lane, score);
    if (Traits::kGeneral && cta.g.rounds_to_bf16) round_scores(score);
    if (tile < inside_begin || tile >= inside_end) drop_outside(work, tile, score);
    // Warps of a warpgroup wait for each other at the next product, so lists should be shortened in all of
    // them at once. On inputs without order they overflow about at these tiles.
    const bool is_planned = tile == next_plan;
    if (is_planned) next_plan *= 3;
    rank_tile(list, score, tile, is_planned, lane % 4);
  }

  // Products and sums of the tiles of an item, and the ranking, for queries that stay. What a product
  // reads is awaited while the one before it runs.
  __device__ __forceinline__ void score_resident(const SelectItem& item, Lists& list) {
    constexpr int kPairs = Traits::kPairCount;
    const SelectWork& work = item.work;
    const int num_tiles = item.num_tiles;
    if (num_tiles == 0) return;
    const int full_tiles = (work.full_last + 1) / Traits::kTileKv;
    Sums sums;
    float s[64], bias[kPairs][2], carry[kRows] = {};
    await_keys(k_at);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
      mbarrier_wait(cta.q_full(group, q_stage(pair)), q_at.parity);
    fence_async_proxy();
    issue(s, q_stage(0), k_at.stage);
    const float* lse = lse_of(work);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if constexpr (Traits::kPairs) {
        load_lse(lse + 2 * pair * cta.p.lse.head_stride, pair, bias[pair]);
      } else {
        bias[0][0] = __ldg(lse);
        bias[0][1] = __ldg(lse + min(8, max(work.num_queries - 1 - row(), 0)));
      }
      make_bias(bias[pair], bias[pair]);
    }
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      const bool is_last_tile = tile == num_tiles - 1;
      if (Traits::kPairs) sums.clear();
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const bool is_last_pair = pair == kPairs - 1;
        const uint32_t k_done = cta.k_empty(k_at.stage);
        if (is_last_pair) {
          k_at.advance();
          if (!is_last_tile) {
            await_keys(k_at);
            fence_async_proxy();
          }
        }
        wgmma_wait_group<0>();
        pin_registers(s);
        mbarrier_arrive_if(cta.q_empty(group, q_stage(pair)), lane == 0 && is_last_tile);
        if (is_last_pair) mbarrier_arrive_if(k_done, lane == 0);
        // Behind the last product comes one that nobody reads: a product on some paths only would make the
        // compiler wait for it at once.
        const int next_stage = q_stage(is_last_pair ? 0 : pair + 1);
        if constexpr (Traits::kPairs) {
          add(sums, work, tile, full_tiles, s, bias[pair]);
          issue(s, next_stage, k_at.stage);
        } else {
          sums.scale(s, cta.g.scale_log2, bias[pair]);
          issue(s, next_stage, k_at.stage);
          sums.exponentiate();
        }
      }
      finish_tile(work, tile, full_tiles, sums, carry, list);
    }
    wgmma_wait_group<0>();
    pin_registers(s);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) q_at.advance();
  }

  // The same for queries that come again for each two tiles of keys, the first and the second in turns.
  __device__ __forceinline__ void score_streams(const SelectItem& item, Lists& list) {
    const SelectWork& work = item.work;
    const int num_pairs = cta.num_pairs(), num_tiles = item.num_tiles;
    if (num_tiles == 0) return;
    const int full_tiles = (work.full_last + 1) / Traits::kTileKv;
    Sums sums[2];
    float s[64], bias[2], lse[2], carry[kRows] = {};
    await_keys(k_at);
    await_queries();
    fence_async_proxy();
    issue(s, q_at.stage, k_at.stage);
    const float* lse_at = lse_of(work);
    load_lse(lse_at, 0, lse);
    make_bias(lse, bias);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile += 2) {
      const bool is_last_tile = tile + 2 == num_tiles;
      KPosition k_second = k_at;
      k_second.advance();
      sums[0].clear();
      sums[1].clear();
#pragma unroll 1
      for (int left = num_pairs - 1; left >= 0; --left) {
        const bool is_last_pair = left == 0;
        const int k_first = k_at.stage;
        if (left == num_pairs - 1) {
          await_keys(k_second);
          fence_async_proxy();
        }
        wgmma_wait_group<0>();
        pin_registers(s);
        mbarrier_arrive_if(cta.k_empty(k_first), lane == 0 && is_last_pair);
        add(sums[0], work, tile, full_tiles, s, bias);
        issue(s, q_at.stage, k_second.stage);
        const uint32_t q_done = cta.q_empty(group, q_at.stage);
        q_at.advance();
        if (is_last_pair) {
          k_at = k_second;
          k_at.advance();
        }
        if (!is_last_pair || !is_last_tile) {
          await_queries();
          if (is_last_pair) await_keys(k_at);
          fence_async_proxy();
        }
        lse_at += (is_last_pair ? 2 - 2 * num_pairs : 2) * cta.p.lse.head_stride;
        load_lse(lse_at, is_last_pair ? 0 : num_pairs - left, lse);
        wgmma_wait_group<0>();
        pin_registers(s);
        mbarrier_arrive_if(q_done, lane == 0);
        mbarrier_arrive_if(cta.k_empty(k_second.stage), lane == 0 && is_last_pair);
        add(sums[1], work, tile + 1, full_tiles, s, bias);
        issue(s, q_at.stage, k_at.stage);
        make_bias(lse, bias);
      }
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        finish_tile(work, tile + half, full_tiles, sums[0], carry, list);
        sums[0] = sums[1];
      }
    }
    wgmma_wait_group<0>();
    pin_registers(s);
  }

  __device__ __forceinline__ void run() {
    for_each_item(cta, [&](const SelectItem& item) {
      using List = QueryList<Traits::kSlots, kRows>;
      List list[kRows];
      int first = 0, last = kAlways;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        list[r].init(cta.base + Traits::kAt.lists + (group * 4 + warp) * List::kWarpBytes, r,
                     select_row(cta.g, item.work, row() + r * 8), lane);
        int begin, end;
        competing(item.work, row() + r * 8, begin, end);
        first = max(first, begin), last = min(last, end);
      }
      next_plan = 3;
      inside_begin = ceil_div(__reduce_max_sync(kFullMask, first), kWarpSize);
      inside_end = __reduce_min_sync(kFullMask, last) / kWarpSize;
      if constexpr (Traits::kPairCount == 0) {
        score_streams(item, list);
      } else {
        score_resident(item, list);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int query = row() + r * 8;
        int32_t* out =
            cta.p.topk_idx +
            (item.work.kv_head * cta.p.packing.total_q + item.work.token + query) * cta.p.topk;
        write_row(list[r], select_row(cta.g, item.work, query), query < item.work.num_queries, out,
                  cta.g.topk, lane);
      }
    });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    select_blocks_sm90_kernel(const __grid_constant__ SelectBlocksParams p,
                              const __grid_constant__ SelectGeometry g,
                              const __grid_constant__ Band band, int num_heads, int num_items) {
  extern __shared__ __align__(1024) unsigned char select_sm90_smem_base[];
  unsigned char* smem = select_sm90_smem_base;
  const SelectSm90<Traits> cta{p, g, smem, smem_address(smem), num_heads, num_items};
  if (threadIdx.x == 0) {
    for (int group = 0; group < Traits::kGroups; ++group) {
      for (int i = 0; i < Traits::kQStages; ++i) {
        mbarrier_init(cta.q_full(group, i), Traits::kProducerThreads);
        mbarrier_init(cta.q_empty(group, i), 4);
      }
    }
    for (int i = 0; i < Traits::kKStages; ++i) {
      mbarrier_init(cta.k_full(i), Traits::kProducerThreads);
      mbarrier_init(cta.k_empty(i), Traits::kConsumerThreads / kWarpSize);
    }
    for (int i = 0; i < kSelectSm90WorkRing; ++i) {
      mbarrier_init(cta.item_full(i), 1);
      mbarrier_init(cta.item_empty(i), Traits::kThreads / kWarpSize);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    const int thread = threadIdx.x;
    // Read from lane 0: the compiler then knows that they are the same in the whole warp.
    const int group = __shfl_sync(kFullMask, thread / 128, 0);
    const int warp = __shfl_sync(kFullMask, thread / 32 % 4, 0);
    SelectConsumer<Traits>{cta, band, group, warp, thread % 32}.run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    const int thread = threadIdx.x % Traits::kProducerThreads;
    if (threadIdx.x / Traits::kProducerThreads % 2 == 0) {
      produce_keys(cta, thread);
    } else {
      produce_queries(cta, band, thread);
    }
    cp_async_commit();
    cp_async_wait<0>();
  }
}

}  // namespace device

template <class Traits>
void launch_select_blocks_sm90(const SelectBlocksParams& params, int num_heads, Stream stream) {
  const Packing& packing = params.packing;
  constexpr int kBytes = Traits::kAt.bytes;
  const int64_t items = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                        params.shape.num_heads_kv;
  auto* kernel = device::select_blocks_sm90_kernel<Traits>;
  allow_shared_memory(kernel, kBytes);
  int device = 0, num_sms = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t ctas = std::min<int64_t>(items, num_sms);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, static_cast<size_t>(kBytes),
           static_cast<cudaStream_t>(stream)>>>(params, device::make_select_geometry(params),
                                                device::make_select_band(params.mask), num_heads,
                                                static_cast<int>(items));
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <SelectBlocksConfig kConfig>
void launch_select_blocks_sm90(const SelectBlocksParams& params, Stream stream) {
  using device::SelectSm90Traits;
  if (params.packing.total_q == 0) return;
  const int group = static_cast<int>(params.shape.group_size());
  const int num_heads = params.group_reduce == GroupReduce::kFirstHead ? 1 : group;
  const bool is_general =
      params.group_reduce == GroupReduce::kMax || params.score_dtype == ScoreDType::kBFloat16;
  const auto launch = [&]<int kPairCount, bool kGeneral> {
    launch_select_blocks_sm90<SelectSm90Traits<kConfig, kPairCount, kGeneral>>(params, num_heads,
                                                                               stream);
  };
  if constexpr (!select_sm90_pairs(kConfig)) {
    is_general ? launch.template operator()<1, true>() : launch.template operator()<1, false>();
  } else if (is_general) {
    launch.template operator()<0, true>();
  } else if (num_heads <= 2) {
    launch.template operator()<1, false>();
  } else if (num_heads <= 4) {
    launch.template operator()<2, false>();
  } else {
    launch.template operator()<0, false>();
  }
}

}  // namespace fsattn
