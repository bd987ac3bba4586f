#include "api/paged_parts.h"

#include <algorithm>

#include "base/math.h"

namespace fsattn {
namespace {

constexpr int64_t kPageGranule = 16;  // tokens; page sizes are multiples of it

int head_dim_of_view(CacheLayout layout) { return layout == CacheLayout::kNhd ? 2 : 1; }
int token_dim_of_view(CacheLayout layout) { return layout == CacheLayout::kNhd ? 1 : 2; }

int64_t size_at(const TensorView& view, int dim) { return view.shape[static_cast<size_t>(dim)]; }

void check_page_rank(const char* name, const TensorView& view, CacheLayout layout) {
  FSATTN_CHECK(view.defined(), kInvalidArgument, name, ": must be given, found none");
  FSATTN_CHECK(view.ndim == 4, kInvalidArgument, name, ": must have 4 dimensions ",
               layout == CacheLayout::kNhd ? "[num_pages, page_size, num_heads_kv, head_dim]"
                                           : "[num_pages, num_heads_kv, page_size, head_dim]",
               ", found ", view.ndim);
}

// The lengths of sequence b, both read on the host.
struct Lengths {
  int64_t before, total;
};

Lengths lengths_of(const PagedSequences& seq, int64_t b) {
  const auto* cu = static_cast<const int32_t*>(seq.cu_seqlens_q.data);
  const int64_t before = static_cast<const int32_t*>(seq.cache_seqlens.data)[b];
  return {before, before + cu[b + 1] - cu[b]};
}

bool has_readable_lengths(const Arguments& args, const PagedSequences& seq) {
  return args.is_readable(seq.cache_seqlens) && args.is_readable(seq.cu_seqlens_q);
}

// A table without columns has no data and nothing to read: that it is too short counts all the same.
bool is_table_readable(const Arguments& args, const TensorView& table) {
  return args.is_readable(table) || (!args.is_cuda() && table.numel() == 0);
}

// The entries of the table that `count` tokens of sequence b use.
void check_row(const PagedNames& names, const TensorView& block_table, const PageTable& table,
               int64_t b, int64_t count) {
  FSATTN_CHECK(count <= table.capacity(), kInvalidArgument, names.table,
               ": the cache is full: sequence ", b, " needs ", ceil_div(count, table.page_size),
               " pages for ", count, " tokens, found ", table.max_pages);
  const auto* row = static_cast<const int32_t*>(block_table.data) + b * table.seq_stride;
  for (int64_t page = 0; page * table.page_size < count; ++page) {
    FSATTN_CHECK(row[page] >= 0 && row[page] < table.num_pages, kInvalidArgument, names.table,
                 ": page ids must be between 0 and ", table.num_pages - 1, ", found ", row[page],
                 " for page ", page, " of sequence ", b);
  }
}

void check_lengths(const PagedSequences& seq, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    const Lengths lengths = lengths_of(seq, b);
    FSATTN_CHECK(lengths.before >= 0, kInvalidArgument,
                 "cache_seqlens: must not be negative, found ", lengths.before, " for sequence ",
                 b);
    FSATTN_CHECK(
        lengths.total <= seq.max_seqlen_k, kInvalidArgument,
        "max_seqlen_k: must not be smaller than the longest sequence with its new tokens (",
        lengths.total, "), found ", seq.max_seqlen_k);
  }
}

}  // namespace

PagedShape paged_shape(const Arguments& args, const PagedKv& cache, CacheLayout layout) {
  check_page_rank("k_cache", cache.k, layout);
  check_page_rank("v_cache", cache.v, layout);
  const int64_t heads = size_at(cache.k, head_dim_of_view(layout));
  FSATTN_CHECK(heads >= 1, kInvalidArgument, "k_cache: must have at least 1 head, found 0");
  check_head_dim("k_cache", cache.k.shape[3]);
  check_head_dim("v_cache", cache.v.shape[3]);
  return {args.dtype(), heads, cache.k.shape[3], cache.v.shape[3]};
}

PagedKvView check_paged_kv(Arguments& args, const PagedKv& cache, const PagedNames& names,
                           const PagedShape& shape, CacheLayout layout, PageUse use) {
  check_page_rank(names.k, cache.k, layout);
  const int64_t num_pages = cache.k.shape[0];
  const int64_t page_size = size_at(cache.k, token_dim_of_view(layout));
  check_range(names.k, num_pages, 0, kMaxIndex);
  FSATTN_CHECK(page_size >= kPageGranule && page_size % kPageGranule == 0, kInvalidArgument,
               names.k, ": page_size must be a multiple of ", kPageGranule, ", found ", page_size);
  const auto pages = [&](const char* name, const TensorView& view, int64_t dim) {
    return use == PageUse::kRead
               ? args.input_pages(name, view, layout,
                                  {num_pages, page_size, shape.num_heads_kv, dim})
               : args.output_pages(name, view, layout,
                                   {num_pages, page_size, shape.num_heads_kv, dim});
  };
  PagedKvView view{};
  view.k = pages(names.k, cache.k, shape.head_dim);
  view.v = pages(names.v, cache.v, shape.head_dim_v);
  view.table.pages = args.input_strided_index(names.table, cache.block_table, {kAnySize, kAnySize});
  view.table.seq_stride = cache.block_table.stride[0];
  view.table.max_pages = cache.block_table.shape[1];
  view.table.num_pages = num_pages;
  view.table.page_size = page_size;
  FSATTN_CHECK(view.table.max_pages <= kMaxIndex / page_size, kInvalidArgument, names.table,
               ": must have fewer than 2^31 / page_size columns, found ", view.table.max_pages);
  return view;
}

AttnShape check_paged_heads(const Arguments& args, const TensorView& q, const PagedShape& kv,
                            double softmax_scale) {
  // The rules of heads are written for packed keys [rows, heads, dim].
  TensorView k = q;
  k.shape[1] = kv.num_heads_kv;
  FSATTN_CHECK(q.shape[2] == kv.head_dim, kInvalidArgument, "q: head_dim must be that of k_cache (",
               kv.head_dim, "), found ", q.shape[2]);
  AttnShape shape = check_heads(args, q, "k_cache", k, softmax_scale);
  shape.head_dim_v = kv.head_dim_v;
  return shape;
}

PagedPacking check_paged_sequences(Arguments& args, const PagedSequences& seq, int64_t total_q,
                                   const PageTable& table) {
  PagedPacking packing{};
  check_row_counts(total_q, "k_cache", 0);
  packing.cu_q = check_cu_seqlens(args, "cu_seqlens_q", seq.cu_seqlens_q, kAnySize);
  packing.batch = seq.cu_seqlens_q.shape[0] - 1;
  packing.cache_seqlens = args.input_index("cache_seqlens", seq.cache_seqlens, {packing.batch});
  check_range("max_seqlen_q", seq.max_seqlen_q, total_q > 0 ? 1 : 0, kMaxIndex);
  check_range("max_seqlen_k", seq.max_seqlen_k, total_q > 0 ? 1 : 0, kMaxIndex);
  check_cu_values(args, "cu_seqlens_q", seq.cu_seqlens_q, total_q, "max_seqlen_q",
                  seq.max_seqlen_q);
  if (has_readable_lengths(args, seq)) check_lengths(seq, packing.batch);
  packing.total_q = total_q;
  packing.max_q = std::min(seq.max_seqlen_q, total_q);
  packing.max_k = std::min(seq.max_seqlen_k, table.capacity());
  return packing;
}

void check_pages_used(const Arguments& args, const PagedSequences& seq, const PagedNames& names,
                      const TensorView& block_table, const PageTable& table) {
  const int64_t batch = seq.cache_seqlens.shape[0];
  FSATTN_CHECK(block_table.shape[0] == batch, kInvalidArgument, names.table,
               ": must have a row for every sequence (", batch, "), found ", block_table.shape[0]);
  if (!has_readable_lengths(args, seq) || !is_table_readable(args, block_table)) return;
  for (int64_t b = 0; b < batch; ++b) {
    check_row(names, block_table, table, b, lengths_of(seq, b).total);
  }
}

void check_windows_used(const Arguments& args, const PagedSequences& seq, const PagedNames& names,
                        const TensorView& block_table, const PageTable& table, int64_t kernel_size,
                        int64_t kernel_stride) {
  const int64_t batch = seq.cache_seqlens.shape[0];
  FSATTN_CHECK(block_table.shape[0] == batch, kInvalidArgument, names.table,
               ": must have a row for every sequence (", batch, "), found ", block_table.shape[0]);
  if (!has_readable_lengths(args, seq) || !is_table_readable(args, block_table)) return;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t total = lengths_of(seq, b).total;
    check_row(names, block_table, table, b, num_windows(total, kernel_size, kernel_stride));
  }
}

}  // namespace fsattn
