// What a plan over a paged cache is decided from. Only api/validate_paged makes one.
#pragma once
#include "plan/problem.h"

namespace fsattn {

enum class PagedOp : int { kAppend, kAttn, kSelected };

// Fields that an operator does not have stay 0.
struct PagedProblem {
  PagedOp op{};
  Device device{};
  DType dtype{};
  int64_t batch = 0;
  int64_t total_q = 0;
  int64_t max_q = 0, max_k = 0;  // bounds of one sequence: new tokens, all tokens
  // The bound of the new tokens as the caller gave it. What decides between kernels may look at this one
  // only: max_q is at most total_q, which depends on the other sequences.
  int64_t max_seqlen_q = 0;
  int64_t num_heads_q = 0, num_heads_kv = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t page_size = 0, cmp_page_size = 0;  // cmp_page_size 0: no compressed cache
  int64_t kernel_size = 0, kernel_stride = 0;
  int64_t block_size = 0, topk = 0, window_size = 0;
  CompressKind compress_kind{};
  bool has_rope = false;
  bool overwrites_raw_keys = false;  // new tokens may take the place of keys before their rotation
  bool has_key_rows = false;         // keys_in_pages() of the cache are defined,
  bool has_cmp_key_rows = false;     // and of the compressed cache
  bool has_topk_out = false;         // the caller has memory for topk_idx
  bool batch_invariant = false;
  size_t workspace_cap = 0;

  constexpr int64_t group_size() const {
    return num_heads_kv == 0 ? 0 : num_heads_q / num_heads_kv;
  }
  // Rows of the input of the compression: the new tokens and at most l - 1 before them.
  constexpr int64_t total_x() const {
    return cmp_page_size == 0 ? 0 : total_q + batch * (kernel_size - 1);
  }
};

}  // namespace fsattn
