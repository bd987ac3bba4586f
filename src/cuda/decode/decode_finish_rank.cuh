// The ranking of decode_finish: the blocks of a query by a cluster of CTAs, in each of which some warps rank while
// the others attend to the window.
//
// Math     as decode_select.
// Tiles    each CTA scores its share of the blocks, up to 64 a warp.
// Ranking  by counting, as decode_rank: of a warp, then of a CTA, whose best go to every CTA of the cluster, then of
//          all. No CTA waits for another one's result. Exact and deterministic.
// Bound    latency: scores from L2, a message through shared memory.
#pragma once
#include <climits>

#include "cuda/decode/decode_attend.cuh"
#include "cuda/decode/decode_rank.cuh"
#include "cuda/device/barrier_sm90.cuh"

namespace fsattn {

// Eight warps share the registers that branches of four have.
template <DecodeConfig kConfig, int kWide>
struct FinishAttendTraits : DecodeTraits<kConfig> {
  static constexpr int kWarps = 4 * kWide, kThreads = kWarps * device::kWarpSize;
  static constexpr size_t kPlannedBytes = decode_finish_smem(kConfig, kWide > 1);
  static constexpr bool kIsNarrow = true;
  static constexpr int kFragments = kConfig.head_dim_v <= 128 ? 2 : 1;
};

template <class Traits>
struct FinishTraits {
  static constexpr int kWide = Traits::kWarps / 4;
  static constexpr size_t kPlannedBytes = Traits::kPlannedBytes;
  // Threads of a role.
  static constexpr int kRankWarps = Traits::kWarps, kRankTeam = Traits::kThreads;
  static constexpr int kThreads = Traits::kThreads + kRankTeam;
  static constexpr int kRankKeys = kWide * kDecodeRankKeys;
  static constexpr int kWarpBlocks = kDecodeRankBlocks / 4;  // that a warp ranks
  static constexpr int kQuads = Traits::kDimV / 4;
  static constexpr int kResultBytes = static_cast<int>(kDecodeRows) * Traits::kDimV * 4;
  static constexpr int kRankBytes = (4 + kRankKeys + kRankWarps * kWarpBlocks) * 4;
  static constexpr int kRingAt = Traits::kQBytes;
  static constexpr int kExchangeAt = kRingAt + Traits::kWarps * Traits::kWarpBytes;
  static constexpr int kSmemBytes =
      kExchangeAt + (kResultBytes > kRankBytes ? kResultBytes : kRankBytes);
  static constexpr int kMinCtas = Traits::kDim <= 128 && kWide == 1 ? 2 : 1;
  // Quads of the output that a thread adds, in a cluster of at least two.
  static constexpr int kItems = ceil_div(static_cast<int>(kDecodeRows) * kQuads / 2, kRankTeam);
};

namespace device {

// Beside the dynamic shared memory.
struct FinishShared {
  KeyChunk chunks[2][kDecodeMaxChunks];  // of the window, of the chosen blocks
  int num_chunks[2];
  SelectQuery query;  // for those that are short of registers
  WarpResults results;
  float lse_log2[kDecodeRows];
  float4 lead[kDecodeRows];
  // The best blocks of each warp, of each CTA, and of all.
  __align__(16) uint32_t warp_score[8 * kDecodeFinishTopk];
  __align__(16) uint32_t cta_score[kDecodeRankCtas * kDecodeFinishTopk];
  int32_t warp_block[8 * kDecodeFinishTopk];
  int32_t cta_block[kDecodeRankCtas * kDecodeFinishTopk];
  __align__(16) int32_t winners[kDecodeFinishTopk];
  int32_t entries[kDecodeFinishTopk];
  float selected_lse[kDecodeRankCtas][kDecodeRows];
  int32_t pages[kDecodeFinishPages];
  // All of the cluster have sent or written theirs.
  uint64_t has_candidates, has_window, has_selected;
};

enum FinishBarrier : int { kAttendBarrier = 1, kRankBarrier = 2, kBlocksBarrier = 3 };

template <int kThreads>
__device__ __forceinline__ void sync_named(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void arrive_named(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// The warps that rank.
template <int kThreads>
struct RankTeam {
  static __device__ unsigned thread() { return threadIdx.x - kThreads; }
  static __device__ unsigned threads() { return kThreads; }
};

// A CTA's share of `count` things: [first, first + count).
struct Share {
  int first, count;
};

__device__ __forceinline__ Share share_of(int count, int rank, int ctas) {
  const int each = ceil_div(count, ctas), first = min(rank * each, count);
  return {first, min(each, count - first)};
}

// What a CTA scores: its share of the blocks that compete, and the windows that it needs for them. With
// has_lead the four before `begin`, of which some overlap the first block, as well.
struct ScoreTask {
  const float *scores, *lse;  // of the query's first head
  Share blocks;
  int first_window;  // of the first block
  int begin, end;    // windows
  int splits;
  bool has_lead;
};

__device__ __forceinline__ ScoreTask find_score_task(const DecodeArgs& p, const SelectQuery& q) {
  const int overlap = p.cmp_band.size / p.cmp_band.stride;
  const int per_block = p.block_size / p.cmp_band.stride;
  const int visible = min(p.cmp_band.last_key(q.position) + 1, q.s.num_cmp);
  ScoreTask t;
  t.scores =
      p.scores + (static_cast<int64_t>(q.unit) * unit_rows(p) + q.query * p.group) * p.scores_pitch;
  t.lse = lse_of_splits(p, q.unit, q.query * p.group);
  if (p.has_pooled) {
    // Whole chunks of four blocks.
    const Share chunks =
        share_of(ceil_div(q.c.num_init + q.c.count, 4), cluster_rank(), cluster_size());
    const int first = min(max(chunks.first * 4 - q.c.num_init, 0), q.c.count);
    const int end = min(max((chunks.first + chunks.count) * 4 - q.c.num_init, 0), q.c.count);
    t.blocks = {first, end - first};
  } else {
    t.blocks = share_of(q.c.count, cluster_rank(), cluster_size());
  }
  const int first = (q.c.num_init + t.blocks.first) * per_block;
  t.first_window = first;
  t.end = min(first + t.blocks.count * per_block, visible);
  t.has_lead =
      first > 0 && first - 4 < visible && overlap > 1 && overlap <= 5 && per_block % 4 == 0;
  t.begin = t.has_lead ? first : max(first - (overlap - 1), 0) & ~3;
  t.splits = num_cmp_splits(p, q.s.num_cmp);
  // Made here: the kernel in front has not finished yet.
  asm volatile("" : "+l"(t.scores), "+l"(t.lse), "+r"(t.begin), "+r"(t.end), "+r"(t.splits));
  return t;
}

// Probabilities of the windows, summed over the heads, from prob[0] on (of the lead: before). The
// first scores are on their way while the lse is made from its splits.
template <class Finish, int kHeads>
__device__ __forceinline__ void sum_heads(const DecodeArgs& p, const ScoreTask& task,
                                          FinishShared& shared, float* prob, int thread) {
  constexpr int kRankTeam = Finish::kRankTeam;
  constexpr int kHeld = 16 / kHeads;  // quads in flight
  const int heads = p.group_reduce == GroupReduce::kFirstHead ? 1 : p.group;
  const float* scores = task.scores;
  float* const lse_log2 = shared.lse_log2;
  const int origin = task.begin, end = task.end;
  // A thread a head, so that four windows more are not a turn more.
  const bool has_lead = task.has_lead && thread < heads;
  float4 lead{};
  if (has_lead) {
    lead = __ldcg(reinterpret_cast<const float4*>(scores + thread * p.scores_pitch + origin - 4));
  }
  bool has_lse = false;
  for (int at = origin; at < end || !has_lse; at += 4 * kHeld * kRankTeam) {
    float4 s[kHeld][kHeads];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int w = at + 4 * (thread + k * kRankTeam);
      const float* from = scores + w;
      const int here = w < end ? heads : 0;
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        s[k][i] = float4{};
        if (i < here) s[k][i] = __ldcg(reinterpret_cast<const float4*>(from));
        from += p.scores_pitch;
      }
    }
    if (!has_lse) {
      combine_lse<8, RankTeam<kRankTeam>>(p, task.lse, task.splits, lse_log2);
      sync_named<kRankTeam>(kRankBarrier);
      has_lse = true;
      if (has_lead) {
        float4 one[1] = {lead}, x{};
        add_heads(p, one, lse_log2 + thread, 1, x);
        shared.lead[thread] = x;
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int w = at + 4 * (thread + k * kRankTeam);
      float4 sum{};
      add_heads(p, s[k], lse_log2, heads, sum);
      if (w < end) *reinterpret_cast<float4*>(prob + w - origin) = sum;
    }
  }
  if (task.has_lead && thread < kWarpSize) {
    __syncwarp();
    if (thread < 4) {
      const float* x = reinterpret_cast<const float*>(shared.lead) + thread;
      const bool takes_max = p.group_reduce == GroupReduce::kMax;
      float sum = 0.f;
#pragma unroll 4
      for (int g = 0; g < heads; ++g) sum = takes_max ? fmaxf(sum, x[4 * g]) : sum + x[4 * g];
      prob[thread - 4] = sum;
    }
  }
}

// Scores of this CTA's share of the blocks that compete.
template <class Finish, int kHeads>
__device__ __forceinline__ void score_blocks(const DecodeArgs& p, const ScoreTask& task,
                                             FinishShared& shared, float* prob, uint32_t* score,
                                             int thread) {
  constexpr int kRankTeam = Finish::kRankTeam;
  constexpr int kWarpBlocks = Finish::kWarpBlocks;
  const int overlap = p.cmp_band.size / p.cmp_band.stride;
  const int per_block = p.block_size / p.cmp_band.stride;
  const int count = task.blocks.count;
  prob += 4;
  sum_heads<Finish, kHeads>(p, task, shared, prob, thread);
  sync_named<kRankTeam>(kRankBarrier);
  for (int i = thread; i < round_up(count, kWarpBlocks); i += kRankTeam) {
    float sum = pool_block(prob, task.begin, task.first_window + i * per_block, task.end, overlap,
                           per_block);
    if (p.rounds_to_bf16) sum = __bfloat162float(__float2bfloat16_rn(sum));
    score[i] = i < count ? __float_as_uint(sum) + 1 : 0;
  }
  sync_named<kRankTeam>(kRankBarrier);
}

// The same from pooled scores. Two threads a chunk, each for half of the heads.
template <class Finish>
__device__ __forceinline__ void score_pooled(const DecodeArgs& p, const SelectQuery& q,
                                             const ScoreTask& task, FinishShared& shared,
                                             uint32_t* score, int thread) {
  constexpr int kRankTeam = Finish::kRankTeam, kHeads = static_cast<int>(kDecodeRows) / 2;
  const int heads = p.group_reduce == GroupReduce::kFirstHead ? 1 : p.group;
  const int half = ceil_div(heads, 2), first_head = thread % 2 * half;
  const int here = min(heads - first_head, half), count = task.blocks.count;
  const int first_block = q.c.num_init + task.blocks.first;
  const int chunk = first_block / 4 + thread / 2, chunks = ceil_div(q.s.num_cmp, kDecodeChunk);
  const bool has_chunk = chunk * 4 < first_block + count;
  float4 x[kHeads];
  float2 side[kHeads], front[kHeads];
  const float* from = task.scores + first_head * p.scores_pitch;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    x[i] = float4{};
    side[i] = front[i] = {0.f, -INFINITY};
    if (i < here && has_chunk) {
      if (chunk < chunks) {
        x[i] = __ldcg(reinterpret_cast<const float4*>(pooled_blocks(from)) + chunk);
        side[i] = __ldcg(pooled_sides(p, from, chunk));
      }
      if (chunk > 0) front[i] = __ldcg(pooled_sides(p, from, chunk - 1));
    }
    from += p.scores_pitch;
  }
  combine_lse<8, RankTeam<kRankTeam>>(p, task.lse, task.splits, shared.lse_log2);
  sync_named<kRankTeam>(kRankBarrier);
  float4 sum{};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i >= here) break;
    const float lse = shared.lse_log2[first_head + i];
    add_scaled(sum, exp2_approx(side[i].y - lse), x[i]);
    sum.x = fmaf(exp2_approx(front[i].y - lse), front[i].x, sum.x);
  }
  sum.x += __shfl_xor_sync(kFullMask, sum.x, 1);
  sum.y += __shfl_xor_sync(kFullMask, sum.y, 1);
  sum.z += __shfl_xor_sync(kFullMask, sum.z, 1);
  sum.w += __shfl_xor_sync(kFullMask, sum.w, 1);
  const float mine[2] = {thread % 2 == 0 ? sum.x : sum.z, thread % 2 == 0 ? sum.y : sum.w};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = chunk * 4 + thread % 2 * 2 + j - first_block;
    const float rounded =
        p.rounds_to_bf16 ? __bfloat162float(__float2bfloat16_rn(mine[j])) : mine[j];
    if (i >= 0 && i < count) score[i] = __float_as_uint(rounded) + 1;
  }
  for (int i = count + thread; i < round_up(count, Finish::kWarpBlocks); i += kRankTeam) {
    score[i] = 0;
  }
  sync_named<kRankTeam>(kRankBarrier);
}

// The best `room` of the blocks of each warp, and of these the best of the CTA, for every CTA of the
// cluster. Zeros fill what is left of the lists.
template <class Finish>
__device__ __forceinline__ void send_best(const DecodeArgs& p, const SelectQuery& q,
                                          const Share& share, const uint32_t* score,
                                          FinishShared& shared, int thread) {
  constexpr int kRankTeam = Finish::kRankTeam;
  constexpr int kRankWarps = Finish::kRankWarps;
  constexpr int kWarpBlocks = Finish::kWarpBlocks;
  const int slots = candidates_a_cta(p.topk), ctas = cluster_size(), room = q.c.room;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int here = min(max(share.count - warp * kWarpBlocks, 0), kWarpBlocks);
  const uint32_t* mine = score + warp * kWarpBlocks;
  static_assert(kWarpBlocks == 2 * kWarpSize);
  if (here > 0) {
    // Zeros stand behind the last block: they win nothing, since those before them are greater.
    int above[2];
    count_above(mine, here, lane, kWarpSize, above);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = lane + k * kWarpSize;
      if (i >= here || above[k] >= room) continue;
      shared.warp_score[warp * slots + above[k]] = mine[i];
      shared.warp_block[warp * slots + above[k]] =
          q.c.num_init + share.first + warp * kWarpBlocks + i;
    }
  }
  for (int i = min(here, room) + lane; i < slots; i += kWarpSize) {
    shared.warp_score[warp * slots + i] = 0;
  }
  sync_named<kRankTeam>(kRankBarrier);
  const int all = kRankWarps * slots, to = cluster_rank() * slots;
  const uint32_t scores = smem_address(shared.cta_score + to);
  const uint32_t blocks = smem_address(shared.cta_block + to);
  for (int i = thread; i < all; i += kRankTeam) {
    const uint32_t x = shared.warp_score[i];
    if (x == 0) continue;
    const int above = count_above(shared.warp_score, all, i);
    if (above >= room) continue;
    const uint32_t block = shared.warp_block[i];
#pragma unroll 2
    for (int c = 0; c < ctas; ++c) {
      send_cluster(scores + above * 4, c, x, shared.has_candidates);
      send_cluster(blocks + above * 4, c, block, shared.has_candidates);
    }
  }
  for (int i = min(share.count, room) + thread; i < slots; i += kRankTeam) {
#pragma unroll 2
    for (int c = 0; c < ctas; ++c) {
      send_cluster(scores + i * 4, c, 0u, shared.has_candidates);
      send_cluster(blocks + i * 4, c, 0u, shared.has_candidates);
    }
  }
}

// The blocks of the query, ascending, -1 behind the last one.
template <class Finish, int kHeads>
__device__ __forceinline__ void find_entries(const DecodeArgs& p, const SelectQuery& q,
                                             const ScoreTask& task, FinishShared& shared,
                                             float* memory, int thread) {
  constexpr int kRankTeam = Finish::kRankTeam;
  const Competition& c = q.c;
  const int ranked = min(c.room, c.count), total = c.num_init + ranked + c.num_local;
  if (thread < kDecodeFinishTopk) shared.winners[thread] = INT_MAX;
  if (thread < p.topk) {
    const int i = thread;
    const bool is_first = i < c.num_init || c.count <= c.room;
    if (i < c.num_init + ranked) {
      if (is_first) shared.entries[i] = i;
    } else {
      shared.entries[i] = i < total ? c.num_blocks - (total - i) : -1;
    }
  }
  if (c.count > c.room && c.room > 0) {
    uint32_t* score = reinterpret_cast<uint32_t*>(memory + 4 + Finish::kRankKeys);
    if (p.has_pooled) {
      score_pooled<Finish>(p, q, task, shared, score, thread);
    } else {
      score_blocks<Finish, kHeads>(p, task, shared, memory, score, thread);
    }
    send_best<Finish>(p, q, task.blocks, score, shared, thread);
    wait_cluster(shared.has_candidates);
    const int count = candidates_a_cta(p.topk) * cluster_size();
    for (int i = thread; i < count; i += kRankTeam) {
      if (shared.cta_score[i] == 0) continue;
      const int above = count_above(shared.cta_score, count, i);
      if (above < c.room) shared.winners[above] = shared.cta_block[i];
    }
    sync_named<kRankTeam>(kRankBarrier);
    if (thread < c.room) {
      const int mine = shared.winners[thread];
      int before = 0;
#pragma unroll
      for (int j = 0; j < kDecodeFinishTopk / 4; ++j) {
        const int4 w = reinterpret_cast<const int4*>(shared.winners)[j];
        before += (w.x < mine ? 1 : 0) + (w.y < mine ? 1 : 0) + (w.z < mine ? 1 : 0) +
                  (w.w < mine ? 1 : 0);
      }
      shared.entries[c.num_init + before] = mine;
    }
  }
  cp_async_wait<0>();  // the pages
  sync_named<kRankTeam>(kRankBarrier);
}

// Brings the sequence's row of the block table, if it is not too long.
template <class Finish>
__device__ __forceinline__ void load_pages(const DecodeArgs& p, const SelectQuery& q,
                                           FinishShared& shared, int thread) {
  const PageTable& table = p.cache.table;
  if (table.max_pages > kDecodeFinishPages) return;
  const int count = min(ceil_div(q.s.num_keys, static_cast<int>(table.page_size)),
                        static_cast<int>(table.max_pages));
  const int32_t* from = table.pages + q.seq * table.seq_stride;
  for (int i = thread; i < count; i += Finish::kRankTeam) {
    cp_async_4(smem_address(shared.pages + i), from + i);
  }
  cp_async_commit();
}

// Where this CTA's share of the chosen keys lies.
__device__ __forceinline__ void list_entries(const DecodeArgs& p, const SelectQuery& q,
                                             FinishShared& shared, int thread) {
  const int per_entry = p.block_size / kDecodeChunk;
  const int page_size = static_cast<int>(p.cache.table.page_size);
  const bool has_pages = p.cache.table.max_pages <= kDecodeFinishPages;
  const int total = q.c.num_init + min(q.c.room, q.c.count) + q.c.num_local;
  const Share share = share_of(total * per_entry, cluster_rank(), cluster_size());
  if (thread < share.count) {
    const int chunk = share.first + thread, entry = chunk / per_entry;
    const int key =
        shared.entries[entry] * p.block_size + (chunk - entry * per_entry) * kDecodeChunk;
    KeyChunk& to = shared.chunks[1][thread];
    if (has_pages) {
      const int slot = key / page_size;
      int page = slot < p.cache.table.max_pages ? shared.pages[slot] : -1;
      if (page >= p.cache.table.num_pages) page = -1;
      to = {max(page, -1), key - slot * page_size, key};
    } else {
      to = find_chunk(p.cache.table, q.seq, key);
    }
  }
  if (thread == 0) shared.num_chunks[1] = share.count;
}

}  // namespace device
}  // namespace fsattn
