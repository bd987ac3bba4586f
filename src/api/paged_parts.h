// Checks that the calls over a paged cache share.
#pragma once
#include "api/parts.h"
#include "fsattn/paged.h"
#include "params/paged.h"

namespace fsattn {

// Names of the tensors of a cache in messages.
struct PagedNames {
  const char* k = "k_cache";
  const char* v = "v_cache";
  const char* table = "block_table";
};

enum class PageUse : int { kRead, kWrite };

// Heads and head dims as the cache has them.
PagedShape paged_shape(const Arguments& args, const PagedKv& cache, CacheLayout layout);

// The pages and their table; heads and head dims must be those of `shape`.
PagedKvView check_paged_kv(Arguments& args, const PagedKv& cache, const PagedNames& names,
                           const PagedShape& shape, CacheLayout layout, PageUse use);

AttnShape check_paged_heads(const Arguments& args, const TensorView& q, const PagedShape& kv,
                            double softmax_scale);

PagedPacking check_paged_sequences(Arguments& args, const PagedSequences& seq, int64_t total_q,
                                   const PageTable& table);

// Every page that the sequences use is in the table and in the cache; nothing on CUDA.
void check_pages_used(const Arguments& args, const PagedSequences& seq, const PagedNames& names,
                      const TensorView& block_table, const PageTable& table);
// The same of the compressed cache.
void check_windows_used(const Arguments& args, const PagedSequences& seq, const PagedNames& names,
                        const TensorView& block_table, const PageTable& table, int64_t kernel_size,
                        int64_t kernel_stride);

}  // namespace fsattn
