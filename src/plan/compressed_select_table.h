// The compiled kernels that do compressed attention and select_blocks at once: docs/kernels/compressed_select.md.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "plan/problem.h"

namespace fsattn {

// A row serves head dims up to its own: smaller ones are padded with zeros in shared memory.
struct CompressedSelectConfig {
  Arch arch;
  DType dtype;
  int head_dim;  // of keys and of values
  int topk;      // blocks that it can pick
};

inline constexpr std::array kCompressedSelectTable{
    CompressedSelectConfig{Arch::kSm90a, DType::kBFloat16, 128, 16},
    CompressedSelectConfig{Arch::kSm90a, DType::kFloat16,  128, 16},
};

// Returns the row, or -1 when the two operators take a kernel each. Blocks of one head can be ranked before
// its lse is known; the sum over several heads, or scores rounded to bfloat16, cannot. Smaller head dims
// lose more to the padding than wgmma wins.
constexpr int find_compressed_select_row(Arch arch, const Problem& compressed,
                                         const Problem& select, bool rounds_scores) {
  const bool is_usual = select.kernel_size == 2 * select.kernel_stride &&
                        select.block_size == 4 * select.kernel_stride;
  // Lists number blocks with 16 bits.
  const bool is_numbered = is_usual && select.total_k / select.block_size < int64_t{1} << 16;
  if (arch != Arch::kSm90a || compressed.group_size() != 1 || !is_numbered || rounds_scores) {
    return -1;
  }
  for (std::size_t row = 0; row < kCompressedSelectTable.size(); ++row) {
    const CompressedSelectConfig& config = kCompressedSelectTable[row];
    const bool fits = compressed.head_dim > config.head_dim / 2 &&
                      compressed.head_dim <= config.head_dim &&
                      compressed.head_dim_v <= config.head_dim && select.topk <= config.topk;
    if (config.dtype == compressed.dtype && fits) return static_cast<int>(row);
  }
  return -1;
}

}  // namespace fsattn
