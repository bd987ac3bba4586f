#include "base/device.h"

#include <mutex>
#include <vector>

#include "base/check.h"
#include "base/threads.h"

#ifdef FSATTN_WITH_CUDA
#include "base/cuda_check.h"
#endif

namespace fsattn {
namespace {

DeviceInfo query_cpu() {
  DeviceInfo info;
  info.num_threads = num_cpu_threads();
  return info;
}

#ifdef FSATTN_WITH_CUDA

constexpr int kOldest = 80;

int attribute_of(int ordinal, cudaDeviceAttr attribute) {
  int value = 0;
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, ordinal));
  return value;
}

DeviceInfo query_cuda(int ordinal) {
  cudaDeviceProp properties;
  FSATTN_CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
  DeviceInfo info;
  info.type = DeviceType::kCuda;
  info.name = properties.name;
  info.compute_capability = 10 * properties.major + properties.minor;
  info.num_sms = attribute_of(ordinal, cudaDevAttrMultiProcessorCount);
  info.smem_per_cta =
      static_cast<size_t>(attribute_of(ordinal, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  FSATTN_CHECK(info.compute_capability >= kOldest, kUnsupported, "device: the CUDA kernels need a ",
               "GPU of compute capability 8.0 or newer, found ", info.name, " with ",
               properties.major, ".", properties.minor);
  // Code for sm_90a runs on compute capability 9.0 alone; newer GPUs run the sm_80 kernels.
  info.arch = info.compute_capability == 90 ? Arch::kSm90a : Arch::kSm80;
  return info;
}

#endif

}  // namespace

#ifdef FSATTN_WITH_CUDA

bool has_cuda_backend() { return true; }

int num_cuda_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

DeviceInfo query_device(const Device& device) {
  if (device.type == DeviceType::kCpu) return query_cpu();
  static std::mutex mutex;
  static std::vector<DeviceInfo> known(static_cast<size_t>(num_cuda_devices()));
  FSATTN_CHECK(device.index >= 0 && static_cast<size_t>(device.index) < known.size(), kInvalidType,
               "device: the CUDA ordinal must be below ", known.size(), ", found ", device.index);
  const std::lock_guard lock(mutex);
  DeviceInfo& info = known[static_cast<size_t>(device.index)];
  if (info.compute_capability == 0) info = query_cuda(device.index);
  return info;
}

void check_current_device(const Device& device) {
  if (device.type == DeviceType::kCpu) return;
  int current = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&current));
  FSATTN_CHECK(current == device.index, kInvalidArgument,
               "device: the current CUDA device must be that of the tensors (", device.index,
               "), found ", current);
}

#else

bool has_cuda_backend() { return false; }

int num_cuda_devices() { return 0; }

DeviceInfo query_device(const Device& device) {
  FSATTN_CHECK(device.type == DeviceType::kCpu, kUnsupported,
               "device: CUDA tensors need a build with the CUDA backend, found a CPU-only build");
  return query_cpu();
}

void check_current_device(const Device&) {}

#endif

}  // namespace fsattn
