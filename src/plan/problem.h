// A Problem is what a plan is decided from: shapes and options, no pointers. Only api/validate makes
// one, from checked input. Fields that an operator does not have stay 0.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "fsattn/config.h"
#include "fsattn/tensor.h"

namespace fsattn {

enum class Op : int {
  kCompressKv,
  kCompressedAttn,
  kSelectBlocks,
  kBlockIndex,
  kSelectedAttn,
  kWindowAttn,
  kGate,
};
enum class Pass : int { kFwd, kBwd };

struct Problem {
  Op op{};
  Pass pass{};
  Device device{};
  DType dtype{};
  int64_t batch = 0;
  // Tokens. Where k holds compressed rows, total_k is rows * kernel_stride: no tensor tells the number
  // of tokens itself.
  int64_t total_q = 0, total_k = 0;
  int64_t max_q = 0, max_k = 0;
  int64_t num_heads_q = 0, num_heads_kv = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t kernel_size = 0, kernel_stride = 0;
  int64_t block_size = 0, topk = 0, window_size = 0;
  CompressKind compress_kind{};
  bool has_block_index = false;
  size_t workspace_cap = 0;

  constexpr int64_t group_size() const {
    return num_heads_kv == 0 ? 0 : num_heads_q / num_heads_kv;
  }
  constexpr int64_t num_block_slots() const { return total_k / block_size + batch; }
};

}  // namespace fsattn
