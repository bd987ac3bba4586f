// selected_attn_merge: adds up the partial rows of a query row.
//
// Math    M = max_s m_s, w_s = l_s 2^(m_s - M), o = sum_s w_s o_s / sum_s w_s, lse = M + log2 sum_s w_s
//         over the written partial rows, in ascending order of s, so the result does not depend on who
//         wrote them when. None written: o = 0, lse = -inf. Marks all rows as unwritten again.
// Tiles   kLanes lanes a row (16 bytes each), 256 threads a CTA, grid (rows of a segment, segments).
// Bound   memory: (2 Dv + 8) bytes per partial row; eight rows in flight a lane.
#pragma once
#include "cuda/device/element.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"

namespace fsattn::selected {

inline constexpr int kMergeThreads = 256;

// The kLanes lanes that share a row, as a mask for warp intrinsics.
template <int kLanes>
__device__ __forceinline__ unsigned row_lanes() {
  if constexpr (kLanes == kWarpSize) return kFullMask;
  return ((1u << kLanes) - 1) << (threadIdx.x % kWarpSize / kLanes * kLanes);
}

// {shift, sum} of a partial row; {-inf, 0} if nobody wrote it.
__device__ __forceinline__ float2 load_stats(const float2* stats) {
  const float2 x = __ldcs(stats);
  return __float_as_uint(x.y) == kNoPartial ? float2{-INFINITY, 0.f} : x;
}

// The row's share of the result. Equal shifts give the factor 1 however large they are.
__device__ __forceinline__ float weight_of(const float2& stats, float top) {
  return stats.x == -INFINITY ? 0.f : stats.y * exp2f(stats.x - top);
}

// Largest shift and sum of the weights over `count` partial rows that are `stride` apart.
template <int kLanes>
__device__ __forceinline__ float2 reduce_stats(const float2* stats, int count, int64_t stride,
                                               int lane, unsigned peers) {
  float top = -INFINITY;
  for (int s = lane; s < count; s += kLanes) top = fmaxf(top, load_stats(stats + s * stride).x);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) top = fmaxf(top, __shfl_xor_sync(peers, top, d));
  float sum = 0.f;
  for (int s = lane; s < count; s += kLanes) sum += weight_of(load_stats(stats + s * stride), top);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(peers, sum, d);
  return {top, sum};
}

template <class Element, int kLanes>
__global__ void __launch_bounds__(kMergeThreads, 3)
    selected_attn_merge_kernel(const __grid_constant__ FwdArgs a) {
  constexpr int kUnroll = 8;
  const RowSpace& space = a.space;
  const int segment = space.first_segment + blockIdx.y, kv_head = segment / space.num_ranges;
  const int row = blockIdx.x * (kMergeThreads / kLanes) + threadIdx.x / kLanes;
  const int local = space.group_div.quotient(row), h = space.group_div.remainder(row, local);
  const int token = (segment - kv_head * space.num_ranges) * space.range + local;
  if (local >= space.range || token >= a.total_q) return;
  const int lane = threadIdx.x % kLanes;
  const unsigned peers = row_lanes<kLanes>();
  const bool is_inside = lane < a.chunks_v;

  const int64_t row0 =
      (int64_t{blockIdx.y} * space.range + local) * space.partials * space.group + h;
  float2* stats = a.partial_stats + row0;
  const float2 total = reduce_stats<kLanes>(stats, space.partials, space.group, lane, peers);
  const float top = total.x, inverse = total.y > 0.f ? 1.f / total.y : 0.f;
  const uint4* source = static_cast<const uint4*>(a.partial) + row0 * a.chunks_v + lane;
  const int64_t stride = int64_t{space.group} * a.chunks_v;
  float acc[8] = {};
  for (int batch = 0; batch < space.partials; batch += kLanes) {
    const int mine = batch + lane;
    const float2 x = mine < space.partials ? load_stats(stats + int64_t{mine} * space.group)
                                           : float2{-INFINITY, 0.f};
    const float weight_of_lane = weight_of(x, top) * inverse;
    const unsigned written =
        __ballot_sync(peers, x.x != -INFINITY) >> (threadIdx.x % kWarpSize - lane);
    const int count = min(kLanes, space.partials - batch);
    for (int s0 = 0; s0 < count; s0 += kUnroll) {
      uint4 chunk[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const bool is_needed = is_inside && s0 + i < count && (written >> (s0 + i) & 1);
        chunk[i] = is_needed ? __ldcs(source + (batch + s0 + i) * stride) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const float w = __shfl_sync(peers, weight_of_lane, (s0 + i) % kLanes, kLanes);
        const uint32_t words[4] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = device::unpack_pair<Element>(words[j]);
          acc[2 * j] = fmaf(w, pair.x, acc[2 * j]);
          acc[2 * j + 1] = fmaf(w, pair.y, acc[2 * j + 1]);
        }
      }
    }
  }
  // The next launch finds the rows unwritten. A lane has read what it resets, and nobody else has.
  for (int i = lane; i < space.partials; i += kLanes) {
    stats[int64_t{i} * space.group].y = __uint_as_float(kNoPartial);
  }
  const int head = kv_head * space.group + h;
  if (is_inside) {
    Element* o =
        static_cast<Element*>(a.o.data) + token * a.o.token_stride + head * a.o.head_stride;
    reinterpret_cast<uint4*>(o)[lane] = {
        pack_average<Element>(acc[0], acc[1]), pack_average<Element>(acc[2], acc[3]),
        pack_average<Element>(acc[4], acc[5]), pack_average<Element>(acc[6], acc[7])};
  }
  if (lane == 0) {
    static_cast<float*>(a.lse.data)[head * a.lse.head_stride + token] =
        total.y > 0.f ? (top + log2f(total.y)) * device::kLn2 : -INFINITY;
  }
}

}  // namespace fsattn::selected
