#include "api/parts.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/math.h"

namespace fsattn {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxGroupSize = 64;
constexpr int64_t kMaxTopk = 128;
constexpr double kMinScale = 1e-37;
constexpr double kMaxScale = 1e38;
constexpr std::array<int64_t, 5> kBlockSizes = {16, 32, 64, 128, 256};

// The scale times log2(e) is a number of fp32, where it may become neither 0 nor infinite.
double resolve_scale(double softmax_scale, int64_t head_dim, DType dtype) {
  FSATTN_CHECK(std::isfinite(softmax_scale) && softmax_scale >= 0.0, kInvalidArgument,
               "softmax_scale: must be finite and positive, or 0 for head_dim^-0.5, found ",
               softmax_scale);
  const bool is_wide = dtype == DType::kFloat64 || softmax_scale == 0.0;
  FSATTN_CHECK(is_wide || (softmax_scale >= kMinScale && softmax_scale <= kMaxScale),
               kInvalidArgument, "softmax_scale: must be between ", kMinScale, " and ", kMaxScale,
               ", found ", softmax_scale);
  return softmax_scale == 0.0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : softmax_scale;
}

// A forgotten max_seqlen would silently compute nothing.
void check_max_seqlen(const char* name, int64_t max_seqlen, int64_t total) {
  check_range(name, max_seqlen, total > 0 ? 1 : 0, kMaxIndex);
}

}  // namespace

Arguments attention_arguments(Purpose purpose, const TensorView& q) {
  Arguments args(purpose, "q", q, 3, "[total_q, num_heads, head_dim]");
  args.use_lead_dtype();
  return args;
}

void check_head_dim(const char* name, int64_t head_dim) {
  FSATTN_CHECK(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, kInvalidArgument,
               name, ": head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", found ",
               head_dim);
}

AttnShape check_heads(const Arguments& args, const TensorView& q, const char* k_name,
                      const TensorView& k, double softmax_scale) {
  const int64_t heads_q = q.shape[1];
  const int64_t heads_kv = k.shape[1];
  check_head_dim("q", q.shape[2]);
  FSATTN_CHECK(heads_kv >= 1, kInvalidArgument, k_name, ": must have at least 1 head, found 0");
  FSATTN_CHECK(heads_q >= 1 && heads_q % heads_kv == 0, kInvalidArgument,
               "q: the number of heads must be a multiple of that of ", k_name, " (", heads_kv,
               "), found ", heads_q);
  FSATTN_CHECK(heads_q / heads_kv <= kMaxGroupSize, kInvalidArgument, "q: must have at most ",
               kMaxGroupSize, " heads for one head of ", k_name, ", found ", heads_q / heads_kv);
  return {args.dtype(), heads_q, heads_kv,
          q.shape[2],   0,       resolve_scale(softmax_scale, q.shape[2], args.dtype())};
}

void check_row_counts(int64_t total_q, const char* k_name, int64_t rows_k) {
  FSATTN_CHECK(total_q <= kMaxIndex, kInvalidArgument,
               "q: must have fewer than 2^31 tokens, found ", total_q);
  FSATTN_CHECK(rows_k <= kMaxIndex, kInvalidArgument, k_name,
               ": must have fewer than 2^31 rows, found ", rows_k);
}

QkvRows check_qkv(Arguments& args, const QkvViews& views, double softmax_scale,
                  const KvNames& names) {
  QkvRows rows{};
  rows.q = args.input_rows("q", views.q, {kAnySize, kAnySize, kAnySize});
  rows.k = args.input_rows(names.k, views.k, {kAnySize, kAnySize, views.q.shape[2]});
  rows.v = args.input_rows(names.v, views.v, {views.k.shape[0], views.k.shape[1], kAnySize});
  rows.shape = check_heads(args, views.q, names.k, views.k, softmax_scale);
  check_head_dim(names.v, views.v.shape[2]);
  rows.shape.head_dim_v = views.v.shape[2];
  rows.total_q = views.q.shape[0];
  rows.rows_k = views.k.shape[0];
  check_row_counts(rows.total_q, names.k, rows.rows_k);
  return rows;
}

const int32_t* check_cu_seqlens(Arguments& args, const char* name, const TensorView& view,
                                int64_t batch) {
  const int64_t size = batch == kAnySize ? kAnySize : batch + 1;
  const int32_t* values = args.input_index(name, view, {size});
  FSATTN_CHECK(view.shape[0] >= 1, kInvalidArgument, name,
               ": must have one element more than there are sequences, found none");
  return values;
}

void check_cu_values(const Arguments& args, const char* name, const TensorView& view, int64_t total,
                     const char* max_name, int64_t max_seqlen) {
  if (!args.is_readable(view)) return;
  const auto* cu = static_cast<const int32_t*>(view.data);
  const int64_t batch = view.shape[0] - 1;
  FSATTN_CHECK(cu[0] == 0, kInvalidArgument, name, ": must start at 0, found ", cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    FSATTN_CHECK(cu[b + 1] >= cu[b], kInvalidArgument, name, ": must not decrease, found ", cu[b],
                 " before ", cu[b + 1], " at ", b + 1);
    const int64_t length = int64_t{cu[b + 1]} - cu[b];
    FSATTN_CHECK(length <= max_seqlen, kInvalidArgument, max_name,
                 ": must not be smaller than the longest sequence (", length, "), found ",
                 max_seqlen);
  }
  FSATTN_CHECK(total == kAnySize || cu[batch] == total, kInvalidArgument, name,
               ": must end at the number of tokens (", total, "), found ", cu[batch]);
}

Packing check_sequences(Arguments& args, const Sequences& seq, int64_t total_q, int64_t rows_k) {
  Packing packing{};
  packing.cu_q = check_cu_seqlens(args, "cu_seqlens_q", seq.cu_seqlens_q, kAnySize);
  packing.batch = seq.cu_seqlens_q.shape[0] - 1;
  packing.cu_k = check_cu_seqlens(args, "cu_seqlens_k", seq.cu_seqlens_k, packing.batch);
  if (seq.q_offset.defined()) {
    packing.q_offset = args.input_index("q_offset", seq.q_offset, {packing.batch});
  }
  check_max_seqlen("max_seqlen_q", seq.max_seqlen_q, total_q);
  check_max_seqlen("max_seqlen_k", seq.max_seqlen_k, rows_k == kAnySize ? 0 : rows_k);
  check_cu_values(args, "cu_seqlens_q", seq.cu_seqlens_q, total_q, "max_seqlen_q",
                  seq.max_seqlen_q);
  check_cu_values(args, "cu_seqlens_k", seq.cu_seqlens_k, rows_k, "max_seqlen_k", seq.max_seqlen_k);
  packing.total_q = total_q;
  packing.total_k = rows_k;
  packing.max_q = std::min(seq.max_seqlen_q, total_q);
  packing.max_k = rows_k == kAnySize ? seq.max_seqlen_k : std::min(seq.max_seqlen_k, rows_k);
  return packing;
}

void check_windows(int64_t kernel_size, int64_t kernel_stride) {
  check_range("kernel_stride", kernel_stride, 1, kMaxIndex);
  check_range("kernel_size", kernel_size, 1, kMaxIndex);
  FSATTN_CHECK(kernel_size % kernel_stride == 0, kInvalidArgument,
               "kernel_size: must be a multiple of kernel_stride (", kernel_stride, "), found ",
               kernel_size);
}

void check_block_size(int64_t block_size) {
  const bool known =
      std::find(kBlockSizes.begin(), kBlockSizes.end(), block_size) != kBlockSizes.end();
  FSATTN_CHECK(known, kInvalidArgument, "block_size: must be 16, 32, 64, 128 or 256, found ",
               block_size);
}

void check_window_counts(const Arguments& args, const TensorView& cu_seqlens_cmp,
                         const char* cu_seqlens_name, const TensorView& cu_seqlens,
                         int64_t rows_cmp, int64_t kernel_size, int64_t kernel_stride) {
  if (!args.is_readable(cu_seqlens_cmp) || !args.is_readable(cu_seqlens)) return;
  const auto* cmp = static_cast<const int32_t*>(cu_seqlens_cmp.data);
  const auto* cu = static_cast<const int32_t*>(cu_seqlens.data);
  const int64_t batch = cu_seqlens.shape[0] - 1;
  FSATTN_CHECK(cmp[0] == 0, kInvalidArgument, "cu_seqlens_cmp: must start at 0, found ", cmp[0]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t windows = num_windows(int64_t{cu[b + 1]} - cu[b], kernel_size, kernel_stride);
    FSATTN_CHECK(int64_t{cmp[b + 1]} - cmp[b] == windows, kInvalidArgument,
                 "cu_seqlens_cmp: sequence ", b, " must have ", windows, " windows by ",
                 cu_seqlens_name, ", found ", int64_t{cmp[b + 1]} - cmp[b]);
  }
  FSATTN_CHECK(cmp[batch] <= rows_cmp, kInvalidArgument,
               "cu_seqlens_cmp: must not end behind the compressed rows (", rows_cmp, "), found ",
               cmp[batch]);
}

CompressedMask check_compressed_mask(Arguments& args, const TensorView& cu_seqlens_cmp,
                                     const Sequences& seq, int64_t rows_cmp, int64_t kernel_size,
                                     int64_t kernel_stride) {
  check_windows(kernel_size, kernel_stride);
  // On the CPU the lengths themselves were compared with it.
  if (args.is_cuda()) check_max_seqlen("max_seqlen_k", seq.max_seqlen_k, rows_cmp);
  const int64_t batch = seq.cu_seqlens_q.shape[0] - 1;
  const int32_t* cu_cmp = check_cu_seqlens(args, "cu_seqlens_cmp", cu_seqlens_cmp, batch);
  check_window_counts(args, cu_seqlens_cmp, "cu_seqlens_k", seq.cu_seqlens_k, rows_cmp, kernel_size,
                      kernel_stride);
  return {cu_cmp, rows_cmp, kernel_size, kernel_stride};
}

void check_selection(const SelectionOptions& options) {
  check_block_size(options.block_size);
  FSATTN_CHECK(options.block_size % options.kernel_stride == 0, kInvalidArgument,
               "block_size: must be a multiple of kernel_stride (", options.kernel_stride,
               "), found ", options.block_size);
  check_range("topk", options.topk, 1, kMaxTopk);
  check_range("init_blocks", options.init_blocks, 0, kMaxIndex);
  check_range("local_blocks", options.local_blocks, 0, kMaxIndex);
  FSATTN_CHECK(options.init_blocks + options.local_blocks <= options.topk, kInvalidArgument,
               "topk: must be at least init_blocks + local_blocks (", options.init_blocks, " + ",
               options.local_blocks, "), found ", options.topk);
}

void check_index_size(int64_t total_q, int64_t topk) {
  FSATTN_CHECK(total_q * topk <= kMaxIndex, kInvalidArgument,
               "topk_idx: total_q * topk must be smaller than 2^31, found ", total_q, " * ", topk);
}

SelectedMask check_selected_mask(Arguments& args, const SelectionViews& views,
                                 const Packing& packing, int64_t num_heads_kv, int64_t block_size) {
  check_block_size(block_size);
  SelectedMask mask{};
  mask.topk_idx = args.input_strided_index("topk_idx", views.topk_idx,
                                           {num_heads_kv, packing.total_q, kAnySize});
  mask.head_stride = views.topk_idx.stride[0];
  mask.token_stride = views.topk_idx.stride[1];
  mask.topk = views.topk_idx.shape[2];
  mask.block_size = block_size;
  check_range("topk_idx: size of the last dimension", mask.topk, 1, kMaxTopk);
  check_index_size(packing.total_q, mask.topk);
  const bool has_start = views.block_start.defined();
  FSATTN_CHECK(has_start == views.block_entry.defined(), kInvalidArgument,
               has_start ? "block_entry" : "block_start", ": must be given together with ",
               has_start ? "block_start" : "block_entry", ", found none");
  if (has_start) {
    const int64_t num_slots = first_block_slot(packing.total_k, packing.batch, block_size);
    args.input_index("block_start", views.block_start, {num_heads_kv, num_slots + 1});
    args.input_index("block_entry", views.block_entry, {num_heads_kv, packing.total_q * mask.topk});
    mask.index = {static_cast<int32_t*>(views.block_start.data),
                  static_cast<int32_t*>(views.block_entry.data), num_slots};
  }
  return mask;
}

AttnFwdTensors check_forward(Arguments& args, const QkvRows& rows, const Packing& packing,
                             const OutputViews& out) {
  const AttnShape& shape = rows.shape;
  AttnFwdTensors attn{};
  attn.packing = packing;
  attn.shape = shape;
  attn.q = rows.q;
  attn.k = rows.k;
  attn.v = rows.v;
  attn.o = args.output_rows(out.o_name, out.o, {rows.total_q, shape.num_heads_q, shape.head_dim_v});
  attn.lse = args.output_stats(out.lse_name, out.lse, {shape.num_heads_q, rows.total_q});
  return attn;
}

AttnBwdTensors check_backward(Arguments& args, const QkvRows& rows, const Packing& packing,
                              const GradientViews& grads, const KvNames& names) {
  const AttnShape& shape = rows.shape;
  const int64_t heads_q = shape.num_heads_q;
  const int64_t heads_kv = shape.num_heads_kv;
  AttnBwdTensors attn{};
  attn.packing = packing;
  attn.shape = shape;
  attn.q = rows.q;
  attn.k = rows.k;
  attn.v = rows.v;
  attn.dout = args.input_rows("dout", grads.dout, {rows.total_q, heads_q, shape.head_dim_v});
  if (grads.dlse.defined()) {
    attn.dlse = args.input_stats("dlse", grads.dlse, {heads_q, rows.total_q});
  }
  attn.o = args.input_rows("o", grads.o, {rows.total_q, heads_q, shape.head_dim_v});
  attn.lse = args.input_stats("lse", grads.lse, {heads_q, rows.total_q});
  attn.dq = args.output_rows("dq", grads.dq, {rows.total_q, heads_q, shape.head_dim});
  attn.dk = args.output_rows(names.dk, grads.dk, {rows.rows_k, heads_kv, shape.head_dim});
  attn.dv = args.output_rows(names.dv, grads.dv, {rows.rows_k, heads_kv, shape.head_dim_v});
  return attn;
}

Problem attention_problem(Op op, Pass pass, const Arguments& args, const Packing& packing,
                          const AttnShape& shape) {
  Problem problem;
  problem.op = op;
  problem.pass = pass;
  problem.device = args.device();
  problem.dtype = shape.dtype;
  problem.batch = packing.batch;
  problem.total_q = packing.total_q;
  problem.total_k = packing.total_k;
  problem.max_q = packing.max_q;
  problem.max_k = packing.max_k;
  problem.num_heads_q = shape.num_heads_q;
  problem.num_heads_kv = shape.num_heads_kv;
  problem.head_dim = shape.head_dim;
  problem.head_dim_v = shape.head_dim_v;
  return problem;
}

Problem selection_problem(const Arguments& args, const SelectBlocksParams& params) {
  Problem problem =
      attention_problem(Op::kSelectBlocks, Pass::kFwd, args, params.packing, params.shape);
  problem.kernel_size = params.mask.kernel_size;
  problem.kernel_stride = params.mask.kernel_stride;
  problem.block_size = params.block_size;
  problem.topk = params.topk;
  return problem;
}

Problem gate_problem(Pass pass, const Arguments& args, const GateShape& shape) {
  Problem problem;
  problem.op = Op::kGate;
  problem.pass = pass;
  problem.device = args.device();
  problem.dtype = shape.dtype;
  problem.total_q = shape.total;
  problem.num_heads_q = shape.num_heads;
  problem.head_dim_v = shape.head_dim;
  return problem;
}

}  // namespace fsattn
