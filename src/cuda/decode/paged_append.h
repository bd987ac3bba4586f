// Appending a few new tokens a sequence to a cache.
#pragma once
#include "params/paged.h"
#include "plan/paged_table.h"

namespace fsattn {

template <PagedCopyConfig kConfig>
void launch_paged_append(const PagedAppendParams& params, Stream stream);

// Runs row `row` of kPagedCopyTable.
void launch_paged_append(int row, const PagedAppendParams& params, Stream stream);

}  // namespace fsattn
