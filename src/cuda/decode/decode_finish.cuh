// decode_finish: all of a query that follows its compressed branch, by one cluster of CTAs.
//
// Math     o = g0 o_cmp + g1 o_sel + g2 o_win; the blocks of o_sel as in decode_select.
// Work     one cluster per (sequence, KV head, query), for groups of up to 16 heads. Each CTA ranks
//          its share of the blocks and attends to its shares of the window and of the chosen keys;
//          then it adds its share of the output's columns.
// Roles    four warps attend: to the window, which depends on nothing, while decode_compressed still
//          runs and the other four warps rank; then to the chosen blocks. The other four add the
//          compressed branch and the window meanwhile.
// Memory   candidates and results of the selected branch go from CTA to CTA through shared memory,
//          those of the window through L2, since they are early.
// Bound    latency of the ranking, then HBM: topk * S and w keys a (sequence, KV head).
// Numbers  partial results fp32, one rounding at the end. Deterministic; the shares, and with them the
//          last bits, depend on the size of the cluster.
#pragma once
#include "cuda/decode/decode_branches.cuh"
#include "cuda/decode/decode_finish_rank.cuh"

namespace fsattn {
namespace device {

// Adds the results of the warps and gives each column of the sum to the CTA that adds those of all.
template <class Traits>
__device__ __forceinline__ void send_results(FinishShared& shared, uint32_t exchange, int rows) {
  constexpr int kQuads = FinishTraits<Traits>::kQuads;
  const int ctas = cluster_size(), rank = cluster_rank(), each = rows * kQuads / ctas;
  add_results<Traits>(shared.results, rows, [&](int row, int quad, const float4& sum, float lse) {
    const int i = row * kQuads + quad, to = i / each;
    send_cluster(exchange + (rank * each + i - to * each) * 16, to, sum, shared.has_selected);
    if (quad < ctas) {
      send_cluster(smem_address(&shared.selected_lse[rank][row]), quad, __float_as_uint(lse),
                   shared.has_selected);
    }
  });
}

// What the four warps that attend need for the window.
template <class Traits>
__device__ __forceinline__ void prepare_window(const DecodeArgs& p, const SelectQuery& q,
                                               FinishShared& shared, uint32_t memory) {
  const int thread = threadIdx.x, ctas = cluster_size(), rank = cluster_rank();
  const DecodeTile tile{q.seq, q.kv_head, q.unit, q.query * p.group, p.group};
  load_queries<Traits, Traits::kThreads>(p, tile, q.s.token, memory, thread);
  cp_async_commit();
  const int last = min(q.position, q.s.num_keys - 1);
  const int begin = max(q.position - p.window_size, 0) / kDecodeChunk * kDecodeChunk;
  const Share share = share_of(max(ceil_div(last + 1 - begin, kDecodeChunk), 0), rank, ctas);
  if (thread < share.count) {
    shared.chunks[0][thread] =
        find_chunk(p.cache.table, q.seq, begin + (share.first + thread) * kDecodeChunk);
  }
  if (thread == 0) shared.num_chunks[0] = share.count;
  sync_named<Traits::kThreads>(kAttendBarrier);
}

// What they do: the window, then the chosen blocks.
template <class Traits>
__device__ __forceinline__ void attend_branches(const DecodeArgs& p, FinishShared& shared,
                                                uint32_t memory) {
  using Finish = FinishTraits<Traits>;
  const SelectQuery& q = shared.query;
  const auto ignore = [](int, const float(&)[2][4]) {};
  const auto ignore_too = [](int, const float(&)[2][4], const float(&)[2]) {};
  const float scale = p.softmax_scale * kLog2E;
  DecodeResult<Traits> result;
#pragma unroll 1
  for (int branch = 0; branch < 2; ++branch) {
    // Everything is derived anew: registers are short.
    const auto head = paged_head<typename Traits::Element>(p, p.cache, q.kv_head, q.s.num_keys);
    const uint64_t policy = l2_evict_first();
    ChunkRing<Traits> ring{memory + Finish::kRingAt +
                           reread_thread_index() / kWarpSize * Traits::kWarpBytes};
    const KeyChunk* chunks = shared.chunks[branch];
    const int count = shared.num_chunks[branch];
    start_chunks(head, chunks, count, ring, policy);
    if (branch == 0) {
      cp_async_wait<Traits::kStages - 1>();
      sync_named<Traits::kThreads>(kAttendBarrier);  // the queries have landed
    }
    const int last = min(q.position, q.s.num_keys - 1);
    const int first = branch == 0 ? q.position - p.window_size : 0;
    const KeyInterval seen[2] = {
        {first, last},
        {first, last}
    };
    attend(result, head, chunks, count, seen, scale, memory, ring, policy, ignore, ignore_too);
    leave_result(result, ring, shared.results);
    sync_named<Traits::kThreads>(kAttendBarrier);
    if (branch == 1) break;
    const DecodeTile tile{q.seq, q.kv_head, q.unit, q.query * p.group, p.group};
    combine_results<Traits>(shared.results, part_rows(p, tile, 1 + cluster_rank()), p.group,
                            p.head_dim_v);
    arrive_cluster(shared.has_window, cluster_size());
    sync_named<2 * Traits::kThreads>(kBlocksBarrier);
  }
  send_results<Traits>(shared, memory + Finish::kExchangeAt, p.group);
}

// A quad of the sum of partial results, weighed by their lse.
__device__ __forceinline__ float4 sum_parts(const float* o, int64_t o_stride, const float* lse,
                                            int64_t lse_stride, int parts, float scale) {
  constexpr int kHeld = 8;
  float4 sum{};
  float top = -INFINITY, total = 0.f;
#pragma unroll 1
  for (int first = 0; first < parts; first += kHeld) {
    float4 x[kHeld];
    float l[kHeld], next = top;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      l[i] = -INFINITY;
      x[i] = float4{};
      if (first + i < parts) {
        l[i] = __ldcg(lse + (first + i) * lse_stride);
        x[i] = __ldcg(reinterpret_cast<const float4*>(o + (first + i) * o_stride));
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) next = fmaxf(next, l[i]);
    if (next == -INFINITY) continue;
    const float keep = exp2_approx((top - next) * kLog2E);
    top = next;
    total *= keep;
    sum = {sum.x * keep, sum.y * keep, sum.z * keep, sum.w * keep};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float weight = exp2_approx((l[i] - top) * kLog2E);
      total += weight;
      // What has no weight may never have been written.
      if (weight != 0.f) add_scaled(sum, weight, x[i]);
    }
  }
  const float factor = total == 0.f ? 0.f : scale / total;
  return {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
}

// What the other four warps do after the ranking: this CTA's share of the output.
template <class Traits>
__device__ __forceinline__ void add_branches(const DecodeArgs& p, const SelectQuery& q,
                                             FinishShared& shared, const float4* exchange,
                                             int thread) {
  using Element = typename Traits::Element;
  constexpr int kQuads = FinishTraits<Traits>::kQuads, kItems = FinishTraits<Traits>::kItems;
  const int ctas = cluster_size(), each = p.group * kQuads / ctas;
  const int64_t token = q.s.token + q.query;
  const int head = q.kv_head * p.group, rows = unit_rows(p);
  const int splits = num_cmp_splits(p, q.s.num_cmp);
  const int64_t unit_row = static_cast<int64_t>(q.unit) * rows + q.query * p.group;
  float4 sum[kItems];
  float gate[kItems];
  wait_cluster(shared.has_window);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    sum[k] = float4{};
    const int at = thread + k * Traits::kThreads, i = cluster_rank() * each + at;
    const int row = i / kQuads, col = i % kQuads * 4;
    if (at >= each || col >= p.head_dim_v) continue;
    gate[k] = gate_value<Element>(p, token, head + row, 1);
    const int64_t cmp =
        (static_cast<int64_t>(q.unit) * p.cmp_splits) * rows + q.query * p.group + row;
    sum[k] =
        sum_parts(p.cmp_o + cmp * p.head_dim_v + col, static_cast<int64_t>(rows) * p.head_dim_v,
                  p.cmp_lse + cmp, rows, splits, gate_value<Element>(p, token, head + row, 0));
    const int64_t part = (unit_row + row) * p.parts + 1;
    const float4 window =
        sum_parts(p.part_o + part * p.head_dim_v + col, p.head_dim_v, p.part_lse + part, 1, ctas,
                  gate_value<Element>(p, token, head + row, 2));
    sum[k] = {sum[k].x + window.x, sum[k].y + window.y, sum[k].z + window.z, sum[k].w + window.w};
  }
  wait_cluster(shared.has_selected);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int at = thread + k * Traits::kThreads, i = cluster_rank() * each + at;
    const int row = i / kQuads, col = i % kQuads * 4;
    if (at >= each || col >= p.head_dim_v) continue;
    float top = -INFINITY, total = 0.f;
    float lse[kDecodeRankCtas];
    float4 x[kDecodeRankCtas], selected{};
#pragma unroll
    for (int c = 0; c < kDecodeRankCtas; ++c) {
      lse[c] = c < ctas ? shared.selected_lse[c][row] : -INFINITY;
      x[c] = c < ctas ? exchange[c * each + at] : float4{};
      top = fmaxf(top, lse[c]);
    }
    const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int c = 0; c < kDecodeRankCtas; ++c) {
      const float weight = exp2_approx((lse[c] - shift) * kLog2E);
      total += weight;
      add_scaled(selected, weight, x[c]);
    }
    add_scaled(sum[k], total == 0.f ? 0.f : gate[k] / total, selected);
    Element* out = static_cast<Element*>(p.o.data) + token * p.o.token_stride +
                   (head + row) * p.o.head_stride + col;
    *reinterpret_cast<uint2*>(out) = {pack_pair<Element>(sum[k].x, sum[k].y),
                                      pack_pair<Element>(sum[k].z, sum[k].w)};
  }
}

}  // namespace device

// kHeads: whose scores a thread has in flight.
template <class Traits, int kHeads>
__global__ void __launch_bounds__(FinishTraits<Traits>::kThreads, FinishTraits<Traits>::kMinCtas)
    decode_finish_kernel(const __grid_constant__ DecodeArgs p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched elsewhere
  using namespace device;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ FinishShared shared;
  const int ctas = cluster_size();
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&shared.has_candidates), 1);
    mbarrier_init(smem_address(&shared.has_window), Traits::kWarps * ctas);
    mbarrier_init(smem_address(&shared.has_selected), 1);
    mbarrier_init_fence();
    // Of every CTA a list of blocks; of every CTA a share of the columns, and the lse of all rows.
    mbarrier_arrive_expect(smem_address(&shared.has_candidates),
                           ctas * candidates_a_cta(p.topk) * 8);
    mbarrier_arrive_expect(smem_address(&shared.has_selected),
                           p.group * (FinishTraits<Traits>::kQuads * 16 + ctas * 4));
  }
  cluster_arrive();
  allow_next_kernel();
  const SelectQuery q = find_query(p, blockIdx.x / ctas);
  if (threadIdx.x == 0) shared.query = q;
  cluster_wait();  // all CTAs of the cluster have started
  if (!q.is_query) return;
  __syncthreads();
  if (threadIdx.x < Traits::kThreads) {
    prepare_window<Traits>(p, q, shared, smem_address(smem));
    attend_branches<Traits>(p, shared, smem_address(smem));
    return;
  }
  const int thread = threadIdx.x - Traits::kThreads;
  float* const memory = reinterpret_cast<float*>(smem + FinishTraits<Traits>::kExchangeAt);
  load_pages<FinishTraits<Traits>>(p, q, shared, thread);
  const ScoreTask task = find_score_task(p, q);
  wait_for_previous_kernel();
  find_entries<FinishTraits<Traits>, kHeads>(p, q, task, shared, memory, thread);
  list_entries(p, shared.query, shared, thread);
  arrive_named<2 * Traits::kThreads>(kBlocksBarrier);
  if (cluster_rank() == 0 && thread < p.topk) {
    const SelectQuery& mine = shared.query;
    p.topk_idx[mine.kv_head * p.topk_head_stride +
               static_cast<int64_t>(mine.s.token + mine.query) * p.topk_token_stride + thread] =
        shared.entries[thread];
  }
  add_branches<Traits>(p, shared.query, shared, reinterpret_cast<const float4*>(memory), thread);
#endif
}

}  // namespace fsattn
