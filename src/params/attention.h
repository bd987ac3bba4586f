// Parameters of the three attention branches. They differ in their mask alone.
#pragma once
#include "params/common.h"
#include "params/gate.h"

namespace fsattn {

// Query t sees compressed key i iff t >= i * kernel_stride + kernel_size - 1 and i < C of its sequence.
// The keys of sequence b are rows cu_cmp[b] .. cu_cmp[b + 1] - 1; Packing::cu_k still holds the
// lengths in tokens, which positions are derived from.
struct CompressedMask {
  const int32_t* cu_cmp;  // [batch + 1]
  int64_t total_cmp;      // rows of k and v
  int64_t kernel_size;
  int64_t kernel_stride;
};

// Query t sees key j iff block j / block_size is in its row of topk_idx and j <= t. A row is a set.
struct SelectedMask {
  const int32_t* topk_idx;  // [Hkv, total_q, topk], last dimension contiguous
  int64_t head_stride;
  int64_t token_stride;
  int64_t topk;
  int64_t block_size;
  BlockIndexView index;  // absent: the backend builds it in its scratch memory when it needs one
};

// Query t sees key j iff t - window_size <= j <= t.
struct WindowMask {
  int64_t window_size;
};

// Keys that stay in the pages of a cache: those of token p and KV head h are row
// page * page_rows + h * head_rows + p % page_size of k and v. head_rows is 0 where a row has all heads;
// else a row is that of one head. Ids outside the cache stand for zeros.
struct PagedKeys {
  PageTable table;  // pages is null: k and v are packed
  int64_t page_rows;
  int64_t head_rows;
  int64_t total_rows;  // behind the last of them

  constexpr bool defined() const { return table.pages != nullptr; }
};

struct AttnFwdTensors {
  Packing packing;
  AttnShape shape;
  Rows q, k, v;
  Rows o;
  Stats lse;  // natural logarithm; -inf where a query sees no key
};

// The dQ of window and of compressed attention as one sum, where the kernels of both keep theirs in fp32
// (plan/dense_attn_table.h): window attention opens it, compressed attention adds to it, and selected
// attention adds it, times softmax_scale, to its own before that is rounded.
struct SharedDq {
  float* sums;                 // null: not shared
  int32_t* turns;              // what the kernel that adds notes of its additions
  const int32_t* prior_turns;  // those of the kernel before it; null when it is the first
};

// Gradients of compress_kv's means of k and v, dk_cmp and dv_cmp, that selected attention adds to the tokens of
// their windows.
struct MeanGradients {
  Rows dk, dv;  // data is null when there are none
  const int32_t* cu_cmp;
  int64_t total_cmp;
  int64_t kernel_size;
  int64_t kernel_stride;
};

struct AttnBwdTensors {
  Packing packing;
  AttnShape shape;
  Rows dout;
  Stats dlse;  // gradient that arrives at lse; data is null when there is none
  Rows q, k, v, o;
  Stats lse;
  Rows dq, dk, dv;
  bool accumulate_dq;   // add to what dq holds instead of overwriting it
  bool accumulate_dkv;  // likewise dk and dv
  // delta = rowsum(dO * O) - dlse of every row, where the caller has it; null otherwise, and always on
  // the CPU. fp32: delta [Hq, total_q] for compressed and window attention, pairs {lse / ln 2, delta}
  // [total_q, Hq] for selected attention, which then reads neither o nor lse.
  void* row_stats = nullptr;
  SharedDq shared_dq = {};
};

template <class Mask>
struct AttnFwdParams {
  AttnFwdTensors attn;
  Mask mask;
  size_t workspace_cap;  // selected attention only: partial results are chunked to stay under it
  Scratch scratch;
  // Block-major selected attention only: its merge writes o of the gate, whose other branches are ready.
  // o.data is null when there is no gate.
  GateFwdParams gate = {};
  // By rows that plan/paged_plan.h knows to read pages. Packing::cu_k and CompressedMask::cu_cmp still hold
  // the lengths.
  PagedKeys pages = {};
};

template <class Mask>
struct AttnBwdParams {
  AttnBwdTensors attn;
  Mask mask;
  size_t workspace_cap;
  Scratch scratch;
  // Selected attention only.
  MeanGradients means = {};
  // Where what it adds to (dq_sums, dk, dv, means) may still be under way; null when it is not.
  Stream side = nullptr;
};

using CompressedAttnFwdParams = AttnFwdParams<CompressedMask>;
using CompressedAttnBwdParams = AttnBwdParams<CompressedMask>;
using SelectedAttnFwdParams = AttnFwdParams<SelectedMask>;
using SelectedAttnBwdParams = AttnBwdParams<SelectedMask>;
using WindowAttnFwdParams = AttnFwdParams<WindowMask>;
using WindowAttnBwdParams = AttnBwdParams<WindowMask>;

}  // namespace fsattn
