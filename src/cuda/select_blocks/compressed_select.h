#pragma once
#include "params/attention.h"
#include "params/select_blocks.h"
#include "plan/compressed_select_table.h"

namespace fsattn {

// Both of the same queries and keys; lse of `select` is that of `attn`.
void launch_compressed_select(int row, const CompressedAttnFwdParams& attn,
                              const SelectBlocksParams& select, Stream stream);

template <CompressedSelectConfig kConfig>
void launch_compressed_select(const CompressedAttnFwdParams& attn, const SelectBlocksParams& select,
                              Stream stream);

}  // namespace fsattn
