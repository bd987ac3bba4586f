// The scratch memory of compress_kv on the CPU: sized by the plan, used by cpu/compress_kv*.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/math.h"
#include "fsattn/config.h"
#include "plan/problem.h"

namespace fsattn {

// Windows whose sums for dweight and dpos_emb are one partial result. A constant: the order of the
// summation shall not depend on the number of threads.
constexpr int64_t kCompressKvChunk = 256;

// Byte offsets. "Number" is fp32, for fp64 inputs fp64.
struct CpuCompressKvScratch {
  size_t weights;   // number [Hkv, l]: the weights as they are applied; not for the linear kind
  size_t packed;    // number [Hkv, l * D, D padded to 64 bytes]: the linear kind's weight, tiled
  size_t partials;  // number [Hkv, chunks of windows, sums]: sums = dy summed [D], dweight [l]
  size_t totals;    // number [Hkv, sums]
  size_t bytes;
  int64_t num_chunks;
  int64_t num_sums;
};

struct CpuCompressKvSizes {
  DType dtype;
  CompressKind kind;
  int64_t num_heads, head_dim, rows_cmp, kernel_size;
};

constexpr CpuCompressKvScratch cpu_compress_kv_scratch(Pass pass, const CpuCompressKvSizes& sizes) {
  const size_t number = size_of(stats_dtype(sizes.dtype));
  const bool is_linear = sizes.kind == CompressKind::kLinear;
  const bool is_bwd = pass == Pass::kBwd;
  const int64_t columns = round_up<int64_t>(sizes.head_dim, 64 / static_cast<int64_t>(number));
  const int64_t num_weights = is_linear ? 0 : sizes.num_heads * sizes.kernel_size;
  const int64_t num_packed =
      is_linear ? sizes.num_heads * sizes.kernel_size * sizes.head_dim * columns : 0;
  CpuCompressKvScratch scratch{};
  scratch.num_chunks = is_bwd ? ceil_div(sizes.rows_cmp, kCompressKvChunk) : 0;
  scratch.num_sums = is_bwd ? sizes.head_dim + (is_linear ? 0 : sizes.kernel_size) : 0;
  const auto take = [&](int64_t count) {
    const size_t offset = scratch.bytes;
    scratch.bytes += round_up<size_t>(static_cast<size_t>(count) * number, 64);
    return offset;
  };
  scratch.weights = take(num_weights);
  scratch.packed = take(num_packed);
  scratch.partials = take(sizes.num_heads * scratch.num_chunks * scratch.num_sums);
  scratch.totals = take(sizes.num_heads * scratch.num_sums);
  return scratch;
}

}  // namespace fsattn
