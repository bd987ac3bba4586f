// Native sparse attention: the checks of its steps, over one set of arguments, so that aliasing is
// checked across all of them. What one step hands to the next was checked as its output.
#include "api/parts.h"
#include "api/validate.h"

namespace fsattn {
namespace {

// What both passes share.
struct NsaInputs {
  QkvRows rows;      // q, k, v
  QkvRows rows_cmp;  // q, k_cmp, v_cmp
  Packing packing;
  Packing packing_cmp;
  CompressedMask compressed;
  WindowMask window;
  Rows gates;
  GateShape gate_shape;
};

void check_same_size(const char* name, int64_t size, const char* what, int64_t wanted) {
  FSATTN_CHECK(size == wanted, kInvalidArgument, name, ": ", what, " (", wanted, "), found ", size);
}

template <class Call>
NsaInputs check_inputs(Arguments& args, const Call& call) {
  const NsaConfig& config = call.config;
  NsaInputs in{};
  in.rows = check_qkv(args, {call.q, call.k, call.v}, config.softmax_scale);
  in.rows_cmp =
      check_qkv(args, {call.q, call.k_cmp, call.v_cmp}, config.softmax_scale, kCompressedNames);
  check_same_size("k_cmp", in.rows_cmp.shape.num_heads_kv, "number of heads must be that of k",
                  in.rows.shape.num_heads_kv);
  check_same_size("v_cmp", in.rows_cmp.shape.head_dim_v, "head_dim must be that of v",
                  in.rows.shape.head_dim_v);
  in.packing = check_sequences(args, call.seq, in.rows.total_q, in.rows.rows_k);
  in.packing_cmp = in.packing;
  in.compressed = check_compressed_mask(args, call.cu_seqlens_cmp, call.seq, in.rows_cmp.rows_k,
                                        config.kernel_size, config.kernel_stride);
  in.packing_cmp.total_k = in.rows_cmp.rows_k * config.kernel_stride;
  check_range("window_size", config.window_size, 0, kMaxIndex);
  in.window = {config.window_size};
  const AttnShape& shape = in.rows.shape;
  in.gates = args.input_gates("gates", call.gates, in.rows.total_q, shape.num_heads_q);
  in.gate_shape = {shape.dtype, in.rows.total_q, shape.num_heads_q, shape.head_dim_v,
                   check_activation(call.activation)};
  return in;
}

SelectedMask given_selection(Arguments& args, const NsaInputs& in, const TensorView& topk_idx,
                             int64_t block_size) {
  const TensorView absent;
  return check_selected_mask(args, {topk_idx, absent, absent}, in.packing,
                             in.rows.shape.num_heads_kv, block_size);
}

// topk_idx is written by the selection and read by the selected attention.
SelectedMask own_selection(SelectBlocksParams& select, Arguments& args,
                           const NativeSparseAttentionFwd& call, const NsaInputs& in) {
  const NsaConfig& config = call.config;
  check_selection({config.block_size, config.topk, config.init_blocks, config.local_blocks,
                   config.kernel_stride});
  check_index_size(in.packing.total_q, config.topk);
  select.packing = in.packing_cmp;
  select.shape = in.rows_cmp.shape;
  select.q = in.rows.q;
  select.k_cmp = in.rows_cmp.k;
  select.mask = in.compressed;
  select.block_size = config.block_size;
  select.topk = config.topk;
  select.init_blocks = config.init_blocks;
  select.local_blocks = config.local_blocks;
  select.group_reduce = check_enum("group_reduce", call.group_reduce, GroupReduce::kFirstHead);
  select.score_dtype = check_enum("score_dtype", call.score_dtype, ScoreDType::kBFloat16);
  select.topk_idx = args.output_index("topk_idx", call.topk_idx,
                                      {in.rows.shape.num_heads_kv, in.rows.total_q, config.topk});
  return {select.topk_idx,   in.rows.total_q * config.topk,
          config.topk,       config.topk,
          config.block_size, BlockIndexView{}};
}

struct BranchProblems {
  Problem compressed, selected, window, gate;
};

BranchProblems branch_problems(Pass pass, const Arguments& args, const NsaInputs& in,
                               const SelectedMask& selected, size_t workspace_cap) {
  BranchProblems problems;
  problems.compressed =
      attention_problem(Op::kCompressedAttn, pass, args, in.packing_cmp, in.rows_cmp.shape);
  problems.compressed.kernel_size = in.compressed.kernel_size;
  problems.compressed.kernel_stride = in.compressed.kernel_stride;
  problems.selected = attention_problem(Op::kSelectedAttn, pass, args, in.packing, in.rows.shape);
  problems.selected.block_size = selected.block_size;
  problems.selected.topk = selected.topk;
  problems.selected.workspace_cap = workspace_cap;
  problems.window = attention_problem(Op::kWindowAttn, pass, args, in.packing, in.rows.shape);
  problems.window.window_size = in.window.window_size;
  problems.gate = gate_problem(pass, args, in.gate_shape);
  return problems;
}

// One branch of the backward pass. dout is the gradient that the gate writes into the workspace:
// contiguous [total_q, Hq, Dv], its address filled in by run/.
struct BranchViews {
  const char* o_name;
  const TensorView& o;
  const char* lse_name;
  const TensorView& lse;
};

AttnBwdTensors branch_backward(Arguments& args, const QkvRows& rows, const Packing& packing,
                               const BranchViews& views) {
  const AttnShape& shape = rows.shape;
  AttnBwdTensors attn{};
  attn.packing = packing;
  attn.shape = shape;
  attn.q = rows.q;
  attn.k = rows.k;
  attn.v = rows.v;
  attn.dout = {nullptr, shape.num_heads_q * shape.head_dim_v, shape.head_dim_v};
  attn.o =
      args.input_rows(views.o_name, views.o, {rows.total_q, shape.num_heads_q, shape.head_dim_v});
  attn.lse = args.input_stats(views.lse_name, views.lse, {shape.num_heads_q, rows.total_q});
  return attn;
}

// Compressed attention writes dq, the others add to it; selected attention writes dk and dv, the
// window adds to them.
void check_gradients(NsaBwdParams& params, Arguments& args, const NativeSparseAttentionBwd& call,
                     const NsaInputs& in) {
  const AttnShape& shape = in.rows.shape;
  const int64_t heads = shape.num_heads_kv;
  const Rows dq =
      args.output_rows("dq", call.dq, {in.rows.total_q, shape.num_heads_q, shape.head_dim});
  const Rows dk = args.output_rows("dk", call.dk, {in.rows.rows_k, heads, shape.head_dim});
  const Rows dv = args.output_rows("dv", call.dv, {in.rows.rows_k, heads, shape.head_dim_v});
  const int64_t rows_cmp = in.rows_cmp.rows_k;
  AttnBwdTensors& compressed = params.compressed.attn;
  compressed.dq = dq;
  compressed.dk = args.output_rows("dk_cmp", call.dk_cmp, {rows_cmp, heads, shape.head_dim});
  compressed.dv = args.output_rows("dv_cmp", call.dv_cmp, {rows_cmp, heads, shape.head_dim_v});
  AttnBwdTensors& selected = params.selected.attn;
  selected.dq = dq;
  selected.dk = dk;
  selected.dv = dv;
  selected.accumulate_dq = true;
  AttnBwdTensors& window = params.window.attn;
  window.dq = dq;
  window.dk = dk;
  window.dv = dv;
  window.accumulate_dq = true;
  window.accumulate_dkv = true;
}

MeanGradients mean_gradients(const Arguments& args, const CompressedAttnBwdParams& compressed) {
  FSATTN_CHECK(args.is_cuda(), kUnsupported, "adds_means: must be false on the CPU, found true");
  const CompressedMask& mask = compressed.mask;
  return {compressed.attn.dk, compressed.attn.dv, mask.cu_cmp,
          mask.total_cmp,     mask.kernel_size,   mask.kernel_stride};
}

GateBwdParams gate_backward(Arguments& args, const NativeSparseAttentionBwd& call,
                            const NsaInputs& in, const NsaBwdParams& params) {
  const GateShape& shape = in.gate_shape;
  GateBwdParams gate{};
  gate.shape = shape;
  gate.dout = args.input_rows("dout", call.dout, {shape.total, shape.num_heads, shape.head_dim});
  gate.o_cmp = params.compressed.attn.o;
  gate.o_sel = params.selected.attn.o;
  gate.o_win = params.window.attn.o;
  gate.gates = in.gates;
  gate.do_cmp = params.compressed.attn.dout;
  gate.do_sel = params.selected.attn.dout;
  gate.do_win = params.window.attn.dout;
  gate.dgates = args.output_gates("dgates", call.dgates, call.gates);
  return gate;
}

}  // namespace

Checked<NsaFwdProblem, NsaFwdParams> validate(const NativeSparseAttentionFwd& call,
                                              Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const NsaInputs in = check_inputs(args, call);
  NsaFwdParams params{};
  const SelectedMask selected =
      call.select ? own_selection(params.select, args, call, in)
                  : given_selection(args, in, call.topk_idx, call.config.block_size);
  params.compressed.attn = check_forward(args, in.rows_cmp, in.packing_cmp,
                                         {call.o_cmp, call.lse_cmp, "o_cmp", "lse_cmp"});
  params.compressed.mask = in.compressed;
  params.select.lse = params.compressed.attn.lse;
  // Every element of o is written by who has read that of o_sel.
  const bool keeps_o_sel = call.o_sel.defined();
  const char* o_sel_name = keeps_o_sel ? "o_sel" : "o";
  params.selected.attn =
      check_forward(args, in.rows, in.packing,
                    {keeps_o_sel ? call.o_sel : call.o, call.lse_sel, o_sel_name, "lse_sel"});
  params.selected.mask = selected;
  params.selected.workspace_cap = call.workspace_cap;
  params.window.attn =
      check_forward(args, in.rows, in.packing, {call.o_win, call.lse_win, "o_win", "lse_win"});
  params.window.mask = in.window;
  const GateShape& gate = in.gate_shape;
  params.gate = {gate,
                 params.compressed.attn.o,
                 params.selected.attn.o,
                 params.window.attn.o,
                 in.gates,
                 keeps_o_sel
                     ? args.output_rows("o", call.o, {gate.total, gate.num_heads, gate.head_dim})
                     : params.selected.attn.o};
  args.check_aliasing();

  const BranchProblems branches =
      branch_problems(Pass::kFwd, args, in, selected, call.workspace_cap);
  const Problem select = call.select ? selection_problem(args, params.select) : Problem{};
  return {
      {call.select, branches.compressed, select, branches.selected, branches.window, branches.gate,
       params.select.score_dtype != ScoreDType::kFloat32},
      params
  };
}

Checked<NsaBwdProblem, NsaBwdParams> validate(const NativeSparseAttentionBwd& call,
                                              Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  const NsaInputs in = check_inputs(args, call);
  NsaBwdParams params{};
  params.compressed.attn = branch_backward(args, in.rows_cmp, in.packing_cmp,
                                           {"o_cmp", call.o_cmp, "lse_cmp", call.lse_cmp});
  params.compressed.mask = in.compressed;
  params.selected.attn =
      branch_backward(args, in.rows, in.packing, {"o_sel", call.o_sel, "lse_sel", call.lse_sel});
  params.selected.mask = given_selection(args, in, call.topk_idx, call.config.block_size);
  params.selected.workspace_cap = call.workspace_cap;
  params.window.attn =
      branch_backward(args, in.rows, in.packing, {"o_win", call.o_win, "lse_win", call.lse_win});
  params.window.mask = in.window;
  check_gradients(params, args, call, in);
  if (call.adds_means) params.selected.means = mean_gradients(args, params.compressed);
  params.gate = gate_backward(args, call, in, params);
  args.check_aliasing();

  const BranchProblems branches =
      branch_problems(Pass::kBwd, args, in, params.selected.mask, call.workspace_cap);
  return {
      {branches.gate, branches.compressed, branches.selected, branches.window,
       in.gate_shape.activation},
      params
  };
}

}  // namespace fsattn
