// Native sparse attention is a composition: the parameters of its steps. Pointers into the
// workspace are null until run/ fills them in.
#pragma once
#include "params/attention.h"
#include "params/gate.h"
#include "params/select_blocks.h"

namespace fsattn {

struct NsaFwdParams {
  CompressedAttnFwdParams compressed;
  SelectBlocksParams select;  // unused when the caller brings topk_idx
  SelectedAttnFwdParams selected;
  WindowAttnFwdParams window;
  GateFwdParams gate;
};

// gate.do_cmp, do_sel and do_win lie in the workspace; the three attentions read them as dout.
struct NsaBwdParams {
  GateBwdParams gate;
  CompressedAttnBwdParams compressed;
  SelectedAttnBwdParams selected;
  WindowAttnBwdParams window;
};

}  // namespace fsattn
