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

// What the backward of a branch needs of its gate. do_x = g_x do enters the gradients as P_x do_x and
// P_x (do_x v - delta_x) alone: so g_x may be a factor of P_x instead, taken off as ln g_x from lse_x, and
// the branches read do itself, with delta_x = rowsum(do * o_x).
struct BranchStats {
  Rows o;
  Stats lse;
  // [Hq, total_q] each in fp32: lse - ln g, and delta. Of the selected branch row_stats holds pairs
  // of {(lse - ln g) / ln 2, delta} [total_q, Hq], and gated_lse is null.
  float* gated_lse;
  float* row_stats;
};

// For gates that are a sigmoid: ln g needs g > 0.
struct GateStatsParams {
  GateShape shape;
  Rows dout;
  BranchStats cmp, sel, win;
  Rows gates;
  Rows dgates;  // as in GateBwdParams
};

}  // namespace fsattn
