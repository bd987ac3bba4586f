// The best entries of a stream of 64-bit keys, kept by one warp.
//
// A key is (score bits, ~index): scores are not negative, so integer order is score order, and equal
// scores rank the lower index first, in whatever order they come. 0 stands for no entry.
#pragma once
#include <cstdint>

#include "cuda/device/math.cuh"

namespace fsattn::device {

using RankKey = unsigned long long;

__device__ __forceinline__ RankKey rank_key(float score, int index) {
  return static_cast<RankKey>(__float_as_uint(score)) << 32 | ~static_cast<uint32_t>(index);
}

__device__ __forceinline__ int rank_index(RankKey key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}

// One compare-exchange step of a sorting network: the lane keeps the larger key, or the smaller.
__device__ __forceinline__ RankKey exchange(RankKey key, int distance, bool keeps_larger) {
  const RankKey other = __shfl_xor_sync(kFullMask, key, distance);
  return (key > other) == keeps_larger ? key : other;
}

// Merges up to 32 new keys into each of kLists lists, which all have `capacity` keys (a multiple of 32)
// in descending order. `fresh[i]` is the lane's new key of list i, 0 for none. The lists are merged side
// by side: one after the other, the warp would wait for its own shuffles most of the time.
template <int kLists>
__device__ __forceinline__ void merge_into(RankKey* const (&list)[kLists], int capacity,
                                           RankKey (&fresh)[kLists], int lane) {
#pragma unroll
  for (int width = 2; width <= kWarpSize; width *= 2) {
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) {
      const bool keeps_larger =
          ((lane & distance) == 0) == (width == kWarpSize || (lane & width) == 0);
#pragma unroll
      for (int i = 0; i < kLists; ++i) fresh[i] = exchange(fresh[i], distance, keeps_larger);
    }
  }
  for (int first = 0; first < capacity; first += kWarpSize) {
    RankKey kept[kLists];
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const RankKey old = list[i][first + lane];
      const RankKey reversed = __shfl_sync(kFullMask, fresh[i], kWarpSize - 1 - lane);
      kept[i] = old > reversed ? old : reversed;
      fresh[i] = old > reversed ? reversed : old;
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const bool keeps_larger = (lane & distance) == 0;
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        kept[i] = exchange(kept[i], distance, keeps_larger);
        fresh[i] = exchange(fresh[i], distance, keeps_larger);
      }
    }
#pragma unroll
    for (int i = 0; i < kLists; ++i) list[i][first + lane] = kept[i];
  }
}

}  // namespace fsattn::device
