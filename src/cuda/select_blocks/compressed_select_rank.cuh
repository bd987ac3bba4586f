// The ranking of compressed_select: the lists of select_blocks, while P V runs and most registers are taken.
//
// Block scores are relative to the reference of the query's softmax, which the limit and what is held follow
// when it moves. What a list is made of stays in shared memory between tiles.
#pragma once
#include "cuda/device/tile_sm80.cuh"
#include "cuda/select_blocks/select_blocks_lists_sm90.cuh"

namespace fsattn::device {

inline constexpr int kFusedSlots = 16;
using FusedList = QueryList<kFusedSlots, 2>;
using FusedLists = FusedList[2];  // of the two queries of a quad

__device__ __forceinline__ float2 load_shared_f32x2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void place_lists(FusedLists& list, uint32_t all_lists) {
  const int thread = reread_thread_index();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    list[r].scores = all_lists + thread / kWarpSize * FusedList::kWarpBytes +
                     r * FusedList::kScoreBytes + thread % kWarpSize / 4 * 4;
    list[r].block_distance = (2 - r) * FusedList::kScoreBytes + r * 2;
  }
}

__device__ __forceinline__ void load_lists(FusedLists& list, uint32_t all_lists, uint32_t state) {
  place_lists(list, all_lists);
  const uint4 x = load_shared_u128(state);
  list[0].held = static_cast<int>(x.x), list[1].held = static_cast<int>(x.y);
  list[0].limit = static_cast<int>(x.z), list[1].limit = static_cast<int>(x.w);
}

__device__ __forceinline__ void store_lists(const FusedLists& list, uint32_t state) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(state), "r"(list[0].held),
               "r"(list[1].held), "r"(list[0].limit), "r"(list[1].limit)
               : "memory");
}

// Takes the scores of a tile if all of the warp's lists have a place for what exceeds their limits.
__device__ __forceinline__ bool append_tile(FusedLists& list, const int (&score)[2][kLaneBlocks],
                                            int tile, int capacity, int quad_lane) {
  const unsigned counts =
      count_above(score[0], list[0].limit) + (count_above(score[1], list[1].limit) << 16);
  const QuadSum fresh = quad_sum(counts, quad_lane);
  const int ends[2] = {list[0].held + static_cast<int>(fresh.all & 0xffff),
                       list[1].held + static_cast<int>(fresh.all >> 16)};
  if (!__all_sync(kFullMask, max(ends[0], ends[1]) <= capacity)) return false;
  const int first = tile * kWarpSize + quad_lane * kLaneBlocks;
  const int before[2] = {static_cast<int>(fresh.before & 0xffff),
                         static_cast<int>(fresh.before >> 16)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t at = list[r].score_at(list[r].held + before[r]);
    list[r].held = ends[r];
#pragma unroll
    for (int i = 0; i < kLaneBlocks; ++i) {
      if (score[r][i] > list[r].limit) {
        list[r].append(at, score[r][i], first + i);
        at += FusedList::kPitch;
      }
    }
  }
  return true;
}

// The same where they have not.
__device__ __forceinline__ void shorten_and_append(FusedLists& list,
                                                   const int (&score)[2][kLaneBlocks], int tile,
                                                   int quad_lane) {
  list[0].shorten<false>(quad_lane);
  list[1].shorten<false>(quad_lane);
  if (append_tile(list, score, tile, FusedList::kCapacity, quad_lane)) return;
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    list[0].shorten<true>(quad_lane);
    swap_lists(list[0], list[1]);
  }
  append_tile(list, score, tile, FusedList::kCapacity, quad_lane);
}

// The reference of the softmax has moved: what was measured from it is `keep` times as much.
__device__ __forceinline__ void rescale_lists(FusedLists& list, const float (&keep)[2],
                                              int quad_lane) {
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (list[r].limit >= 0) list[r].limit = __float_as_int(__int_as_float(list[r].limit) * keep[r]);
#pragma unroll 1
    for (int j = quad_lane; j < list[r].held; j += 4) {
      const int x = load_shared_s32(list[r].score_at(j));
      if (x == kAlways) continue;
      store_shared_u32(list[r].score_at(j), __float_as_uint(__int_as_float(x) * keep[r]));
    }
  }
  __syncwarp();
}

}  // namespace fsattn::device
