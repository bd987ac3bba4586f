#include "plan/nsa_plan.h"

#include <algorithm>
#include <initializer_list>
#include <sstream>

#include "plan/compressed_select_table.h"
#include "plan/dense_attn_table.h"

namespace fsattn {
namespace {

size_t largest_workspace(std::initializer_list<const Plan*> steps) {
  size_t bytes = 0;
  for (const Plan* step : steps) bytes = std::max(bytes, step->workspace_bytes);
  return bytes;
}

size_t gradient_bytes(const Problem& gate) {
  return static_cast<size_t>(gate.total_q * gate.num_heads_q * gate.head_dim_v) *
         size_of(gate.dtype);
}

size_t stats_bytes(const Problem& gate) {
  return static_cast<size_t>(gate.total_q * gate.num_heads_q) * 2 * sizeof(float);
}

// The block index of selected attention as a step of its own.
void add_index(WorkspaceLayout& layout, NsaBwdPlan& plan, const NsaBwdProblem& problem,
               const DeviceInfo& device) {
  Problem index = problem.selected;
  index.op = Op::kBlockIndex;
  index.pass = Pass::kFwd;
  plan.index = make_plan(index, device);
  const int64_t heads = index.num_heads_kv;
  const auto bytes_of = [](int64_t count) { return static_cast<size_t>(count) * sizeof(int32_t); };
  plan.index_start = layout.add(bytes_of(heads * (index.num_block_slots() + 1)));
  plan.index_entry = layout.add(bytes_of(heads * index.total_q * index.topk));
  plan.scratch_index = layout.add(plan.index.workspace_bytes);
  index = problem.selected;
  index.has_block_index = true;
  plan.selected = make_plan(index, device);
}

// What a plan that shares dQ needs beside the scratch memory of its steps.
void add_shared_dq(WorkspaceLayout& layout, NsaBwdPlan& plan, const NsaBwdProblem& problem) {
  plan.compressed.workspace_bytes =
      dense_attn_workspace(problem.compressed, plan.compressed.arch, true);
  plan.window.workspace_bytes = dense_attn_workspace(problem.window, plan.window.arch, true);
  const Problem& p = problem.compressed;
  const int64_t turns = dense_num_turns(p.batch, p.total_q, p.num_heads_q);
  const auto turn_bytes = static_cast<size_t>(turns) * sizeof(int32_t);
  plan.dq_sums = layout.add(static_cast<size_t>(dense_dq_sums_bytes(p.total_q, p.num_heads_q)));
  plan.turns_win = layout.add(turn_bytes);
  plan.turns_cmp = layout.add(turn_bytes);
  plan.scratch_cmp = layout.add(plan.compressed.workspace_bytes);
}

std::string steps_text(const char* pass, size_t workspace_bytes,
                       std::initializer_list<const Plan*> steps) {
  std::ostringstream out;
  out << "native_sparse_attention " << pass << ": workspace " << workspace_bytes << " bytes";
  for (const Plan* step : steps) out << "\n  " << to_string(*step);
  return out.str();
}

std::string problems_text(const char* pass, std::initializer_list<const Problem*> steps) {
  std::ostringstream out;
  out << "native_sparse_attention " << pass;
  for (const Problem* step : steps) out << "\n  " << to_string(*step);
  return out.str();
}

}  // namespace

NsaFwdPlan make_plan(const NsaFwdProblem& problem, const DeviceInfo& device) {
  NsaFwdPlan plan;
  plan.has_select = problem.has_select;
  plan.compressed = make_plan(problem.compressed, device);
  if (problem.has_select) plan.select = make_plan(problem.select, device);
  if (problem.has_select && device.type == DeviceType::kCuda) {
    plan.compressed_select_row = find_compressed_select_row(device.arch, problem.compressed,
                                                            problem.select, problem.rounds_scores);
  }
  if (plan.compressed_select_row >= 0) {
    plan.compressed.reason += ", with select_blocks in one kernel";
    plan.select.reason += ", in the kernel of compressed_attention";
  }
  plan.selected = make_plan(problem.selected, device);
  plan.window = make_plan(problem.window, device);
  plan.gate = make_plan(problem.gate, device);
  plan.merges_gate = plan.selected.algorithm == Algorithm::kBlockMajor;
  if (plan.merges_gate) plan.gate.reason += ", in the merge of selected_attention";
  WorkspaceLayout layout;
  plan.scratch = layout.add(largest_workspace(
      {&plan.compressed, &plan.select, &plan.selected, &plan.window, &plan.gate}));
  plan.workspace_bytes = layout.bytes();
  return plan;
}

NsaBwdPlan make_plan(const NsaBwdProblem& problem, const DeviceInfo& device) {
  NsaBwdPlan plan;
  plan.gate = make_plan(problem.gate, device);
  plan.compressed = make_plan(problem.compressed, device);
  plan.selected = make_plan(problem.selected, device);
  plan.window = make_plan(problem.window, device);
  // A gate of any sign has no logarithm.
  plan.folds_gates =
      device.type == DeviceType::kCuda && problem.activation == GateActivation::kSigmoid;
  if (plan.folds_gates) plan.gate.reason += ", as a factor of P";
  const size_t gradient = plan.folds_gates ? 0 : gradient_bytes(problem.gate);
  const size_t stats = plan.folds_gates ? stats_bytes(problem.gate) : 0;
  WorkspaceLayout layout;
  plan.do_cmp = layout.add(gradient);
  plan.do_sel = layout.add(gradient);
  plan.do_win = layout.add(gradient);
  plan.stats_cmp = layout.add(stats);
  plan.stats_sel = layout.add(stats);
  plan.stats_win = layout.add(stats);
  plan.shares_dq = has_fused_bwd(plan.compressed.arch) && has_fused_bwd(plan.window.arch);
  if (plan.shares_dq) {
    add_index(layout, plan, problem, device);
    add_shared_dq(layout, plan, problem);
  }
  plan.scratch =
      layout.add(largest_workspace({&plan.gate, &plan.compressed, &plan.selected, &plan.window}));
  plan.workspace_bytes = layout.bytes();
  return plan;
}

std::string to_string(const NsaFwdPlan& plan) {
  if (!plan.has_select) {
    return steps_text("fwd", plan.workspace_bytes,
                      {&plan.compressed, &plan.selected, &plan.window, &plan.gate});
  }
  return steps_text("fwd", plan.workspace_bytes,
                    {&plan.compressed, &plan.select, &plan.selected, &plan.window, &plan.gate});
}

std::string to_string(const NsaBwdPlan& plan) {
  if (plan.shares_dq) {
    return steps_text("bwd", plan.workspace_bytes,
                      {&plan.index, &plan.gate, &plan.window, &plan.compressed, &plan.selected});
  }
  return steps_text("bwd", plan.workspace_bytes,
                    {&plan.gate, &plan.compressed, &plan.selected, &plan.window});
}

std::string to_string(const NsaFwdProblem& problem) {
  if (!problem.has_select) {
    return problems_text("fwd",
                         {&problem.compressed, &problem.selected, &problem.window, &problem.gate});
  }
  return problems_text("fwd", {&problem.compressed, &problem.select, &problem.selected,
                               &problem.window, &problem.gate});
}

std::string to_string(const NsaBwdProblem& problem) {
  return problems_text("bwd",
                       {&problem.gate, &problem.compressed, &problem.selected, &problem.window});
}

}  // namespace fsattn
