#include "plan/cuda_plan.h"

#include <sstream>

#include "base/check.h"
#include "plan/block_index_table.h"
#include "plan/compress_kv_table.h"
#include "plan/gate_table.h"

namespace fsattn {
namespace {

// A row of a table and what a plan says of it. row is -1 when no kernel fits; `nearest` names the
// widest kernel that there is.
struct Choice {
  int row = -1;
  Arch arch = Arch::kSm80;
  Algorithm algorithm = Algorithm::kOnly;
  size_t workspace_bytes = 0;
  std::string reason;
  std::string nearest;
};

template <class Table>
const auto& row_of(const Table& table, int row) {
  return table[static_cast<size_t>(row)];
}

Choice choose_compress_kv(const Problem& problem) {
  Choice choice;
  choice.nearest = "bfloat16 and float16";
  choice.row = find_compress_kv_row(problem.dtype);
  if (choice.row < 0) return choice;
  choice.arch = row_of(kCompressKvTable, choice.row).arch;
  choice.workspace_bytes = compress_kv_workspace(problem);
  choice.reason = name_of(problem.dtype);
  return choice;
}

Choice choose_block_index(const Problem& problem) {
  Choice choice;
  choice.nearest = "topk <= 128";
  choice.row = find_block_index_row(problem);
  if (choice.row < 0) return choice;
  const BlockIndexConfig& config = row_of(kBlockIndexTable, choice.row);
  choice.arch = config.arch;
  choice.workspace_bytes = block_index_workspace(problem);
  std::ostringstream reason;
  reason << 32 * config.query_words << " queries a step, windows of " << config.window << " blocks";
  choice.reason = reason.str();
  return choice;
}

Choice choose_gate(const Problem& problem) {
  Choice choice;
  choice.nearest = "bfloat16 and float16";
  choice.row = find_gate_row(problem.dtype);
  if (choice.row < 0) return choice;
  choice.arch = row_of(kGateTable, choice.row).arch;
  choice.reason = name_of(problem.dtype);
  return choice;
}

Choice choose(const Problem& problem) {
  switch (problem.op) {
    case Op::kCompressKv:
      return choose_compress_kv(problem);
    case Op::kBlockIndex:
      return choose_block_index(problem);
    case Op::kGate:
      return choose_gate(problem);
    case Op::kCompressedAttn:
    case Op::kSelectBlocks:
    case Op::kSelectedAttn:
    case Op::kWindowAttn:
      return {};
  }
  return {};
}

}  // namespace

Plan make_cuda_plan(const Problem& problem, const DeviceInfo&) {
  const Choice choice = choose(problem);
  FSATTN_CHECK(choice.row >= 0, kUnsupported, name_of(problem.op), " ", name_of(problem.pass),
               ": this build has no CUDA kernel for ", to_string(problem),
               "; nearest: ", choice.nearest.empty() ? "none for this operator" : choice.nearest);
  Plan plan;
  plan.op = problem.op;
  plan.pass = problem.pass;
  plan.arch = choice.arch;
  plan.algorithm = choice.algorithm;
  plan.row = choice.row;
  plan.workspace_bytes = choice.workspace_bytes;
  plan.reason = choice.reason;
  return plan;
}

std::string compiled_cuda_kernels() {
  std::ostringstream out;
  out << "compress_kv " << kCompressKvTable.size() << ", build_block_index "
      << kBlockIndexTable.size() << ", gate " << kGateTable.size();
  return out.str();
}

}  // namespace fsattn
