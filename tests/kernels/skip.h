// Tells whether a GPU test can run on this machine.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

namespace fsattn::test {

// Prints why and returns true when there is no GPU, or when an argument that starts with "sm90"
// asks for kernels of Hopper's own instructions and the GPU is another one. The caller then exits
// with 0.
inline bool is_skipped(int argc, char** argv) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no CUDA device\n");
    return true;
  }
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "sm90", 4) == 0 && (major != 9 || minor != 0)) {
      std::printf("skipped: needs an sm_90 device, found sm_%d%d\n", major, minor);
      return true;
    }
  }
  return false;
}

}  // namespace fsattn::test
