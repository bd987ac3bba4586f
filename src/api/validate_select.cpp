// The selection and the block index.
#include <algorithm>

#include "api/parts.h"
#include "api/validate.h"
#include "base/math.h"

namespace fsattn {
namespace {

// No tensor of the call has a row a token of k, so block_start stands for it: num_slots =
// total_k / S + B. Of the total_k with this num_slots the largest counts: the backends clamp
// cu_seqlens_k to it, and a smaller one would cut keys off the last sequence.
int64_t total_k_of(const BuildBlockIndex& call, int64_t batch) {
  FSATTN_CHECK(call.block_start.defined(), kInvalidArgument,
               "block_start: must be given, found none");
  FSATTN_CHECK(call.block_start.ndim == 2, kInvalidArgument,
               "block_start: must have 2 dimensions [num_heads_kv, num_slots + 1], found ",
               call.block_start.ndim);
  const int64_t num_slots = call.block_start.shape[1] - 1;
  FSATTN_CHECK(num_slots >= batch && num_slots <= kMaxIndex, kInvalidArgument,
               "block_start: must have total_k / block_size + batch + 1 columns (at least ",
               batch + 1, "), found ", num_slots + 1);
  return std::min((num_slots - batch + 1) * call.block_size - 1, kMaxIndex);
}

}  // namespace

Checked<Problem, SelectBlocksParams> validate(const SelectBlocks& call, Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  SelectBlocksParams params{};
  params.q = args.input_rows("q", call.q, {kAnySize, kAnySize, kAnySize});
  params.k_cmp = args.input_rows("k_cmp", call.k_cmp, {kAnySize, kAnySize, call.q.shape[2]});
  params.shape = check_heads(args, call.q, "k_cmp", call.k_cmp, call.softmax_scale);
  check_row_counts(call.q.shape[0], "k_cmp", call.k_cmp.shape[0]);
  params.lse = args.input_stats("lse", call.lse, {call.q.shape[1], call.q.shape[0]});
  params.packing = check_sequences(args, call.seq, call.q.shape[0], kAnySize);
  params.mask = check_compressed_mask(args, call.cu_seqlens_cmp, call.seq, call.k_cmp.shape[0],
                                      call.kernel_size, call.kernel_stride);
  params.packing.total_k = call.k_cmp.shape[0] * call.kernel_stride;
  check_selection(
      {call.block_size, call.topk, call.init_blocks, call.local_blocks, call.kernel_stride});
  params.block_size = call.block_size;
  params.topk = call.topk;
  params.init_blocks = call.init_blocks;
  params.local_blocks = call.local_blocks;
  params.group_reduce = check_enum("group_reduce", call.group_reduce, GroupReduce::kFirstHead);
  params.score_dtype = check_enum("score_dtype", call.score_dtype, ScoreDType::kBFloat16);
  params.topk_idx = args.output_index("topk_idx", call.topk_idx,
                                      {call.k_cmp.shape[1], call.q.shape[0], call.topk});
  args.check_aliasing();
  return {selection_problem(args, params), params};
}

Checked<Problem, BlockIndexParams> validate(const BuildBlockIndex& call, Purpose purpose) {
  Arguments args(purpose, "topk_idx", call.topk_idx, 3, "[num_heads_kv, total_q, topk]");
  const int64_t heads = call.topk_idx.shape[0];
  const int64_t total_q = call.topk_idx.shape[1];
  check_range("topk_idx: number of heads", heads, 1, kMaxIndex);
  check_range("topk_idx: number of tokens", total_q, 0, kMaxIndex);
  BlockIndexParams params{};
  params.num_heads_kv = heads;
  params.packing = check_sequences(args, call.seq, total_q, kAnySize);
  check_block_size(call.block_size);
  params.packing.total_k = total_k_of(call, params.packing.batch);
  const TensorView absent;
  params.mask = check_selected_mask(args, {call.topk_idx, absent, absent}, params.packing, heads,
                                    call.block_size);
  const int64_t num_slots = call.block_start.shape[1] - 1;
  if (args.is_readable(call.seq.cu_seqlens_k)) {
    const auto* cu = static_cast<const int32_t*>(call.seq.cu_seqlens_k.data);
    const int64_t wanted =
        first_block_slot(int64_t{cu[params.packing.batch]}, params.packing.batch, call.block_size);
    FSATTN_CHECK(num_slots == wanted, kInvalidArgument,
                 "block_start: must have total_k / block_size + batch + 1 columns (", wanted + 1,
                 "), found ", num_slots + 1);
  }
  params.mask.index.start =
      args.output_index("block_start", call.block_start, {heads, num_slots + 1});
  params.mask.index.entry =
      args.output_index("block_entry", call.block_entry, {heads, total_q * params.mask.topk});
  params.mask.index.num_slots = num_slots;
  args.check_aliasing();

  Problem problem = attention_problem(Op::kBlockIndex, Pass::kFwd, args, params.packing, {});
  problem.dtype = DType::kInt32;
  problem.num_heads_kv = heads;
  problem.block_size = call.block_size;
  problem.topk = params.mask.topk;
  return {problem, params};
}

}  // namespace fsattn
