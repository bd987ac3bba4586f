// Between packed tensors and the pages of a cache.
#pragma once
#include "params/paged.h"
#include "plan/paged_table.h"

namespace fsattn {

template <PagedCopyConfig kConfig>
void launch_paged_write(const PagedWriteParams& params, Stream stream);

template <PagedCopyConfig kConfig>
void launch_paged_scatter(const PagedScatterParams& params, Stream stream);

template <PagedCopyConfig kConfig>
void launch_paged_gather(const PagedGatherParams& params, Stream stream);

// Runs row `row` of kPagedCopyTable.
void launch_paged_write(int row, const PagedWriteParams& params, Stream stream);
void launch_paged_scatter(int row, const PagedScatterParams& params, Stream stream);
void launch_paged_gather(int row, const PagedGatherParams& params, Stream stream);

}  // namespace fsattn
