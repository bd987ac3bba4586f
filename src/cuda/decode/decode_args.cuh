// What the fused kernels over a paged cache are given, and where a sequence stands in it.
#pragma once
#include "cuda/device/band.h"
#include "cuda/device/math.cuh"
#include "params/paged.h"
#include "plan/paged_table.h"

namespace fsattn {

struct DecodeArgs {
  PagedPacking packing;
  Rows q, o, gates;
  Stats lse;  // of the selected branch where it is alone
  PagedKvView cache, cmp;
  device::Band cmp_band;
  // Scratch memory: plan/paged_table.h.
  float *scores, *cmp_o, *cmp_lse, *part_o, *part_lse;
  int32_t* counters;
  uint32_t* block_scores;
  int64_t scores_pitch, block_scores_pitch;
  int32_t* topk_idx;  // [Hkv, total_q, topk] by strides
  int64_t topk_head_stride, topk_token_stride;
  int batch, heads_kv, group, max_q;
  int head_dim, head_dim_v;
  float softmax_scale;
  int max_blocks;  // of a sequence
  int block_size, topk, init_blocks, local_blocks, window_size;
  int cmp_split, cmp_splits;  // keys of a split; splits that there is memory for
  int cmp_long;               // compressed keys of a sequence whose splits are twice as large
  // Instead of the scores of windows there are their sums over blocks: pools_scores().
  bool has_pooled;
  int sel_entries, sel_splits, win_keys, win_splits, parts;
  bool is_nsa;  // false: the selected branch alone
  bool has_sigmoid, rounds_to_bf16;
  GroupReduce group_reduce;
};

namespace device {

// Rows of scores and partial results that a (sequence, KV head) owns.
__device__ __forceinline__ int unit_rows(const DecodeArgs& p) { return p.max_q * p.group; }

// A sequence of the batch. Lengths come from the device and are clamped to what exists.
struct DecodeSequence {
  int token;     // its first query
  int num_q;     // queries; none when there are more than max_q
  int position;  // of the first one; clamped far beyond any key
  int num_keys;  // tokens, the new ones included
  int num_cmp;   // compressed keys
};

__device__ __forceinline__ int num_cmp_keys(const DecodeArgs& p, int num_keys) {
  if (!p.is_nsa) return 0;
  const int64_t windows = p.cmp_band.last_key(num_keys - 1) + 1;
  return static_cast<int>(min(windows, p.cmp.table.capacity()));
}

// Instead of its scores a row may hold, for each chunk of 16 windows, what they add to four blocks, and
// beside it what the last one adds to the next block and the reference of all, a base-2 logarithm.
template <class Float>
__device__ __forceinline__ Float* pooled_blocks(Float* row) {
  return row;
}
__device__ __forceinline__ float2* pooled_sides(const DecodeArgs& p, float* row, int chunk) {
  return reinterpret_cast<float2*>(row + p.scores_pitch / 2) + chunk;
}
__device__ __forceinline__ const float2* pooled_sides(const DecodeArgs& p, const float* row,
                                                      int chunk) {
  return reinterpret_cast<const float2*>(row + p.scores_pitch / 2) + chunk;
}

// Compressed keys a split: the sequence's own length decides.
__device__ __forceinline__ int cmp_split(const DecodeArgs& p, int num_cmp) {
  return num_cmp >= p.cmp_long ? 2 * p.cmp_split : p.cmp_split;
}

__device__ __forceinline__ int num_cmp_splits(const DecodeArgs& p, int num_cmp) {
  return ceil_div(num_cmp, cmp_split(p, num_cmp));
}

__device__ __forceinline__ DecodeSequence find_sequence(const DecodeArgs& p, int seq) {
  const int total = static_cast<int>(p.packing.total_q);
  const int begin = min(max(__ldg(p.packing.cu_q + seq), 0), total);
  const int end = min(max(__ldg(p.packing.cu_q + seq + 1), begin), total);
  const int before = max(__ldg(p.packing.cache_seqlens + seq), 0);
  DecodeSequence s;
  s.token = begin;
  s.num_q = end - begin <= p.max_q ? end - begin : 0;  // more than the call was made for: left out
  s.position = min(before, Band::kUnlimited);
  s.num_keys =
      static_cast<int>(min(static_cast<int64_t>(s.position) + (end - begin), p.packing.max_k));
  s.num_cmp = num_cmp_keys(p, s.num_keys);
  return s;
}

// Up to kDecodeRows queries that share their keys: rows [row, row + num_rows) of the unit. Row
// i * G + g is query i of head g of the group.
struct DecodeTile {
  int seq, kv_head, unit;
  int row, num_rows;
};

// The keys that one query sees: [first, last].
struct KeyInterval {
  int first, last;
};

}  // namespace device
}  // namespace fsattn
