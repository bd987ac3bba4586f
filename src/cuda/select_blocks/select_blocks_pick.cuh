// The ranking of the Hopper kernel of select_blocks: block scores of a chunk of blocks lie in shared
// memory, and a warp looks through whole rows of them.
//
// A list of candidates a row is kept in the order of the blocks, and a limit that only scores above it
// matter. In the first chunk a lane takes the largest score of its blocks: the room-th largest of the 32
// lanes is reached by at least `room` blocks. Later the limit is the room-th best candidate, found
// again when the list overflows. Only scores are sorted, to find limits; candidates stay in place.
#pragma once
#include "cuda/device/element.cuh"
#include "cuda/device/warp_topk.cuh"
#include "cuda/select_blocks/select_blocks_work.cuh"
#include "plan/select_blocks_table.h"

namespace fsattn::device {

// What is kept of one query while its blocks are ranked.
struct alignas(16) PickState {
  int begin, end;  // blocks that compete
  int count;       // candidates in the list
  int limit;       // scores of later blocks that do not exceed it cannot be picked
};

// A candidate: score bits and block.
using Pick = int2;

inline constexpr int kCarryPitch = kSelectSm90CarryPitch;
inline constexpr int kChunkTiles = kSelectSm90ChunkTiles;
inline constexpr int kChunkBlocks = kChunkTiles * kWarpSize;

// Scores, candidates and states of the queries of a CTA, in shared memory.
struct PickMemory {
  float* score;  // [rows, kChunkBlocks]
  float* carry;  // [rows, kCarryPitch]: what the tile before adds to a tile's first block
  Pick* list;    // [rows, kWarpSize], in ascending order of the blocks
  PickState* state;
  int* room;  // how many blocks of a row are picked
};

// Where block `block` of a tile lies in its 32 scores: eight rows of four blocks touch all banks.
__device__ __forceinline__ int pick_column(int row, int block) { return block ^ (row % 8 * 4); }

template <bool kHasCarry>
__device__ __forceinline__ float load_score(const PickMemory& memory, int first_tile, int row,
                                            int tile, int lane) {
  float score = memory.score[row * kChunkBlocks + tile * kWarpSize + pick_column(row, lane)];
  if (kHasCarry && lane == 0) score += memory.carry[row * kCarryPitch + (first_tile + tile) % 16];
  return score;
}

__device__ __forceinline__ float round_to_bf16(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

__device__ __forceinline__ bool competes(const PickState& state, int block) {
  return block >= state.begin && block < state.end;
}

// Shortens the lists to the blocks that would be picked now.
template <int kRows>
__device__ __forceinline__ void prune(const PickMemory& memory, int first_row,
                                      PickState (&state)[kRows], const int (&room)[kRows],
                                      int lane) {
  Pick kept[kRows];
  int sorted[kRows];
  __syncwarp();  // the lists have been written
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    kept[r] = lane < state[r].count ? memory.list[(first_row + r) * kWarpSize + lane] : Pick{-1, 0};
    sorted[r] = kept[r].x;
  }
  sort_scores(sorted, lane);
  __syncwarp();  // the lists have been read
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int limit = __shfl_sync(kFullMask, sorted[r], max(room[r] - 1, 0));
    const unsigned below = (1u << lane) - 1;
    const bool is_tie = kept[r].x == limit;
    const unsigned over = __ballot_sync(kFullMask, kept[r].x > limit);
    const unsigned ties = __ballot_sync(kFullMask, is_tie);
    const bool keeps = kept[r].x > limit ||
                       (is_tie && limit >= 0 && __popc(ties & below) < room[r] - __popc(over));
    const unsigned mask = __ballot_sync(kFullMask, keeps);
    if (keeps) memory.list[(first_row + r) * kWarpSize + __popc(mask & below)] = kept[r];
    state[r].count = __popc(mask);
    state[r].limit = max(state[r].limit, limit);
  }
}

// The same with up to 32 fresh blocks, all behind those of the list, in ascending order; lanes without
// one have score -1.
template <int kRows>
__device__ __forceinline__ void merge_picks(const PickMemory& memory, int first_row,
                                            PickState (&state)[kRows], const int (&room)[kRows],
                                            const Pick (&fresh)[kRows], int lane) {
  Pick kept[kRows];
  int best[kRows], old[kRows];
  __syncwarp();  // the lists have been written
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    kept[r] = lane < state[r].count ? memory.list[(first_row + r) * kWarpSize + lane] : Pick{-1, 0};
    best[r] = fresh[r].x;
    old[r] = kept[r].x;
  }
  sort_scores(best, lane);
  sort_scores(old, lane);
  merge_scores(best, old, lane);
  __syncwarp();  // the lists have been read
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int threshold = __shfl_sync(kFullMask, best[r], max(room[r] - 1, 0));
    const unsigned below = (1u << lane) - 1;
    const unsigned kept_over = __ballot_sync(kFullMask, kept[r].x > threshold);
    const unsigned fresh_over = __ballot_sync(kFullMask, fresh[r].x > threshold);
    const unsigned kept_ties = __ballot_sync(kFullMask, kept[r].x == threshold && threshold >= 0);
    const unsigned fresh_ties = __ballot_sync(kFullMask, fresh[r].x == threshold && threshold >= 0);
    const int ties = room[r] - __popc(kept_over) - __popc(fresh_over);  // that are picked
    const bool keeps =
        kept[r].x > threshold || ((kept_ties >> lane & 1) && __popc(kept_ties & below) < ties);
    const bool takes =
        fresh[r].x > threshold ||
        ((fresh_ties >> lane & 1) && __popc(kept_ties) + __popc(fresh_ties & below) < ties);
    const unsigned kept_mask = __ballot_sync(kFullMask, keeps);
    const unsigned fresh_mask = __ballot_sync(kFullMask, takes);
    Pick* list = memory.list + (first_row + r) * kWarpSize;
    if (keeps) list[__popc(kept_mask & below)] = kept[r];
    if (takes) list[__popc(kept_mask) + __popc(fresh_mask & below)] = fresh[r];
    state[r].count = __popc(kept_mask) + __popc(fresh_mask);
    state[r].limit = max(state[r].limit, threshold);
  }
  __syncwarp();
}

// The tiles of a chunk one after the other, each raising the limits for the next: for rows in which
// more blocks reach the limit than a list holds.
template <int kRows, bool kHasCarry>
__device__ __forceinline__ void merge_tiles(const PickMemory& memory, int first_tile,
                                            bool rounds_to_bf16, int first_row,
                                            PickState (&state)[kRows], const int (&room)[kRows],
                                            int lane) {
#pragma unroll 1
  for (int t = 0; t < kChunkTiles; ++t) {
    const int block = (first_tile + t) * kWarpSize + lane;
    Pick fresh[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float x = load_score<kHasCarry>(memory, first_tile, first_row + r, t, lane);
      if (rounds_to_bf16) x = round_to_bf16(x);
      const int score = __float_as_int(x);
      fresh[r] = {competes(state[r], block) && score > state[r].limit ? score : -1, block};
    }
    merge_picks(memory, first_row, state, room, fresh, lane);
  }
}

// Looks through the blocks of a chunk for rows first_row .. first_row + kRows - 1, side by side. Tiles
// behind the last one hold no block that competes, and their memory anything.
template <int kRows, bool kHasCarry>
__device__ __forceinline__ void pick_blocks(const PickMemory& memory, int first_tile,
                                            bool rounds_to_bf16, int first_row, int lane) {
  const int first_block = first_tile * kWarpSize, last_block = first_block + kChunkBlocks - 1;
  PickState state[kRows];
  bool is_needed = false, is_inside = true, is_first = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state[r] = memory.state[first_row + r];
    is_needed |= state[r].begin <= last_block && state[r].end > first_block;
    is_inside &= state[r].begin <= first_block && state[r].end > last_block;
    is_first |= state[r].limit < 0;
  }
  if (!is_needed) return;

  float x[kRows][kChunkTiles];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kChunkTiles; ++t)
      x[r][t] = load_score<kHasCarry>(memory, first_tile, first_row + r, t, lane);
  }
  if (rounds_to_bf16) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int t = 0; t < kChunkTiles; ++t) x[r][t] = round_to_bf16(x[r][t]);
    }
  }
  int score[kRows][kChunkTiles], room[kRows], limit[kRows], reached[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    room[r] = memory.room[first_row + r];
    limit[r] = reached[r] = state[r].limit;
#pragma unroll
    for (int t = 0; t < kChunkTiles; ++t) score[r][t] = __float_as_int(x[r][t]);
  }
  if (!is_inside) {
    __syncwarp();  // a branch: most chunks lie inside
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int t = 0; t < kChunkTiles; ++t) {
        if (!competes(state[r], first_block + t * kWarpSize + lane)) score[r][t] = -1;
      }
    }
  }
  // At least `room` blocks of the chunk reach the room-th largest of the lanes' largest scores.
  const auto raise_limits = [&] {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reached[r] = score[r][0];
#pragma unroll
      for (int t = 1; t < kChunkTiles; ++t) reached[r] = max(reached[r], score[r][t]);
    }
    sort_scores(reached, lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reached[r] = __shfl_sync(kFullMask, reached[r], max(room[r] - 1, 0));
      limit[r] = max(limit[r], reached[r] - 1);
    }
  };
  unsigned passing[kRows][kChunkTiles];  // the lanes whose block is a candidate
  const auto fits = [&] {
    int most = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int count = state[r].count;
#pragma unroll
      for (int t = 0; t < kChunkTiles; ++t) {
        passing[r][t] = __ballot_sync(kFullMask, score[r][t] > limit[r]);
        count += __popc(passing[r][t]);
      }
      most = max(most, count);
    }
    return most <= kWarpSize;
  };
  if (is_first) raise_limits();
  bool is_done = fits();
  if (!is_done) {
    prune(memory, first_row, state, room, lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) limit[r] = max(limit[r], state[r].limit);
    is_done = fits();
    if (!is_done && !is_first) {
      raise_limits();
      is_done = fits();
    }
  }
  if (is_done) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Pick* list = memory.list + (first_row + r) * kWarpSize;
#pragma unroll
      for (int t = 0; t < kChunkTiles; ++t) {
        const unsigned mask = passing[r][t];
        const int at = state[r].count + __popc(mask & ((1u << lane) - 1));
        if (mask >> lane & 1) list[at] = {score[r][t], first_block + t * kWarpSize + lane};
        state[r].count += __popc(mask);
      }
      state[r].limit = max(state[r].limit, reached[r]);
    }
  } else {
    merge_tiles<kRows, kHasCarry>(memory, first_tile, rounds_to_bf16, first_row, state, room, lane);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane == 0) memory.state[first_row + r] = state[r];
  }
}

// Shortens the lists of rows first_row .. first_row + kRows - 1 to what is picked.
template <int kRows>
__device__ __forceinline__ void finish_picks(const PickMemory& memory, int first_row, int lane) {
  PickState state[kRows];
  int room[kRows];
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state[r] = memory.state[first_row + r];
    room[r] = memory.room[first_row + r];
  }
  prune(memory, first_row, state, room, lane);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane == 0) memory.state[first_row + r] = state[r];
  }
  __syncwarp();
}

// Writes a row of topk_idx: initial blocks, picks and local blocks ascending, -1 behind the last.
__device__ __forceinline__ void write_picks(int32_t* out, int num_blocks, int num_init,
                                            int num_local, int count, const Pick* list, int topk,
                                            int lane) {
  const int picked = lane - num_init, total = num_init + count + num_local;
  int block = lane;
  if (picked >= 0) block = picked < count ? list[picked].y : num_blocks - (total - lane);
  if (lane < topk) out[lane] = lane < total ? block : -1;
}

}  // namespace fsattn::device
