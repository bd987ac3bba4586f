// The choice of a CUDA kernel: one function an operator, each over its table.
#pragma once
#include "plan/plan.h"

namespace fsattn {

Plan make_cuda_plan(const Problem& problem, const DeviceInfo& device);

// The tables as text: rows an operator, "compress_kv 2, gate 2, ...".
std::string compiled_cuda_kernels();

}  // namespace fsattn
