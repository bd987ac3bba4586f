#pragma once
#include "params/common.h"

namespace fsattn {

struct GateShape {
  DType dtype;
  int64_t total;
  int64_t num_heads;
  int64_t head_dim;
  GateActivation activation;
};

// Gate i of (token, head) is gates[token * token_stride + head * head_stride + i]; head_stride is 0
// for gates per token.
struct GateFwdParams {
  GateShape shape;
  Rows o_cmp, o_sel, o_win;
  Rows gates;
  Rows o;
};

struct GateBwdParams {
  GateShape shape;
  Rows dout;
  Rows o_cmp, o_sel, o_win;
  Rows gates;
  Rows do_cmp, do_sel, do_win;
  // Per token (head_stride 0), the sum over heads is written. Gates per head may be broadcast, so that
  // only the stride of dgates tells which of the two it is.
  Rows dgates;
};

}  // namespace fsattn
