#include "api/parts.h"
#include "api/validate.h"

namespace fsattn {
namespace {

struct Branches {
  GateShape shape;
  Rows o_cmp, o_sel, o_win;
  Rows gates;
};

template <class Call>
Branches check_branches(Arguments& args, const Call& call) {
  args.use_lead_dtype();
  const TensorView& lead = call.o_cmp;
  const int64_t total = lead.shape[0];
  const int64_t heads = lead.shape[1];
  check_range("o_cmp: number of tokens", total, 0, kMaxIndex);
  check_range("o_cmp: number of heads", heads, 1, kMaxIndex);
  check_head_dim("o_cmp", lead.shape[2]);
  Branches in{};
  in.o_cmp = args.input_rows("o_cmp", lead, {total, heads, lead.shape[2]});
  in.o_sel = args.input_rows("o_sel", call.o_sel, {total, heads, lead.shape[2]});
  in.o_win = args.input_rows("o_win", call.o_win, {total, heads, lead.shape[2]});
  in.gates = args.input_gates("gates", call.gates, total, heads);
  in.shape = {args.dtype(), total, heads, lead.shape[2], check_activation(call.activation)};
  return in;
}

Arguments gate_arguments(Purpose purpose, const TensorView& o_cmp) {
  return Arguments(purpose, "o_cmp", o_cmp, 3, "[tokens, num_heads, head_dim]");
}

}  // namespace

Checked<Problem, GateFwdParams> validate(const GateFwd& call, Purpose purpose) {
  Arguments args = gate_arguments(purpose, call.o_cmp);
  const Branches in = check_branches(args, call);
  const GateShape& shape = in.shape;
  const Rows o = args.output_rows("o", call.o, {shape.total, shape.num_heads, shape.head_dim});
  args.check_aliasing();
  return {
      gate_problem(Pass::kFwd, args, shape), {shape, in.o_cmp, in.o_sel, in.o_win, in.gates, o}
  };
}

Checked<Problem, GateBwdParams> validate(const GateBwd& call, Purpose purpose) {
  Arguments args = gate_arguments(purpose, call.o_cmp);
  const Branches in = check_branches(args, call);
  const GateShape& shape = in.shape;
  const auto sizes = {shape.total, shape.num_heads, shape.head_dim};
  GateBwdParams params{};
  params.shape = shape;
  params.o_cmp = in.o_cmp;
  params.o_sel = in.o_sel;
  params.o_win = in.o_win;
  params.gates = in.gates;
  params.dout = args.input_rows("dout", call.dout, sizes);
  params.do_cmp = args.output_rows("do_cmp", call.do_cmp, sizes);
  params.do_sel = args.output_rows("do_sel", call.do_sel, sizes);
  params.do_win = args.output_rows("do_win", call.do_win, sizes);
  params.dgates = args.output_gates("dgates", call.dgates, call.gates);
  args.check_aliasing();
  return {gate_problem(Pass::kBwd, args, shape), params};
}

}  // namespace fsattn
