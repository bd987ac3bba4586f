#include "plan/paged_cuda.h"

#include <algorithm>

#include "plan/paged_table.h"

namespace fsattn {
namespace {

DecodeSplits splits_of(const PagedProblem& p) {
  const bool is_nsa = p.op == PagedOp::kAttn;
  const int64_t max_cmp = is_nsa ? num_windows(p.max_k, p.kernel_size, p.kernel_stride) : 0;
  return decode_splits(max_cmp, kDecodeSplit, p.block_size, p.topk, is_nsa ? p.window_size : 0);
}

// Why the fused attention does not serve a problem; null when it does.
const char* refuse_decode(const PagedProblem& p, const DeviceInfo& device, int row) {
  if (row < 0) return "no fused row for the dtype and head_dim";
  if (p.max_seqlen_q > kDecodeMaxQueries) return "more new tokens than the fused kernels take";
  if (p.group_size() > kDecodeMaxGroup) return "a larger group than the fused kernels take";
  const DecodeSplits splits = splits_of(p);
  if (splits.cmp > kDecodeMaxParts || 1 + splits.win + splits.sel > kDecodeMaxParts) {
    return "more splits than the fused kernels combine";
  }
  if (p.topk > kDecodeMaxTopk) return "more blocks than the fused kernels take";
  constexpr size_t kStatic = 4096;  // shared memory that is not counted by the table
  size_t smem = decode_smem(kDecodeTable[static_cast<size_t>(row)]);
  if (p.op == PagedOp::kAttn) {
    const int64_t blocks = ceil_div(p.max_k, p.block_size);
    if (blocks > kDecodeMaxBlocks) return "more blocks in a sequence than the fused kernels rank";
    const int64_t windows = p.kernel_size / p.kernel_stride + p.block_size / p.kernel_stride;
    if (windows + 2 > kDecodePoolKeys)
      return "more windows over a block than the fused kernels take";
    smem = std::max(smem, decode_select_smem(blocks));
  }
  if (smem + kStatic > device.smem_per_cta) return "the device has too little shared memory";
  return nullptr;
}

// What is faster for the shape of the call; the last bits of the results depend on it.
void tune_for_shape(PagedTuning& tuning, const PagedProblem& p, const DeviceInfo& device, int row) {
  const int64_t units = p.batch * p.num_heads_kv, rows = p.max_q * p.group_size();
  tuning.cmp_long = choose_cmp_long(units, ceil_div(rows, kDecodeRows), device.num_sms);
  if (device.compute_capability < 90) return;  // no clusters
  const DecodeConfig& config = kDecodeTable[static_cast<size_t>(row)];
  tuning.finish =
      choose_finish({units * p.max_q, p.group_size(), ceil_div(p.max_k, p.block_size), p.block_size,
                     p.topk, p.window_size, p.kernel_size, p.kernel_stride},
                    can_finish_wide(config), device.num_sms);
  if (decode_finish_smem(config, tuning.finish.is_wide) > device.smem_per_cta) tuning.finish = {};
}

PagedChoice choose_decode(const PagedProblem& p, const DeviceInfo& device) {
  PagedChoice choice;
  const int row = find_decode_row(p.dtype, p.head_dim, p.head_dim_v);
  if (const char* refusal = refuse_decode(p, device, row)) {
    choice.reason = refusal;
    return choice;
  }
  const bool is_nsa = p.op == PagedOp::kAttn;
  const int64_t max_cmp = is_nsa ? num_windows(p.max_k, p.kernel_size, p.kernel_stride) : 0;
  const int64_t max_blocks = is_nsa ? ceil_div(p.max_k, p.block_size) : 0;
  choice.row = row;
  choice.tuning.cmp_split = kDecodeSplit;
  choice.tuning.cmp_long = kDecodeNeverLong;
  DecodeSplits splits = splits_of(p);
  if (is_nsa && !p.batch_invariant) tune_for_shape(choice.tuning, p, device, row);
  if (choice.tuning.finish.ctas > 0) {
    splits = decode_finish_splits(splits, choice.tuning.finish.ctas);
  }
  choice.scratch_bytes =
      static_cast<size_t>(decode_scratch(p.batch * p.num_heads_kv, p.max_q, p.group_size(),
                                         p.head_dim_v, max_cmp, max_blocks, splits, is_nsa)
                              .bytes);
  choice.reason = "few new tokens a sequence";
  return choice;
}

// Any number of new tokens; without compression the composed path is one kernel, too.
PagedChoice choose_append_chunk(const PagedProblem& p, const DeviceInfo& device) {
  PagedChoice choice;
  choice.reason = "more new tokens than the fused kernels take";
  if (p.cmp_page_size == 0 || p.compress_kind == CompressKind::kLinear || p.overwrites_raw_keys) {
    return choice;
  }
  constexpr size_t kStatic = 4096;  // shared memory that is not counted by the table
  const int64_t smem =
      paged_append_chunk_smem(p.kernel_size, p.kernel_stride, p.head_dim, p.head_dim_v);
  if (static_cast<size_t>(smem) + kStatic > device.smem_per_cta) {
    choice.reason = "the device has too little shared memory for the windows of a chunk";
    return choice;
  }
  choice.row = find_paged_copy_row(p.dtype);
  choice.tuning.has_chunks = true;
  choice.reason = "many new tokens a sequence";
  return choice;
}

PagedChoice choose_append(const PagedProblem& p, const DeviceInfo& device) {
  if (p.max_seqlen_q > kDecodeMaxQueries) return choose_append_chunk(p, device);
  PagedChoice choice;
  constexpr size_t kStatic = 8192;  // shared memory beside the windows
  const bool is_linear = p.compress_kind == CompressKind::kLinear;
  const int64_t window =
      is_linear ? paged_append_linear_smem(p.kernel_size, std::max(p.head_dim, p.head_dim_v))
                : paged_append_smem(p.kernel_size, p.head_dim, p.head_dim_v);
  if (p.cmp_page_size > 0 && static_cast<size_t>(window) + kStatic > device.smem_per_cta) {
    choice.reason = "the device has too little shared memory for a window";
    return choice;
  }
  choice.row = find_paged_copy_row(p.dtype);
  choice.reason = "few new tokens a sequence";
  return choice;
}

}  // namespace

int find_paged_copy_row(DType dtype) {
  for (std::size_t row = 0; row < kPagedCopyTable.size(); ++row) {
    if (kPagedCopyTable[row].dtype == dtype) return static_cast<int>(row);
  }
  return -1;
}

PagedChoice choose_paged_fused(const PagedProblem& problem, const DeviceInfo& device) {
  if (problem.op == PagedOp::kAppend) return choose_append(problem, device);
  return choose_decode(problem, device);
}

}  // namespace fsattn
