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
#include "cuda/device/band.h"
#include "cuda/device/sequence_tile.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/device/warp_topk.cuh"
#include "cuda/select_blocks/select_blocks.h"

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

// What one CTA computes.
struct SelectWork {
  int kv_head;
  int first_head;   // of the group
  int64_t token;    // of the first query
  int position;     // of the first query
  int num_queries;  // 0 or less: nothing to do
  int first_row;    // of the keys
  int num_keys;
  int last_key;    // the last key that some query sees; -1: none
  int full_last;   // the last key that every query sees
  int num_blocks;  // of the sequence
};

// The numbers of one call that every warp needs.
struct SelectGeometry {
  int block_size, topk, init_blocks, local_blocks;
  int overlap;    // l / d: windows that cover a token
  int per_block;  // S / d: windows that start in a block
  int log_per_block;
  bool rounds_to_bf16;
  float scale_log2;
};

// Where the competition of one query takes place.
struct SelectRow {
  int num_blocks;   // blocks that the query may select; 0: none
  int num_init;     // blocks 0 .. num_init - 1 are taken
  int local_begin;  // blocks from here on compete for nothing: the last num_local are taken
  int num_local;
  int room;  // blocks that the ranking may take
};

__device__ __forceinline__ SelectRow select_row(const SelectGeometry& g, const SelectWork& work,
                                                int row) {
  const int position = work.position + row;
  const int query_block = position < 0 ? -1 : position / g.block_size;
  SelectRow r;
  r.num_blocks = min(query_block + 1, work.num_blocks);
  r.num_init = min(min(g.init_blocks, r.num_blocks), g.topk);
  r.local_begin = min(max(query_block + 1 - g.local_blocks, r.num_init), r.num_blocks);
  r.num_local = min(r.num_blocks - r.local_begin, g.topk - r.num_init);
  r.room = g.topk - r.num_init - r.num_local;
  return r;
}

template <class Traits>
__device__ SelectWork find_select_work(const SelectBlocksParams& p, const Band& band) {
  const int num_heads = static_cast<int>(p.shape.num_heads_kv);
  const int batch = static_cast<int>(p.packing.batch);
  // Latest queries first: they see the most keys.
  const int slot = static_cast<int>(gridDim.x) / num_heads - 1 - blockIdx.x / num_heads;
  const TileSlot tile = find_tile(p.packing.cu_q, batch, slot, Traits::kTileQ);
  const RowRange queries =
      rows_of(p.packing.cu_q, batch, tile.seq, static_cast<int>(p.packing.total_q));
  const RowRange keys = rows_of(p.mask.cu_cmp, batch, tile.seq, static_cast<int>(p.mask.total_cmp));
  const bool is_sequence = tile.seq < batch;
  SelectWork work;
  work.kv_head = blockIdx.x % num_heads;
  work.first_head = work.kv_head * static_cast<int>(p.shape.group_size());
  work.token = int64_t{queries.begin} + tile.first;
  work.num_queries = min(queries.count - tile.first, Traits::kTileQ);
  work.position = query_offset(p.packing, tile.seq, queries.count) + tile.first;
  work.first_row = keys.begin;
  work.num_keys = is_sequence ? keys.count : 0;
  // In tokens, of which this operator has no tensor: total_k is not known here.
  const int seqlen_k =
      is_sequence ? __ldg(p.packing.cu_k + tile.seq + 1) - __ldg(p.packing.cu_k + tile.seq) : 0;
  work.num_blocks = ceil_div(max(seqlen_k, 0), static_cast<int>(p.block_size));
  work.last_key = min(band.last_key(work.position + work.num_queries - 1), work.num_keys - 1);
  work.full_last = min(band.last_key(work.position), work.num_keys - 1);
  return work;
}

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

// Column of window c of a step: windows that start one block apart lie side by side, so that a warp
// reads them without bank conflicts.
__device__ __forceinline__ int score_column(int log_per_block, int c) {
  constexpr int kLogTileKv = 7;
  static_assert(1 << kLogTileKv == kSelectTileKv);
  const int in_block = c & ((1 << log_per_block) - 1);
  return (in_block << (kLogTileKv - log_per_block)) + (c >> log_per_block);
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

// Score of block `block` of a step; windows before the step are in `halo`, the last overlap - 1 of
// them. The usual geometry, two windows over a token and four in a block, has weights 1, 2, 2, 2, 1.
template <bool kIsUsual>
__device__ __forceinline__ float block_score(const SelectGeometry& g, const float* score,
                                             const float* halo, int block) {
  float sum = 0.f;
  if constexpr (kIsUsual) {
    constexpr int kBlocks = kSelectTileKv / 4;
    const float before = block == 0 ? halo[0] : score[3 * kBlocks + block - 1];
    const float* p = score + block;
    sum = before + 2.f * p[0];
    sum = fmaf(2.f, p[kBlocks], sum);
    sum = fmaf(2.f, p[2 * kBlocks], sum);
    sum += p[3 * kBlocks];
  } else {
    const int first = g.per_block * block - (g.overlap - 1);
    const int most = min(g.overlap, g.per_block);
    const int count = g.overlap + g.per_block - 1;
    for (int o = 0; o < count; ++o) {
      const int c = first + o;
      const float p = c < 0 ? halo[c + g.overlap - 1] : score[score_column(g.log_per_block, c)];
      const int weight = min(min(o + 1, count - o), most);
      sum = fmaf(static_cast<float>(weight), p, sum);
    }
  }
  return g.rounds_to_bf16 ? __bfloat162float(__float2bfloat16_rn(sum)) : sum;
}

// What is kept of one query while its blocks are ranked.
struct alignas(16) RankState {
  int begin, end;  // blocks that compete
  int room;        // for how many there is room
  int count;       // keys in the buffer
};

extern __shared__ __align__(128) unsigned char select_smem[];

// Shared memory of a CTA as typed arrays. Addresses are formed where they are used: kept in registers
// they would make the products spill.
struct SelectMemory {
  const SelectBlocksSmem& at;
  const SelectGeometry& g;

  __device__ uint32_t k() const { return smem_address(select_smem) + at.k; }
  __device__ uint32_t q() const { return smem_address(select_smem) + at.q; }
  __device__ float* score(int row) const {
    return reinterpret_cast<float*>(select_smem + at.score) + row * kSelectScorePitch;
  }
  __device__ float* halo(int row) const {
    return reinterpret_cast<float*>(select_smem + at.halo) + row * round_up(g.overlap - 1, 2);
  }
  __device__ int capacity() const { return round_up(g.topk, kWarpSize); }
  // The best keys of a query in descending order, 0 behind the last.
  __device__ RankKey* list(int row) const {
    return reinterpret_cast<RankKey*>(select_smem + at.list) + row * capacity();
  }
  __device__ RankKey* buffer(int row) const {
    return reinterpret_cast<RankKey*>(select_smem + at.buffer) + row * kSelectBuffer;
  }
  // The worst key of the row that still counts.
  __device__ RankKey* threshold(int row) const {
    return reinterpret_cast<RankKey*>(select_smem + at.threshold) + row;
  }
  __device__ RankState* state(int row) const {
    return reinterpret_cast<RankState*>(select_smem + at.state) + row;
  }
};

// A copy of the kernel's parameters at offset 0 of shared memory, for the functions that are not
// inlined and cannot see them.
struct SelectSetup {
  SelectBlocksSmem at;
  SelectGeometry g;
};
static_assert(sizeof(SelectSetup) <= kSelectSetupBytes);

__device__ __forceinline__ SelectSetup& select_setup() {
  return *reinterpret_cast<SelectSetup*>(select_smem);
}

// Merges the buffers of kMergeRows queries into their lists and empties them. Not inlined: the lane masks
// of the sorting network would be kept in registers through the products.
inline constexpr int kMergeRows = 4;

static __device__ __noinline__ void merge_rows(int first_row, int lane) {
  constexpr int kRows = kMergeRows;
  const SelectMemory memory{select_setup().at, select_setup().g};
  __syncwarp();  // the keys of all lanes are in the buffers
  RankKey* list[kRows];
  RankKey fresh[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i;
    list[i] = memory.list(row);
    fresh[i] = lane < memory.state(row)->count ? memory.buffer(row)[lane] : 0;
  }
  merge_into(list, memory.capacity(), fresh, lane);
  __syncwarp();
  if (lane < kRows) {
    const int row = first_row + lane;
    RankState& state = *memory.state(row);
    *memory.threshold(row) = state.room == 0 ? ~RankKey{0} : memory.list(row)[state.room - 1];
    state.count = 0;
  }
  __syncwarp();
}

// Writes the row of topk_idx: ascending, -1 behind the last.
__device__ __forceinline__ void write_row(int32_t* out, const SelectRow& row, const RankKey* list,
                                          int topk, int lane) {
  int ranked = 0;
  for (int first = 0; first < row.room; first += kWarpSize) {
    const bool is_taken = first + lane < row.room && list[first + lane] != 0;
    ranked += __popc(__ballot_sync(kFullMask, is_taken));
  }
  for (int i = lane; i < ranked; i += kWarpSize) {
    const int block = rank_index(list[i]);
    int place = 0;
    for (int j = 0; j < ranked; ++j) place += rank_index(list[j]) < block ? 1 : 0;
    out[row.num_init + place] = block;
  }
  const int total = row.num_init + ranked + row.num_local;
  for (int i = lane; i < topk; i += kWarpSize) {
    if (i < row.num_init) out[i] = i;
    if (i >= row.num_init + ranked) out[i] = i < total ? row.num_blocks - (total - i) : -1;
  }
}

template <class Traits>
__device__ void clear_rows(const SelectMemory& memory, const SelectGeometry& g,
                           const SelectWork& work, int warp, int lane) {
  for (int i = warp * Traits::kRowsPerWarp; i < (warp + 1) * Traits::kRowsPerWarp; ++i) {
    for (int c = lane; c < memory.capacity(); c += kWarpSize) memory.list(i)[c] = 0;
    for (int c = lane; c < g.overlap - 1; c += kWarpSize) memory.halo(i)[c] = 0.f;
    if (lane == 0) {
      const SelectRow at = select_row(g, work, i);
      const bool is_query = i < work.num_queries;
      *memory.state(i) = {is_query ? at.num_init : 0, is_query ? at.local_begin : 0, at.room, 0};
      *memory.threshold(i) = at.room == 0 ? ~RankKey{0} : 0;
    }
  }
  __syncwarp();
}

// Ranks one block a lane for kRows queries from `first_row` on. All scores are formed before the first
// is compared: one query after the other, the warp would wait for shared memory.
template <int kRows, bool kIsUsual>
__device__ __forceinline__ void rank_blocks(const SelectMemory& memory, int first_row,
                                            int first_block, int block_in_step, bool is_block,
                                            int lane) {
  const int block = first_block + block_in_step;
  RankKey key[kRows];
  unsigned winners[kRows];
  int counts[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const RankState state = *memory.state(first_row + i);
    const bool competes = is_block && block >= state.begin && block < state.end;
    const float score = block_score<kIsUsual>(memory.g, memory.score(first_row + i),
                                              memory.halo(first_row + i), block_in_step);
    key[i] = competes ? rank_key(score, block) : 0;
    counts[i] = state.count;
    winners[i] = __ballot_sync(kFullMask, key[i] > *memory.threshold(first_row + i));
  }
  bool is_full = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) is_full |= counts[i] + __popc(winners[i]) > kSelectBuffer;
  if (is_full) {
    // Queries of a warp fill their buffers at about the same time: when one is full, all are merged.
    for (int i = 0; i < kRows; i += kMergeRows) merge_rows(first_row + i, lane);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      counts[i] = 0;
      winners[i] = __ballot_sync(kFullMask, key[i] > *memory.threshold(first_row + i));
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (winners[i] == 0) continue;
    const int row = first_row + i;
    const int place = counts[i] + __popc(winners[i] & ((1u << lane) - 1));
    if (winners[i] >> lane & 1) memory.buffer(row)[place] = key[i];
    if (lane == 0) memory.state(row)->count = counts[i] + __popc(winners[i]);
  }
  __syncwarp();
}

// Ranks the blocks that end inside the step from window `first_key` on, for the warp's own queries.
// Not inlined: what it keeps would take the registers of the products.
template <class Traits, bool kIsUsual>
__device__ __noinline__ void rank_step(int first_key, int warp, int lane) {
  constexpr int kRows = Traits::kRowsPerWarp;
  static_assert(kRows % kMergeRows == 0);
  const SelectSetup setup = select_setup();
  const SelectMemory memory{setup.at, setup.g};
  const int first_row = warp * kRows;
  const int log_per_block = kIsUsual ? 2 : setup.g.log_per_block;
  const int blocks = Traits::kTileKv >> log_per_block;
  for (int base = 0; base < blocks; base += kWarpSize) {
    const bool is_block = base + lane < blocks;
    rank_blocks<kRows, kIsUsual>(memory, first_row, first_key >> log_per_block,
                                 is_block ? base + lane : 0, is_block, lane);
  }
  const int columns = setup.g.overlap - 1;
  for (int c = lane; c < kRows * columns; c += kWarpSize) {
    const int row = first_row + c / columns, column = c % columns;
    memory.halo(row)[column] =
        memory.score(row)[score_column(log_per_block, Traits::kTileKv - columns + column)];
  }
}

template <class Traits>
__device__ __forceinline__ void rank(const SelectGeometry& g, int first_key, int warp, int lane) {
  if (g.overlap == 2 && g.per_block == 4) {
    rank_step<Traits, true>(first_key, warp, lane);
  } else {
    rank_step<Traits, false>(first_key, warp, lane);
  }
  __syncwarp();  // the lanes read each other's halo in the next step
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
  if (thread == 0) shared_work = find_select_work<Traits>(p, band);
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
void launch_select_blocks(const SelectBlocksParams& params, Stream stream) {
  using Traits = device::SelectTraits<kConfig>;
  const Packing& packing = params.packing;
  if (packing.total_q == 0) return;
  const CompressedMask& mask = params.mask;
  device::SelectGeometry g{};
  g.block_size = static_cast<int>(params.block_size);
  g.topk = static_cast<int>(params.topk);
  g.init_blocks = static_cast<int>(params.init_blocks);
  g.local_blocks = static_cast<int>(params.local_blocks);
  g.overlap = static_cast<int>(mask.kernel_size / mask.kernel_stride);
  g.per_block = static_cast<int>(params.block_size / mask.kernel_stride);
  while (1 << g.log_per_block < g.per_block) ++g.log_per_block;
  g.scale_log2 = static_cast<float>(params.shape.softmax_scale) * device::kLog2E;
  g.rounds_to_bf16 = params.score_dtype == ScoreDType::kBFloat16;
  const device::Band band{static_cast<int>(mask.kernel_stride), static_cast<int>(mask.kernel_size),
                          device::Band::kUnlimited};
  const int group = static_cast<int>(params.shape.group_size());
  const int num_heads = params.group_reduce == GroupReduce::kFirstHead ? 1 : group;
  const SelectBlocksSmem smem = select_blocks_smem(kConfig, g.overlap - 1, g.topk);
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                       params.shape.num_heads_kv;
  auto* kernel = device::select_blocks_kernel<Traits>;
  FSATTN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem.bytes));
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, static_cast<size_t>(smem.bytes),
           static_cast<cudaStream_t>(stream)>>>(params, smem, g, band, num_heads);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
