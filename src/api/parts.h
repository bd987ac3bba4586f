// Checks that several operators share. Each returns the part of the parameters that it vouches for.
#pragma once
#include "api/arguments.h"
#include "fsattn/ops.h"
#include "params/gate.h"
#include "params/select_blocks.h"
#include "plan/problem.h"

namespace fsattn {

// Names of the key and value tensors in messages: k_cmp, v_cmp where they hold compressed rows.
struct KvNames {
  const char* k = "k";
  const char* v = "v";
  const char* dk = "dk";
  const char* dv = "dv";
};
inline constexpr KvNames kCompressedNames{"k_cmp", "v_cmp", "dk_cmp", "dv_cmp"};

struct QkvViews {
  const TensorView& q;
  const TensorView& k;
  const TensorView& v;
};

struct QkvRows {
  AttnShape shape;
  Rows q, k, v;
  int64_t total_q;
  int64_t rows_k;
};

// The Arguments of a call whose first tensor is q [total_q, Hq, D].
Arguments attention_arguments(Purpose purpose, const TensorView& q);

// num_heads_q, num_heads_kv, head_dim and their rules; head_dim_v stays 0.
AttnShape check_heads(const Arguments& args, const TensorView& q, const char* k_name,
                      const TensorView& k, double softmax_scale);
void check_head_dim(const char* name, int64_t head_dim);

QkvRows check_qkv(Arguments& args, const QkvViews& views, double softmax_scale,
                  const KvNames& names = {});

// `rows_k`: rows of k, which cu_seqlens_k must end at; kAnySize where no tensor has a row a token.
// Packing::total_k is left to the caller then.
Packing check_sequences(Arguments& args, const Sequences& seq, int64_t total_q, int64_t rows_k);

void check_windows(int64_t kernel_size, int64_t kernel_stride);
void check_block_size(int64_t block_size);
CompressedMask check_compressed_mask(Arguments& args, const TensorView& cu_seqlens_cmp,
                                     const Sequences& seq, int64_t rows_cmp, int64_t kernel_size,
                                     int64_t kernel_stride);

// cu_seqlens_cmp against the lengths in cu_seqlens; nothing on CUDA.
void check_window_counts(const Arguments& args, const TensorView& cu_seqlens_cmp,
                         const char* cu_seqlens_name, const TensorView& cu_seqlens,
                         int64_t rows_cmp, int64_t kernel_size, int64_t kernel_stride);

// A cu_seqlens tensor [batch + 1]; kAnySize when this one decides the batch size.
const int32_t* check_cu_seqlens(Arguments& args, const char* name, const TensorView& view,
                                int64_t batch);

// Its values: 0 first, never decreasing, `total` last (unless kAnySize), no sequence longer than
// `max_seqlen`. Nothing on CUDA.
void check_cu_values(const Arguments& args, const char* name, const TensorView& view, int64_t total,
                     const char* max_name, int64_t max_seqlen);

struct SelectionOptions {
  int64_t block_size, topk, init_blocks, local_blocks;
  int64_t kernel_stride;
};
void check_selection(const SelectionOptions& options);

// topk_idx and the optional index of its blocks.
struct SelectionViews {
  const TensorView& topk_idx;
  const TensorView& block_start;
  const TensorView& block_entry;
};
SelectedMask check_selected_mask(Arguments& args, const SelectionViews& views,
                                 const Packing& packing, int64_t num_heads_kv, int64_t block_size);
void check_index_size(int64_t total_q, int64_t topk);

// The outputs of a forward pass: o [total_q, Hq, Dv], lse [Hq, total_q].
struct OutputViews {
  const TensorView& o;
  const TensorView& lse;
  const char* o_name = "o";
  const char* lse_name = "lse";
};
AttnFwdTensors check_forward(Arguments& args, const QkvRows& rows, const Packing& packing,
                             const OutputViews& out);

// What a backward pass reads beside q, k, v, and the gradients that it writes. An undefined `dlse`
// means no gradient arrives at lse.
struct GradientViews {
  const TensorView& dout;
  const TensorView& dlse;
  const TensorView& o;
  const TensorView& lse;
  const TensorView& dq;
  const TensorView& dk;
  const TensorView& dv;
};
AttnBwdTensors check_backward(Arguments& args, const QkvRows& rows, const Packing& packing,
                              const GradientViews& grads, const KvNames& names = {});

// An enumerator: 0 .. last.
template <class Enum>
Enum check_enum(const char* name, Enum value, Enum last) {
  check_range(name, static_cast<int64_t>(value), 0, static_cast<int64_t>(last));
  return value;
}
inline GateActivation check_activation(GateActivation activation) {
  return check_enum("activation", activation, GateActivation::kNone);
}

// Tokens of q, rows of k.
void check_row_counts(int64_t total_q, const char* k_name, int64_t rows_k);

Problem gate_problem(Pass pass, const Arguments& args, const GateShape& shape);
Problem selection_problem(const Arguments& args, const SelectBlocksParams& params);
Problem attention_problem(Op op, Pass pass, const Arguments& args, const Packing& packing,
                          const AttnShape& shape);

}  // namespace fsattn
