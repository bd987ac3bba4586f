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
  // Of kCompressedSelectTable: one kernel does compressed attention and the selection. -1: one each.
  int compressed_select_row = -1;
  bool merges_gate =
      false;  // the merge of selected attention, then the last step, applies the gate
  Region scratch;
  size_t workspace_bytes = 0;
};

// What the gate hands to the three branches outlives its step: their gradients, [total_q, Hq, Dv]
// each in the dtype of the inputs, or, when their gates are folded into P (params/gate.h), two fp32
// numbers a row. Scratch is shared as in the forward pass.
struct NsaBwdPlan {
  Plan gate, compressed, selected, window;
  bool folds_gates = false;
  Region do_cmp, do_sel, do_win;           // empty when gates are folded
  Region stats_cmp, stats_sel, stats_win;  // empty otherwise
  // Window and compressed attention add up one dQ in fp32 (SharedDq of params/attention.h), which
  // makes compressed and selected attention independent up to the sums of the latter: they run on two
  // streams. The index of selected attention is a step of its own then, beside the gate.
  bool shares_dq = false;
  Plan index;
  Region index_start, index_entry, scratch_index;
  Region dq_sums, turns_win, turns_cmp, scratch_cmp;
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
