// What the backward kernels of selected attention are given.
#pragma once
#include "cuda/selected_attn/work_items.cuh"
#include "params/attention.h"

namespace fsattn::selected {

struct BwdArgs {
  AttnBwdTensors attn;
  MeanGradients means;
  const int32_t* entries;  // [Hkv, total_q * topk]
  int64_t entry_stride;    // total_q * topk
  ItemList list;
  RowSpace space;
  int chunks_qk;  // 16-byte chunks of a row of q and k
  int chunks_v;   // and of v and dO
  float scale;
  float scale_log2;
  float2* stats;     // [total_q, Hq] {lse in base 2, rowsum(dO * O) - dlse}
  void* dq_partial;  // [segments of the launch, range, partials, G, D] input dtype
  uint8_t* marks;    // [segments of the launch, range, partials] 1: the partial rows were written
  float* dkv_items;  // [segments of the launch, item capacity, keys, D + Dv]; sm_90a: input dtype
  float*
      dkv_sum;  // [total_k, D + Dv] of the one KV head of a launch; null: launches hold whole heads
  int* part_items;  // [segments of the launch, num_parts + 1]
  int keys;         // of a part
  int num_parts;
  bool is_first, is_last;  // launch of its KV head
};

// A token, or a token and a head, never needs more than 31 bits; what they are multiplied by may.
template <class Element>
__device__ __forceinline__ Element* row_pointer16(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<Element*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

}  // namespace fsattn::selected
