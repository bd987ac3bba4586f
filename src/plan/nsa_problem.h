// The problems of the steps of native sparse attention.
#pragma once
#include "plan/problem.h"

namespace fsattn {

struct NsaFwdProblem {
  bool has_select;  // false: the caller brings topk_idx
  Problem compressed, select, selected, window, gate;
  bool rounds_scores = true;  // or fp32 ones are ranked
};

struct NsaBwdProblem {
  Problem gate, compressed, selected, window;
  GateActivation activation{};
};

}  // namespace fsattn
