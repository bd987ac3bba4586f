// The plan of native sparse attention: the plans of its steps and the workspace that they share.
#pragma once
#include <string>

#include "plan/nsa_problem.h"
#include "plan/plan.h"
#include "plan/workspace.h"

namespace fsattn {

// One scratch region serves all steps in turn: none of them needs what an earlier one left there.
struct NsaFwdPlan {
  bool has_select = true;
  Plan compressed, select, selected, window, gate;
  Region scratch;
  size_t workspace_bytes = 0;
};

// The gradients of the three branches, [total_q, Hq, Dv] each in the dtype of the inputs, outlive
// the step that writes them; scratch is shared as in the forward pass.
struct NsaBwdPlan {
  Plan gate, compressed, selected, window;
  Region do_cmp, do_sel, do_win;
  Region scratch;
  size_t workspace_bytes = 0;
};

NsaFwdPlan make_plan(const NsaFwdProblem& problem, const DeviceInfo& device);
NsaBwdPlan make_plan(const NsaBwdProblem& problem, const DeviceInfo& device);

// A line a step.
std::string to_string(const NsaFwdProblem& problem);
std::string to_string(const NsaBwdProblem& problem);
std::string to_string(const NsaFwdPlan& plan);
std::string to_string(const NsaBwdPlan& plan);

}  // namespace fsattn
