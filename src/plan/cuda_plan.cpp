#include "plan/cuda_plan.h"

#include <sstream>

#include "base/check.h"
#include "plan/block_index_table.h"
#include "plan/compress_kv_table.h"
#include "plan/compressed_select_table.h"
#include "plan/dense_attn_table.h"
#include "plan/gate_table.h"
#include "plan/select_blocks_table.h"
#include "plan/selected_attn_table.h"

namespace fsattn {
namespace {

// A row of a table and what a plan says of it. row is -1 when no kernel fits; `nearest` names what the
// kernels take then.
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

template <class Config>
std::string tile_text(const Config& config) {
  std::ostringstream out;
  out << name_of(config.dtype) << ", head_dim <= " << config.head_dim
      << ", head_dim_v <= " << config.head_dim_v;
  return out.str();
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

// Compressed and window attention.
Choice choose_dense_attn(const Problem& problem, Arch arch, size_t smem_per_cta) {
  Choice choice;
  choice.nearest = tile_text(kDenseAttnFwdTable.back());
  choice.row = find_dense_attn_row(problem.pass, arch, static_cast<int64_t>(smem_per_cta),
                                   problem.dtype, problem.head_dim, problem.head_dim_v);
  if (choice.row < 0) return choice;
  const DenseAttnConfig& config = problem.pass == Pass::kFwd
                                      ? row_of(kDenseAttnFwdTable, choice.row)
                                      : row_of(kDenseAttnBwdTable, choice.row);
  choice.arch = config.arch;
  choice.workspace_bytes = dense_attn_workspace(problem, config.arch);
  choice.reason = tile_text(config);
  return choice;
}

Choice choose_select_blocks(const Problem& problem, Arch arch, size_t smem_per_cta) {
  Choice choice;
  std::ostringstream nearest;
  nearest << "kernel_size / kernel_stride <= " << kSelectMaxHalo + 1
          << " and block_size / kernel_stride <= " << kSelectTileKv;
  choice.nearest = nearest.str();
  choice.row = find_select_blocks_row(arch, problem, static_cast<int64_t>(smem_per_cta));
  if (choice.row < 0) return choice;
  const SelectBlocksConfig& config = row_of(kSelectBlocksTable, choice.row);
  choice.arch = config.arch;
  choice.workspace_bytes = select_blocks_workspace(problem);
  std::ostringstream reason;
  reason << name_of(config.dtype) << ", head_dim <= " << config.head_dim << ", " << config.tile_q
         << " queries a tile";
  choice.reason = reason.str();
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
  reason << config.lanes * config.places << " ids a query, windows of " << config.window
         << " blocks";
  choice.reason = reason.str();
  return choice;
}

Choice choose_selected_attn_fwd(const Problem& problem, Arch arch) {
  Choice choice;
  choice.nearest = tile_text(kSelectedAttnFwdTable.back());
  choice.row = find_selected_attn_fwd_row(arch, problem);
  if (choice.row < 0) return choice;
  const SelectedAttnFwdConfig& config = row_of(kSelectedAttnFwdTable, choice.row);
  choice.arch = config.arch;
  choice.algorithm = config.algorithm == SelectedAlgorithm::kQueryMajor ? Algorithm::kQueryMajor
                                                                        : Algorithm::kBlockMajor;
  choice.workspace_bytes = selected_attn_fwd_workspace(problem, choice.row);
  choice.reason = tile_text(config) + ", " + std::to_string(config.keys) + " keys a tile";
  return choice;
}

Choice choose_selected_attn_bwd(const Problem& problem, Arch arch) {
  Choice choice;
  choice.nearest = tile_text(kSelectedAttnBwdTable.back());
  choice.row = find_selected_attn_bwd_row(arch, problem);
  if (choice.row < 0) return choice;
  const SelectedAttnBwdConfig& config = row_of(kSelectedAttnBwdTable, choice.row);
  choice.arch = config.arch;
  choice.algorithm = Algorithm::kBlockMajor;
  choice.workspace_bytes = selected_attn_bwd_workspace(problem);
  choice.reason = tile_text(config);
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

Choice choose(const Problem& problem, const DeviceInfo& device) {
  switch (problem.op) {
    case Op::kCompressKv:
      return choose_compress_kv(problem);
    case Op::kCompressedAttn:
    case Op::kWindowAttn:
      return choose_dense_attn(problem, device.arch, device.smem_per_cta);
    case Op::kSelectBlocks:
      return choose_select_blocks(problem, device.arch, device.smem_per_cta);
    case Op::kBlockIndex:
      return choose_block_index(problem);
    case Op::kSelectedAttn:
      return problem.pass == Pass::kFwd ? choose_selected_attn_fwd(problem, device.arch)
                                        : choose_selected_attn_bwd(problem, device.arch);
    case Op::kGate:
      return choose_gate(problem);
  }
  return {};
}

}  // namespace

Plan make_cuda_plan(const Problem& problem, const DeviceInfo& device) {
  const Choice choice = choose(problem, device);
  FSATTN_CHECK(choice.row >= 0, kUnsupported, name_of(problem.op), " ", name_of(problem.pass),
               ": this build has no CUDA kernel for ", to_string(problem),
               "; nearest: ", choice.nearest);
  return {problem.op, problem.pass,           choice.arch,  choice.algorithm,
          choice.row, choice.workspace_bytes, choice.reason};
}

std::string compiled_cuda_kernels() {
  std::ostringstream out;
  out << "compress_kv " << kCompressKvTable.size() << ", compressed_attention and window_attention "
      << kDenseAttnFwdTable.size() << " fwd " << kDenseAttnBwdTable.size() << " bwd, select_blocks "
      << kSelectBlocksTable.size() << " (and " << kCompressedSelectTable.size()
      << " with compressed_attention), build_block_index " << kBlockIndexTable.size()
      << ", selected_attention " << kSelectedAttnFwdTable.size() << " fwd "
      << kSelectedAttnBwdTable.size() << " bwd, gate " << kGateTable.size();
  return out.str();
}

}  // namespace fsattn
