// The public functions: validate, plan, run. No arithmetic, no decisions.
#include "fsattn/ops.h"

#include <sstream>

#include "api/call.h"
#include "api/validate.h"
#include "base/device.h"
#include "base/log.h"
#include "fsattn/version.h"
#include "plan/cuda_plan.h"
#include "plan/nsa_plan.h"
#include "plan/workspace.h"
#include "run/backends.h"
#include "run/nsa.h"
#include "run/region.h"
#include "run/steps.h"

namespace fsattn {
namespace {

const Device& device_of(const Problem& problem) { return problem.device; }
const Device& device_of(const NsaFwdProblem& problem) { return problem.gate.device; }
const Device& device_of(const NsaBwdProblem& problem) { return problem.gate.device; }

template <class ProblemType>
auto plan_of(const ProblemType& problem) {
  const auto plan = make_plan(problem, describe_device(device_of(problem)));
  if (is_plan_logged()) log_once(to_string(problem) + "\n  -> " + to_string(plan));
  return plan;
}

template <class Params>
void execute(const Plan& plan, const Params& params, const Execution& execution) {
  const Region all{0, plan.workspace_bytes};
  run_step(plan, params, scratch_in(execution.workspace, all), execution.stream);
}

void execute(const NsaFwdPlan& plan, const NsaFwdParams& params, const Execution& execution) {
  run_nsa_fwd(plan, params, execution.workspace, execution.stream);
}

void execute(const NsaBwdPlan& plan, const NsaBwdParams& params, const Execution& execution) {
  run_nsa_bwd(plan, params, execution.workspace, execution.stream);
}

template <class Call>
size_t workspace_bytes_of(const Call& call) {
  return plan_of(validate(call, Purpose::kPlan).problem).workspace_bytes;
}

template <class Call>
std::string explain_call(const Call& call) {
  return to_string(plan_of(validate(call, Purpose::kPlan).problem));
}

template <class Call>
void run_call(const Call& call, const Execution& execution) {
  const auto checked = validate(call, Purpose::kRun);
  check_current_device(device_of(checked.problem));
  const auto plan = plan_of(checked.problem);
  check_workspace(execution, plan.workspace_bytes);
  execute(plan, checked.params, execution);
}

}  // namespace

#define FSATTN_DEFINE_CALL(Call)                                                \
  size_t workspace_bytes(const Call& call) { return workspace_bytes_of(call); } \
  std::string explain(const Call& call) { return explain_call(call); }          \
  void run(const Call& call, const Execution& execution) { run_call(call, execution); }

FSATTN_DEFINE_CALL(CompressKvFwd)
FSATTN_DEFINE_CALL(CompressKvBwd)
FSATTN_DEFINE_CALL(CompressedAttentionFwd)
FSATTN_DEFINE_CALL(CompressedAttentionBwd)
FSATTN_DEFINE_CALL(SelectBlocks)
FSATTN_DEFINE_CALL(BuildBlockIndex)
FSATTN_DEFINE_CALL(SelectedAttentionFwd)
FSATTN_DEFINE_CALL(SelectedAttentionBwd)
FSATTN_DEFINE_CALL(WindowAttentionFwd)
FSATTN_DEFINE_CALL(WindowAttentionBwd)
FSATTN_DEFINE_CALL(GateFwd)
FSATTN_DEFINE_CALL(GateBwd)
FSATTN_DEFINE_CALL(NativeSparseAttentionFwd)
FSATTN_DEFINE_CALL(NativeSparseAttentionBwd)
#undef FSATTN_DEFINE_CALL

namespace {

// A GPU that is too old is listed with the reason.
std::string describe_cuda_device(int index) {
  try {
    const DeviceInfo info = query_device({DeviceType::kCuda, index});
    return info.name + ", " + name_of(info.arch) + ", " + std::to_string(info.num_sms) + " SMs";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string describe_cuda() {
  if (!has_cuda_backend()) return "cuda: not in this build\n";
  std::ostringstream out;
  out << "cuda: " << num_cuda_devices() << " devices, kernels: " << compiled_cuda_kernels() << "\n";
  for (int index = 0; index < num_cuda_devices(); ++index) {
    out << "cuda:" << index << ": " << describe_cuda_device(index) << "\n";
  }
  return out.str();
}

}  // namespace

std::string describe_build() {
  std::ostringstream out;
  const DeviceInfo cpu = describe_device(Device{});
  out << "fsattn " << FSATTN_VERSION << "\n"
      << "cpu: " << cpu.name << ", " << cpu.num_threads << " threads\n"
      << describe_cuda();
  return out.str();
}

}  // namespace fsattn
