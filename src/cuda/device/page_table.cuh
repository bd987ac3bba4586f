// Where a token of a paged cache lies. Nothing that the device alone knows is trusted: a token without a page
// has no row.
#pragma once
#include "params/attention.h"

namespace fsattn::device {

// A token's page and its place there; page is -1 where the cache has none.
struct PagePlace {
  int64_t page;
  int row;
};

__device__ __forceinline__ PagePlace find_page(const PageTable& table, int seq, int token) {
  const int page_size = static_cast<int>(table.page_size), slot = token / page_size;
  int page = -1;
  if (slot < table.max_pages) page = __ldg(table.pages + seq * table.seq_stride + slot);
  if (page < 0 || page >= table.num_pages) page = -1;
  return {page, token - slot * page_size};
}

// A tensor copy from there has no row inside the tensor, which reads as zeros.
inline constexpr int kNoKeyRow = -64;

// The first row of keys `key` .. of a sequence, which do not cross a page.
__device__ __forceinline__ int find_key_row(const PagedKeys& pages, int seq, int key, int head) {
  const PagePlace place = find_page(pages.table, seq, key);
  if (place.page < 0) return kNoKeyRow;
  return static_cast<int>(place.page) * static_cast<int>(pages.page_rows) +
         head * static_cast<int>(pages.head_rows) + place.row;
}

}  // namespace fsattn::device
