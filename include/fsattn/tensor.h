#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace fsattn {

enum class DType : int { kFloat64, kFloat32, kFloat16, kBFloat16, kInt32 };
enum class DeviceType : int { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  // CUDA ordinal; 0 on the CPU
  friend bool operator==(const Device&, const Device&) = default;
};

constexpr int kMaxDims = 4;

// A typed, strided view of memory that somebody else owns. Shapes and strides count elements.
// A default-constructed view stands for an absent optional tensor.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device{};
  int ndim = -1;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> stride{};

  bool defined() const { return ndim >= 0; }
  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[static_cast<size_t>(i)];
    return count;
  }
};

// Bytes of one element.
constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  return 0;
}

// A row-major view: the last dimension is contiguous and there are no gaps.
template <class... Sizes>
TensorView contiguous_view(void* data, DType dtype, Device device, Sizes... sizes) {
  static_assert(sizeof...(Sizes) <= kMaxDims);
  TensorView view{data, dtype, device, static_cast<int>(sizeof...(Sizes)), {}, {}};
  const int64_t shape[] = {static_cast<int64_t>(sizes)...};
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[static_cast<size_t>(i)] = shape[i];
    view.stride[static_cast<size_t>(i)] = stride;
    stride *= shape[i];
  }
  return view;
}

}  // namespace fsattn
