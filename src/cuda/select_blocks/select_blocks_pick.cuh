// What the ranking of the Hopper kernels of select_blocks is made of: networks that sort scores in the
// registers of a lane, and limits of the four lanes of a query.
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

// Orders two scores of one lane, the larger first.
__device__ __forceinline__ void order(int& a, int& b) {
  const int larger = max(a, b);
  b = min(a, b);
  a = larger;
}

// Sorts in descending order, by Batcher's odd-even merge sort. The last one must be the least already.
template <int kCount>
__device__ __forceinline__ void sort_before_least(int (&x)[kCount]) {
#pragma unroll
  for (int p = 1; p < kCount; p *= 2) {
#pragma unroll
    for (int k = p; k >= 1; k /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int j = i + k;
        const bool is_pair = i >= k % p && (i - k % p) / k % 2 == 0 && i / (2 * p) == j / (2 * p);
        if (j < kCount - 1 && is_pair) order(x[i], x[j]);
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

}  // namespace fsattn::device
