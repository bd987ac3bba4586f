// CPU tensors for tests: fp64, fp32, bf16, fp16 and int32 in buffers that an Arena owns.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#include "fsattn/tensor.h"

namespace fsattn::test {

// Keeps the memory of all tensors of a test. Buffers start on 256 bytes and hold NaN (all bits set)
// until something is written, so that reading what nobody wrote shows.
class Arena {
 public:
  template <class... Sizes>
  TensorView make(DType dtype, Sizes... sizes) {
    TensorView view = contiguous_view(nullptr, dtype, {}, sizes...);
    view.data = allocate(static_cast<size_t>(view.numel()) * size_of(dtype));
    return view;
  }

  void* allocate(size_t bytes) {
    constexpr size_t kAlignment = 256;
    std::vector<std::byte>& buffer = buffers_.emplace_back(bytes + kAlignment, std::byte{0xff});
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    return buffer.data() + (kAlignment - address % kAlignment) % kAlignment;
  }

 private:
  std::deque<std::vector<std::byte>> buffers_;
};

inline int64_t offset_of(const TensorView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  return i * view.stride[0] + (view.ndim > 1 ? j * view.stride[1] : 0) +
         (view.ndim > 2 ? k * view.stride[2] : 0);
}

// Element access for the two dtypes that the naive loops of the tests use.
inline double get(const TensorView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t at = offset_of(view, i, j, k);
  return view.dtype == DType::kFloat64 ? static_cast<const double*>(view.data)[at]
                                       : double{static_cast<const float*>(view.data)[at]};
}
inline void set(const TensorView& view, double value, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t at = offset_of(view, i, j, k);
  if (view.dtype == DType::kFloat64) {
    static_cast<double*>(view.data)[at] = value;
  } else {
    static_cast<float*>(view.data)[at] = static_cast<float>(value);
  }
}
inline int32_t& index_at(const TensorView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  return static_cast<int32_t*>(view.data)[offset_of(view, i, j, k)];
}

inline void for_each(const TensorView& view,
                     const std::function<void(int64_t, int64_t, int64_t)>& body) {
  const int64_t rows = view.ndim > 1 ? view.shape[1] : 1;
  const int64_t columns = view.ndim > 2 ? view.shape[2] : 1;
  for (int64_t i = 0; i < view.shape[0]; ++i) {
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t k = 0; k < columns; ++k) body(i, j, k);
    }
  }
}

inline void fill_random(const TensorView& view, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  for_each(view, [&](int64_t i, int64_t j, int64_t k) { set(view, normal(generator), i, j, k); });
}

inline TensorView index_tensor(Arena& arena, const std::vector<int32_t>& values) {
  const TensorView view = arena.make(DType::kInt32, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), static_cast<int32_t*>(view.data));
  return view;
}

}  // namespace fsattn::test
