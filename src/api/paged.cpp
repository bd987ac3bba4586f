// The public functions over a paged cache: validate, plan, run.
#include "fsattn/paged.h"

#include "api/call.h"
#include "api/validate_paged.h"
#include "base/log.h"
#include "plan/paged_plan.h"
#include "run/paged.h"

namespace fsattn {
namespace {

PagedAppendPlan plan_of(const Checked<PagedProblem, PagedAppendParams>& checked) {
  return make_append_plan(checked.problem, describe_device(checked.problem.device));
}

PagedAttnPlan plan_of(const Checked<PagedProblem, PagedAttnParams>& checked) {
  return make_paged_attn_plan(checked.problem, describe_device(checked.problem.device));
}

PagedSelectedPlan plan_of(const Checked<PagedProblem, PagedSelectedParams>& checked) {
  return make_paged_selected_plan(checked.problem, describe_device(checked.problem.device));
}

void execute(const PagedAppendPlan& plan, const PagedAppendParams& params,
             const Execution& execution) {
  run_append(plan, params, execution.workspace, execution.stream);
}

void execute(const PagedAttnPlan& plan, const PagedAttnParams& params, const Execution& execution) {
  run_paged_attn(plan, params, execution.workspace, execution.stream);
}

void execute(const PagedSelectedPlan& plan, const PagedSelectedParams& params,
             const Execution& execution) {
  run_paged_selected(plan, params, execution.workspace, execution.stream);
}

template <class Call>
size_t workspace_bytes_of(const Call& call) {
  return plan_of(validate(call, Purpose::kPlan)).workspace_bytes;
}

template <class Call>
std::string explain_call(const Call& call) {
  return to_string(plan_of(validate(call, Purpose::kPlan)));
}

template <class Call>
void run_call(const Call& call, const Execution& execution) {
  const auto checked = validate(call, Purpose::kRun);
  check_current_device(checked.problem.device);
  const auto plan = plan_of(checked);
  if (is_plan_logged()) log_once(to_string(checked.problem) + "\n  -> " + to_string(plan));
  check_workspace(execution, plan.workspace_bytes);
  execute(plan, checked.params, execution);
}

}  // namespace

size_t workspace_bytes(const AppendKv& call) { return workspace_bytes_of(call); }
std::string explain(const AppendKv& call) { return explain_call(call); }
void run(const AppendKv& call, const Execution& execution) { run_call(call, execution); }

size_t workspace_bytes(const PagedNativeSparseAttention& call) { return workspace_bytes_of(call); }
std::string explain(const PagedNativeSparseAttention& call) { return explain_call(call); }
void run(const PagedNativeSparseAttention& call, const Execution& execution) {
  run_call(call, execution);
}

size_t workspace_bytes(const PagedSelectedAttention& call) { return workspace_bytes_of(call); }
std::string explain(const PagedSelectedAttention& call) { return explain_call(call); }
void run(const PagedSelectedAttention& call, const Execution& execution) {
  run_call(call, execution);
}

}  // namespace fsattn
