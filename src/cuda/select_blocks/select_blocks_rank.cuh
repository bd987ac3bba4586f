// The ranking half of select_blocks: what is kept of a query, the scores of its blocks, its list.
// Math, tiles and roles: select_blocks_sm80.cuh.
#pragma once
#include "cuda/device/mma_sm80.cuh"
#include "cuda/device/warp_topk.cuh"
#include "cuda/select_blocks/select_blocks.h"
#include "cuda/select_blocks/select_blocks_work.cuh"

namespace fsattn::device {

// Column of window c of a step: windows that start one block apart lie side by side, so that a warp
// reads them without bank conflicts.
__device__ __forceinline__ int score_column(int log_per_block, int c) {
  constexpr int kLogTileKv = 7;
  static_assert(1 << kLogTileKv == kSelectTileKv);
  const int in_block = c & ((1 << log_per_block) - 1);
  return (in_block << (kLogTileKv - log_per_block)) + (c >> log_per_block);
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
  __syncwarp();  // all lanes have read the counts, which one of them changes
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

}  // namespace fsattn::device
