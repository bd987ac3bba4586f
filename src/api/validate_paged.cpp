// Calls over a paged cache.
#include "api/validate_paged.h"

#include <algorithm>

#include "api/paged_parts.h"
#include "base/math.h"

namespace fsattn {
namespace {

constexpr PagedNames kCompressedPages{"k_cmp_cache", "v_cmp_cache", "cmp_block_table"};

struct PagedTensors {
  const PagedSequences& seq;
  const PagedPacking& packing;
  const PagedShape& shape;
  const PagedKvView& cache;
  const PagedKvView& cmp;
};

PagedProblem paged_problem(PagedOp op, const Arguments& args, const PagedTensors& in) {
  PagedProblem problem;
  problem.op = op;
  problem.device = args.device();
  problem.dtype = in.shape.dtype;
  problem.batch = in.packing.batch;
  problem.total_q = in.packing.total_q;
  problem.max_q = in.packing.max_q;
  problem.max_k = in.packing.max_k;
  problem.max_seqlen_q = in.seq.max_seqlen_q;
  problem.num_heads_kv = in.shape.num_heads_kv;
  problem.head_dim = in.shape.head_dim;
  problem.head_dim_v = in.shape.head_dim_v;
  problem.page_size = in.cache.table.page_size;
  problem.cmp_page_size = in.cmp.table.page_size;
  return problem;
}

// Rotation tables; they decide whether keys before their rotation are kept.
RopeTables check_rope(Arguments& args, const AppendKv& call, const PagedShape& shape,
                      int64_t max_k) {
  const bool has_cos = call.rope_cos.defined();
  FSATTN_CHECK(has_cos == call.rope_sin.defined(), kInvalidArgument,
               has_cos ? "rope_sin" : "rope_cos", ": must be given together with ",
               has_cos ? "rope_cos" : "rope_sin", ", found none");
  if (!has_cos) return {};
  FSATTN_CHECK(shape.head_dim % 2 == 0, kInvalidArgument, "k: head_dim must be even with rope_cos");
  const void* cos = args.input_dense("rope_cos", call.rope_cos, {kAnySize, shape.head_dim / 2});
  const int64_t positions = call.rope_cos.shape[0];
  const void* sin = args.input_dense("rope_sin", call.rope_sin, {positions, shape.head_dim / 2});
  FSATTN_CHECK(positions >= max_k, kInvalidArgument,
               "rope_cos: must have a row for every position below max_seqlen_k (", max_k,
               "), found ", positions);
  return {cos, sin, positions};
}

RawKeys check_raw_keys(Arguments& args, const AppendKv& call, const PagedShape& shape,
                       const PageTable& table) {
  const bool needs_raw = call.rope_cos.defined() && call.cmp.k.defined();
  if (!needs_raw) {
    args.require_absent("k_raw_cache", call.k_raw, "unless keys are rotated and compressed");
    return {};
  }
  const PagedRows rows =
      args.output_pages("k_raw_cache", call.k_raw, call.layout,
                        {table.num_pages, kAnySize, shape.num_heads_kv, shape.head_dim});
  const int64_t size = call.k_raw.shape[call.layout == CacheLayout::kNhd ? 1 : 2];
  FSATTN_CHECK(size >= 1 && table.page_size % size == 0 &&
                   (size == table.page_size || size >= call.kernel_size),
               kInvalidArgument, "k_raw_cache: must hold page_size (", table.page_size,
               ") rows a page, or a divisor of it that is at least kernel_size (", call.kernel_size,
               "), found ", size);
  return {rows, size};
}

struct CompressWeights {
  const void* k = nullptr;
  const void* v = nullptr;
  const void* pos_emb = nullptr;
};

const void* check_weight(Arguments& args, const char* name, const TensorView& view,
                         const AppendKv& call, int64_t heads, int64_t dim) {
  if (call.kind == CompressKind::kMean) {
    args.require_absent(name, view, "for the kind mean");
    return nullptr;
  }
  if (call.kind == CompressKind::kLinear) {
    return args.input_dense(name, view, {heads, call.kernel_size * dim, dim});
  }
  return args.input_dense(name, view, {heads, call.kernel_size});
}

CompressWeights check_weights(Arguments& args, const AppendKv& call, const PagedShape& shape) {
  check_enum("kind", call.kind, CompressKind::kLinear);
  if (!call.cmp.k.defined()) {
    args.require_absent("weight_k", call.weight_k, "without k_cmp_cache");
    args.require_absent("weight_v", call.weight_v, "without k_cmp_cache");
    args.require_absent("pos_emb", call.pos_emb, "without k_cmp_cache");
    return {};
  }
  CompressWeights weights;
  weights.k =
      check_weight(args, "weight_k", call.weight_k, call, shape.num_heads_kv, shape.head_dim);
  weights.v =
      check_weight(args, "weight_v", call.weight_v, call, shape.num_heads_kv, shape.head_dim_v);
  if (call.pos_emb.defined()) {
    weights.pos_emb = args.input_dense("pos_emb", call.pos_emb,
                                       {shape.num_heads_kv, call.kernel_size, shape.head_dim});
  }
  return weights;
}

PagedShape check_new_tokens(Arguments& args, const AppendKv& call, PagedWriteParams& params) {
  params.k = args.input_rows("k", call.k, {kAnySize, kAnySize, kAnySize});
  params.v = args.input_rows("v", call.v, {call.k.shape[0], call.k.shape[1], kAnySize});
  FSATTN_CHECK(call.k.shape[1] >= 1, kInvalidArgument, "k: must have at least 1 head, found 0");
  check_head_dim("k", call.k.shape[2]);
  check_head_dim("v", call.v.shape[2]);
  return {args.dtype(), call.k.shape[1], call.k.shape[2], call.v.shape[2]};
}

// What both attentions check of q and the cache.
struct PagedQueries {
  AttnShape shape;
  PagedShape kv;
  Rows q;
  PagedKvView cache;
  PagedPacking packing;
};

template <class Call>
PagedQueries check_queries(Arguments& args, const Call& call, double softmax_scale,
                           int64_t block_size) {
  PagedQueries in{};
  in.q = args.input_rows("q", call.q, {kAnySize, kAnySize, kAnySize});
  in.kv = paged_shape(args, call.cache, call.layout);
  in.cache = check_paged_kv(args, call.cache, {}, in.kv, call.layout, PageUse::kRead);
  in.shape = check_paged_heads(args, call.q, in.kv, softmax_scale);
  check_block_size(block_size);
  FSATTN_CHECK(in.cache.table.page_size % block_size == 0, kInvalidArgument,
               "k_cache: page_size must be a multiple of block_size (", block_size, "), found ",
               in.cache.table.page_size);
  in.packing = check_paged_sequences(args, call.seq, call.q.shape[0], in.cache.table);
  check_pages_used(args, call.seq, {}, call.cache.block_table, in.cache.table);
  return in;
}

PagedProblem attention_problem(PagedOp op, const Arguments& args, const PagedSequences& seq,
                               const PagedQueries& in, const PagedKvView& cmp) {
  PagedProblem problem = paged_problem(op, args, {seq, in.packing, in.kv, in.cache, cmp});
  problem.num_heads_q = in.shape.num_heads_q;
  problem.has_key_rows = keys_in_pages(in.cache, in.kv.num_heads_kv).page_rows > 0;
  problem.has_cmp_key_rows =
      cmp.k.data != nullptr && keys_in_pages(cmp, in.kv.num_heads_kv).page_rows > 0;
  return problem;
}

}  // namespace

Checked<PagedProblem, PagedAppendParams> validate(const AppendKv& call, Purpose purpose) {
  Arguments args(purpose, "k", call.k, 3, "[total_q, num_heads_kv, head_dim]");
  args.use_lead_dtype();
  check_enum("layout", call.layout, CacheLayout::kHnd);
  PagedAppendParams params{};
  PagedWriteParams& write = params.write;
  write.shape = check_new_tokens(args, call, write);
  write.cache = check_paged_kv(args, call.cache, {}, write.shape, call.layout, PageUse::kWrite);
  write.packing = check_paged_sequences(args, call.seq, call.k.shape[0], write.cache.table);
  check_pages_used(args, call.seq, {}, call.cache.block_table, write.cache.table);
  check_windows(call.kernel_size, call.kernel_stride);
  write.kernel_size = call.kernel_size;
  write.kernel_stride = call.kernel_stride;
  if (call.cmp.k.defined()) {
    params.cmp =
        check_paged_kv(args, call.cmp, kCompressedPages, write.shape, call.layout, PageUse::kWrite);
    check_windows_used(args, call.seq, kCompressedPages, call.cmp.block_table, params.cmp.table,
                       call.kernel_size, call.kernel_stride);
  }
  write.rope = check_rope(args, call, write.shape, write.packing.max_k);
  write.raw = check_raw_keys(args, call, write.shape, write.cache.table);
  const CompressWeights weights = check_weights(args, call, write.shape);
  params.kind = call.kind;
  params.weight_k = weights.k;
  params.weight_v = weights.v;
  params.pos_emb = weights.pos_emb;
  args.check_aliasing();

  PagedProblem problem = paged_problem(
      PagedOp::kAppend, args, {call.seq, write.packing, write.shape, write.cache, params.cmp});
  problem.kernel_size = call.kernel_size;
  problem.kernel_stride = call.kernel_stride;
  problem.compress_kind = call.kind;
  problem.has_rope = write.rope.cos != nullptr || call.rope_cos.defined();
  problem.overwrites_raw_keys =
      write.raw.size != 0 && write.raw.size != write.cache.table.page_size;
  return {problem, params};
}

Checked<PagedProblem, PagedAttnParams> validate(const PagedNativeSparseAttention& call,
                                                Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  check_enum("layout", call.layout, CacheLayout::kHnd);
  const NsaConfig& config = call.config;
  const PagedQueries in = check_queries(args, call, config.softmax_scale, config.block_size);
  PagedAttnParams params{};
  params.packing = in.packing;
  params.shape = in.shape;
  params.q = in.q;
  params.cache = in.cache;
  params.cmp = check_paged_kv(args, call.cmp, kCompressedPages, in.kv, call.layout, PageUse::kRead);
  check_windows(config.kernel_size, config.kernel_stride);
  check_windows_used(args, call.seq, kCompressedPages, call.cmp.block_table, params.cmp.table,
                     config.kernel_size, config.kernel_stride);
  check_selection({config.block_size, config.topk, config.init_blocks, config.local_blocks,
                   config.kernel_stride});
  check_index_size(in.packing.total_q, config.topk);
  check_range("window_size", config.window_size, 0, kMaxIndex);
  params.gates = args.input_gates("gates", call.gates, in.packing.total_q, in.shape.num_heads_q);
  params.activation = check_activation(call.activation);
  params.kernel_size = config.kernel_size;
  params.kernel_stride = config.kernel_stride;
  params.block_size = config.block_size;
  params.topk = config.topk;
  params.init_blocks = config.init_blocks;
  params.local_blocks = config.local_blocks;
  params.window_size = config.window_size;
  params.group_reduce = check_enum("group_reduce", call.group_reduce, GroupReduce::kFirstHead);
  params.score_dtype = check_enum("score_dtype", call.score_dtype, ScoreDType::kBFloat16);
  params.o = args.output_rows("o", call.o,
                              {in.packing.total_q, in.shape.num_heads_q, in.shape.head_dim_v});
  if (call.topk_idx.defined()) {
    params.topk_idx = args.output_index("topk_idx", call.topk_idx,
                                        {in.shape.num_heads_kv, in.packing.total_q, config.topk});
  }
  args.check_aliasing();

  PagedProblem problem = attention_problem(PagedOp::kAttn, args, call.seq, in, params.cmp);
  problem.kernel_size = config.kernel_size;
  problem.kernel_stride = config.kernel_stride;
  problem.block_size = config.block_size;
  problem.topk = config.topk;
  problem.window_size = config.window_size;
  problem.has_topk_out = call.topk_idx.defined();
  problem.batch_invariant = call.batch_invariant;
  problem.workspace_cap = call.workspace_cap;
  return {problem, params};
}

Checked<PagedProblem, PagedSelectedParams> validate(const PagedSelectedAttention& call,
                                                    Purpose purpose) {
  Arguments args = attention_arguments(purpose, call.q);
  check_enum("layout", call.layout, CacheLayout::kHnd);
  const PagedQueries in = check_queries(args, call, call.softmax_scale, call.block_size);
  PagedSelectedParams params{};
  params.packing = in.packing;
  params.shape = in.shape;
  params.q = in.q;
  params.cache = in.cache;
  Packing tokens{};
  tokens.batch = in.packing.batch;
  tokens.total_q = in.packing.total_q;
  const TensorView absent;
  params.mask = check_selected_mask(args, {call.topk_idx, absent, absent}, tokens,
                                    in.shape.num_heads_kv, call.block_size);
  params.o = args.output_rows("o", call.o,
                              {in.packing.total_q, in.shape.num_heads_q, in.shape.head_dim_v});
  params.lse = args.output_stats("lse", call.lse, {in.shape.num_heads_q, in.packing.total_q});
  args.check_aliasing();

  PagedProblem problem = attention_problem(PagedOp::kSelected, args, call.seq, in, {});
  problem.block_size = call.block_size;
  problem.topk = params.mask.topk;
  problem.batch_invariant = call.batch_invariant;
  problem.workspace_cap = call.workspace_cap;
  return {problem, params};
}

}  // namespace fsattn
