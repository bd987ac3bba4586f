// Parameters over a paged KV cache. Semantics: fsattn/paged.h. On CUDA neither block tables nor
// lengths are trusted.
#pragma once
#include <algorithm>

#include "params/attention.h"
#include "params/compress_kv.h"
#include "params/gate.h"

namespace fsattn {

// [pages, tokens of a page, heads, dim] with a contiguous last dimension, in either layout. Strides
// count elements.
struct PagedRows {
  void* data;
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
};

struct PagedKvView {
  PagedRows k, v;
  PageTable table;
};

// Where the tokens of all pages are rows of one stride; page_rows is 0 where they are not, or too many for
// 32 bits.
constexpr PagedKeys keys_in_pages(const PagedKvView& cache, int64_t heads) {
  const PageTable& table = cache.table;
  const auto rows_of = [&](const PagedRows& rows) -> PagedKeys {
    const int64_t stride = rows.token_stride;
    const bool is_alone = table.num_pages == 1;  // the stride of its page means nothing
    if (stride <= 0 || table.num_pages == 0) return {};
    const bool has_heads = heads > 1 && rows.head_stride >= stride;  // rows of one head
    const int64_t head = has_heads ? rows.head_stride : 0;
    const int64_t page =
        is_alone ? std::max(table.page_size * stride, heads * head) : rows.page_stride;
    if (page % stride != 0 || head % stride != 0) return {};
    const int64_t last = (table.num_pages - 1) * page + (heads - 1) * head;
    return {table, page / stride, head / stride, last / stride + table.page_size};
  };
  const PagedKeys k = rows_of(cache.k), v = rows_of(cache.v);
  const bool is_same = k.page_rows == v.page_rows && k.head_rows == v.head_rows;
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
  return is_same && k.page_rows > 0 && k.total_rows <= kMaxRows ? k : PagedKeys{};
}

// New token i of sequence b is row cu_q[b] + i and stands at position cache_seqlens[b] + i.
struct PagedPacking {
  int64_t batch;
  const int32_t* cu_q;
  const int32_t* cache_seqlens;
  int64_t total_q;
  int64_t max_q;  // bounds of the lengths of one sequence: new tokens,
  int64_t max_k;  // and all tokens; at most the capacity of the table
};

struct PagedShape {
  DType dtype;
  int64_t num_heads_kv;
  int64_t head_dim;
  int64_t head_dim_v;
};

// cos and sin [num_positions, head_dim / 2], contiguous, in the dtype of the call; null without
// rotation. max_k <= num_positions.
struct RopeTables {
  const void* cos;
  const void* sin;
  int64_t num_positions;
};

// Keys before their rotation: token p in row p % size of page pages[p / page_size]. data is null when
// keys are stored as they come.
struct RawKeys {
  PagedRows rows;
  int64_t size;
};

// k, v -> pages. When x_k.data is set, also the input of the compression: sequence b owns rows
// cu_x[b] .. cu_x[b + 1] - 1 of x_k and x_v, the tokens from c * kernel_stride (c = windows that were
// complete before) to the last new one, keys before their rotation; no rows without new tokens.
// Older tokens are read before rows of RawKeys that hold them are overwritten.
struct PagedWriteParams {
  PagedPacking packing;
  PagedShape shape;
  Rows k, v;
  PagedKvView cache;
  RawKeys raw;
  RopeTables rope;
  int64_t kernel_size;
  int64_t kernel_stride;
  Rows x_k, x_v;  // [total_q + batch * (kernel_size - 1), Hkv, D or Dv]
  int32_t* cu_x;  // [batch + 1]
};

// Compressed rows -> pages: row cu_cmp[b] + i is window c + i of sequence b, rotated by the position
// (c + i) * kernel_stride.
struct PagedScatterParams {
  PagedPacking packing;
  PagedShape shape;
  Rows k_cmp, v_cmp;
  const int32_t* cu_cmp;  // [batch + 1]
  PagedKvView cmp;
  RopeTables rope;
  int64_t kernel_size;
  int64_t kernel_stride;
};

// Pages -> packed tensors of all tokens, the new ones included: the input of the operators over packed
// sequences. Lengths are clamped to 0 .. max_k; the compressed ones follow from them. cmp.k.data is
// null when there is no compressed cache; k_cmp, v_cmp and cu_cmp are unused then. k.data is null when no
// tokens are wanted, k_cmp.data when no compressed ones are.
struct PagedGatherParams {
  PagedPacking packing;
  PagedShape shape;
  PagedKvView cache, cmp;
  int64_t kernel_size;
  int64_t kernel_stride;
  Rows k, v;          // [batch * max_k, Hkv, D or Dv]
  Rows k_cmp, v_cmp;  // [batch * num_windows(max_k), Hkv, D or Dv]
  int32_t* cu_k;      // [batch + 1]
  int32_t* cu_cmp;    // [batch + 1]
  int32_t* q_offset;  // [batch]: cache_seqlens, 0 for negative ones
};

// How attention goes on behind the compressed branch: by a cluster of `ctas` CTAs a query, wide ones of
// 512 threads; 0: by several kernels.
struct DecodeFinish {
  int ctas = 0;
  bool is_wide = false;

  bool operator==(const DecodeFinish&) const = default;
};

// What the plan fixes for the fused kernels.
struct PagedTuning {
  int64_t cmp_split;  // attention: compressed keys a split,
  int64_t cmp_long;   // twice as many in sequences of so many compressed keys
  bool has_chunks;    // append: sequences may have any number of new tokens
  DecodeFinish finish;
};

// PagedWrite, compression and PagedScatter in one.
struct PagedAppendParams {
  PagedWriteParams write;  // x_k, x_v, cu_x unused
  PagedKvView cmp;         // k.data is null: nothing is compressed
  CompressKind kind;
  const void* weight_k;
  const void* weight_v;
  const void* pos_emb;
  PagedTuning tuning;
  Scratch scratch;
};

// All of native sparse attention for few queries a sequence.
struct PagedAttnParams {
  PagedPacking packing;
  AttnShape shape;
  Rows q;
  Rows gates;  // as in GateFwdParams
  GateActivation activation;
  PagedKvView cache, cmp;
  int64_t kernel_size;
  int64_t kernel_stride;
  int64_t block_size;
  int64_t topk;
  int64_t init_blocks;
  int64_t local_blocks;
  int64_t window_size;
  GroupReduce group_reduce;
  ScoreDType score_dtype;
  int32_t* topk_idx;  // [Hkv, total_q, topk], contiguous; always there
  Rows o;
  PagedTuning tuning;
  Scratch scratch;
};

// Selected attention for few queries a sequence. mask.index is unused.
struct PagedSelectedParams {
  PagedPacking packing;
  AttnShape shape;
  Rows q;
  PagedKvView cache;
  SelectedMask mask;
  Rows o;
  Stats lse;
  PagedTuning tuning;
  Scratch scratch;
};

}  // namespace fsattn
