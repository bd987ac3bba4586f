// What a plan needs to know of the device that it is made for.
#pragma once
#include <cstddef>
#include <string>

#include "base/dtype.h"
#include "fsattn/tensor.h"

namespace fsattn {

struct DeviceInfo {
  DeviceType type = DeviceType::kCpu;
  Arch arch = Arch::kCpu;    // the newest instruction set of ours that the device runs
  std::string name = "cpu";  // CUDA: the product name; CPU: the instruction set, filled in by run/
  int num_threads = 1;       // CPU: threads of a parallel loop
  int compute_capability = 0;  // CUDA: 10 * major + minor
  int num_sms = 0;             // CUDA
  size_t smem_per_cta = 0;     // CUDA: bytes of shared memory that one CTA can opt in to
};

// CUDA devices are asked once and remembered. Throws kUnsupported for CUDA tensors when the library
// was built without CUDA or the GPU is older than sm_80, kInvalidType for an ordinal that does not
// exist.
DeviceInfo query_device(const Device& device);

// Whether the library was built with the CUDA backend.
bool has_cuda_backend();

// CUDA devices that this process sees; 0 without CUDA in the build or without a driver.
int num_cuda_devices();

// Kernels are launched on the current device: throws kInvalidArgument when a CUDA tensor lives on
// another one.
void check_current_device(const Device& device);

}  // namespace fsattn
