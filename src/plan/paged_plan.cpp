#include "plan/paged_plan.h"

#include <algorithm>
#include <sstream>

#include "base/check.h"
#include "plan/dense_attn_table.h"
#include "plan/paged_cuda.h"

namespace fsattn {
namespace {

constexpr int64_t kMaxPackedTokens = (int64_t{1} << 31) - 1;  // cu_seqlens of the copies are int32

// Bytes of a packed tensor [rows, heads, dim].
size_t rows_bytes(const PagedProblem& problem, int64_t rows, int64_t heads, int64_t dim) {
  return static_cast<size_t>(rows * heads * dim) * size_of(problem.dtype);
}

size_t index_bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(int32_t); }

int64_t packed_tokens(const PagedProblem& problem) { return problem.batch * problem.max_k; }

int64_t packed_windows(const PagedProblem& problem) {
  if (problem.cmp_page_size == 0) return 0;
  return problem.batch * num_windows(problem.max_k, problem.kernel_size, problem.kernel_stride);
}

PagedKernel cpu_kernel(const DeviceInfo& device) {
  PagedKernel kernel;
  kernel.reason = device.name + ", composed";
  return kernel;
}

PagedKernel choose_kernel(const PagedProblem& problem, const DeviceInfo& device,
                          size_t* fused_scratch) {
  FSATTN_ASSERT(problem.device.type == device.type);
  if (device.type == DeviceType::kCpu) return cpu_kernel(device);
  PagedKernel kernel;
  kernel.arch = device.arch;
  const PagedChoice choice = choose_paged_fused(problem, device);
  kernel.is_fused = choice.row >= 0;
  if (kernel.is_fused) {
    kernel.row = choice.row;
    kernel.tuning = choice.tuning;
    kernel.reason = choice.reason;
    *fused_scratch = choice.scratch_bytes;
    return kernel;
  }
  kernel.row = find_paged_copy_row(problem.dtype);
  kernel.reason = "composed";
  FSATTN_CHECK(kernel.row >= 0, kUnsupported, name_of(problem.op),
               ": this build has no CUDA kernel for ", to_string(problem));
  return kernel;
}

// A step over the packed copies. Fields that the operator does not have stay 0.
Problem step_problem(Op op, const PagedProblem& problem) {
  Problem step;
  step.op = op;
  step.pass = Pass::kFwd;
  step.device = problem.device;
  step.dtype = problem.dtype;
  step.total_q = problem.total_q;
  step.num_heads_q = problem.num_heads_q;
  step.head_dim_v = problem.head_dim_v;
  if (op == Op::kGate) return step;
  step.batch = problem.batch;
  step.total_k = packed_tokens(problem);
  step.max_q = problem.max_q;
  step.max_k = problem.max_k;
  step.num_heads_kv = problem.num_heads_kv;
  step.head_dim = problem.head_dim;
  if (op == Op::kCompressedAttn || op == Op::kSelectBlocks) {
    step.total_k = packed_windows(problem) * problem.kernel_stride;
    step.kernel_size = problem.kernel_size;
    step.kernel_stride = problem.kernel_stride;
  }
  if (op == Op::kSelectedAttn || op == Op::kSelectBlocks) {
    step.block_size = problem.block_size;
    step.topk = problem.topk;
  }
  if (op == Op::kSelectedAttn) step.workspace_cap = problem.workspace_cap;
  if (op == Op::kWindowAttn) step.window_size = problem.window_size;
  return step;
}

Problem compress_problem(const PagedProblem& problem, int64_t head_dim) {
  Problem step;
  step.op = Op::kCompressKv;
  step.pass = Pass::kFwd;
  step.device = problem.device;
  step.dtype = problem.dtype;
  step.batch = problem.batch;
  step.total_k = problem.total_x();
  step.max_k = std::min(problem.max_q + problem.kernel_size - 1, step.total_k);
  step.num_heads_kv = problem.num_heads_kv;
  step.head_dim = head_dim;
  step.kernel_size = problem.kernel_size;
  step.kernel_stride = problem.kernel_stride;
  step.compress_kind = problem.compress_kind;
  return step;
}

// The rows of kSelectedAttnFwdTable that read pages.
bool reads_pages(const PagedProblem& problem, const Plan& selected) {
  return problem.has_key_rows && selected.arch == Arch::kSm90a &&
         selected.algorithm == Algorithm::kBlockMajor;
}

// Those of kDenseAttnFwdTable.
bool reads_pages(const Plan& dense, bool has_key_rows, int64_t page_size) {
  return has_key_rows && dense.arch == Arch::kSm90a && page_size % kDensePageKeys == 0;
}

// What a composed attention copies, behind its reason.
const char* copies_text(bool reads_pages, bool reads_cmp_pages) {
  if (reads_pages) return reads_cmp_pages ? ", copies nothing" : ", copies compressed tokens";
  return reads_cmp_pages ? ", copies tokens" : ", copies all tokens";
}

PagedCopies add_copies(WorkspaceLayout& layout, const PagedProblem& problem, bool copies_tokens,
                       bool copies_windows) {
  const int64_t heads = problem.num_heads_kv;
  FSATTN_CHECK(
      packed_tokens(problem) <= kMaxPackedTokens, kUnsupported, name_of(problem.op),
      ": without a fused kernel, sequences * max_seqlen_k must be smaller than 2^31, found ",
      problem.batch, " * ", problem.max_k);
  const int64_t tokens = copies_tokens ? packed_tokens(problem) : 0;
  const int64_t windows = copies_windows ? packed_windows(problem) : 0;
  PagedCopies copies;
  copies.k = layout.add(rows_bytes(problem, tokens, heads, problem.head_dim));
  copies.v = layout.add(rows_bytes(problem, tokens, heads, problem.head_dim_v));
  copies.k_cmp = layout.add(rows_bytes(problem, windows, heads, problem.head_dim));
  copies.v_cmp = layout.add(rows_bytes(problem, windows, heads, problem.head_dim_v));
  copies.cu_k = layout.add(index_bytes(problem.batch + 1));
  copies.cu_cmp = layout.add(index_bytes(problem.batch + 1));
  copies.q_offset = layout.add(index_bytes(problem.batch));
  return copies;
}

std::string kernel_text(PagedOp op, const PagedKernel& kernel, size_t workspace_bytes) {
  std::ostringstream out;
  out << name_of(op) << ": " << name_of(kernel.arch);
  if (kernel.is_fused) out << " fused row " << kernel.row;
  out << ", workspace " << workspace_bytes << " bytes (" << kernel.reason << ")";
  return out.str();
}

}  // namespace

PagedAppendPlan make_append_plan(const PagedProblem& problem, const DeviceInfo& device) {
  PagedAppendPlan plan;
  WorkspaceLayout layout;
  size_t scratch = 0;
  plan.kernel = choose_kernel(problem, device, &scratch);
  plan.has_cmp = problem.cmp_page_size > 0;
  if (!plan.kernel.is_fused && plan.has_cmp) {
    const int64_t rows = problem.total_x(), heads = problem.num_heads_kv;
    const int64_t windows = rows / problem.kernel_stride;
    plan.x_k = layout.add(rows_bytes(problem, rows, heads, problem.head_dim));
    plan.x_v = layout.add(rows_bytes(problem, rows, heads, problem.head_dim_v));
    plan.cu_x = layout.add(index_bytes(problem.batch + 1));
    plan.k_cmp = layout.add(rows_bytes(problem, windows, heads, problem.head_dim));
    plan.v_cmp = layout.add(rows_bytes(problem, windows, heads, problem.head_dim_v));
    plan.cu_cmp = layout.add(index_bytes(problem.batch + 1));
    plan.compress_k = make_plan(compress_problem(problem, problem.head_dim), device);
    plan.compress_v = make_plan(compress_problem(problem, problem.head_dim_v), device);
    scratch = std::max(plan.compress_k.workspace_bytes, plan.compress_v.workspace_bytes);
  }
  plan.scratch = layout.add(scratch);
  plan.workspace_bytes = layout.bytes();
  return plan;
}

PagedAttnPlan make_paged_attn_plan(const PagedProblem& problem, const DeviceInfo& device) {
  PagedAttnPlan plan;
  WorkspaceLayout layout;
  size_t scratch = 0;
  plan.kernel = choose_kernel(problem, device, &scratch);
  if (!problem.has_topk_out) {
    plan.topk_idx = layout.add(index_bytes(problem.num_heads_kv * problem.total_q * problem.topk));
  }
  if (!plan.kernel.is_fused) {
    NsaFwdProblem steps{true,
                        step_problem(Op::kCompressedAttn, problem),
                        step_problem(Op::kSelectBlocks, problem),
                        step_problem(Op::kSelectedAttn, problem),
                        step_problem(Op::kWindowAttn, problem),
                        step_problem(Op::kGate, problem)};
    plan.steps = make_plan(steps, device);
    plan.reads_pages = reads_pages(problem, plan.steps.selected) &&
                       reads_pages(plan.steps.window, problem.has_key_rows, problem.page_size);
    plan.reads_cmp_pages =
        plan.steps.select.arch == Arch::kSm90a &&
        reads_pages(plan.steps.compressed, problem.has_cmp_key_rows, problem.cmp_page_size);
    plan.kernel.reason += copies_text(plan.reads_pages, plan.reads_cmp_pages);
    plan.copies = add_copies(layout, problem, !plan.reads_pages, !plan.reads_cmp_pages);
    const size_t o = rows_bytes(problem, problem.total_q, problem.num_heads_q, problem.head_dim_v);
    const size_t lse = static_cast<size_t>(problem.total_q * problem.num_heads_q) *
                       size_of(stats_dtype(problem.dtype));
    for (Region* region : {&plan.o_cmp, &plan.o_win}) *region = layout.add(o);
    for (Region* region : {&plan.lse_cmp, &plan.lse_sel, &plan.lse_win}) *region = layout.add(lse);
    plan.workspace_cap = problem.workspace_cap;
    scratch = plan.steps.workspace_bytes;
  }
  plan.scratch = layout.add(scratch);
  plan.workspace_bytes = layout.bytes();
  return plan;
}

PagedSelectedPlan make_paged_selected_plan(const PagedProblem& problem, const DeviceInfo& device) {
  PagedSelectedPlan plan;
  WorkspaceLayout layout;
  size_t scratch = 0;
  plan.kernel = choose_kernel(problem, device, &scratch);
  if (!plan.kernel.is_fused) {
    plan.selected = make_plan(step_problem(Op::kSelectedAttn, problem), device);
    plan.reads_pages = reads_pages(problem, plan.selected);
    plan.kernel.reason += copies_text(plan.reads_pages, true);
    plan.copies = add_copies(layout, problem, !plan.reads_pages, false);
    plan.workspace_cap = problem.workspace_cap;
    scratch = plan.selected.workspace_bytes;
  }
  plan.scratch = layout.add(scratch);
  plan.workspace_bytes = layout.bytes();
  return plan;
}

const char* name_of(PagedOp op) {
  switch (op) {
    case PagedOp::kAppend:
      return "append_kv";
    case PagedOp::kAttn:
      return "paged_native_sparse_attention";
    case PagedOp::kSelected:
      return "paged_selected_attention";
  }
  return "?";
}

std::string to_string(const PagedProblem& problem) {
  std::ostringstream out;
  out << name_of(problem.op) << ": " << name_of(problem.device.type) << " "
      << name_of(problem.dtype) << " batch=" << problem.batch << " total_q=" << problem.total_q
      << " max_q=" << problem.max_q << " max_k=" << problem.max_k;
  if (problem.num_heads_q > 0) out << " heads_q=" << problem.num_heads_q;
  out << " heads_kv=" << problem.num_heads_kv << " head_dim=" << problem.head_dim
      << " head_dim_v=" << problem.head_dim_v << " page_size=" << problem.page_size;
  if (problem.cmp_page_size > 0) {
    out << " cmp_page_size=" << problem.cmp_page_size << " kernel_size=" << problem.kernel_size
        << " kernel_stride=" << problem.kernel_stride;
  }
  if (problem.block_size > 0) {
    out << " block_size=" << problem.block_size << " topk=" << problem.topk;
  }
  if (problem.op == PagedOp::kAttn) out << " window_size=" << problem.window_size;
  if (problem.has_rope) out << " with rotation";
  if (problem.batch_invariant) out << " batch invariant";
  return out.str();
}

std::string to_string(const PagedAppendPlan& plan) {
  std::string text = kernel_text(PagedOp::kAppend, plan.kernel, plan.workspace_bytes);
  if (plan.kernel.is_fused || !plan.has_cmp) return text;
  return text + "\n  " + to_string(plan.compress_k) + "\n  " + to_string(plan.compress_v);
}

std::string to_string(const PagedAttnPlan& plan) {
  std::string text = kernel_text(PagedOp::kAttn, plan.kernel, plan.workspace_bytes);
  if (plan.kernel.is_fused) return text;
  return text + "\n  " + to_string(plan.steps);
}

std::string to_string(const PagedSelectedPlan& plan) {
  std::string text = kernel_text(PagedOp::kSelected, plan.kernel, plan.workspace_bytes);
  if (plan.kernel.is_fused) return text;
  return text + "\n  " + to_string(plan.selected);
}

}  // namespace fsattn
