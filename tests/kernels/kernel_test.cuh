// What the tests of single device functions share: arrays on the device, fragment maps, skipping.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/skip.h"
#include "support/test.h"

namespace fsattn::test {

inline void cuda_ok(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Waits for the kernel and reports what it did wrong.
inline void finish_kernel() {
  cuda_ok(cudaGetLastError());
  cuda_ok(cudaDeviceSynchronize());
}

// An array on the device. Made from a size, all its bytes are 0xff: NaN in every floating-point
// type.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    cuda_ok(cudaMalloc(&data_, size * sizeof(T)));
    cuda_ok(cudaMemset(data_, 0xff, size * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    cuda_ok(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> copy(size_);
    cuda_ok(cudaMemcpy(copy.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Deterministic integers in [-limit, limit]: small products and sums of them are exact.
inline int small_integer(uint32_t index, int limit) {
  index = (index ^ (index >> 16)) * 0x85ebca6bu;
  index = (index ^ (index >> 13)) * 0xc2b2ae35u;
  return static_cast<int>((index >> 8) % static_cast<uint32_t>(2 * limit + 1)) - limit;
}

template <class Element>
struct Matrix {
  int rows, cols;
  std::vector<Element> data;
  Matrix(int rows_, int cols_, uint32_t seed, int limit = 4) : rows(rows_), cols(cols_) {
    for (int i = 0; i < rows * cols; ++i) {
      data.push_back(
          Element(static_cast<float>(small_integer(seed + static_cast<uint32_t>(i), limit))));
    }
  }
  // Elements outside read as zero, as the tiles promise.
  float at(int row, int col) const {
    return row < rows && col < cols
               ? static_cast<float>(data[static_cast<size_t>(row * cols + col)])
               : 0.f;
  }
};

// Row and column of accumulator register i of a lane in an m16n8 tile (cuda/device/mma_sm80.cuh).
__device__ inline int fragment_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
__device__ inline int fragment_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Counts elements of got[rows, cols] that differ from want(row, col); bitwise for NaN-free data.
template <class T, class Want>
int count_wrong(const std::vector<T>& got, int rows, int cols, const Want& want) {
  int wrong = 0;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) {
      wrong += !(static_cast<float>(got[static_cast<size_t>(r * cols + c)]) == want(r, c));
    }
  }
  return wrong;
}

}  // namespace fsattn::test

#define FSATTN_KERNEL_TEST_MAIN()                       \
  int main(int argc, char** argv) {                     \
    if (fsattn::test::is_skipped(argc, argv)) return 0; \
    return fsattn::test::run_all(argc, argv);           \
  }
