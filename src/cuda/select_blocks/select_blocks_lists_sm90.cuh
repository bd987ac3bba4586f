// The ranking of the Hopper kernel of select_blocks: lists of queries.
//
// Four lanes share a query and its list in shared memory: the blocks that exceed the query's limit, in
// ascending order, with their scores. The limit is the room-th best score of the list, or a bound of
// it. It is found when a list would overflow, for the queries of a warp side by side, and shortens the
// lists. Only scores are sorted, in registers: a share of the list a lane.
//
// A list has room for what is picked and for all blocks of a tile, so that no order of scores overflows
// one that has just been shortened.
#pragma once
#include "cuda/select_blocks/select_blocks_pick.cuh"

namespace fsattn::device {

// Of a number of each lane: the sum of the lanes of a quad before this one, and of all four.
struct QuadSum {
  unsigned before, all;
};
__device__ __forceinline__ QuadSum quad_sum(unsigned x, int quad_lane) {
  const unsigned neighbor = __shfl_xor_sync(kFullMask, x, 1), two = x + neighbor;
  const unsigned others = __shfl_xor_sync(kFullMask, two, 2);
  return {(quad_lane % 2 == 1 ? neighbor : 0) + (quad_lane >= 2 ? others : 0), two + others};
}

// The number of x[i] above `limit`: signs of the differences, which do not overflow as all are -1 or more.
template <int kCount>
__device__ __forceinline__ unsigned count_above(const int (&x)[kCount], int limit) {
  unsigned count = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) count += static_cast<unsigned>(limit - x[i]) >> 31;
  return count;
}

// The list of a query; its four lanes know the same. The lists of a warp's eight queries lie side by
// side, slot by slot: first the scores of each of kRows times eight, then the blocks, those of two
// queries in a word.
template <int kSlots, int kRows>
struct QueryList {
  static_assert(kRows <= 2);
  uint32_t scores;  // shared address of slot 0
  uint32_t block_distance;
  int held;  // entries
  int limit;

  static constexpr int kPitch = 8 * 4, kScoreBytes = 4 * kSlots * kPitch;
  static constexpr int kWarpBytes = (kRows + 1) * kScoreBytes;
  // A lane takes an odd number of slots side by side: the quad's lanes then never meet in a bank.
  static constexpr int kShare = kSlots - 1, kCapacity = 4 * kShare;

  __device__ uint32_t score_at(int slot) const { return scores + slot * kPitch; }

  // Places that no pick needs are filled, so that the room-th best is always the last of kSlots.
  __device__ static int fill_of(const SelectRow& row) {
    return row.room > 0 ? kSlots - row.room : 0;
  }

  __device__ __forceinline__ void init(uint32_t warp_lists, int r, const SelectRow& row, int lane) {
    scores = warp_lists + r * kScoreBytes + lane / 4 * 4;
    block_distance = (kRows - r) * kScoreBytes + r * 2;
    limit = -1;
    held = fill_of(row);
#pragma unroll 1
    for (int j = lane % 4; j < held; j += 4)
      store_shared_u32(score_at(j), static_cast<uint32_t>(kAlways));
  }

  __device__ __forceinline__ void append(uint32_t at, int score, int block) const {
    store_shared_u32(at, static_cast<uint32_t>(score));
    store_shared_u16(at + block_distance, block);
  }

  // Raises the limit and drops what is below. Exact: what stays are the picks; of equal scores those of
  // the first blocks stay.
  template <bool kExact>
  __device__ __forceinline__ void shorten(int quad_lane) {
    const int share = ((held + 3) / 4) | 1, first = share * quad_lane;
    const int mine = min(held - first, share);
    int score[kSlots], block[kShare], sorted[kSlots];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kShare; ++j) {
      const int x = load_shared_s32(score_at(first + j));
      score[j] = j < mine ? x : -1;
    }
    score[kShare] = -1;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) sorted[j] = score[j];
    sort_before_least(sorted);
    const int reached = kExact ? exact_limit(sorted) : likely_limit(sorted, quad_lane % 2 == 0);
    limit = max(limit, reached);
    const int least = max(limit, 0);
    QuadSum kept = quad_sum(count_above(score, least - 1), quad_lane);
    if (kExact && __any_sync(kFullMask, kept.all > kSlots)) {
      drop_ties(score, least, quad_lane);
      kept = quad_sum(count_above(score, least - 1), quad_lane);
    }
    held = static_cast<int>(kept.all);
#pragma unroll
    for (int j = 0; j < kShare; ++j)
      block[j] = load_shared_u16(score_at(first + j) + block_distance);
    uint32_t at = score_at(static_cast<int>(kept.before));
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kShare; ++j) {
      if (score[j] >= least) {
        append(at, score[j], block[j]);
        at += kPitch;
      }
    }
  }

  // Takes the last of the scores that equal `least` out, so that kSlots stay.
  __device__ __forceinline__ static void drop_ties(int (&score)[kSlots], int least, int quad_lane) {
    const QuadSum above = quad_sum(count_above(score, least), quad_lane);
    const unsigned room = kSlots - above.all;
    unsigned equal = 0;
#pragma unroll
    for (int j = 0; j < kShare; ++j) equal += score[j] == least;
    unsigned place = quad_sum(equal, quad_lane).before;
#pragma unroll
    for (int j = 0; j < kShare; ++j) {
      if (score[j] == least && place++ >= room) score[j] = -1;
    }
  }
};

template <class List>
__device__ __forceinline__ void swap_lists(List& a, List& b) {
  const List x = a;
  a = b;
  b = x;
}

// Takes the scores of a tile: those of the lane's kLaneBlocks blocks for each of its queries.
template <int kSlots, int kRows>
__device__ __forceinline__ void rank_tile(QueryList<kSlots, kRows> (&list)[kRows],
                                          const int (&score)[kRows][kLaneBlocks], int tile,
                                          bool is_planned, int quad_lane) {
  using List = QueryList<kSlots, kRows>;
  QuadSum fresh;
  const auto count = [&](int r, unsigned sums) {
    return static_cast<int>(r == 0 && kRows == 2 ? sums & 0xffff : r == 0 ? sums : sums >> 16);
  };
  const auto fits = [&](int capacity) {
    unsigned counts = count_above(score[0], list[0].limit);
    if (kRows == 2) counts += count_above(score[kRows - 1], list[kRows - 1].limit) << 16;
    fresh = quad_sum(counts, quad_lane);
    bool is_place = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) is_place &= list[r].held + count(r, fresh.all) <= capacity;
    return __all_sync(kFullMask, is_place);
  };
  if (!fits(is_planned ? 2 * kSlots : List::kCapacity)) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) list[r].template shorten<false>(quad_lane);
    if (!fits(List::kCapacity)) {
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) {
        list[0].template shorten<true>(quad_lane);
        if (kRows == 2) swap_lists(list[0], list[kRows - 1]);
      }
      fits(List::kCapacity);
    }
  }
  if (!__any_sync(kFullMask, fresh.all != 0)) return;
  const int first = tile * kWarpSize + quad_lane * kLaneBlocks;
  uint32_t at[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    at[r] = list[r].score_at(list[r].held + count(r, fresh.before));
    list[r].held += count(r, fresh.all);
  }
#pragma unroll
  for (int i = 0; i < kLaneBlocks; ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (score[r][i] > list[r].limit) {
        list[r].append(at[r], score[r][i], first + i);
        at[r] += List::kPitch;
      }
    }
  }
}

// Writes a row of topk_idx: initial blocks, picks and local blocks ascending, -1 behind the last.
template <int kSlots, int kRows>
__device__ __forceinline__ void write_row(QueryList<kSlots, kRows>& list, const SelectRow& row,
                                          bool is_query, int32_t* out, int topk, int lane) {
  const int quad_lane = lane % 4;
  list.template shorten<true>(quad_lane);
  __syncwarp();
  if (!is_query) return;
  const int fill = list.fill_of(row), end = row.num_init + list.held - fill;
  const int total = end + row.num_local;
#pragma unroll
  for (int i = 0; i < kSlots / 4; ++i) {
    const int slot = quad_lane + 4 * i, place = row.num_init + slot - fill;
    const int block = load_shared_u16(list.score_at(slot) + list.block_distance);
    if (slot >= fill && slot < list.held) out[place] = block;
  }
#pragma unroll
  for (int i = 0; i < kSlots / 4; ++i) {
    const int place = quad_lane + 4 * i;
    const int block = place < row.num_init ? place
                      : place < total      ? row.num_blocks - (total - place)
                                           : -1;
    if (place < topk && (place < row.num_init || place >= end)) out[place] = block;
  }
}

}  // namespace fsattn::device
