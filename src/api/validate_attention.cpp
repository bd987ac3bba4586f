// The three attention branches.
#include "api/parts.h"
#include "api/validate.h"

namespace fsattn {
namespace {

struct CompressedInputs {
  QkvRows rows;
  Packing packing;
  CompressedMask mask;
};

template <class Call>
CompressedInputs check_compressed_inputs(Arguments& args, const Call& call) {
  CompressedInputs in{};
  in.rows = check_qkv(args, {call.q, call.k, call.v}, call.softmax_scale, kCompressedNames);
  in.packing = check_sequences(args, call.seq, in.rows.total_q, kAnySize);
  in.mask = check_compressed_mask(args, call.cu_seqlens_cmp, call.seq, in.rows.rows_k,
                                  call.kernel_size, call.kernel_stride);
  in.packing.total_k = in.rows.rows_k * call.kernel_stride;
  return in;
}

Problem compressed_problem(Pass pass, const Arguments& args, const CompressedInputs& in) {
  Problem problem = attention_problem(Op::kCompressedAttn, pass, args, in.packing, in.rows.shape);
  problem.kernel_size = in.mask.kernel_size;
  problem.kernel_stride = in.mask.kernel_stride;
  return problem;
}

struct SelectedInputs {
  QkvRows rows;
  Packing packing;
  SelectedMask mask;
};

template <class Call>
SelectedInputs check_selected_inputs(Arguments& args, const Call& call) {
  SelectedInputs in{};
  in.rows = check_qkv(args, {call.q, call.k, call.v}, call.softmax_scale);
  in.packing = check_sequences(args, call.seq, in.rows.total_q, in.rows.rows_k);
  in.mask = check_selected_mask(args, {call.topk_idx, call.block_start, call.block_entry},
                                in.packing, in.rows.shape.num_heads_kv, call.block_size);
  return in;
}

Problem selected_problem(Pass pass, const Arguments& args, const SelectedInputs& in,
                         size_t workspace_cap) {
  Problem problem = attention_problem(Op::kSelectedAttn, pass, args, in.packing, in.rows.shape);
  problem.block_size = in.mask.block_size;
  problem.topk = in.mask.topk;
  problem.has_block_index = in.mask.index.start != nullptr;
  problem.workspace_cap = workspace_cap;
  return problem;
}

struct WindowInputs {
  QkvRows rows;
  Packing packing;
  WindowMask mask;
};

template <class Call>
WindowInputs check_window_inputs(Arguments& args, const Call& call) {
  WindowInputs in{};
  in.rows = check_qkv(args, {call.q, call.k, call.v}, call.softmax_scale);
  in.packing = check_sequences(args, call.seq, in.rows.total_q, in.rows.rows_k);
  check_range("window_size", call.window_size, 0, kMaxIndex);
  in.mask = {call.window_size};
  return in;
}

Problem window_problem(Pass pass, const Arguments& args, const WindowInputs& in) {
  Problem problem = attention_problem(Op::kWindowAttn, pass, args, in.packing, in.rows.shape);
  problem.window_size = in.mask.window_size;
  return problem;
}

template <class Call>
GradientViews gradients_of(const Call& call) {
  return {call.dout, call.dlse, call.o, call.lse, call.dq, call.dk, call.dv};
}

}  // namespace

Checked<Problem, CompressedAttnFwdParams> validate(const CompressedAttentionFwd& call,
                                                   Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const CompressedInputs in = check_compressed_inputs(args, call);
  const AttnFwdTensors attn = check_forward(args, in.rows, in.packing, {call.o, call.lse});
  args.check_aliasing();
  return {
      compressed_problem(Pass::kFwd, args, in), {attn, in.mask, 0, {}}
  };
}

Checked<Problem, CompressedAttnBwdParams> validate(const CompressedAttentionBwd& call,
                                                   Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const CompressedInputs in = check_compressed_inputs(args, call);
  const AttnBwdTensors attn =
      check_backward(args, in.rows, in.packing, gradients_of(call), kCompressedNames);
  args.check_aliasing();
  return {
      compressed_problem(Pass::kBwd, args, in), {attn, in.mask, 0, {}}
  };
}

Checked<Problem, SelectedAttnFwdParams> validate(const SelectedAttentionFwd& call,
                                                 Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const SelectedInputs in = check_selected_inputs(args, call);
  const AttnFwdTensors attn = check_forward(args, in.rows, in.packing, {call.o, call.lse});
  args.check_aliasing();
  return {
      selected_problem(Pass::kFwd, args, in, call.workspace_cap),
      {attn, in.mask, call.workspace_cap, {}}
  };
}

Checked<Problem, SelectedAttnBwdParams> validate(const SelectedAttentionBwd& call,
                                                 Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const SelectedInputs in = check_selected_inputs(args, call);
  const AttnBwdTensors attn = check_backward(args, in.rows, in.packing, gradients_of(call));
  args.check_aliasing();
  return {
      selected_problem(Pass::kBwd, args, in, call.workspace_cap),
      {attn, in.mask, call.workspace_cap, {}}
  };
}

Checked<Problem, WindowAttnFwdParams> validate(const WindowAttentionFwd& call, Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const WindowInputs in = check_window_inputs(args, call);
  const AttnFwdTensors attn = check_forward(args, in.rows, in.packing, {call.o, call.lse});
  args.check_aliasing();
  return {
      window_problem(Pass::kFwd, args, in), {attn, in.mask, 0, {}}
  };
}

Checked<Problem, WindowAttnBwdParams> validate(const WindowAttentionBwd& call, Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const WindowInputs in = check_window_inputs(args, call);
  const AttnBwdTensors attn = check_backward(args, in.rows, in.packing, gradients_of(call));
  args.check_aliasing();
  return {
      window_problem(Pass::kBwd, args, in), {attn, in.mask, 0, {}}
  };
}

}  // namespace fsattn
