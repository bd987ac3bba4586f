// decode_branches: the window and the selected branch of a few new tokens, and the sum of the branches.
//
// Math     o = g0 o_cmp + g1 o_sel + g2 o_win; every branch a softmax over its own keys.
// Work     one CTA per (a) tile of 16 rows and split of the window, (b) tile of 16 rows: combines the
//          splits of the compressed branch, (c) query, tile of 16 heads and split of its blocks.
//          The CTA that finishes last of those that a query needs adds them up, in a fixed order.
// Order    (a) and (b) come first: they run while decode_select still ranks the blocks that (c) waits
//          for (programmatic dependent launch).
// Bound    HBM: topk * S and w keys a (sequence, KV head).
// Numbers  partial results fp32, one rounding at the end. Deterministic.
#pragma once
#include "cuda/decode/decode_attend.cuh"
#include "cuda/device/grid_dependency.cuh"

namespace fsattn {
namespace device {

// CTAs of a (sequence, KV head): tiles over all rows of the longest query count, then over the heads of
// each query.
struct BranchGrid {
  int tiles;        // of 16 rows
  int tiles_query;  // of the heads of one query
  int early;        // CTAs a unit that do not wait for the selection
  int late;
};

__host__ __device__ inline BranchGrid branch_grid(const DecodeArgs& p) {
  constexpr int kRows = static_cast<int>(kDecodeRows);
  BranchGrid g;
  g.tiles = ceil_div(p.max_q * p.group, kRows);
  g.tiles_query = ceil_div(p.group, kRows);
  g.early = p.is_nsa ? g.tiles * (1 + p.win_splits) : 0;
  g.late = p.max_q * g.tiles_query * p.sel_splits;
  return g;
}

// Tiles of 16 rows that hold heads of the query.
__device__ __forceinline__ int tiles_of_query(const DecodeArgs& p, int query) {
  constexpr int kRows = static_cast<int>(kDecodeRows);
  return ((query + 1) * p.group - 1) / kRows - query * p.group / kRows + 1;
}

// CTAs that have to finish before the branches of a query can be added.
__device__ __forceinline__ int num_arrivals(const DecodeArgs& p, const BranchGrid& grid,
                                            int query) {
  const int early = p.is_nsa ? tiles_of_query(p, query) * (1 + p.win_splits) : 0;
  return early + grid.tiles_query * p.sel_splits;
}

__device__ __forceinline__ PartialRows part_rows(const DecodeArgs& p, const DecodeTile& tile,
                                                 int part) {
  const int64_t row = static_cast<int64_t>(tile.unit) * unit_rows(p) + tile.row;
  return {p.part_o + (row * p.parts + part) * p.head_dim_v, p.part_lse + row * p.parts + part,
          static_cast<int64_t>(p.parts) * p.head_dim_v, p.parts};
}

// One branch of an output row: the partial results [first, end) of `row`, four columns.
__device__ __forceinline__ float4 combine_parts(const float* o, int64_t o_stride, const float* lse,
                                                int64_t lse_stride, int count, float& total_lse) {
  float top = -INFINITY, total = 0.f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) top = fmaxf(top, __ldcg(lse + i * lse_stride));
  total_lse = -INFINITY;
  float4 sum{};
  if (top == -INFINITY) return sum;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    total += exp2_approx((__ldcg(lse + i * lse_stride) - top) * kLog2E);
  }
  const float inverse = 1.f / total;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float part = __ldcg(lse + i * lse_stride);
    if (part == -INFINITY) continue;  // nothing was written
    add_scaled(sum, exp2_approx((part - top) * kLog2E) * inverse,
               __ldcg(reinterpret_cast<const float4*>(o + i * o_stride)));
  }
  total_lse = top + log2_approx(total) * kLn2;
  return sum;
}

// The splits of the compressed branch become part 0 of each row.
__device__ __forceinline__ void combine_compressed(const DecodeArgs& p, const DecodeTile& tile,
                                                   int splits) {
  const PartialRows out = part_rows(p, tile, 0);
  const int64_t first = static_cast<int64_t>(tile.unit) * p.cmp_splits * unit_rows(p) + tile.row;
  const int quads = p.head_dim_v / 4;
  for (int i = threadIdx.x; i < tile.num_rows * quads; i += blockDim.x) {
    const int row = i / quads, col = (i - row * quads) * 4;
    float lse;
    const float4 x = combine_parts(p.cmp_o + (first + row) * p.head_dim_v + col,
                                   static_cast<int64_t>(unit_rows(p)) * p.head_dim_v,
                                   p.cmp_lse + first + row, unit_rows(p), splits, lse);
    *reinterpret_cast<float4*>(out.o + row * out.o_stride + col) = x;
    if (col == 0) out.lse[row * out.lse_stride] = lse;
  }
}

template <class Element>
__device__ __forceinline__ float gate_value(const DecodeArgs& p, int64_t token, int head, int i) {
  const Element* gates = static_cast<const Element*>(p.gates.data) + token * p.gates.token_stride +
                         head * p.gates.head_stride;
  const float x = static_cast<float>(gates[i]);
  return p.has_sigmoid ? 1.f / (1.f + exp2_approx(-x * kLog2E)) : x;
}

// Adds the branches of one query and writes its output.
template <class Element>
__device__ __forceinline__ void write_query(const DecodeArgs& p, const DecodeTile& tile, int query,
                                            int64_t token) {
  const int quads = p.head_dim_v / 4;
  for (int i = threadIdx.x; i < p.group * quads; i += blockDim.x) {
    const int g = i / quads, col = (i - g * quads) * 4, head = tile.kv_head * p.group + g;
    const int64_t row = static_cast<int64_t>(tile.unit) * unit_rows(p) + query * p.group + g;
    const float* o = p.part_o + row * p.parts * p.head_dim_v + col;
    const float* lse = p.part_lse + row * p.parts;
    const int selected = p.parts - p.sel_splits;
    float branch_lse;
    float4 x = combine_parts(o + selected * p.head_dim_v, p.head_dim_v, lse + selected, 1,
                             p.sel_splits, branch_lse);
    if (p.is_nsa) {
      const float4 sel = x;
      const float4 win =
          combine_parts(o + p.head_dim_v, p.head_dim_v, lse + 1, 1, p.win_splits, branch_lse);
      const float4 cmp = __ldcg(reinterpret_cast<const float4*>(o));
      x = {};
      add_scaled(x, gate_value<Element>(p, token, head, 0), cmp);
      add_scaled(x, gate_value<Element>(p, token, head, 1), sel);
      add_scaled(x, gate_value<Element>(p, token, head, 2), win);
    } else if (col == 0) {
      static_cast<float*>(p.lse.data)[head * p.lse.head_stride + token] = branch_lse;
    }
    Element* out =
        static_cast<Element*>(p.o.data) + token * p.o.token_stride + head * p.o.head_stride + col;
    *reinterpret_cast<uint2*>(out) = {pack_pair<Element>(x.x, x.y), pack_pair<Element>(x.z, x.w)};
  }
}

// A CTA has written its part of queries [first, end): whoever comes last adds the branches.
template <class Element>
__device__ __forceinline__ void finish_queries(const DecodeArgs& p, const BranchGrid& grid,
                                               const DecodeTile& tile, int token, int first,
                                               int end, bool* is_last) {
  __threadfence();
  __syncthreads();
  const int query = first + static_cast<int>(threadIdx.x);
  if (query < end) {
    const int before = atomicAdd(p.counters + tile.unit * p.max_q + query, 1);
    is_last[threadIdx.x] = before == num_arrivals(p, grid, query) - 1;
  }
  __syncthreads();
  for (int i = first; i < end; ++i) {
    if (!is_last[i - first]) continue;
    __threadfence();
    write_query<Element>(p, tile, i, token + i);
  }
}

// The chunks of this CTA's entries of a row of topk_idx. A row is a set: entries that are not a block of
// the sequence and repeated ones do not count. Called by the first warp.
__device__ __forceinline__ void list_selected(const DecodeArgs& p, const DecodeSequence& s,
                                              const int32_t* entries, int seq, int split,
                                              int position, DecodeShared& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int per_entry = p.block_size / kDecodeChunk;
  const int at = split * p.sel_entries + lane / per_entry;
  bool is_chunk = lane < p.sel_entries * per_entry && at < p.topk;
  int key = 0;
  if (is_chunk) {
    const int block = __ldcg(entries + at);
    const int64_t first =
        static_cast<int64_t>(block) * p.block_size + lane % per_entry * kDecodeChunk;
    is_chunk = block >= 0 && first < s.num_keys && first <= position;
    for (int i = 0; is_chunk && i < at; ++i) is_chunk = __ldcg(entries + i) != block;
    key = static_cast<int>(first);
  }
  const unsigned taken = __ballot_sync(kFullMask, is_chunk);
  if (is_chunk) {
    shared.chunks[__popc(taken & ((1u << lane) - 1))] = find_chunk(p.cache.table, seq, key);
  }
  if (lane == 0) shared.num_chunks = __popc(taken);
}

}  // namespace device

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_branches_kernel(const __grid_constant__ DecodeArgs p) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kRows = static_cast<int>(kDecodeRows);
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ DecodeShared shared;
  __shared__ bool is_last[kRows];
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const uint32_t q_tile = smem_address(smem);
  const BranchGrid grid = branch_grid(p);
  const int units = p.batch * p.heads_kv;

  const bool is_early = static_cast<int>(blockIdx.x) < units * grid.early;
  const int index = is_early ? blockIdx.x : blockIdx.x - units * grid.early;
  DecodeTile tile;
  tile.unit = index / (is_early ? grid.early : grid.late);
  int rest = index - tile.unit * (is_early ? grid.early : grid.late);
  tile.seq = tile.unit / p.heads_kv;
  tile.kv_head = tile.unit - tile.seq * p.heads_kv;
  const DecodeSequence s = find_sequence(p, tile.seq);
  int part, end_row;
  if (is_early) {
    tile.row = rest / (1 + p.win_splits) * kRows;
    part = rest % (1 + p.win_splits);
    end_row = s.num_q * p.group;
  } else {
    const int query = rest / (grid.tiles_query * p.sel_splits);
    rest -= query * grid.tiles_query * p.sel_splits;
    tile.row = query * p.group + rest / p.sel_splits * kRows;
    part = p.parts - p.sel_splits + rest % p.sel_splits;
    end_row = query < s.num_q ? (query + 1) * p.group : 0;
  }
  tile.num_rows = min(end_row - tile.row, kRows);
  if (tile.num_rows <= 0) return;
  const int first_query = tile.row / p.group;
  const int last_query = (tile.row + tile.num_rows - 1) / p.group;

  if (is_early && part == 0) {
    combine_compressed(p, tile, ceil_div(s.num_cmp, p.cmp_split));
  } else {
    KeyInterval seen[2];
    load_queries<Traits>(p, tile, s.token, q_tile);
    if (is_early) {
      const int position = s.position + first_query;
      const int begin =
          max(position - p.window_size, 0) / kDecodeChunk * kDecodeChunk + (part - 1) * p.win_keys;
      const int end = min(min(begin + p.win_keys, s.position + last_query + 1), s.num_keys);
      const int key = begin + thread * kDecodeChunk;
      if (thread < kDecodeMaxChunks && key < end) {
        shared.chunks[thread] = find_chunk(p.cache.table, tile.seq, key);
      }
      if (thread == 0) shared.num_chunks = max(ceil_div(end - begin, kDecodeChunk), 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = s.position + (tile.row + lane / 4 + 8 * i) / p.group;
        seen[i] = {t - p.window_size, min(t, end - 1)};
      }
    } else {
      wait_for_previous_kernel();
      const int t = s.position + first_query;
      if (thread < kWarpSize) {
        const int32_t* entries = p.topk_idx + tile.kv_head * p.topk_head_stride +
                                 static_cast<int64_t>(s.token + first_query) * p.topk_token_stride;
        list_selected(p, s, entries, tile.seq, part - (p.parts - p.sel_splits), t, shared);
      }
      seen[0] = seen[1] = {0, min(t, s.num_keys - 1)};
    }
    __syncthreads();
    DecodeResult<Traits> result;
    const auto head = paged_head<Element>(p, p.cache, tile.kv_head, s.num_keys);
    attend(result, shared, head, seen, p.softmax_scale * kLog2E, q_tile, l2_evict_first(),
           [](int, const float(&)[2][4]) {});
    write_partial(result, shared, q_tile, smem, part_rows(p, tile, part), tile.num_rows,
                  p.head_dim_v);
  }
  finish_queries<Element>(p, grid, tile, s.token, first_query, last_query + 1, is_last);
}

}  // namespace fsattn
