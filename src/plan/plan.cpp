#include "plan/plan.h"

#include <sstream>

#include "base/check.h"
#include "plan/cpu_workspace.h"
#include "plan/cuda_plan.h"

namespace fsattn {
namespace {

bool is_attention(Op op) {
  return op == Op::kCompressedAttn || op == Op::kSelectedAttn || op == Op::kWindowAttn;
}

Plan make_cpu_plan(const Problem& problem, const DeviceInfo& device) {
  Plan plan;
  plan.op = problem.op;
  plan.pass = problem.pass;
  plan.arch = Arch::kCpu;
  plan.workspace_bytes = cpu_workspace_bytes(problem, device.num_threads);
  std::ostringstream reason;
  reason << device.name << ", " << device.num_threads
         << (device.num_threads == 1 ? " thread" : " threads");
  plan.reason = reason.str();
  return plan;
}

void write_windows(std::ostream& out, const Problem& problem) {
  if (problem.kernel_size == 0) return;
  out << " kernel_size=" << problem.kernel_size << " kernel_stride=" << problem.kernel_stride;
}

void write_blocks(std::ostream& out, const Problem& problem) {
  if (problem.block_size == 0) return;
  out << " block_size=" << problem.block_size << " topk=" << problem.topk;
  if (problem.has_block_index) out << " with block index";
}

}  // namespace

Plan make_plan(const Problem& problem, const DeviceInfo& device) {
  FSATTN_ASSERT(problem.device.type == device.type);
  return device.type == DeviceType::kCpu ? make_cpu_plan(problem, device)
                                         : make_cuda_plan(problem, device);
}

const char* name_of(Op op) {
  switch (op) {
    case Op::kCompressKv:
      return "compress_kv";
    case Op::kCompressedAttn:
      return "compressed_attention";
    case Op::kSelectBlocks:
      return "select_blocks";
    case Op::kBlockIndex:
      return "build_block_index";
    case Op::kSelectedAttn:
      return "selected_attention";
    case Op::kWindowAttn:
      return "window_attention";
    case Op::kGate:
      return "gate";
  }
  return "?";
}

const char* name_of(Pass pass) { return pass == Pass::kFwd ? "fwd" : "bwd"; }

const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kOnly:
      return "";
    case Algorithm::kQueryMajor:
      return "query-major";
    case Algorithm::kBlockMajor:
      return "block-major";
  }
  return "?";
}

std::string to_string(const Problem& problem) {
  std::ostringstream out;
  out << name_of(problem.op) << " " << name_of(problem.pass) << ": " << name_of(problem.device.type)
      << " " << name_of(problem.dtype);
  if (problem.op != Op::kGate) out << " batch=" << problem.batch;
  if (problem.op != Op::kCompressKv) out << " total_q=" << problem.total_q;
  if (problem.op != Op::kGate) out << " total_k=" << problem.total_k;
  if (problem.num_heads_q > 0) out << " heads_q=" << problem.num_heads_q;
  if (problem.num_heads_kv > 0) out << " heads_kv=" << problem.num_heads_kv;
  if (problem.head_dim > 0) out << " head_dim=" << problem.head_dim;
  if (problem.head_dim_v > 0) out << " head_dim_v=" << problem.head_dim_v;
  write_windows(out, problem);
  write_blocks(out, problem);
  if (problem.op == Op::kWindowAttn) out << " window_size=" << problem.window_size;
  if (is_attention(problem.op) || problem.op == Op::kSelectBlocks) {
    out << " max_q=" << problem.max_q << " max_k=" << problem.max_k;
  }
  return out.str();
}

std::string to_string(const Plan& plan) {
  std::ostringstream out;
  out << name_of(plan.op) << " " << name_of(plan.pass) << ": " << name_of(plan.arch);
  if (plan.algorithm != Algorithm::kOnly) out << " " << name_of(plan.algorithm);
  if (plan.arch != Arch::kCpu) out << " row " << plan.row;
  out << ", workspace " << plan.workspace_bytes << " bytes (" << plan.reason << ")";
  return out.str();
}

}  // namespace fsattn
