// What the query-stationary kernels share: the work of a CTA and the mask of its scores.
#pragma once
#include "cuda/dense_attn/dense_attn.h"
#include "cuda/device/sequence_tile.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

// What one CTA computes. It stays in shared memory: only a few values are needed in the loop.
struct QueryTileWork {
  int64_t token;               // of the first query
  int64_t k_offset, v_offset;  // elements
  int seq, head, kv_head;
  int key_row;      // row of k of the first key
  int position;     // of the first query
  int num_queries;  // from the first one to the end of the sequence; 0 or less: nothing to do
  int num_keys;
  int first_key, last_key;    // some row sees them
  int full_first, full_last;  // every row sees them
  float scale_log2;           // softmax_scale * log2(e)
};

// Sets scores outside the visible interval of their row to -inf.
template <int kM, int kN>
__device__ __forceinline__ void mask_scores(float (&s)[kM][kN][4], const device::Band& band,
                                            const QueryTileWork& work, int first_key) {
  // Few tiles come here: nothing that only they need should live in registers.
  const int thread = device::reread_thread_index(), lane = thread % device::kWarpSize;
  const int position = work.position + thread / device::kWarpSize * kM * 16;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int t = position + i * 8 + lane / 4;
    // Relative to the lane's first key, so that the others are compared with constants.
    const int lane_key = first_key + lane % 4 * 2;
    const int low = band.first_key(t) - lane_key;
    const int high = min(band.last_key(t), work.num_keys - 1) - lane_key;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = n * 8 + e;
        if (key < low || key > high) s[i / 2][n][i % 2 * 2 + e] = -INFINITY;
      }
    }
  }
}

// The work of tile `index` of `count`: a multiple of the heads, which are the fastest index.
template <int kTileQ, class Tensors>
__device__ QueryTileWork find_query_tile(const Tensors& p, const device::KeySet& keys, int index,
                                         int count) {
  const int num_heads = static_cast<int>(p.shape.num_heads_q);
  const int batch = static_cast<int>(p.packing.batch);
  const int slot = count / num_heads - 1 - index / num_heads;
  const device::TileSlot tile = device::find_tile(p.packing.cu_q, batch, slot, kTileQ);
  const device::RowRange queries =
      device::rows_of(p.packing.cu_q, batch, tile.seq, static_cast<int>(p.packing.total_q));
  const device::RowRange kv = device::rows_of(keys.cu_keys, batch, tile.seq, keys.total_keys);
  QueryTileWork work;
  work.seq = tile.seq;
  work.head = index % num_heads;
  work.kv_head = work.head / (num_heads / static_cast<int>(p.shape.num_heads_kv));
  work.key_row = kv.begin;
  work.token = int64_t{queries.begin} + tile.first;
  work.k_offset = kv.begin * p.k.token_stride + work.kv_head * p.k.head_stride;
  work.v_offset = kv.begin * p.v.token_stride + work.kv_head * p.v.head_stride;
  work.num_queries = queries.count - tile.first;
  work.num_keys = tile.seq == batch ? 0 : kv.count;
  work.position = device::query_offset(p.packing, tile.seq, queries.count) + tile.first;
  const int last = work.position + min(kTileQ, work.num_queries) - 1;
  work.first_key = keys.band.first_key(work.position);
  work.last_key = min(keys.band.last_key(last), work.num_keys - 1);
  work.full_first = keys.band.first_key(last);
  work.full_last = min(keys.band.last_key(work.position), work.num_keys - 1);
  work.scale_log2 = static_cast<float>(p.shape.softmax_scale) * device::kLog2E;
  return work;
}

// One tile a CTA.
template <int kTileQ, class Tensors>
__device__ QueryTileWork find_query_tile(const Tensors& p, const device::KeySet& keys) {
  return find_query_tile<kTileQ>(p, keys, static_cast<int>(blockIdx.x),
                                 static_cast<int>(gridDim.x));
}

// Starts the copy of kRows rows of q, k, v or dO from row `first` of the tile or sequence on. The
// address is derived anew each time: kept, it would take registers that the loops do not have.
template <int kRows, int kCols, int kThreads, class Element>
__device__ __forceinline__ void load_rows(uint32_t tile, const Rows& rows, int64_t offset,
                                          int num_rows, int64_t cols, int first) {
  const device::MatrixView<Element> matrix{static_cast<const Element*>(rows.data) + offset,
                                           rows.token_stride, num_rows, static_cast<int>(cols)};
  const int thread = device::reread_thread_index();
  device::load_tile<kRows, kCols, kThreads>(tile, device::thread_part(matrix, thread), first,
                                            thread);
}

}  // namespace fsattn
