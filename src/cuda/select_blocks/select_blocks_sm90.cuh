// select_blocks, sm_90a: the same operator with wgmma and producer warps, for the usual geometry.
//
// Math    select_blocks_sm80.cuh, with l / d = 2 and S / d = 4: a block's windows weigh 1, 2, 2, 2, 1.
// Shapes  params/select_blocks.h, head_dim and topk up to the row's.
// Tiles   a product is 64 rows and 128 windows (32 blocks). The rows are 64 queries of one head for groups
//         of one, else 32 queries of two heads, 8 apart, so that a thread adds the heads of a query in 32
//         registers. Each consumer warpgroup has its own queries; all use the same tiles of windows.
// Roles   two or three consumer warpgroups: products, exponentials, block scores, ranking in registers
//         (select_blocks_pick.cuh). A product starts as soon as the scores of the one before it have become
//         probabilities, so that it runs while blocks are ranked. Two producer warps copy keys and two copy
//         queries, by cp.async. A CTA an SM goes through the work items, longest first; the producers are
//         ahead.
// Layout  the keys of a tile are copied in an order that gives a thread whole blocks, see load_keys().
// Memory  up to two tiles of queries a warpgroup (they stay when the group has no more), two or three of
//         keys, the lists of the ranking.
// Regs    scores of a tile 64, sum over heads 32: 152 a consumer thread of three warpgroups, 56 a producer.
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

template <class Traits>
struct SelectConsumer {
  using Element = typename Traits::Element;
  static constexpr int kRows = Traits::kRows;
  static constexpr int kSums = kRows * 32;  // windows of a tile that a thread has

  const SelectSm90<Traits>& cta;
  const Band& band;
  int group, warp, lane;  // warp: of the warpgroup
  RingPosition<Traits::kQStages> q_at = {};
  RingPosition<Traits::kKStages> k_at = {};

  // Of the item: the first of the thread's queries, which lie 8 apart.
  __device__ int row() const {
    return group * Traits::kGroupQueries + warp * (8 * kRows) + lane / 4;
  }

  // Starts s = Q K^T of the tiles in the stages.
  __device__ __forceinline__ void issue(float (&s)[64]) const {
    const uint64_t a = wgmma_descriptor(cta.queries(group, q_at.stage), 16);
    const uint64_t b = wgmma_descriptor(cta.keys(k_at.stage), 16);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Traits::kDim / 16; ++kk) {
      wgmma_ss_m64n128k16<Element>(
          s, wgmma_descriptor_at(a, kk / 4 * Traits::kQPanelBytes + kk % 4 * 32),
          wgmma_descriptor_at(b, kk / 4 * Traits::kKPanelBytes + kk % 4 * 32), kk > 0);
    }
    wgmma_commit();
  }

  // -lse of the thread's two rows of a product, in bits. A row that counts nothing: -inf.
  __device__ __forceinline__ void load_bias(const SelectWork& work, int pair,
                                            float (&bias)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = Traits::kPairs ? 2 * pair + i : 0, r = row() + (Traits::kPairs ? 0 : i * 8);
      const float* from = static_cast<const float*>(cta.p.lse.data) +
                          (work.first_head + head) * cta.p.lse.head_stride + work.token + r;
      const bool is_valid = r < work.num_queries && head < cta.num_heads;
      const float lse = is_valid ? __ldg(from) : -INFINITY;
      bias[i] = lse == -INFINITY ? -INFINITY : -lse * kLog2E;
    }
  }

  // p (+)= the probabilities of a product. Element 2 n + e of a row is its window 2 n + e of the lane's 32.
  __device__ __forceinline__ void add(float (&p)[kSums], const float (&s)[64],
                                      const float (&bias)[2]) const {
    const auto probability = [&](int i, int half) {
      return exp2_approx(fmaf(s[i / 2 * 4 + half * 2 + i % 2], cta.g.scale_log2, bias[half]));
    };
    if constexpr (!Traits::kPairs) {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[i] = probability(i, 0), p[32 + i] = probability(i, 1);
    } else if (cta.p.group_reduce == GroupReduce::kMax) {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[i] = fmaxf(fmaxf(p[i], probability(i, 0)), probability(i, 1));
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[i] = p[i] + probability(i, 0) + probability(i, 1);
    }
  }

  // Zeros where a query does not see a window of the tile.
  __device__ __forceinline__ void mask(const SelectWork& work, int tile, float (&p)[kSums]) const {
    const int first = tile * Traits::kTileKv;
    if (first + Traits::kTileKv - 1 <= work.full_last) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int last = min(band.last_key(work.position + row() + r * 8), work.num_keys - 1);
      const int limit = last - first - lane % 4 * 32;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (i > limit) p[r * 32 + i] = 0.f;
      }
    }
  }

  // The scores of the lane's eight blocks; carry: what the tile before adds to the first block.
  __device__ __forceinline__ void make_scores(const float (&p)[kSums], float (&carry)[kRows],
                                              int (&score)[kRows][kLaneBlocks]) const {
    const int source = (lane & ~3) | ((lane + 3) & 3);  // the lane of the blocks before
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float end = p[r * 32 + 31];
      float before = __shfl_sync(kFullMask, lane % 4 == 3 ? carry[r] : end, source);
      carry[r] = end;
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        const float* w = p + r * 32 + i * 4;
        score[r][i] = __float_as_int(fmaf(2.f, w[0] + w[1] + w[2], before + w[3]));
        before = w[3];
      }
    }
    if (!cta.g.rounds_to_bf16) return;
    __syncwarp();  // a branch
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        const float x = __int_as_float(score[r][i]);
        score[r][i] = __float_as_int(__bfloat162float(__float2bfloat16_rn(x)));
      }
    }
  }

  // Waits for the operands of a product.
  __device__ __forceinline__ void await(bool is_first_tile, bool is_first_pair) const {
    const bool is_new = is_first_tile || cta.streams_queries();
    if (is_first_pair) mbarrier_wait(cta.k_full(k_at.stage), k_at.parity);
    if (is_new) mbarrier_wait(cta.q_full(group, q_at.stage), q_at.parity);
    // What cp.async wrote becomes visible to wgmma. The fence waits for all loads of the thread.
    if (is_new || is_first_pair) fence_async_proxy();
  }

  // Products and sums of the tiles of an item, and the ranking. A product starts when the scores of the one
  // before it have become probabilities.
  __device__ __forceinline__ void score(const SelectItem& item,
                                        PickList<Traits::kSlots> (&list)[kRows]) {
    const SelectWork& work = item.work;
    const int num_pairs = cta.num_pairs(), num_tiles = item.num_tiles;
    if (num_tiles == 0) return;
    float s[64], p[kSums], bias[2], carry[kRows] = {};
    int score[kRows][kLaneBlocks];
    await(true, true);
    issue(s);
    load_bias(work, 0, bias);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      const bool is_last_tile = tile == num_tiles - 1;
#pragma unroll
      for (float& x : p) x = 0.f;
#pragma unroll 1
      for (int pair = 0; pair < num_pairs; ++pair) {
        const bool is_last_pair = pair == num_pairs - 1;
        wgmma_wait_group<0>();
        pin_registers(s);
        release(is_last_tile || cta.streams_queries(), is_last_pair, num_pairs);
        add(p, s, bias);
        if (!Traits::kPairs) finish_tile(work, tile, p, carry, score);
        // Behind the last product comes one that nobody reads: a product on some paths only would make the
        // compiler wait for it at once.
        if (!is_last_tile || !is_last_pair) await(is_last_pair ? false : tile == 0, is_last_pair);
        issue(s);
        if (Traits::kPairs) load_bias(work, is_last_pair ? 0 : pair + 1, bias);
      }
      if (Traits::kPairs) finish_tile(work, tile, p, carry, score);
      pick_tile(list, score, tile, lane % 4);
    }
    wgmma_wait_group<0>();
    pin_registers(s);
  }

  __device__ __forceinline__ void finish_tile(const SelectWork& work, int tile, float (&p)[kSums],
                                              float (&carry)[kRows],
                                              int (&score)[kRows][kLaneBlocks]) const {
    mask(work, tile, p);
    make_scores(p, carry, score);
  }

  // The product is done: what it read may be overwritten. Queries that stay are released after the last
  // tile; until then their ring turns without new parities.
  __device__ __forceinline__ void release(bool releases_queries, bool releases_keys,
                                          int num_pairs) {
    if (lane == 0) {
      if (releases_queries) mbarrier_arrive(cta.q_empty(group, q_at.stage));
      if (releases_keys) mbarrier_arrive(cta.k_empty(k_at.stage));
    }
    if (releases_queries) {
      q_at.advance();
    } else if (num_pairs == Traits::kQStages) {
      if (++q_at.stage == Traits::kQStages) q_at.stage = 0;
    }
    if (releases_keys) k_at.advance();
  }

  __device__ __forceinline__ void run() {
    for_each_item(cta, [&](const SelectItem& item) {
      constexpr int kListInts = kWarpSize * Traits::kSlots;
      const int list_index = (group * 4 + warp) * kRows;
      PickList<Traits::kSlots> list[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        list[r].scores = cta.base + cta.at.score + (list_index + r) * (kListInts * 4) + lane * 4;
        list[r].codes = cta.base + cta.at.code + (list_index + r) * (kListInts * 2) + lane * 2;
        const int query = row() + r * 8;
        list[r].init(select_row(cta.g, item.work, query), query < item.work.num_queries, lane % 4);
      }
      score(item, list);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int query = row() + r * 8;
        int32_t* out =
            cta.p.topk_idx +
            (item.work.kv_head * cta.p.packing.total_q + item.work.token + query) * cta.p.topk;
        write_picks(list[r], select_row(cta.g, item.work, query), query < item.work.num_queries,
                    list[r].scores - lane * 4, out, cta.g.topk, lane);
      }
    });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    select_blocks_sm90_kernel(const __grid_constant__ SelectBlocksParams p,
                              const __grid_constant__ SelectSm90Smem at,
                              const __grid_constant__ SelectGeometry g,
                              const __grid_constant__ Band band, int num_heads, int num_items) {
  extern __shared__ __align__(1024) unsigned char select_sm90_smem_base[];
  unsigned char* smem = select_sm90_smem_base;
  const SelectSm90<Traits> cta{p, g, at, smem, smem_address(smem), num_heads, num_items};
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

template <SelectBlocksConfig kConfig>
void launch_select_blocks_sm90(const SelectBlocksParams& params, Stream stream) {
  using Traits = device::SelectSm90Traits<kConfig>;
  const Packing& packing = params.packing;
  if (packing.total_q == 0) return;
  const int group = static_cast<int>(params.shape.group_size());
  const int num_heads = params.group_reduce == GroupReduce::kFirstHead ? 1 : group;
  const SelectSm90Smem smem = select_sm90_smem(kConfig);
  const int64_t items = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                        params.shape.num_heads_kv;
  auto* kernel = device::select_blocks_sm90_kernel<Traits>;
  allow_shared_memory(kernel, smem.bytes);
  int device = 0, num_sms = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t ctas = std::min<int64_t>(items, num_sms);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, static_cast<size_t>(smem.bytes),
           static_cast<cudaStream_t>(stream)>>>(params, smem, device::make_select_geometry(params),
                                                device::make_select_band(params.mask), num_heads,
                                                static_cast<int>(items));
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
