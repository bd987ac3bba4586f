// decode_branches: the window and the selected branch of a few new tokens, and the sum of the
// branches.
//
// Math     o = g0 o_cmp + g1 o_sel + g2 o_win; every branch a softmax over its own keys.
// Work     one CTA per (a) tile of 16 rows and split of the window, (b) tile of 16 rows: combines
//          the splits of the compressed branch, (c) query, tile of 16 heads and split of its
//          blocks. The CTA that finishes last of those that a query needs adds them up, in a fixed
//          order.
// Order    (a) and (b) come first: they run while decode_select still ranks the blocks that (c)
//          waits for (programmatic dependent launch).
// Bound    HBM: topk * S and w keys a (sequence, KV head).
// Numbers  partial results fp32, one rounding at the end. Deterministic.
#pragma once
#include "cuda/decode/decode_attend.cuh"
#include "cuda/device/grid_dependency.cuh"

namespace fsattn {
namespace device {

// Beside the dynamic shared memory.
struct BranchShared {
  KeyChunk chunks[kDecodeMaxChunks];
  int num_chunks;
  WarpResults results;
  int entries[kDecodeMaxTopk];  // of a row of topk_idx
  bool is_last[kDecodeRows];
};

// CTAs of a (sequence, KV head): tiles over all rows of the longest query count, then over the
// heads of each query.
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

// Turns the lse of partial results into weights that add up to `scale`; returns the lse of all. One
// thread: there are few of them, and the rows and branches have a thread each.
__device__ __forceinline__ float weigh_parts(float* lse, int count, float scale) {
  float top = -INFINITY, total = 0.f;
  for (int i = 0; i < count; ++i) top = fmaxf(top, lse[i]);
  const bool is_empty = top == -INFINITY;
  for (int i = 0; i < count; ++i) {
    lse[i] = is_empty ? 0.f : exp2_approx((lse[i] - top) * kLog2E);
    total += lse[i];
  }
  if (is_empty) return top;
  for (int i = 0; i < count; ++i) lse[i] *= scale / total;
  return top + log2_approx(total) * kLn2;
}

// Weighted sums of the partial results of up to 16 rows; `write(row, column, sum)` takes four
// columns. Part i of row r: o + r * row_stride + i * part_stride, weight[r * parts + i]. What has
// no weight may never have been written. A thread has all its columns in flight.
template <class Traits, class Write>
__device__ __forceinline__ void add_parts(const float* o, int64_t row_stride, int64_t part_stride,
                                          const float* weight, int rows, int parts, int dim_v,
                                          const Write& write) {
  constexpr int kQuads = Traits::kDimV / 4;
  constexpr int kItems = 2, kParts = 8;  // rows and parts in flight
  constexpr int kRowsApart = Traits::kThreads / kQuads;
  const int col = threadIdx.x % kQuads * 4;
  if (col >= dim_v) return;
#pragma unroll 1
  for (int first_row = threadIdx.x / kQuads; first_row < rows; first_row += kItems * kRowsApart) {
    float4 sum[kItems] = {};
#pragma unroll 1
    for (int first = 0; first < parts; first += kParts) {
      float4 x[kItems][kParts];
      float w[kItems][kParts];
      const float* from = o + first_row * row_stride + first * part_stride + col;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int row = first_row + k * kRowsApart;
        const float* at = from;
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          w[k][i] = row < rows && first + i < parts ? weight[row * parts + first + i] : 0.f;
          x[k][i] = float4{};
          if (w[k][i] != 0.f) x[k][i] = __ldcg(reinterpret_cast<const float4*>(at));
          at += part_stride;
        }
        from += kRowsApart * row_stride;
      }
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) add_scaled(sum[k], w[k][i], x[k][i]);
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int row = first_row + k * kRowsApart;
      if (row < rows) write(row, col, sum[k]);
    }
  }
}

// The splits of the compressed branch become part 0 of each row. `weights`: shared memory, a float
// a (row, split).
template <class Traits>
__device__ __forceinline__ void combine_compressed(const DecodeArgs& p, const DecodeTile& tile,
                                                   int splits, float* weights) {
  const PartialRows out = part_rows(p, tile, 0);
  const int rows = unit_rows(p), thread = threadIdx.x;
  const int64_t first = static_cast<int64_t>(tile.unit) * p.cmp_splits * rows + tile.row;
  for (int i = thread; i < tile.num_rows * splits; i += Traits::kThreads) {
    const int split = i / tile.num_rows, row = i - split * tile.num_rows;
    weights[row * splits + split] = __ldcg(p.cmp_lse + first + split * rows + row);
  }
  __syncthreads();
  if (thread < tile.num_rows) {
    out.lse[thread * out.lse_stride] = weigh_parts(weights + thread * splits, splits, 1.f);
  }
  __syncthreads();
  add_parts<Traits>(p.cmp_o + first * p.head_dim_v, p.head_dim_v,
                    static_cast<int64_t>(rows) * p.head_dim_v, weights, tile.num_rows, splits,
                    p.head_dim_v, [&](int row, int col, const float4& x) {
                      *reinterpret_cast<float4*>(out.o + row * out.o_stride + col) = x;
                    });
}

template <class Element>
__device__ __forceinline__ float gate_value(const DecodeArgs& p, int64_t token, int head, int i) {
  const Element* gates = static_cast<const Element*>(p.gates.data) + token * p.gates.token_stride +
                         head * p.gates.head_stride;
  const float x = static_cast<float>(gates[i]);
  return p.has_sigmoid ? 1.f / (1.f + exp2_approx(-x * kLog2E)) : x;
}

// The branches of a row among its partial results, in the order of the gates.
struct BranchParts {
  int first, count;
};

__device__ __forceinline__ BranchParts branch_parts(const DecodeArgs& p, int branch) {
  if (!p.is_nsa) return {0, p.parts};
  if (branch == 0) return {0, 1};
  if (branch == 1) return {1 + p.win_splits, p.sel_splits};
  return {1, p.win_splits};
}

// Adds the branches of `rows` heads of one query, from `first_head` of the group on. `weights`:
// shared memory, a float a (row, part).
template <class Traits>
__device__ __forceinline__ void write_heads(const DecodeArgs& p, const DecodeTile& tile, int query,
                                            int64_t token, int first_head, int rows,
                                            float* weights) {
  using Element = typename Traits::Element;
  const int parts = p.parts, head = tile.kv_head * p.group + first_head;
  const int64_t first =
      static_cast<int64_t>(tile.unit) * unit_rows(p) + query * p.group + first_head;
  // One thread a (row, branch) from here to its weights.
  const int row = static_cast<int>(threadIdx.x) % static_cast<int>(kDecodeRows);
  const int branch = threadIdx.x / kDecodeRows;
  const bool is_branch = row < rows && branch < (p.is_nsa ? 3 : 1);
  float gate = 1.f;
  if (is_branch && p.is_nsa) gate = gate_value<Element>(p, token, head + row, branch);
  for (int i = threadIdx.x; i < rows * parts; i += Traits::kThreads) {
    weights[i] = __ldcg(p.part_lse + first * parts + i);
  }
  __syncthreads();
  if (is_branch) {
    const BranchParts at = branch_parts(p, branch);
    const float lse = weigh_parts(weights + row * parts + at.first, at.count, gate);
    if (!p.is_nsa) {
      static_cast<float*>(p.lse.data)[(head + row) * p.lse.head_stride + token] = lse;
    }
  }
  __syncthreads();
  Element* out = static_cast<Element*>(p.o.data) + token * p.o.token_stride;
  add_parts<Traits>(p.part_o + first * parts * p.head_dim_v,
                    static_cast<int64_t>(parts) * p.head_dim_v, p.head_dim_v, weights, rows, parts,
                    p.head_dim_v, [&](int r, int col, const float4& x) {
                      *reinterpret_cast<uint2*>(out + (head + r) * p.o.head_stride + col) = {
                          pack_pair<Element>(x.x, x.y), pack_pair<Element>(x.z, x.w)};
                    });
  __syncthreads();  // the weights may be written again
}

__device__ __forceinline__ int atomic_add_acq_rel(int32_t* at, int x) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(x)
               : "memory");
  return before;
}

// A CTA has written its part of queries [first, end): whoever comes last adds the branches.
template <class Traits>
__device__ __forceinline__ void finish_queries(const DecodeArgs& p, const BranchGrid& grid,
                                               const DecodeTile& tile, int token, int first,
                                               int end, BranchShared& shared, float* weights) {
  __syncthreads();
  const int query = first + static_cast<int>(threadIdx.x);
  if (query < end) {
    // Released for the whole CTA, which the barrier has ordered before.
    const int before = atomic_add_acq_rel(p.counters + tile.unit * p.max_q + query, 1);
    shared.is_last[threadIdx.x] = before == num_arrivals(p, grid, query) - 1;
  }
  __syncthreads();
  for (int i = first; i < end; ++i) {
    if (!shared.is_last[i - first]) continue;
    for (int head = 0; head < p.group; head += static_cast<int>(kDecodeRows)) {
      write_heads<Traits>(p, tile, i, token + i, head,
                          min(p.group - head, static_cast<int>(kDecodeRows)), weights);
    }
  }
}

// Brings a sequence's row of the block table to L2 while the selection is not there yet.
__device__ __forceinline__ void touch_pages(const PageTable& table, int seq) {
  constexpr int kLine = 128 / sizeof(int32_t);
  const int slot = static_cast<int>(threadIdx.x) * kLine;
  if (slot < table.max_pages) prefetch_l2(table.pages + seq * table.seq_stride + slot);
}

// The chunks of this CTA's entries of a row of topk_idx. A row of the caller's is a set: entries
// that are not a block of the sequence and repeated ones do not count. Called by the first warp.
__device__ __forceinline__ void list_selected(const DecodeArgs& p, const DecodeSequence& s,
                                              const int32_t* entries, int seq, int split,
                                              int position, BranchShared& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int per_entry = p.block_size / kDecodeChunk;
  const int at = split * p.sel_entries + lane / per_entry;
  bool is_chunk = lane < p.sel_entries * per_entry && at < p.topk;
  int* const row = shared.entries;
  // The rows of decode_select hold no block twice.
  const int first_entry = p.is_nsa ? split * p.sel_entries : 0;
  const int end_entry = min((split + 1) * p.sel_entries, p.topk);
  for (int i = first_entry + lane; i < end_entry; i += kWarpSize) row[i] = __ldcg(entries + i);
  __syncwarp();
  int key = 0;
  if (is_chunk) {
    const int block = row[at];
    const int64_t first =
        static_cast<int64_t>(block) * p.block_size + lane % per_entry * kDecodeChunk;
    is_chunk = block >= 0 && first < s.num_keys && first <= position;
    for (int i = first_entry; i < at; ++i) is_chunk = is_chunk && row[i] != block;
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
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas == 2 ? 3 : 1)
    decode_branches_kernel(const __grid_constant__ DecodeArgs p) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kRows = static_cast<int>(kDecodeRows);
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ BranchShared shared;
  float* const weights = reinterpret_cast<float*>(smem);
  static_assert(kRows * kDecodeMaxParts * sizeof(float) <= Traits::kSmemBytes);
  allow_next_kernel();
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const uint32_t q_tile = smem_address(smem);
  const BranchGrid grid = branch_grid(p);
  const int units = p.batch * p.heads_kv;

  const bool is_early = static_cast<int>(blockIdx.x) < units * grid.early;
  const int index = is_early ? blockIdx.x : blockIdx.x - units * grid.early;
  // Heads are the fastest index of the window, so that neighbours read the same pages; the
  // selected blocks of each head are its own.
  const int per_unit = is_early ? grid.early : grid.late;
  DecodeTile tile;
  tile.seq = index / (per_unit * p.heads_kv);
  int rest = index - tile.seq * per_unit * p.heads_kv;
  tile.kv_head = is_early ? rest % p.heads_kv : rest / per_unit;
  rest = is_early ? rest / p.heads_kv : rest - tile.kv_head * per_unit;
  tile.unit = tile.seq * p.heads_kv + tile.kv_head;
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
    combine_compressed<Traits>(p, tile, num_cmp_splits(p, s.num_cmp), weights);
  } else {
    KeyInterval seen[2];
    load_queries<Traits, Traits::kThreads>(p, tile, s.token, q_tile, thread);
    cp_async_commit();
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
      touch_pages(p.cache.table, tile.seq);
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
    const uint64_t policy = l2_evict_first();
    ChunkRing<Traits> ring{q_tile + 2 * Traits::kQBytes + thread / kWarpSize * Traits::kWarpBytes};
    start_chunks(head, shared.chunks, shared.num_chunks, ring, policy);
    cp_async_wait<Traits::kStages - 1>();
    __syncthreads();  // the queries have landed
    attend(
        result, head, shared.chunks, shared.num_chunks, seen, p.softmax_scale * kLog2E, q_tile,
        ring, policy, [](int, const float(&)[2][4]) {},
        [](int, const float(&)[2][4], const float(&)[2]) {});
    leave_result(result, ring, shared.results);
    __syncthreads();
    combine_results<Traits>(shared.results, part_rows(p, tile, part), tile.num_rows, p.head_dim_v);
  }
  finish_queries<Traits>(p, grid, tile, s.token, first_query, last_query + 1, shared, weights);
}

}  // namespace fsattn
