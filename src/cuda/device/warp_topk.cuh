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

// Sorts a bitonic sequence over the warp, largest key in lane 0.
__device__ __forceinline__ RankKey warp_merge(RankKey key, int lane) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    key = exchange(key, distance, (lane & distance) == 0);
  }
  return key;
}

__device__ __forceinline__ RankKey warp_sort(RankKey key, int lane) {
#pragma unroll
  for (int width = 2; width < kWarpSize; width *= 2) {
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) {
      key = exchange(key, distance, ((lane & distance) == 0) == ((lane & width) == 0));
    }
  }
  return warp_merge(key, lane);
}

// The list of one query: `list` holds `capacity` keys (a multiple of 32) in descending order,
// `buffer` up to 32 keys that wait for a merge. Both lie in shared memory that this warp owns.
struct WarpTopK {
  RankKey* list;
  RankKey* buffer;
  int capacity;

  __device__ void clear(int lane) const {
    for (int i = lane; i < capacity; i += kWarpSize) list[i] = 0;
  }

  // Merges the first `count` keys of the buffer into the list.
  __device__ void merge(int count, int lane) const {
    RankKey rest = warp_sort(lane < count ? buffer[lane] : 0, lane);
    for (int first = 0; first < capacity; first += kWarpSize) {
      const RankKey kept = list[first + lane];
      const RankKey reversed = __shfl_sync(kFullMask, rest, kWarpSize - 1 - lane);
      list[first + lane] = warp_merge(kept > reversed ? kept : reversed, lane);
      rest = warp_merge(kept > reversed ? reversed : kept, lane);
    }
    __syncwarp();  // the lanes read each other's entries next
  }
};

}  // namespace fsattn::device
