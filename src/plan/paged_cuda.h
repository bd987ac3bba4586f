// The kernels over a paged cache on CUDA: which row serves a problem and what scratch it needs. Pure
// functions. row is -1 where no kernel fits.
#pragma once
#include <string>

#include "base/device.h"
#include "params/paged.h"
#include "plan/paged_problem.h"

namespace fsattn {

struct PagedChoice {
  int row = -1;
  PagedTuning tuning{};
  size_t scratch_bytes = 0;
  std::string reason;
};

// The row of paged_write, paged_scatter and paged_gather.
int find_paged_copy_row(DType dtype);

// The fused kernels: paged_append, paged_attn or paged_selected, by problem.op.
PagedChoice choose_paged_fused(const PagedProblem& problem, const DeviceInfo& device);

}  // namespace fsattn
