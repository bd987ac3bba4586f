// The compiled kernels of compress_kv and the scratch memory they need.
#pragma once
#include <array>

#include "base/math.h"
#include "plan/problem.h"

namespace fsattn {

// A row is the kernels of both passes for one dtype; their template argument.
struct CompressKvConfig {
  Arch arch;
  DType dtype;
};

// The first row whose dtype fits wins; the kernels run on every GPU from Ampere on.
inline constexpr std::array kCompressKvTable{
    CompressKvConfig{Arch::kSm80, DType::kBFloat16},
    CompressKvConfig{Arch::kSm80, DType::kFloat16 },
};

// Returns the row, or -1 when no kernel fits.
constexpr int find_compress_kv_row(DType dtype) {
  for (int row = 0; row < static_cast<int>(kCompressKvTable.size()); ++row) {
    if (kCompressKvTable[static_cast<size_t>(row)].dtype == dtype) return row;
  }
  return -1;
}

// Sums over all compressed rows are formed in this many partial sums, added in order.
constexpr int64_t kCompressKvMaxChunks = 64;
constexpr int64_t kCompressKvMinRowsAChunk = 64;

constexpr int64_t compress_kv_num_chunks(int64_t rows_cmp) {
  const int64_t chunks = ceil_div(rows_cmp, kCompressKvMinRowsAChunk);
  return chunks < 1 ? 1 : (chunks > kCompressKvMaxChunks ? kCompressKvMaxChunks : chunks);
}

// Pooling of windows of two strides: a thread may take this many of them in a row and read the tokens that two
// share once instead of twice. With fewer threads than these they would wait for each load.
constexpr int kCompressKvWalk = 4;
constexpr int64_t kCompressKvWalkers = int64_t{1} << 16;

constexpr int64_t compress_kv_walkers(int64_t rows_cmp, int64_t row_vectors) {
  return ceil_div<int64_t>(rows_cmp, kCompressKvWalk) * row_vectors;
}

// `row_vectors`: vectors of 8 elements in all heads of a row.
constexpr bool compress_kv_walks(int64_t kernel_size, int64_t kernel_stride, int64_t rows_cmp,
                                 int64_t row_vectors) {
  return kernel_size == 2 * kernel_stride &&
         compress_kv_walkers(rows_cmp, row_vectors) >= kCompressKvWalkers;
}

// Where the fp32 arrays of a call lie in its scratch memory; offsets count floats.
struct CompressKvScratch {
  int64_t weight;        // [Hkv, l]: the weight of each token of a window; not for linear
  int64_t bias;          // [Hkv, D]: what pos_emb adds to every window (forward)
  int64_t bias_partial;  // [l, Hkv, D]: linear forward with pos_emb
  int64_t dy_sum;        // [Hkv, D]: sum of dx_cmp over all rows (backward)
  int64_t dy_partial;    // [chunks, Hkv, D]
  int64_t dw_partial;    // [chunks, Hkv, l]: not for linear
  int64_t size;
};

constexpr CompressKvScratch compress_kv_scratch(int64_t num_heads, int64_t head_dim,
                                                int64_t kernel_size, int64_t rows_cmp) {
  const int64_t chunks = compress_kv_num_chunks(rows_cmp);
  CompressKvScratch s{};
  s.weight = 0;
  s.bias = s.weight + num_heads * kernel_size;
  s.bias_partial = s.bias + num_heads * head_dim;
  s.dy_sum = s.bias_partial + kernel_size * num_heads * head_dim;
  s.dy_partial = s.dy_sum + num_heads * head_dim;
  s.dw_partial = s.dy_partial + chunks * num_heads * head_dim;
  s.size = s.dw_partial + chunks * num_heads * kernel_size;
  return s;
}

// Both passes. Problem::total_k holds the tokens of x.
constexpr size_t compress_kv_workspace(const Problem& p) {
  const CompressKvScratch s =
      compress_kv_scratch(p.num_heads_kv, p.head_dim, p.kernel_size, p.total_k / p.kernel_stride);
  return static_cast<size_t>(s.size) * sizeof(float);
}

}  // namespace fsattn
