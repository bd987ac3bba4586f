// decode_rank: the blocks of one query of a sequence that is not long, by a cluster of CTAs.
//
// Math     as decode_select.
// Tiles    one cluster per (sequence, KV head, query); each CTA scores its share of the blocks.
// Ranking  by counting the scores above each score, first among the blocks of a CTA; those that may
//          win go to the shared memory of the first CTA, which counts again. Scores that are equal are
//          taken in the order of their index. Exact and deterministic.
// Bound    latency: scores from L2, two barriers of the cluster.
#pragma once
#include "cuda/decode/decode_select.cuh"
#include "cuda/device/cluster_sm90.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

inline constexpr int kDecodeRankThreads = 288;

namespace device {

// Shared memory of a CTA: the windows of a step, the scores of its blocks, and in the first CTA the
// blocks that may win.
struct RankShared {
  float* prob;
  uint32_t *score, *candidates;
  int32_t* blocks;  // of the candidates
};

// Candidates of a CTA: all that could win, and zeros up to a multiple of four.
__host__ __device__ inline int candidates_a_cta(int topk) { return round_up(topk, 4); }

inline int rank_smem(int topk, int ctas) {
  return 4 * (kDecodeRankKeys + kDecodeRankBlocks + 2 * ctas * candidates_a_cta(topk));
}

__device__ __forceinline__ RankShared rank_shared(const DecodeArgs& p, float* memory) {
  RankShared s;
  s.prob = memory;
  s.score = reinterpret_cast<uint32_t*>(memory + kDecodeRankKeys);
  s.candidates = s.score + kDecodeRankBlocks;
  s.blocks = reinterpret_cast<int32_t*>(s.candidates + candidates_a_cta(p.topk) * cluster_size());
  return s;
}

// How many scores are greater than each of score[first + k * step], or equal and before it. Zeros fill
// the last quad.
template <int kCount>
__device__ __forceinline__ void count_above(const uint32_t* score, int count, int first, int step,
                                            int (&above)[kCount]) {
  const uint4* quads = reinterpret_cast<const uint4*>(score);
  uint32_t mine[kCount];
  int sum[kCount][4] = {};  // chains of their own
#pragma unroll
  for (int k = 0; k < kCount; ++k) mine[k] = score[first + k * step];
#pragma unroll 8
  for (int q = 0; q < ceil_div(count, 4); ++q) {
    const uint4 s = quads[q];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const uint32_t bound = q > (first + k * step) / 4 ? mine[k] + 1 : mine[k];
      sum[k][0] += s.x >= bound ? 1 : 0;
      sum[k][1] += s.y >= bound ? 1 : 0;
      sum[k][2] += s.z >= bound ? 1 : 0;
      sum[k][3] += s.w >= bound ? 1 : 0;
    }
  }
  // In its own quad those behind it, and itself, were counted when equal.
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int i = first + k * step, at = i % 4;
    const uint4 s = quads[i / 4];
    sum[k][0] -= at <= 0 && s.x == mine[k] ? 1 : 0;
    sum[k][1] -= at <= 1 && s.y == mine[k] ? 1 : 0;
    sum[k][2] -= at <= 2 && s.z == mine[k] ? 1 : 0;
    sum[k][3] -= s.w == mine[k] ? 1 : 0;
    above[k] = sum[k][0] + sum[k][1] + sum[k][2] + sum[k][3];
  }
}

__device__ __forceinline__ int count_above(const uint32_t* score, int count, int i) {
  int above[1];
  count_above(score, count, i, 0, above);
  return above[0];
}

// Adds the probabilities of four windows over up to kHeads heads.
template <int kHeads>
__device__ __forceinline__ void add_heads(const DecodeArgs& p, const float4 (&s)[kHeads],
                                          const float* lse_log2, int heads, float4& sum) {
  const float scale = p.softmax_scale * kLog2E;
  const bool takes_max = p.group_reduce == GroupReduce::kMax;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i >= heads) break;
    const float lse = lse_log2[i];
    const float4 x{exp2_approx(fmaf(s[i].x, scale, -lse)), exp2_approx(fmaf(s[i].y, scale, -lse)),
                   exp2_approx(fmaf(s[i].z, scale, -lse)), exp2_approx(fmaf(s[i].w, scale, -lse))};
    if (takes_max) {
      sum = {fmaxf(sum.x, x.x), fmaxf(sum.y, x.y), fmaxf(sum.z, x.z), fmaxf(sum.w, x.w)};
    } else {
      sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
  }
}

// Scores of the competing blocks base .. base + count - 1.
template <int kHeads>
__device__ __forceinline__ void score_share(const DecodeArgs& p, const SelectQuery& q, int base,
                                            int count, float* lse_log2, const RankShared& shared) {
  const int overlap = p.cmp_band.size / p.cmp_band.stride;
  const int per_block = p.block_size / p.cmp_band.stride;
  const int visible = min(p.cmp_band.last_key(q.position) + 1, q.s.num_cmp);
  const int heads = p.group_reduce == GroupReduce::kFirstHead ? 1 : p.group;
  const float* scores =
      p.scores + (static_cast<int64_t>(q.unit) * unit_rows(p) + q.query * p.group) * p.scores_pitch;
  const int step = blocks_a_step(p, kDecodeRankKeys), thread = threadIdx.x, threads = blockDim.x;
  combine_lse<8>(p, lse_of_splits(p, q.unit, q.query * p.group), num_cmp_splits(p, q.s.num_cmp),
                 lse_log2);
  __syncthreads();
  for (int from = 0; from < count; from += step) {
    const int blocks = min(step, count - from);
    const int first = (q.c.num_init + base + from) * per_block;
    const int origin = max(first - (overlap - 1), 0) & ~3;
    const int end = min(first + blocks * per_block, visible);
    for (int at = origin; at < end; at += 4 * threads) {
      const int w = at + 4 * thread;
      float4 sum{};
      for (int g = 0; g < heads; g += kHeads) {
        float4 s[kHeads];
        const float* from = scores + g * p.scores_pitch + w;
        const int here = w < end ? heads - g : 0;
#pragma unroll
        for (int i = 0; i < kHeads; ++i) {
          s[i] = float4{};
          if (i < here) s[i] = __ldcg(reinterpret_cast<const float4*>(from));
          from += p.scores_pitch;
        }
        add_heads(p, s, lse_log2 + g, heads - g, sum);
      }
      if (w < end) *reinterpret_cast<float4*>(shared.prob + w - origin) = sum;
    }
    __syncthreads();
    for (int i = thread; i < round_up(blocks, 4); i += threads) {
      float sum = pool_block(shared.prob, origin, first + i * per_block, end, overlap, per_block);
      if (p.rounds_to_bf16) sum = __bfloat162float(__float2bfloat16_rn(sum));
      shared.score[from + i] = i < blocks ? __float_as_uint(sum) + 1 : 0;
    }
    __syncthreads();
  }
}

// Sends the blocks of this CTA that may win to the first CTA.
__device__ __forceinline__ void send_candidates(const DecodeArgs& p, const Competition& c, int base,
                                                int count, const RankShared& shared) {
  const int slots = candidates_a_cta(p.topk), first = cluster_rank() * slots;
  const uint32_t scores = smem_address(shared.candidates + first);
  const uint32_t blocks = smem_address(shared.blocks + first);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int above = count_above(shared.score, count, i);
    if (above >= c.room) continue;
    store_cluster(scores + above * 4, 0, shared.score[i]);
    store_cluster(blocks + above * 4, 0, static_cast<uint32_t>(c.num_init + base + i));
  }
  for (int i = min(count, c.room) + static_cast<int>(threadIdx.x); i < slots; i += blockDim.x) {
    store_cluster(scores + i * 4, 0, 0);
  }
}

// Writes the winners among the candidates, ascending. `winners` holds topk ints.
__device__ __forceinline__ void write_best(const DecodeArgs& p, const Competition& c,
                                           const RankShared& shared, int32_t* winners,
                                           int32_t* out) {
  const int count = candidates_a_cta(p.topk) * cluster_size(), thread = threadIdx.x;
  for (int i = thread; i < count; i += blockDim.x) {
    if (shared.candidates[i] == 0) continue;
    const int above = count_above(shared.candidates, count, i);
    if (above < c.room) winners[above] = shared.blocks[i];
  }
  __syncthreads();
  for (int i = thread; i < c.room; i += blockDim.x) {
    const int mine = winners[i];
    int before = 0;
    for (int j = 0; j < c.room; ++j) before += winners[j] < mine ? 1 : 0;
    out[c.num_init + before] = mine;
  }
}

}  // namespace device

// kHeads: whose scores a thread has in flight. Templates, so that the rows that launch them share one.
template <int kMaxThreads, int kHeads>
__global__ void __launch_bounds__(kMaxThreads, 3)
    decode_rank_kernel(const __grid_constant__ DecodeArgs p) {
  using namespace device;
  extern __shared__ __align__(16) float memory[];
  __shared__ float lse_log2[kDecodeMaxGroup];
  __shared__ int32_t winners[kDecodeMaxTopk];
  cluster_arrive();
  const int rank = cluster_rank(), ctas = cluster_size();
  const SelectQuery q = find_query(p, blockIdx.x / ctas);
  const Competition& c = q.c;
  int32_t* out = p.topk_idx + q.kv_head * p.topk_head_stride +
                 static_cast<int64_t>(q.s.token + q.query) * p.topk_token_stride;
  const int ranked = min(c.room, c.count), total = c.num_init + ranked + c.num_local;
  if (rank == 0 && q.is_query) {
    for (int i = threadIdx.x; i < p.topk; i += blockDim.x) {
      if (i < c.num_init) out[i] = i;
      if (c.count <= c.room && i >= c.num_init && i < c.num_init + ranked) out[i] = i;
      if (i >= c.num_init + ranked) out[i] = i < total ? c.num_blocks - (total - i) : -1;
    }
  }
  wait_for_previous_kernel();
  // The next kernel starts now: it has work that needs the compressed branch alone.
  allow_next_kernel();
  cluster_wait();  // all CTAs of the cluster have started
  if (!q.is_query || c.count <= c.room || c.room == 0) return;
  const RankShared shared = rank_shared(p, memory);
  const int share = ceil_div(c.count, ctas), base = min(rank * share, c.count);
  const int count = min(share, c.count - base);
  score_share<kHeads>(p, q, base, count, lse_log2, shared);
  send_candidates(p, c, base, count, shared);
  cluster_arrive();
  cluster_wait();
  if (rank == 0) write_best(p, c, shared, winners, out);
}

}  // namespace fsattn
