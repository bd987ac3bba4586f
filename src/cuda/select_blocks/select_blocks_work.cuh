// What the kernels of select_blocks share: which queries a CTA owns and which of their blocks compete.
#pragma once
#include "cuda/device/band.h"
#include "cuda/device/math.cuh"
#include "cuda/device/sequence_tile.cuh"
#include "params/select_blocks.h"

namespace fsattn::device {

// What one CTA computes.
struct SelectWork {
  int seq, kv_head;
  int first_head;   // of the group
  int64_t token;    // of the first query
  int position;     // of the first query
  int num_queries;  // 0 or less: nothing to do
  int first_row;    // of the keys
  int num_keys;
  int last_key;    // the last key that some query sees; -1: none
  int full_last;   // the last key that every query sees
  int num_blocks;  // of the sequence
};

// The numbers of one call that every warp needs.
struct SelectGeometry {
  int block_size, topk, init_blocks, local_blocks;
  int log_block_size;
  int overlap;    // l / d: windows that cover a token
  int per_block;  // S / d: windows that start in a block
  int log_per_block;
  bool rounds_to_bf16;
  float scale_log2;
};

// Where the competition of one query takes place.
struct SelectRow {
  int num_blocks;   // blocks that the query may select; 0: none
  int num_init;     // blocks 0 .. num_init - 1 are taken
  int local_begin;  // blocks from here on compete for nothing: the last num_local are taken
  int num_local;
  int room;  // blocks that the ranking may take
};

__device__ __forceinline__ SelectRow select_row(const SelectGeometry& g, const SelectWork& work,
                                                int row) {
  const int position = work.position + row;
  const int query_block = position < 0 ? -1 : position >> g.log_block_size;
  SelectRow r;
  r.num_blocks = min(query_block + 1, work.num_blocks);
  r.num_init = min(min(g.init_blocks, r.num_blocks), g.topk);
  r.local_begin = min(max(query_block + 1 - g.local_blocks, r.num_init), r.num_blocks);
  r.num_local = min(r.num_blocks - r.local_begin, g.topk - r.num_init);
  r.room = g.topk - r.num_init - r.num_local;
  return r;
}

inline SelectGeometry make_select_geometry(const SelectBlocksParams& p) {
  SelectGeometry g{};
  g.block_size = static_cast<int>(p.block_size);
  g.topk = static_cast<int>(p.topk);
  g.init_blocks = static_cast<int>(p.init_blocks);
  g.local_blocks = static_cast<int>(p.local_blocks);
  g.overlap = static_cast<int>(p.mask.kernel_size / p.mask.kernel_stride);
  g.per_block = static_cast<int>(p.block_size / p.mask.kernel_stride);
  while (1 << g.log_per_block < g.per_block) ++g.log_per_block;
  while (1 << g.log_block_size < g.block_size) ++g.log_block_size;
  g.scale_log2 = static_cast<float>(p.shape.softmax_scale) * kLog2E;
  g.rounds_to_bf16 = p.score_dtype == ScoreDType::kBFloat16;
  return g;
}

inline Band make_select_band(const CompressedMask& mask) {
  return {static_cast<int>(mask.kernel_stride), static_cast<int>(mask.kernel_size),
          Band::kUnlimited};
}

// What work item `index` of `count` is when items are kTileQ queries of one KV head.
template <int kTileQ>
__device__ SelectWork find_select_work(const SelectBlocksParams& p, const Band& band, int index,
                                       int count) {
  const int num_heads = static_cast<int>(p.shape.num_heads_kv);
  const int batch = static_cast<int>(p.packing.batch);
  // Latest queries first: they see the most keys.
  const int slot = count / num_heads - 1 - index / num_heads;
  const TileSlot tile = find_tile(p.packing.cu_q, batch, slot, kTileQ);
  const RowRange queries =
      rows_of(p.packing.cu_q, batch, tile.seq, static_cast<int>(p.packing.total_q));
  const RowRange keys = rows_of(p.mask.cu_cmp, batch, tile.seq, static_cast<int>(p.mask.total_cmp));
  const bool is_sequence = tile.seq < batch;
  SelectWork work;
  work.seq = tile.seq;
  work.kv_head = index % num_heads;
  work.first_head = work.kv_head * static_cast<int>(p.shape.group_size());
  work.token = int64_t{queries.begin} + tile.first;
  work.num_queries = min(queries.count - tile.first, kTileQ);
  work.position = query_offset(p.packing, tile.seq, queries.count) + tile.first;
  work.first_row = keys.begin;
  work.num_keys = is_sequence ? keys.count : 0;
  // In tokens, of which this operator has no tensor: total_k is not known here.
  const int64_t seqlen_k =
      is_sequence ? int64_t{__ldg(p.packing.cu_k + tile.seq + 1)} - __ldg(p.packing.cu_k + tile.seq)
                  : 0;
  // A wrong length may not keep the CTA busy for long.
  const int64_t longest = min(p.packing.max_k, int64_t{1} << 30);
  work.num_blocks = ceil_div(static_cast<int>(min(max(seqlen_k, int64_t{0}), longest)),
                             static_cast<int>(p.block_size));
  work.last_key = min(band.last_key(work.position + work.num_queries - 1), work.num_keys - 1);
  work.full_last = min(band.last_key(work.position), work.num_keys - 1);
  return work;
}

}  // namespace fsattn::device
