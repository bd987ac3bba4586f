// The block selection on the CPU. Contract: SelectBlocks in fsattn/ops.h. Signature as in
// params/backend.h; row and stream have no meaning here.
#pragma once
#include "params/select_blocks.h"

namespace fsattn::cpu {

void select_blocks(int row, const SelectBlocksParams& params, Stream stream);

}  // namespace fsattn::cpu
