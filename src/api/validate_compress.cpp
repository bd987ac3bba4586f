#include <algorithm>

#include "api/parts.h"
#include "api/validate.h"

namespace fsattn {
namespace {

struct CompressInputs {
  CompressKvShape shape;
  Rows x;
  const void* weight;
  const void* pos_emb;
  const int32_t* cu_seqlens;
};

// The weight of each kind; `check` is an input or an output check of Arguments.
template <class Check>
auto check_weight(const CompressKvShape& shape, Check check) {
  if (shape.kind == CompressKind::kLinear) {
    return check({shape.num_heads, shape.kernel_size * shape.head_dim, shape.head_dim});
  }
  return check({shape.num_heads, shape.kernel_size});
}

template <class Call>
CompressKvShape check_shape(const Arguments& args, const Call& call) {
  const TensorView& x = call.x;
  check_range("x: number of tokens", x.shape[0], 0, kMaxIndex);
  check_range("x: number of heads", x.shape[1], 1, kMaxIndex);
  check_head_dim("x", x.shape[2]);
  check_windows(call.kernel_size, call.kernel_stride);
  check_range("max_seqlen", call.max_seqlen, x.shape[0] > 0 ? 1 : 0, kMaxIndex);
  CompressKvShape shape{};
  shape.dtype = args.dtype();
  shape.total = x.shape[0];
  shape.rows_cmp = x.shape[0] / call.kernel_stride;
  shape.max_seqlen = std::min(call.max_seqlen, x.shape[0]);
  shape.num_heads = x.shape[1];
  shape.head_dim = x.shape[2];
  shape.kernel_size = call.kernel_size;
  shape.kernel_stride = call.kernel_stride;
  shape.kind = check_enum("kind", call.kind, CompressKind::kLinear);
  return shape;
}

template <class Call>
CompressInputs check_inputs(Arguments& args, const Call& call) {
  args.use_lead_dtype();
  CompressInputs in{};
  in.shape = check_shape(args, call);
  in.x = args.input_rows("x", call.x, {kAnySize, kAnySize, kAnySize});
  in.cu_seqlens = check_cu_seqlens(args, "cu_seqlens", call.cu_seqlens, kAnySize);
  in.shape.batch = call.cu_seqlens.shape[0] - 1;
  check_cu_values(args, "cu_seqlens", call.cu_seqlens, in.shape.total, "max_seqlen",
                  call.max_seqlen);
  if (in.shape.kind == CompressKind::kMean) {
    args.require_absent("weight", call.weight, "for the kind mean");
  } else {
    in.weight = check_weight(in.shape, [&](std::initializer_list<int64_t> sizes) {
      return args.input_dense("weight", call.weight, sizes);
    });
  }
  if (call.pos_emb.defined()) {
    in.pos_emb = args.input_dense("pos_emb", call.pos_emb,
                                  {in.shape.num_heads, in.shape.kernel_size, in.shape.head_dim});
  }
  return in;
}

Problem compress_problem(Pass pass, const Arguments& args, const CompressKvShape& shape) {
  Problem problem;
  problem.op = Op::kCompressKv;
  problem.pass = pass;
  problem.device = args.device();
  problem.dtype = shape.dtype;
  problem.batch = shape.batch;
  problem.total_k = shape.total;
  problem.max_k = shape.max_seqlen;
  problem.num_heads_kv = shape.num_heads;
  problem.head_dim = shape.head_dim;
  problem.kernel_size = shape.kernel_size;
  problem.kernel_stride = shape.kernel_stride;
  problem.compress_kind = shape.kind;
  return problem;
}

Arguments compress_arguments(Purpose purpose, const TensorView& x) {
  return Arguments(purpose, "x", x, 3, "[tokens, num_heads, head_dim]");
}

}  // namespace

Checked<Problem, CompressKvFwdParams> validate(const CompressKvFwd& call, Purpose purpose) {
  Arguments args = compress_arguments(purpose, call.x);
  const CompressInputs in = check_inputs(args, call);
  const CompressKvShape& shape = in.shape;
  CompressKvFwdParams params{};
  params.shape = shape;
  params.x = in.x;
  params.weight = in.weight;
  params.pos_emb = in.pos_emb;
  params.cu_seqlens = in.cu_seqlens;
  params.x_cmp =
      args.output_rows("x_cmp", call.x_cmp, {shape.rows_cmp, shape.num_heads, shape.head_dim});
  params.cu_seqlens_cmp =
      args.output_index("cu_seqlens_cmp", call.cu_seqlens_cmp, {shape.batch + 1});
  args.check_aliasing();
  return {compress_problem(Pass::kFwd, args, shape), params};
}

Checked<Problem, CompressKvBwdParams> validate(const CompressKvBwd& call, Purpose purpose) {
  Arguments args = compress_arguments(purpose, call.x);
  const CompressInputs in = check_inputs(args, call);
  const CompressKvShape& shape = in.shape;
  CompressKvBwdParams params{};
  params.shape = shape;
  params.x = in.x;
  params.weight = in.weight;
  params.pos_emb = in.pos_emb;
  params.cu_seqlens = in.cu_seqlens;
  params.cu_seqlens_cmp =
      check_cu_seqlens(args, "cu_seqlens_cmp", call.cu_seqlens_cmp, shape.batch);
  check_window_counts(args, call.cu_seqlens_cmp, "cu_seqlens", call.cu_seqlens, shape.rows_cmp,
                      shape.kernel_size, shape.kernel_stride);
  params.dx_cmp =
      args.input_rows("dx_cmp", call.dx_cmp, {shape.rows_cmp, shape.num_heads, shape.head_dim});
  params.dx = args.output_rows("dx", call.dx, {shape.total, shape.num_heads, shape.head_dim});
  if (call.weight.defined()) {
    params.dweight = check_weight(shape, [&](std::initializer_list<int64_t> sizes) {
      return args.output_dense("dweight", call.dweight, sizes);
    });
  } else {
    args.require_absent("dweight", call.dweight, "without weight");
  }
  if (call.pos_emb.defined()) {
    params.dpos_emb = args.output_dense("dpos_emb", call.dpos_emb,
                                        {shape.num_heads, shape.kernel_size, shape.head_dim});
  } else {
    args.require_absent("dpos_emb", call.dpos_emb, "without pos_emb");
  }
  args.check_aliasing();
  return {compress_problem(Pass::kBwd, args, shape), params};
}

}  // namespace fsattn
