#pragma once
#include <cstddef>

#include "params/common.h"
#include "plan/workspace.h"

namespace fsattn {

// An empty region has no memory, and its workspace may be null.
inline void* data_in(void* workspace, const Region& region) {
  return region.bytes == 0 ? nullptr : static_cast<std::byte*>(workspace) + region.offset;
}

inline Scratch scratch_in(void* workspace, const Region& region) {
  return {data_in(workspace, region), region.bytes};
}

}  // namespace fsattn
