// Prefix sums over a warp and over a CTA.
#pragma once
#include <cstdint>

#include "cuda/device/math.cuh"

namespace fsattn::device {

__device__ __forceinline__ int warp_inclusive_scan(int x, int lane) {
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const int y = __shfl_up_sync(kFullMask, x, d);
    if (lane >= d) x += y;
  }
  return x;
}

// Exclusive prefix sum over the CTA; `total` is the sum over all threads. `warp_sums` holds
// kWarpSize ints of shared memory and may be reused by the next call at once.
__device__ __forceinline__ int cta_exclusive_scan(int x, int* warp_sums, int& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  const int inclusive = warp_inclusive_scan(x, lane);
  __syncthreads();  // everyone has read the sums of the call before
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    warp_sums[lane] = warp_inclusive_scan(lane < num_warps ? warp_sums[lane] : 0, lane);
  }
  __syncthreads();
  total = warp_sums[num_warps - 1];
  return inclusive - x + (warp == 0 ? 0 : warp_sums[warp - 1]);
}

}  // namespace fsattn::device
