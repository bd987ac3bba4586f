// The fused kernels over a paged cache: attention of a few new tokens a sequence.
#pragma once
#include "params/paged.h"
#include "plan/paged_table.h"

namespace fsattn {

template <DecodeConfig kConfig>
void launch_paged_attn(const PagedAttnParams& params, Stream stream);

template <DecodeConfig kConfig>
void launch_paged_selected(const PagedSelectedParams& params, Stream stream);

// Runs row `row` of kDecodeTable.
void launch_paged_attn(int row, const PagedAttnParams& params, Stream stream);
void launch_paged_selected(int row, const PagedSelectedParams& params, Stream stream);

}  // namespace fsattn
