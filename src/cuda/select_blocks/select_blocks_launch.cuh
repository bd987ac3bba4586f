// Starts the kernel of a row of kSelectBlocksTable.
#pragma once
#include "cuda/select_blocks/select_blocks_sm80.cuh"
#include "cuda/select_blocks/select_blocks_sm90.cuh"

namespace fsattn {

template <SelectBlocksConfig kConfig>
void launch_select_blocks(const SelectBlocksParams& params, Stream stream) {
  if constexpr (kConfig.arch == Arch::kSm90a) {
    launch_select_blocks_sm90<kConfig>(params, stream);
  } else {
    FSATTN_ASSERT(!params.pages.defined());
    launch_select_blocks_sm80<kConfig>(params, stream);
  }
}

}  // namespace fsattn
