// select_blocks: scores the blocks of keys by the mass that compressed attention gives them and keeps
// the best, in one kernel.
//
// Math    P[t, i] = reduce over the group's heads of exp(softmax_scale <q_h, k_i> - lse_h), i visible to t
//         score[t, b] = sum_i P[t, i] * overlap(window i, block b) / d;  weights: docs/math.md
//         row = the initial and local blocks, and the best of the others up to topk; ties to the lowest.
// Shapes  params/select_blocks.h. l / d <= 65, S / d <= 128.
// Tiles   one CTA per (64 queries of a sequence, KV head), 128 compressed keys a step. 8 warps: 4 x 16
//         queries times 2 x 64 keys. The keys stay while the heads of the group stream through, so the
//         sum over heads is an addition in registers.
// Roles   all warps compute P; then each warp ranks the blocks of 8 queries: a lane sums the windows of
//         one block and appends it to the query's buffer when it beats the worst one kept; full buffers
//         are sorted and merged into the list.
// Memory  head_dim 128, G > 1, topk <= 32: K 32 KB + Q (two stages) or P 33 KB + lists 32 KB = 98 KB, two
//         CTAs an SM. Nothing in global memory but the result.
// Bound   tensor cores, 2 * D FLOP a (head, query, window), level with ex2, one each.
// Numbers scores fp32; a block's windows are added in ascending order.
#pragma once
#include "base/cuda_check.h"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/select_blocks/select_blocks_rank.cuh"

namespace fsattn {
namespace device {

template <SelectBlocksConfig kConfig>
struct SelectTraits {
  using Element = ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kTileQ = kConfig.tile_q, kTileKv = kSelectTileKv;
  static constexpr int kWarpsQ = kTileQ / 16;  // while multiplying; the others share the keys
  static constexpr int kKeysPerWarp = kTileKv * kWarpsQ / kWarps;
  static constexpr int kRowsPerWarp = kTileQ / kWarps;  // while ranking
  static constexpr int kQBytes = tile_bytes<kDim>(kTileQ);
  static constexpr int kMinCtas = kDim <= 128 ? 2 : 1;
};

// p (+)= the probabilities of one head; s holds its scores. A row without keys has bias -inf.
template <int kN>
__device__ __forceinline__ void add_probabilities(float (&p)[kN][4], const float (&s)[kN][4],
                                                  float scale_log2, const float (&bias)[2],
                                                  GroupReduce reduce) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = exp2_approx(fmaf(s[n][e], scale_log2, bias[e / 2]));
      p[n][e] = reduce == GroupReduce::kMax ? fmaxf(p[n][e], x) : p[n][e] + x;
    }
  }
}

// Writes the probabilities of 16 queries and 8 kN keys; keys behind the row's limit count 0.
template <int kN>
__device__ __forceinline__ void store_probabilities(float* score, const float (&p)[kN][4],
                                                    int log_per_block, int first_column,
                                                    const int (&limit)[2], int lane) {
  asm volatile(""
               : "+r"(first_column));  // else all columns are kept in registers between the steps
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = first_column + n * 8 + lane % 4 * 2 + e % 2;
      const int row = lane / 4 + e / 2 * 8;
      score[row * kSelectScorePitch + score_column(log_per_block, c)] =
          c <= limit[e / 2] ? p[n][e] : 0.f;
    }
  }
}

// Starts the copy of the queries of head `h` of the group into their stage.
template <class Traits>
__device__ __forceinline__ void load_head(const SelectBlocksParams& p, const SelectMemory& memory,
                                          const SelectWork& work, int h, int thread) {
  using Element = typename Traits::Element;
  const int64_t head = work.first_head + h;
  const MatrixView<Element> q{static_cast<const Element*>(p.q.data) +
                                  work.token * p.q.token_stride + head * p.q.head_stride,
                              p.q.token_stride, work.num_queries,
                              static_cast<int>(p.shape.head_dim)};
  load_tile<Traits::kTileQ, Traits::kDim, Traits::kThreads>(memory.q() + h % 2 * Traits::kQBytes,
                                                            thread_part(q, thread), 0, thread);
}

// The sum over heads of the probabilities of the step whose keys are in shared memory, left in
// memory.score(). Q of the first head has been requested and committed.
template <class Traits>
__device__ void compute_step(const SelectBlocksParams& p, const SelectMemory& memory,
                             const SelectGeometry& g, const SelectWork& work, const Band& band,
                             int num_heads, int first_key, int thread) {
  using Element = typename Traits::Element;
  constexpr int kN = 4, kParts = Traits::kKeysPerWarp / (8 * kN);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int q_row = warp % Traits::kWarpsQ * 16;
  const int k_row = warp / Traits::kWarpsQ * Traits::kKeysPerWarp;
  float sum[kParts][kN][4] = {};
  for (int h = 0; h < num_heads; ++h) {
    if (h + 1 < num_heads) {
      load_head<Traits>(p, memory, work, h + 1, thread);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();  // Q of this head and the keys have landed
    const uint32_t q_lane = lane_rows16<Traits::kDim>(
        memory.q() + h % 2 * Traits::kQBytes + tile_bytes<Traits::kDim>(q_row), lane);
    const float* lse = static_cast<const float*>(p.lse.data) +
                       (work.first_head + h) * p.lse.head_stride + work.token;
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = q_row + i * 8 + lane / 4;
      const float x = row < work.num_queries ? __ldg(lse + row) : -INFINITY;
      bias[i] = x == -INFINITY ? -INFINITY : -x * kLog2E;
    }
    // In parts: the scores of all 64 keys beside their sums would not fit 128 registers.
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float s[1][kN][4] = {};
      const uint32_t k_tile = memory.k() + tile_bytes<Traits::kDim>(k_row + part * kN * 8);
      mma_a_bt<Element, Traits::kDim, Traits::kDim>(s, q_lane,
                                                    lane_rows8x2<Traits::kDim>(k_tile, lane));
      add_probabilities(sum[part], s[0], g.scale_log2, bias, p.group_reduce);
    }
    __syncthreads();  // nobody reads this Q any more; after the last head, nor the keys
  }
  int limit[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int last = band.last_key(work.position + q_row + i * 8 + lane / 4);
    limit[i] = min(last, work.num_keys - 1) - first_key;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    store_probabilities(memory.score(q_row), sum[part], g.log_per_block, k_row + part * kN * 8,
                        limit, lane);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    select_blocks_kernel(const __grid_constant__ SelectBlocksParams p,
                         const __grid_constant__ SelectBlocksSmem at,
                         const __grid_constant__ SelectGeometry g,
                         const __grid_constant__ Band band, int num_heads) {
  using Element = typename Traits::Element;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  // Shared, because in registers it would push the loop into spilling.
  __shared__ SelectWork shared_work;
  if (thread == 32) select_setup() = {at, g};
  if (thread == 0) {
    shared_work = find_select_work<Traits::kTileQ>(p, band, static_cast<int>(blockIdx.x),
                                                   static_cast<int>(gridDim.x));
  }
  __syncthreads();
  const SelectWork& work = shared_work;
  if (work.num_queries <= 0) return;
  const SelectMemory memory{at, g};
  clear_rows<Traits>(memory, g, work, warp, lane);

  const auto load_keys = [&](int first) {
    const MatrixView<Element> k{
        static_cast<const Element*>(p.k_cmp.data) + work.first_row * p.k_cmp.token_stride +
            work.kv_head * p.k_cmp.head_stride,
        p.k_cmp.token_stride, work.num_keys, static_cast<int>(p.shape.head_dim)};
    load_tile<Traits::kTileKv, Traits::kDim, Traits::kThreads>(memory.k(), thread_part(k, thread),
                                                               first, thread);
  };

  int first_key = 0;
  if (work.last_key >= 0) {
    load_keys(0);
    load_head<Traits>(p, memory, work, 0, thread);
    cp_async_commit();
  }
  for (; first_key <= work.last_key; first_key += Traits::kTileKv) {
    compute_step<Traits>(p, memory, g, work, band, num_heads, first_key, thread);
    const bool has_next = first_key + Traits::kTileKv <= work.last_key;
    if (has_next) load_keys(first_key + Traits::kTileKv);
    __syncthreads();  // the probabilities of all warps are there
    rank<Traits>(g, first_key, warp, lane);
    __syncthreads();  // the scores make room for the queries
    if (has_next) load_head<Traits>(p, memory, work, 0, thread);
    cp_async_commit();
  }
  cp_async_wait<0>();

  // Blocks behind the last visible window still compete, with what of it reaches into them.
  const int last_block =
      min((work.position + work.num_queries - 1) / g.block_size, work.num_blocks - 1);
  for (int i = thread; i < Traits::kTileQ * kSelectScorePitch; i += Traits::kThreads)
    memory.score(0)[i] = 0.f;
  __syncthreads();
  for (; first_key >> g.log_per_block <= last_block; first_key += Traits::kTileKv) {
    rank<Traits>(g, first_key, warp, lane);
  }

  int32_t* out = p.topk_idx + (work.kv_head * p.packing.total_q + work.token) * p.topk;
  for (int i = 0; i < Traits::kRowsPerWarp; i += kMergeRows) {
    merge_rows(warp * Traits::kRowsPerWarp + i, lane);
  }
  for (int i = warp * Traits::kRowsPerWarp; i < (warp + 1) * Traits::kRowsPerWarp; ++i) {
    if (i >= work.num_queries) break;
    const SelectRow row = select_row(g, work, i);
    write_row(out + int64_t{i} * p.topk, row, memory.list(i), g.topk, lane);
  }
}

}  // namespace device

template <SelectBlocksConfig kConfig>
void launch_select_blocks_sm80(const SelectBlocksParams& params, Stream stream) {
  using Traits = device::SelectTraits<kConfig>;
  const Packing& packing = params.packing;
  if (packing.total_q == 0) return;
  const device::SelectGeometry g = device::make_select_geometry(params);
  const device::Band band = device::make_select_band(params.mask);
  const int group = static_cast<int>(params.shape.group_size());
  const int num_heads = params.group_reduce == GroupReduce::kFirstHead ? 1 : group;
  const SelectBlocksSmem smem = select_blocks_smem(kConfig, g.overlap - 1, g.topk);
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                       params.shape.num_heads_kv;
  auto* kernel = device::select_blocks_kernel<Traits>;
  allow_shared_memory(kernel, smem.bytes);
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, static_cast<size_t>(smem.bytes),
           static_cast<cudaStream_t>(stream)>>>(params, smem, g, band, num_heads);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
