#pragma once
#include "params/select_blocks.h"
#include "plan/select_blocks_table.h"

namespace fsattn {

void launch_select_blocks(int row, const SelectBlocksParams& params, Stream stream);

template <SelectBlocksConfig kConfig>
void launch_select_blocks(const SelectBlocksParams& params, Stream stream);

}  // namespace fsattn
