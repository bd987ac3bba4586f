// decode_select: the blocks of one query from the scores that decode_compressed left behind.
//
// Math     as select_blocks: p = exp(scale s - lse) summed over the heads of the group, block
//          score = sum of p * overlap / d, forced blocks, the topk best, ties to the lowest index,
//          ascending.
// Tiles    one CTA per (sequence, KV head, query). Windows in steps of kDecodeSelectKeys through
//          shared memory, the scores of all blocks that compete in shared memory.
// Ranking  the bits of the worst score that is taken are found from the top, two at a time, by
//          counting over the CTA; equal scores are taken in the order of their index. Exact and
//          deterministic.
// Long     from kDecodePooledBlocks blocks on decode_pool scores them first, one CTA a step.
// Bound    latency: scores from L2, then 5 to 16 rounds of counting.
#pragma once
#include "cuda/decode/decode_args.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/grid_dependency.cuh"
#include "cuda/device/scan.cuh"

namespace fsattn {

inline constexpr int kDecodeSelectThreads = 512;
namespace device {

// Where the competition of one query takes place: as SelectRow of select_blocks.
struct Competition {
  int num_blocks;  // that the query may select
  int num_init;    // blocks 0 .. num_init - 1 are taken
  int count;       // blocks num_init .. num_init + count - 1 compete
  int num_local;   // the last ones are taken
  int room;        // blocks that the ranking may take
};

__device__ __forceinline__ Competition find_competition(const DecodeArgs& p, int position,
                                                        int num_keys) {
  const int query_block = position / p.block_size;
  Competition c;
  c.num_blocks = min(query_block + 1, ceil_div(num_keys, p.block_size));
  c.num_init = min(min(p.init_blocks, c.num_blocks), p.topk);
  const int local_begin = min(max(query_block + 1 - p.local_blocks, c.num_init), c.num_blocks);
  c.count = local_begin - c.num_init;
  c.num_local = min(c.num_blocks - local_begin, p.topk - c.num_init);
  c.room = p.topk - c.num_init - c.num_local;
  return c;
}

// Threads that work together: those of a CTA.
struct WholeCta {
  static __device__ unsigned thread() { return threadIdx.x; }
  static __device__ unsigned threads() { return blockDim.x; }
};

// The lse of the splits of a query's first head; those of a split lie together.
__device__ __forceinline__ const float* lse_of_splits(const DecodeArgs& p, int64_t unit, int row) {
  return p.cmp_lse + unit * p.cmp_splits * unit_rows(p) + row;
}

// The lse of each head over all splits, by kLanes lanes a head. `lse`: lse_of_splits().
template <int kLanes, class Team = WholeCta>
__device__ __forceinline__ void combine_lse(const DecodeArgs& p, const float* lse, int splits,
                                            float* lse_log2) {
  constexpr int kHeld = 4;  // of the lse of a lane; more are read twice
  constexpr int kHeads = kWarpSize / kLanes;
  const int lane = Team::thread() % kLanes, warp = Team::thread() / kWarpSize;
  const int first = Team::thread() % kWarpSize / kLanes, warps = Team::threads() / kWarpSize;
  for (int head = warp * kHeads; head < p.group; head += warps * kHeads) {
    const int g = head + first;
    const float* from = lse + g;
    const auto load = [&](int s) {
      return s < splits && g < p.group ? __ldcg(from + s * unit_rows(p)) : -INFINITY;
    };
    float held[kHeld], top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = load(lane + i * kLanes);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) top = fmaxf(top, held[i]);
    for (int s = lane + kHeld * kLanes; s < splits; s += kLanes) top = fmaxf(top, load(s));
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) {
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, d));
    }
    const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sum += exp2_approx((held[i] - shift) * kLog2E);
    for (int s = lane + kHeld * kLanes; s < splits; s += kLanes) {
      sum += exp2_approx((load(s) - shift) * kLog2E);
    }
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kFullMask, sum, d);
    if (lane == 0 && g < p.group) {
      lse_log2[g] = top == -INFINITY ? -INFINITY : fmaf(top, kLog2E, log2_approx(sum));
    }
  }
}

// Probabilities of four windows at each of two places, over the heads of the group as group_reduce
// says. The second place is kDecodeSelectThreads vectors behind the first: more loads in flight.
__device__ __forceinline__ void group_probability(const DecodeArgs& p, const float* scores,
                                                  const float* lse_log2, bool has_second,
                                                  float4 (&sum)[2]) {
  const float scale = p.softmax_scale * kLog2E;
  const int heads = p.group_reduce == GroupReduce::kFirstHead ? 1 : p.group;
  const bool takes_max = p.group_reduce == GroupReduce::kMax;
#pragma unroll 4
  for (int g = 0; g < heads; ++g) {
    const float4* from = reinterpret_cast<const float4*>(scores + g * p.scores_pitch);
    float4 s[2] = {__ldcg(from), {}};
    if (has_second) s[1] = __ldcg(from + kDecodeSelectThreads);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 x{exp2_approx(fmaf(s[i].x, scale, -lse_log2[g])),
                     exp2_approx(fmaf(s[i].y, scale, -lse_log2[g])),
                     exp2_approx(fmaf(s[i].z, scale, -lse_log2[g])),
                     exp2_approx(fmaf(s[i].w, scale, -lse_log2[g]))};
      if (takes_max) {
        sum[i] = {fmaxf(sum[i].x, x.x), fmaxf(sum[i].y, x.y), fmaxf(sum[i].z, x.z),
                  fmaxf(sum[i].w, x.w)};
      } else {
        sum[i] = {sum[i].x + x.x, sum[i].y + x.y, sum[i].z + x.z, sum[i].w + x.w};
      }
    }
  }
}

// Score of the block whose first window is `first`; window w is prob[w - origin].
__device__ __forceinline__ float pool_block(const float* prob, int origin, int first, int end,
                                            int overlap, int per_block) {
  const auto at = [&](int w) { return w >= 0 && w < end ? prob[w - origin] : 0.f; };
  if (overlap == 2 && per_block == 4) {
    float sum = at(first - 1) + 2.f * at(first);
    sum = fmaf(2.f, at(first + 1), sum);
    sum = fmaf(2.f, at(first + 2), sum);
    return sum + at(first + 3);
  }
  const int count = overlap + per_block - 1, most = min(overlap, per_block);
  float sum = 0.f;
  for (int o = 0; o < count; ++o) {
    const int weight = min(min(o + 1, count - o), most);
    sum = fmaf(static_cast<float>(weight), at(first - (overlap - 1) + o), sum);
  }
  return sum;
}

// One query of one (sequence, KV head), and what it competes for.
struct SelectQuery {
  DecodeSequence s;
  Competition c;
  int seq, kv_head, unit, query, position;
  bool is_query;
};

__device__ __forceinline__ SelectQuery find_query(const DecodeArgs& p, int index) {
  SelectQuery q;
  q.unit = index / p.max_q;
  q.query = index - q.unit * p.max_q;
  q.seq = q.unit / p.heads_kv;
  q.kv_head = q.unit - q.seq * p.heads_kv;
  q.s = find_sequence(p, q.seq);
  q.position = q.s.position + q.query;
  q.is_query = q.query < q.s.num_q;
  q.c = find_competition(p, q.position, q.s.num_keys);
  return q;
}

// Blocks whose windows fit a step of `keys` windows.
__host__ __device__ inline int blocks_a_step(const DecodeArgs& p, int64_t keys) {
  const int overlap = p.cmp_band.size / p.cmp_band.stride;
  return (static_cast<int>(keys) - (overlap - 1) - 3) / (p.block_size / p.cmp_band.stride);
}

// Scores of the competing blocks base .. base + step - 1 as integers in score order; 0
// ranks below every score.
__device__ __forceinline__ void score_step(const DecodeArgs& p, const SelectQuery& q, int base,
                                           int step, const float* lse_log2, float* prob,
                                           uint32_t* score) {
  const int overlap = p.cmp_band.size / p.cmp_band.stride;
  const int per_block = p.block_size / p.cmp_band.stride;
  const int visible = min(p.cmp_band.last_key(q.position) + 1, q.s.num_cmp);
  const float* scores =
      p.scores + (static_cast<int64_t>(q.unit) * unit_rows(p) + q.query * p.group) * p.scores_pitch;
  const int blocks = min(step, q.c.count - base);
  const int first = (q.c.num_init + base) * per_block;
  const int origin = max(first - (overlap - 1), 0) & ~3;
  const int end = min(first + blocks * per_block, visible);
  constexpr int kApart = kDecodeSelectThreads * 4;
  for (int w = origin + static_cast<int>(threadIdx.x) * 4; w < end; w += 2 * kApart) {
    const bool has_second = w + kApart < end;
    float4 sum[2] = {};
    group_probability(p, scores + w, lse_log2, has_second, sum);
    *reinterpret_cast<float4*>(prob + w - origin) = sum[0];
    if (has_second) *reinterpret_cast<float4*>(prob + w + kApart - origin) = sum[1];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < blocks; i += kDecodeSelectThreads) {
    float sum = pool_block(prob, origin, first + i * per_block, end, overlap, per_block);
    if (p.rounds_to_bf16) sum = __bfloat162float(__float2bfloat16_rn(sum));
    score[base + i] = __float_as_uint(sum) + 1;
  }
  __syncthreads();
}

// Adds two 32-bit numbers of every thread over the CTA. `sums` holds two rounds of one pair a warp.
__device__ __forceinline__ uint2 add_over_cta(uint2 x, uint2* sums, int round) {
  constexpr int kWarps = kDecodeSelectThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint2* mine = sums + round % 2 * kWarps;
  x.x = __reduce_add_sync(kFullMask, x.x);
  x.y = __reduce_add_sync(kFullMask, x.y);
  if (lane == 0) mine[warp] = x;
  __syncthreads();
  const uint2 part = lane < kWarps ? mine[lane] : uint2{};
  return {__reduce_add_sync(kFullMask, part.x), __reduce_add_sync(kFullMask, part.y)};
}

// The largest number that at least `room` of the scores reach; with fewer scores than that, 0.
__device__ __forceinline__ uint32_t find_threshold(const uint32_t* score, int count, int room,
                                                   uint2* sums) {
  constexpr int kHeld = 4;  // scores of a thread in registers
  if (count <= room) return 0;
  uint32_t held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * kDecodeSelectThreads;
    held[i] = at < count ? score[at] : 0;
  }
  uint32_t threshold = 0;
  for (int shift = 30, round = 0; shift >= 0; shift -= 2, ++round) {
    const uint32_t low = threshold | 1u << shift, mid = threshold | 2u << shift,
                   high = threshold | 3u << shift;
    uint2 reach{};  // low and mid in 16 bits each, high
    const auto tally = [&](uint32_t s) {
      reach.x += (s >= low ? 1u : 0u) + (s >= mid ? 1u << 16 : 0u);
      reach.y += s >= high ? 1u : 0u;
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kDecodeSelectThreads < count) tally(held[i]);
    }
    for (int at = threadIdx.x + kHeld * kDecodeSelectThreads; at < count;
         at += kDecodeSelectThreads) {
      tally(score[at]);
    }
    reach = add_over_cta(reach, sums, round);
    const int at_low = reach.x & 0xffff, at_mid = reach.x >> 16, at_high = reach.y;
    int reached = -1;
    if (at_high >= room) {
      threshold = high;
      reached = at_high;
    } else if (at_mid >= room) {
      threshold = mid;
      reached = at_mid;
    } else if (at_low >= room) {
      threshold = low;
      reached = at_low;
    }
    if (reached == room) break;
  }
  return threshold;
}

// Writes the blocks above the threshold and the first ones at it, ascending. `masks` holds two
// words for every 32 blocks.
__device__ __forceinline__ void write_winners(const uint32_t* score, const Competition& c,
                                              uint32_t threshold, uint2* masks, int32_t* out) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int words = ceil_div(c.count, kWarpSize);
  for (int w = warp; w < words; w += kDecodeSelectThreads / kWarpSize) {
    const int at = w * kWarpSize + lane;
    const uint32_t s = at < c.count ? score[at] : 0;
    const unsigned above = __ballot_sync(kFullMask, s > threshold);
    const unsigned equal = __ballot_sync(kFullMask, s == threshold && threshold > 0);
    if (lane == 0) masks[w] = {above, equal};
  }
  __syncthreads();
  if (warp != 0) return;
  const int per_lane = ceil_div(words, kWarpSize);
  const int begin = min(lane * per_lane, words), end = min(begin + per_lane, words);
  int above = 0, equal = 0;
  for (int w = begin; w < end; ++w) {
    above += __popc(masks[w].x);
    equal += __popc(masks[w].y);
  }
  const int above_to = warp_inclusive_scan(above, lane);
  int equal_before = warp_inclusive_scan(equal, lane) - equal;
  int above_before = above_to - above;
  const int ties = c.room - __shfl_sync(kFullMask, above_to, kWarpSize - 1);
  for (int w = begin; w < end; ++w) {
    const uint2 mask = masks[w];
    for (unsigned left = mask.x | mask.y; left != 0; left &= left - 1) {
      const int bit = __ffs(left) - 1;
      const bool is_tie = mask.y >> bit & 1;
      if (!is_tie || equal_before < ties) {
        out[c.num_init + above_before + min(equal_before, ties)] = c.num_init + w * kWarpSize + bit;
      }
      (is_tie ? equal_before : above_before) += 1;
    }
  }
}

}  // namespace device

// Long sequences: one CTA a step of windows, so that one CTA a query does not have to read them
// all. Templates, so that the rows that launch them share one.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    decode_pool_kernel(const __grid_constant__ DecodeArgs p) {
  using namespace device;
  static_assert(kThreads == kDecodeSelectThreads);
  __shared__ __align__(16) float prob[kDecodePoolKeys];
  __shared__ float lse_log2[kDecodeMaxGroup];
  const int step = blocks_a_step(p, kDecodePoolKeys), steps = ceil_div(p.max_blocks, step);
  const int index = blockIdx.x / steps, base = (blockIdx.x - index * steps) * step;
  const SelectQuery q = find_query(p, index);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (!q.is_query || q.c.count <= q.c.room || base >= q.c.count) return;
  combine_lse<8>(p, lse_of_splits(p, q.unit, q.query * p.group), num_cmp_splits(p, q.s.num_cmp),
                 lse_log2);
  __syncthreads();
  score_step(p, q, base, step, lse_log2, prob, p.block_scores + index * p.block_scores_pitch);
}

template <int kThreads, bool kIsPooled>
__global__ void __launch_bounds__(kThreads, 2)
    decode_select_kernel(const __grid_constant__ DecodeArgs p) {
  using namespace device;
  static_assert(kThreads == kDecodeSelectThreads);
  extern __shared__ __align__(16) float prob[];
  __shared__ float lse_log2[kDecodeMaxGroup];
  __shared__ uint2 sums[2 * kDecodeSelectThreads / kWarpSize];
  const SelectQuery q = find_query(p, blockIdx.x);
  const Competition& c = q.c;
  int32_t* out = p.topk_idx + q.kv_head * p.topk_head_stride +
                 static_cast<int64_t>(q.s.token + q.query) * p.topk_token_stride;
  const int ranked = min(c.room, c.count), total = c.num_init + ranked + c.num_local;
  for (int i = threadIdx.x; q.is_query && i < p.topk; i += kThreads) {
    if (i < c.num_init) out[i] = i;
    if (i >= c.num_init + ranked) out[i] = i < total ? c.num_blocks - (total - i) : -1;
  }
  wait_for_previous_kernel();
  // The next kernel starts now: it has work that needs the compressed branch alone.
  allow_next_kernel();
  if (!q.is_query || ranked == 0) return;
  uint32_t* score = reinterpret_cast<uint32_t*>(prob + kDecodeSelectKeys);
  if (c.count <= c.room) {
    for (int i = threadIdx.x; i < c.count; i += kThreads) score[i] = 1;
    __syncthreads();
  } else if constexpr (kIsPooled) {
    const uint32_t* from = p.block_scores + blockIdx.x * p.block_scores_pitch;
    for (int i = threadIdx.x; i < c.count; i += kThreads) score[i] = __ldcg(from + i);
    __syncthreads();
  } else {
    combine_lse<8>(p, lse_of_splits(p, q.unit, q.query * p.group), num_cmp_splits(p, q.s.num_cmp),
                   lse_log2);
    __syncthreads();
    const int step = blocks_a_step(p, kDecodeSelectKeys);
    for (int base = 0; base < c.count; base += step) {
      score_step(p, q, base, step, lse_log2, prob, score);
    }
  }
  const uint32_t threshold = find_threshold(score, c.count, c.room, sums);
  write_winners(score, c, threshold, reinterpret_cast<uint2*>(prob), out);
}

}  // namespace fsattn
