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
