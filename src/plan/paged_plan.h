// Plans over a paged cache. A call runs as one fused kernel sequence where choose_paged_fused() finds
// one, else composed: pages are copied into packed tensors in the workspace, and the operators over
// packed sequences do the rest. Workspace of a composed attention, with T = B * max_k tokens and
// C = B * windows of max_k: (T + C) * Hkv * (D + Dv) elements, six times total_q * Hq * Dv for the
// branches, and the scratch memory of the operators. The Hopper rows read the pages themselves
// (PagedKeys): then T is 0, C is 0, or both.
#pragma once
#include <string>

#include "params/paged.h"
#include "plan/nsa_plan.h"
#include "plan/paged_problem.h"

namespace fsattn {

// The kernels of a plan: fused, or those that copy pages.
struct PagedKernel {
  Arch arch = Arch::kCpu;
  bool is_fused = false;
  int row = 0;
  PagedTuning tuning{};
  std::string reason;
};

struct PagedAppendPlan {
  PagedKernel kernel;
  bool has_cmp = false;
  // Composed with compression: its input, its output, its steps.
  Region x_k, x_v, cu_x, k_cmp, v_cmp, cu_cmp;
  Plan compress_k, compress_v;
  Region scratch;  // of the fused kernels, or of each step in turn
  size_t workspace_bytes = 0;
};

// The packed copies of a cache.
struct PagedCopies {
  Region k, v;          // empty where tokens are read in their pages
  Region k_cmp, v_cmp;  // likewise
  Region cu_k, cu_cmp, q_offset;
};

struct PagedAttnPlan {
  PagedKernel kernel;
  Region topk_idx;  // unless the caller has memory for it
  // Composed.
  bool reads_pages = false;      // of tokens: selected and window attention do
  bool reads_cmp_pages = false;  // compressed attention and select_blocks do
  PagedCopies copies;
  Region o_cmp, o_win, lse_cmp, lse_sel, lse_win;  // selected attention writes to o
  NsaFwdPlan steps;
  size_t workspace_cap = 0;
  Region scratch;
  size_t workspace_bytes = 0;
};

struct PagedSelectedPlan {
  PagedKernel kernel;
  bool reads_pages = false;
  PagedCopies copies;
  Plan selected;
  size_t workspace_cap = 0;
  Region scratch;
  size_t workspace_bytes = 0;
};

// Each throws kUnsupported when neither way has a kernel.
PagedAppendPlan make_append_plan(const PagedProblem& problem, const DeviceInfo& device);
PagedAttnPlan make_paged_attn_plan(const PagedProblem& problem, const DeviceInfo& device);
PagedSelectedPlan make_paged_selected_plan(const PagedProblem& problem, const DeviceInfo& device);

const char* name_of(PagedOp op);
std::string to_string(const PagedProblem& problem);
std::string to_string(const PagedAppendPlan& plan);
std::string to_string(const PagedAttnPlan& plan);
std::string to_string(const PagedSelectedPlan& plan);

}  // namespace fsattn
