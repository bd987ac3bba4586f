#pragma once
#include <cuda_runtime_api.h>

#include "base/check.h"

#define FSATTN_CUDA_CHECK(call)                                                                  \
  do {                                                                                           \
    if (const cudaError_t status = (call); status != cudaSuccess) {                              \
      ::fsattn::detail::fail(::fsattn::ErrorCode::kCuda, std::source_location::current(), #call, \
                             ": ", cudaGetErrorString(status));                                  \
    }                                                                                            \
  } while (0)

namespace fsattn {

// Lets a kernel have `bytes` of dynamic shared memory a CTA. A device that has less (sm_86 and sm_89
// have 99 KiB, sm_80 163, sm_90 227) does not run the kernel: kUnsupported.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  const cudaError_t result =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (result != cudaErrorInvalidValue) {
    FSATTN_CUDA_CHECK(result);
    return;
  }
  cudaGetLastError();  // the refusal must not surface at the caller's next check
  int device = 0, limit = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  detail::fail(ErrorCode::kUnsupported, std::source_location::current(), "device: must have ",
               bytes, " bytes of shared memory a CTA for this head_dim, found ", limit);
}

}  // namespace fsattn
