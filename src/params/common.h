// What every operator's parameters are made of. All of it is checked before it gets here
// (api/validate): a backend trusts shapes, dtypes and host-side values. It may not trust what only
// the device knows: the values in cu_seqlens, q_offset and topk_idx of CUDA tensors.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fsattn/config.h"
#include "fsattn/tensor.h"

namespace fsattn {

using Stream = void*;  // cudaStream_t; null on the CPU

// A tensor [tokens, heads, dim] with a contiguous last dimension. Strides count elements.
struct Rows {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// A statistics tensor [heads, tokens]: fp32, or fp64 when the inputs are fp64. Contiguous tokens.
struct Stats {
  void* data;  // null when an optional one is absent
  int64_t head_stride;
};

// B sequences packed along the token axis. Sequence b owns query tokens cu_q[b] .. cu_q[b + 1] - 1;
// its query i stands at position i + (q_offset ? q_offset[b] : seqlen_k - seqlen_q).
struct Packing {
  int64_t batch;
  const int32_t* cu_q;
  const int32_t* cu_k;
  const int32_t* q_offset;  // null: bottom-right alignment
  int64_t total_q;
  int64_t total_k;  // where k holds compressed rows: rows * kernel_stride
  int64_t max_q;    // upper bounds of the lengths of one sequence
  int64_t max_k;
};

struct AttnShape {
  DType dtype;
  int64_t num_heads_q;
  int64_t num_heads_kv;
  int64_t head_dim;
  int64_t head_dim_v;
  double softmax_scale;

  constexpr int64_t group_size() const { return num_heads_q / num_heads_kv; }
};

// Token p of sequence b lies in page pages[b * seq_stride + p / page_size], row p % page_size.
struct PageTable {
  const int32_t* pages;
  int64_t seq_stride;
  int64_t max_pages;  // columns
  int64_t num_pages;  // of the cache: ids outside 0 .. num_pages - 1 are never dereferenced
  int64_t page_size;

  constexpr int64_t capacity() const { return max_pages * page_size; }
};

// Scratch memory of one call, sized by the plan. 256-byte aligned.
struct Scratch {
  void* data;
  size_t bytes;
};

// The block index: see BuildBlockIndex in fsattn/ops.h.
struct BlockIndexView {
  int32_t* start;  // [Hkv, num_slots + 1], contiguous; null when absent
  int32_t* entry;  // [Hkv, total_q * topk], contiguous
  int64_t num_slots;
};

}  // namespace fsattn
