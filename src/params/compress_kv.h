#pragma once
#include "params/common.h"

namespace fsattn {

// Shared by both passes. Weight and pos_emb are contiguous and have the dtype of x.
struct CompressKvShape {
  DType dtype;
  int64_t batch;
  int64_t total;     // tokens of x
  int64_t rows_cmp;  // rows of x_cmp: total / kernel_stride
  int64_t max_seqlen;
  int64_t num_heads;
  int64_t head_dim;
  int64_t kernel_size;
  int64_t kernel_stride;
  CompressKind kind;
};

struct CompressKvFwdParams {
  CompressKvShape shape;
  Rows x;
  const void* weight;   // by kind: null, [Hkv, l], [Hkv, l], [Hkv, l * D, D]
  const void* pos_emb;  // [Hkv, l, D] or null
  const int32_t* cu_seqlens;
  Rows x_cmp;               // rows behind the last sequence are written as zeros
  int32_t* cu_seqlens_cmp;  // [batch + 1]
  Scratch scratch;
};

struct CompressKvBwdParams {
  CompressKvShape shape;
  Rows dx_cmp;
  Rows x;
  const void* weight;
  const void* pos_emb;
  const int32_t* cu_seqlens;
  const int32_t* cu_seqlens_cmp;
  Rows dx;
  void* dweight;   // like weight, or null
  void* dpos_emb;  // like pos_emb, or null
  Scratch scratch;
};

}  // namespace fsattn
