#include "plan/paged_cuda.h"

namespace fsattn {

int find_paged_copy_row(DType /*dtype*/) { return -1; }

PagedChoice choose_paged_fused(const PagedProblem& /*problem*/, const DeviceInfo& /*device*/) {
  return {};
}

}  // namespace fsattn
