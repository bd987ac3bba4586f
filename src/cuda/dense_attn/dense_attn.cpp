#include "cuda/dense_attn/dense_attn.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace fsattn {
namespace {

constexpr auto kFwdLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array{&launch_dense_attn_fwd<kDenseAttnFwdTable[kRow]>...};
}
(std::make_index_sequence<kDenseAttnFwdTable.size()>{});

constexpr auto kBwdLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array{&launch_dense_attn_bwd<kDenseAttnBwdTable[kRow]>...};
}
(std::make_index_sequence<kDenseAttnBwdTable.size()>{});

int clamp_to_int(int64_t x, int limit) { return static_cast<int>(std::min<int64_t>(x, limit)); }

// Beyond 2^30 a stride, a size and a reach all mean "farther than any sequence is long".
constexpr int kFar = device::Band::kUnlimited;

device::KeySet key_set(const CompressedMask& mask, const Packing&) {
  const device::Band band{clamp_to_int(mask.kernel_stride, kFar),
                          clamp_to_int(mask.kernel_size, kFar), kFar};
  return {band, mask.cu_cmp, static_cast<int>(mask.total_cmp)};
}

device::KeySet key_set(const WindowMask& mask, const Packing& packing) {
  const device::Band band{1, 1, clamp_to_int(mask.window_size, kFar)};
  return {band, packing.cu_k, static_cast<int>(packing.total_k)};
}

template <class Params>
void launch_fwd(int row, const Params& params, Stream stream) {
  device::KeySet keys = key_set(params.mask, params.attn.packing);
  keys.pages = params.pages;
  kFwdLaunchers.at(static_cast<size_t>(row))(params.attn, keys, stream);
}

// `split_rows`: rows of k that may get partial results, 0 when the work is not split.
template <class Params>
void launch_bwd(int row, const Params& params, int64_t split_rows, Stream stream) {
  const AttnBwdTensors& attn = params.attn;
  const AttnShape& shape = attn.shape;
  const Arch arch = kDenseAttnBwdTable.at(static_cast<size_t>(row)).arch;
  const SharedDq& shared = attn.shared_dq;
  const bool is_shared = shared.sums != nullptr;
  FSATTN_ASSERT(has_fused_bwd(arch) || !is_shared);
  const Packing& packing = attn.packing;
  const DenseAttnBwdScratch scratch =
      dense_attn_bwd_scratch(arch, is_shared, packing.batch, packing.total_q, shape.num_heads_q,
                             shape.num_heads_kv, split_rows, shape.head_dim, shape.head_dim_v);
  FSATTN_ASSERT(params.scratch.bytes >= static_cast<size_t>(scratch.bytes));
  auto* base = static_cast<std::byte*>(params.scratch.data);
  DenseBwdBuffers buffers{};
  buffers.delta = attn.row_stats != nullptr ? static_cast<float*>(attn.row_stats)
                                            : reinterpret_cast<float*>(base);
  buffers.partial_dk = reinterpret_cast<float*>(base + scratch.partial_dk);
  buffers.partial_dv = reinterpret_cast<float*>(base + scratch.partial_dv);
  buffers.dq_sums = reinterpret_cast<float*>(base + scratch.dq_sums);
  buffers.turns = reinterpret_cast<int*>(base + scratch.turns);
  buffers.num_turns = scratch.num_turns;
  if (is_shared) {
    buffers.dq_sums = shared.sums;
    buffers.turns = shared.turns;
    buffers.num_turns = dense_num_turns(packing.batch, packing.total_q, shape.num_heads_q);
    buffers.prior_turns = shared.prior_turns;
  }
  buffers.splits =
      split_rows == 0 ? 1 : static_cast<int>(compressed_attn_bwd_splits(arch, shape.group_size()));
  buffers.partial_rows = static_cast<int>(split_rows);
  kBwdLaunchers.at(static_cast<size_t>(row))(attn, key_set(params.mask, attn.packing), buffers,
                                             stream);
}

}  // namespace

void launch_compressed_attn_fwd(int row, const CompressedAttnFwdParams& params, Stream stream) {
  launch_fwd(row, params, stream);
}

void launch_window_attn_fwd(int row, const WindowAttnFwdParams& params, Stream stream) {
  launch_fwd(row, params, stream);
}

void launch_compressed_attn_bwd(int row, const CompressedAttnBwdParams& params, Stream stream) {
  launch_bwd(row, params, params.attn.packing.total_k / params.mask.kernel_stride, stream);
}

void launch_window_attn_bwd(int row, const WindowAttnBwdParams& params, Stream stream) {
  launch_bwd(row, params, 0, stream);
}

}  // namespace fsattn
