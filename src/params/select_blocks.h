#pragma once
#include "params/attention.h"

namespace fsattn {

struct SelectBlocksParams {
  Packing packing;
  AttnShape shape;  // head_dim_v is unused
  Rows q, k_cmp;
  Stats lse;
  CompressedMask mask;
  int64_t block_size;
  int64_t topk;
  int64_t init_blocks;
  int64_t local_blocks;
  GroupReduce group_reduce;
  ScoreDType score_dtype;
  int32_t* topk_idx;  // [Hkv, total_q, topk], contiguous
  Scratch scratch;
  // As in AttnFwdParams, of k_cmp, whose head stride is 0 where a row of the pages is that of one head.
  PagedKeys pages = {};
};

struct BlockIndexParams {
  Packing packing;
  int64_t num_heads_kv;
  SelectedMask mask;  // mask.index is the output
  Scratch scratch;
};

}  // namespace fsattn
