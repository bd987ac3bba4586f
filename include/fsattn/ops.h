// The operators. A call is a value: a struct that names every tensor and option. Three functions
// take it:
//     workspace_bytes(call)  bytes of scratch memory that run() needs
//     explain(call)          the plan as text: backend, algorithm, kernel row, workspace, reason
//     run(call, execution)   validates, plans and runs; allocates nothing, synchronises nothing
// Each throws fsattn::Error on input that breaks a rule. The first two need no memory: the data of a
// view may still be null. Outputs may not overlap inputs, nor elements of an output each other.
//
// Shapes: B sequences are packed along the token axis. Hq query heads, Hkv key heads, G = Hq / Hkv;
// query head h reads KV head h / G. D is the head dim of q and k, Dv that of v and o. The last
// dimension is contiguous, all other strides are free. dtypes: fp64, fp32, bf16, fp16 on the CPU;
// bf16, fp16 on CUDA. Statistics (lse) are fp32, for fp64 inputs fp64. Undefined views are "absent".
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "fsattn/config.h"
#include "fsattn/error.h"
#include "fsattn/tensor.h"

namespace fsattn {

// Where and in which scratch memory a call runs.
struct Execution {
  void* stream = nullptr;     // cudaStream_t on CUDA; unused on the CPU
  void* workspace = nullptr;  // at least workspace_bytes(call) bytes, 256-byte aligned
  size_t workspace_bytes = 0;
};

// How sequences lie in the token axis. Query i of a sequence stands at position i + q_offset, which
// defaults to seqlen_k - seqlen_q (bottom-right alignment).
struct Sequences {
  TensorView cu_seqlens_q;   // int32 [B + 1]
  TensorView cu_seqlens_k;   // int32 [B + 1]
  TensorView q_offset;       // int32 [B], optional
  int64_t max_seqlen_q = 0;  // an upper bound of every sequence's length
  int64_t max_seqlen_k = 0;
};

// x [total, Hkv, D] -> x_cmp [total / d, Hkv, D]; rows behind the last sequence are zero.
struct CompressKvFwd {
  TensorView x, weight, pos_emb;  // weight: see CompressKind; pos_emb [Hkv, l, D], optional
  TensorView cu_seqlens;          // int32 [B + 1]
  int64_t max_seqlen = 0;
  int64_t kernel_size = 32, kernel_stride = 16;
  CompressKind kind = CompressKind::kMean;
  TensorView x_cmp;           // out
  TensorView cu_seqlens_cmp;  // out, int32 [B + 1]
};

struct CompressKvBwd {
  TensorView dx_cmp, x, weight, pos_emb;
  TensorView cu_seqlens, cu_seqlens_cmp;
  int64_t max_seqlen = 0;
  int64_t kernel_size = 32, kernel_stride = 16;
  CompressKind kind = CompressKind::kMean;
  TensorView dx;        // out, like x
  TensorView dweight;   // out, like weight; absent without weight
  TensorView dpos_emb;  // out, like pos_emb; absent without pos_emb
};

// Query t sees compressed key i iff t >= i * d + l - 1.
struct CompressedAttentionFwd {
  TensorView q, k, v;  // [total_q, Hq, D], [rows, Hkv, D], [rows, Hkv, Dv]
  Sequences seq;
  TensorView cu_seqlens_cmp;  // int32 [B + 1]
  int64_t kernel_size = 32, kernel_stride = 16;
  double softmax_scale = 0.0;  // 0 means D^-0.5
  TensorView o, lse;           // out: [total_q, Hq, Dv], [Hq, total_q]
};

struct CompressedAttentionBwd {
  TensorView dout, dlse;  // dlse optional
  TensorView q, k, v, o, lse;
  Sequences seq;
  TensorView cu_seqlens_cmp;
  int64_t kernel_size = 32, kernel_stride = 16;
  double softmax_scale = 0.0;
  TensorView dq, dk, dv;  // out
};

// Ranks the blocks of keys by the softmax mass of the compressed attention (NSA paper, eq. 9, 10).
struct SelectBlocks {
  TensorView q, k_cmp, lse;  // lse as compressed attention returned it
  Sequences seq;
  TensorView cu_seqlens_cmp;
  int64_t kernel_size = 32, kernel_stride = 16;
  int64_t block_size = 64, topk = 16, init_blocks = 1, local_blocks = 2;
  double softmax_scale = 0.0;
  GroupReduce group_reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
  TensorView topk_idx;  // out, int32 [Hkv, total_q, topk]: ascending, -1 behind the last
};

// block -> the queries that want it. Block b of sequence s has the slot cu_seqlens_k[s] / S + s + b;
// num_slots = total_k / S + B. Entries block_start[h, slot] .. block_start[h, slot + 1] - 1 of
// block_entry[h] are (query token * topk + position in its row), ascending; of a repeated id only
// the first position counts, ids outside the sequence and blocks after the query are left out.
struct BuildBlockIndex {
  TensorView topk_idx;  // int32 [Hkv, total_q, topk]
  Sequences seq;
  int64_t block_size = 64;
  TensorView block_start;  // out, int32 [Hkv, num_slots + 1]
  TensorView block_entry;  // out, int32 [Hkv, total_q * topk]
};

// Query t sees key j iff block j / S is in its row of topk_idx and j <= t.
struct SelectedAttentionFwd {
  TensorView q, k, v, topk_idx;
  TensorView block_start, block_entry;  // optional, from BuildBlockIndex
  Sequences seq;
  int64_t block_size = 64;
  double softmax_scale = 0.0;
  size_t workspace_cap = size_t{1} << 30;  // partial results are chunked to stay under it
  TensorView o, lse;                       // out
};

struct SelectedAttentionBwd {
  TensorView dout, dlse;
  TensorView q, k, v, o, lse, topk_idx;
  TensorView block_start, block_entry;
  Sequences seq;
  int64_t block_size = 64;
  double softmax_scale = 0.0;
  size_t workspace_cap = size_t{1} << 30;
  TensorView dq, dk, dv;  // out
};

// Query t sees key j iff t - w <= j <= t.
struct WindowAttentionFwd {
  TensorView q, k, v;
  Sequences seq;
  int64_t window_size = 512;
  double softmax_scale = 0.0;
  TensorView o, lse;  // out
};

struct WindowAttentionBwd {
  TensorView dout, dlse;
  TensorView q, k, v, o, lse;
  Sequences seq;
  int64_t window_size = 512;
  double softmax_scale = 0.0;
  TensorView dq, dk, dv;  // out
};

// o = g0 * o_cmp + g1 * o_sel + g2 * o_win.
struct GateFwd {
  TensorView o_cmp, o_sel, o_win;  // [total_q, Hq, Dv]
  TensorView gates;                // [total_q, 3] or [total_q, Hq, 3]
  GateActivation activation = GateActivation::kSigmoid;
  TensorView o;  // out
};

struct GateBwd {
  TensorView dout, o_cmp, o_sel, o_win, gates;
  GateActivation activation = GateActivation::kSigmoid;
  TensorView do_cmp, do_sel, do_win, dgates;  // out
};

// The six operators above as one call. k_cmp and v_cmp come from compress_kv; topk_idx is computed
// unless `select` is false, when the caller brings it (and its last size counts, not config.topk).
struct NativeSparseAttentionFwd {
  TensorView q, k, v, k_cmp, v_cmp, gates;
  Sequences seq;
  TensorView cu_seqlens_cmp;
  NsaConfig config;
  GroupReduce group_reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
  GateActivation activation = GateActivation::kSigmoid;
  bool select = true;
  size_t workspace_cap = size_t{1} << 30;
  TensorView topk_idx;  // out, or in
  TensorView o;         // out
  // out; backward reads them. Without a backward o_sel may be left out: o holds it until the gate.
  TensorView o_cmp, o_sel, o_win, lse_cmp, lse_sel, lse_win;
};

// Everything but the gradients is as the forward call had it. Beside the scratch memory of the steps the
// workspace holds the gradients of the three branches, [total_q, Hq, Dv] each; for gates of logits on CUDA
// two numbers a row instead.
struct NativeSparseAttentionBwd {
  TensorView dout;
  TensorView q, k, v, k_cmp, v_cmp, gates;
  TensorView topk_idx, o_cmp, o_sel, o_win, lse_cmp, lse_sel, lse_win;
  Sequences seq;
  TensorView cu_seqlens_cmp;
  NsaConfig config;
  GateActivation activation = GateActivation::kSigmoid;
  size_t workspace_cap = size_t{1} << 30;
  // k_cmp and v_cmp are compress_kv's means of k and v, whose gradients dk and dv then hold too. CUDA only.
  bool adds_means = false;
  TensorView dq, dk, dv, dk_cmp, dv_cmp, dgates;  // out
};

#define FSATTN_DECLARE_CALL(Call)           \
  size_t workspace_bytes(const Call& call); \
  std::string explain(const Call& call);    \
  void run(const Call& call, const Execution& execution)

FSATTN_DECLARE_CALL(CompressKvFwd);
FSATTN_DECLARE_CALL(CompressKvBwd);
FSATTN_DECLARE_CALL(CompressedAttentionFwd);
FSATTN_DECLARE_CALL(CompressedAttentionBwd);
FSATTN_DECLARE_CALL(SelectBlocks);
FSATTN_DECLARE_CALL(BuildBlockIndex);
FSATTN_DECLARE_CALL(SelectedAttentionFwd);
FSATTN_DECLARE_CALL(SelectedAttentionBwd);
FSATTN_DECLARE_CALL(WindowAttentionFwd);
FSATTN_DECLARE_CALL(WindowAttentionBwd);
FSATTN_DECLARE_CALL(GateFwd);
FSATTN_DECLARE_CALL(GateBwd);
FSATTN_DECLARE_CALL(NativeSparseAttentionFwd);
FSATTN_DECLARE_CALL(NativeSparseAttentionBwd);
#undef FSATTN_DECLARE_CALL

// The library as text: version, CPU instruction set and threads, CUDA devices, compiled kernels.
std::string describe_build();

}  // namespace fsattn
