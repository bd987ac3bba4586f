#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define FSATTN_HOST_DEVICE __host__ __device__
#else
#define FSATTN_HOST_DEVICE
#endif

namespace fsattn {

template <class Int>
FSATTN_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
  return (value + divisor - 1) / divisor;
}

template <class Int>
FSATTN_HOST_DEVICE constexpr Int round_up(Int value, Int multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Complete compression windows in a sequence of `length` tokens: floor((L - l) / d) + 1, 0 if L < l.
FSATTN_HOST_DEVICE constexpr int64_t num_windows(int64_t length, int64_t kernel_size,
                                                 int64_t kernel_stride) {
  return length < kernel_size ? 0 : (length - kernel_size) / kernel_stride + 1;
}

// Compressed keys that the query at `position` sees: those whose window ends at or before it.
FSATTN_HOST_DEVICE constexpr int64_t num_visible_windows(int64_t position, int64_t kernel_size,
                                                         int64_t kernel_stride) {
  return num_windows(position + 1, kernel_size, kernel_stride);
}

// The first slot of a sequence's blocks in the block index. Sequences never overlap, because
// ceil(L / S) <= (start + L) / S - start / S + 1.
FSATTN_HOST_DEVICE constexpr int64_t first_block_slot(int64_t seq_start_k, int64_t seq_idx,
                                                      int64_t block_size) {
  return seq_start_k / block_size + seq_idx;
}

}  // namespace fsattn
