// Where intermediates lie in the caller's workspace.
#pragma once
#include <cstddef>

#include "base/math.h"

namespace fsattn {

// Every region starts on a multiple of this, as the workspace itself does.
inline constexpr size_t kWorkspaceAlignment = 256;

struct Region {
  size_t offset = 0;
  size_t bytes = 0;
};

// Lays regions one behind the other.
class WorkspaceLayout {
 public:
  Region add(size_t bytes) {
    const Region region{bytes_, bytes};
    bytes_ += round_up(bytes, kWorkspaceAlignment);
    return region;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

}  // namespace fsattn
