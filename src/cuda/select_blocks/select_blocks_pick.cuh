// The ranking of the Hopper kernel of select_blocks, in registers.
//
// Four lanes share a query. A lane keeps a list of the blocks that it scored itself and that exceed the
// query's limit, in ascending order: what the four lists hold always includes the blocks that are
// picked. A limit is the room-th best of a query's lists; it is found when a list would overflow, for
// the queries of a warp side by side, and shortens the lists. Only scores are sorted.
//
// A list holds as many entries as may be picked, so a lane that finds no place may drop its worst: as many
// of its own blocks are better. That happens only to inputs whose best blocks fall to one lane, and keeps
// the result exact for them.
#pragma once
#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"
#include "cuda/select_blocks/select_blocks_work.cuh"
#include "plan/select_blocks_table.h"

namespace fsattn::device {

inline constexpr int kLaneBlocks = 8;       // blocks of a tile that a lane scores
inline constexpr int kAlways = 0x7fffffff;  // above every score: entries that only fill a place

__device__ __forceinline__ int load_shared_s32(uint32_t address) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ int load_shared_u16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_shared_u16(uint32_t address, int x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(x)) : "memory");
}

// A lane numbers the blocks that it scores: eight of each tile.
__device__ __forceinline__ int pick_block(int code, int quad_lane) {
  return code / kLaneBlocks * kWarpSize + quad_lane * kLaneBlocks + code % kLaneBlocks;
}

// Orders two scores of one lane, the larger first.
__device__ __forceinline__ void order(int& a, int& b) {
  const int larger = max(a, b);
  b = min(a, b);
  a = larger;
}

// Sorts in descending order: Batcher's odd-even merge sort.
template <int kSlots>
__device__ __forceinline__ void sort_in_lane(int (&x)[kSlots]) {
#pragma unroll
  for (int p = 1; p < kSlots; p *= 2) {
#pragma unroll
    for (int k = p; k >= 1; k /= 2) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int j = i + k;
        const bool is_pair = i >= k % p && (i - k % p) / k % 2 == 0 && i / (2 * p) == j / (2 * p);
        if (j < kSlots && is_pair) order(x[i], x[j]);
      }
    }
  }
}

// Sorts a bitonic sequence in descending order.
template <int kCount>
__device__ __forceinline__ void merge_in_lane(int (&x)[kCount]) {
#pragma unroll
  for (int distance = kCount / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if ((j & distance) == 0) order(x[j], x[j + distance]);
    }
  }
}

// The kCount-th largest of four lanes' scores, kCount sorted ones a lane.
template <int kCount>
__device__ __forceinline__ int exact_limit(const int (&sorted)[kCount]) {
  int x[kCount], y[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) y[j] = __shfl_xor_sync(kFullMask, sorted[j], 1);
#pragma unroll
  for (int j = 0; j < kCount; ++j) x[j] = max(sorted[j], y[kCount - 1 - j]);
  merge_in_lane(x);  // the largest of two lanes
#pragma unroll
  for (int j = 0; j < kCount; ++j) y[j] = __shfl_xor_sync(kFullMask, x[j], 2);
  int limit = kAlways;
#pragma unroll
  for (int j = 0; j < kCount; ++j) limit = min(limit, max(x[j], y[kCount - 1 - j]));
  return limit;
}

// The same of the better half of each lane's scores: rarely less, and two thirds of the work.
template <int kCount>
__device__ __forceinline__ int likely_limit(const int (&sorted)[kCount], bool is_even_lane) {
  constexpr int kHalf = kCount / 2;
  int x[kHalf], y[kHalf];
#pragma unroll
  for (int j = 0; j < kHalf; ++j) y[j] = __shfl_xor_sync(kFullMask, sorted[j], 1);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const int other = y[kHalf - 1 - j];
    x[j] = is_even_lane ? max(sorted[j], other) : min(sorted[j], other);
  }
  merge_in_lane(x);  // the even lane has the better half of the two lanes', in order
#pragma unroll
  for (int j = 0; j < kHalf; ++j) y[j] = __shfl_xor_sync(kFullMask, x[j], 3);
  int limit = kAlways;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) limit = min(limit, max(x[j], y[kHalf - 1 - j]));
  return min(limit, __shfl_xor_sync(kFullMask, limit, 1));
}

// The list of a lane for one of its queries. Slot j lies 32 entries behind slot j - 1: lanes never meet
// in a bank.
template <int kSlots>
struct PickList {
  uint32_t scores, codes;  // shared addresses of slot 0
  uint32_t next;           // where the next score goes
  int limit;
  int begin, end;  // blocks that compete

  static constexpr int kPitch = kWarpSize * 4;

  __device__ uint32_t score_at(int slot) const { return scores + slot * kPitch; }
  __device__ uint32_t code_at(int slot) const { return codes + slot * (kPitch / 2); }
  __device__ int count() const { return static_cast<int>(next - scores) / kPitch; }
  __device__ bool has_place(int entries) const {
    return next + entries * kPitch <= scores + kSlots * kPitch;
  }

  __device__ __forceinline__ void append(int score, int code) {
    store_shared_u32(next, static_cast<uint32_t>(score));
    store_shared_u16(codes - scores / 2 + next / 2, code);
    next += kPitch;
  }

  // Places that no pick needs are filled, so that the room-th best is always the last of kSlots.
  __device__ __forceinline__ void init(const SelectRow& row, bool is_query, int quad_lane) {
    begin = is_query ? row.num_init : 0;
    end = is_query && row.room > 0 ? row.local_begin : 0;
    limit = -1;
    next = scores;
    const int filled = fill_of(row, quad_lane);
#pragma unroll 1
    for (int j = 0; j < filled; ++j) append(kAlways, 0);
  }
  __device__ static int fill_of(const SelectRow& row, int quad_lane) {
    return row.room > 0 ? (kSlots - row.room + 3 - quad_lane) / 4 : 0;
  }

  // Raises the limit to the room-th best of the query's lists and drops what is below.
  template <bool kExact>
  __device__ __forceinline__ void shorten(int quad_lane) {
    int score[kSlots], code[kSlots], sorted[kSlots];
    const int held = count();
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int x = load_shared_s32(score_at(j));
      code[j] = load_shared_u16(code_at(j));
      sorted[j] = score[j] = j < held ? x : -1;
    }
    sort_in_lane(sorted);
    const int reached = kExact ? exact_limit(sorted) : likely_limit(sorted, quad_lane % 2 == 0);
    limit = max(limit, reached);
    const int least = max(reached, 0);
    next = scores;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (score[j] >= least) append(score[j], code[j]);
    }
  }

  // Removes slot `slot`.
  __device__ __forceinline__ void remove(int slot) {
    next -= kPitch;
    const int held = count();
#pragma unroll 1
    for (int j = slot; j < held; ++j) {
      const int x = load_shared_s32(score_at(j + 1)), code = load_shared_u16(code_at(j + 1));
      store_shared_u32(score_at(j), static_cast<uint32_t>(x));
      store_shared_u16(code_at(j), code);
    }
  }

  // Appends, in place of the worst entry when the list is full; of equal ones the last goes.
  __device__ __forceinline__ void insert(int score, int code) {
    if (!has_place(1)) {
      int worst = kAlways, at = 0;
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        const int x = load_shared_s32(score_at(j));
        if (x <= worst) worst = x, at = j;
      }
      if (score <= worst) return;
      remove(at);
    }
    append(score, code);
  }

  // More entries than are picked equal the limit: the last ones in the order of the blocks go.
  __device__ __forceinline__ void drop_ties(int surplus, int filled, int quad_lane) {
#pragma unroll 1
    while (__any_sync(kFullMask, surplus > 0)) {
      int last = -1, block = -1;
      const int held = count();
#pragma unroll 1
      for (int j = filled; j < held; ++j) {
        if (load_shared_s32(score_at(j)) == limit) last = j;
      }
      if (last >= 0) block = pick_block(load_shared_u16(code_at(last)), quad_lane);
      int highest = max(block, __shfl_xor_sync(kFullMask, block, 1));
      highest = max(highest, __shfl_xor_sync(kFullMask, highest, 2));
      if (surplus > 0 && block == highest && last >= 0) remove(last);
      --surplus;
    }
  }
};

__device__ __forceinline__ int quad_count(int x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

// Takes the scores of a tile: those of the lane's kLaneBlocks blocks for each of its queries.
template <int kSlots, int kRows>
__device__ __forceinline__ void pick_tile(PickList<kSlots> (&list)[kRows],
                                          int (&score)[kRows][kLaneBlocks], int tile,
                                          int quad_lane) {
  const int first_block = pick_block(tile * kLaneBlocks, quad_lane);
  bool is_inside = true;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    is_inside &= first_block >= list[r].begin && first_block + kLaneBlocks <= list[r].end;
  if (!__all_sync(kFullMask, is_inside)) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        const int block = first_block + i;
        if (block < list[r].begin || block >= list[r].end) score[r][i] = -1;
      }
    }
  }
  unsigned fresh;
  const auto counts = [&] {
    bool fits = true;
    fresh = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      unsigned more =
          0;  // the signs of the differences, which do not overflow: both are -1 or more
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i)
        more += static_cast<unsigned>(list[r].limit - score[r][i]) >> 31;
      fresh |= more;
      fits &= list[r].has_place(static_cast<int>(more));
    }
    return __all_sync(kFullMask, fits);
  };
  bool fits = counts();
  if (!__any_sync(kFullMask, fresh != 0)) return;
  if (!fits) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) list[r].template shorten<false>(quad_lane);
    fits = counts();
  }
  const int code = tile * kLaneBlocks;
  if (fits) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        if (score[r][i] > list[r].limit) list[r].append(score[r][i], code + i);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        if (score[r][i] > list[r].limit) list[r].insert(score[r][i], code + i);
      }
    }
  }
}

// Writes a row of topk_idx: initial blocks, picks and local blocks ascending, -1 behind the last. The
// lists are overwritten, all of the warp's for these rows: `scratch`.
template <int kSlots>
__device__ __forceinline__ void write_picks(PickList<kSlots>& list, const SelectRow& row,
                                            bool is_query, uint32_t scratch, int32_t* out, int topk,
                                            int lane) {
  const int quad_lane = lane % 4;
  list.template shorten<true>(quad_lane);
  const int filled = list.fill_of(row, quad_lane);
  const int held = quad_count(list.count());
  list.drop_ties(is_query ? held - kSlots : 0, filled, quad_lane);
  const int mine = list.count() - filled;
  int before = 0, picked = 0;  // of the lanes before this one, of all four
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int count = __shfl_sync(kFullMask, mine, (lane & ~3) | q);
    if (q < quad_lane) before += count;
    picked += count;
  }
  int block[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j)
    block[j] = pick_block(load_shared_u16(list.code_at(j)), quad_lane);
  __syncwarp();
  const uint32_t all = scratch + lane / 4 * (kSlots * 4);
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    if (j >= filled && j < filled + mine)
      store_shared_u32(all + (before + j - filled) * 4, static_cast<uint32_t>(block[j]));
  }
  __syncwarp();
  constexpr int kPerLane = kSlots / 4;
  int chosen[kPerLane], rank[kPerLane] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) chosen[i] = load_shared_s32(all + (quad_lane + 4 * i) * 4);
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const int other = j < picked ? load_shared_s32(all + j * 4) : kAlways;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) rank[i] += other < chosen[i];
  }
  __syncwarp();
  if (!is_query) return;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (quad_lane + 4 * i < picked) out[row.num_init + rank[i]] = chosen[i];
  }
  const int total = row.num_init + picked + row.num_local;
  for (int i = quad_lane; i < topk; i += 4) {
    if (i < row.num_init) out[i] = i;
    if (i >= row.num_init + picked) out[i] = i < total ? row.num_blocks - (total - i) : -1;
  }
}

}  // namespace fsattn::device
