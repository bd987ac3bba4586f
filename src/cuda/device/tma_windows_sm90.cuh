// Tensor copies of compressed keys in an order that gives a thread of a wgmma whole blocks.
#pragma once
#include "cuda/device/tma_sm90.cuh"

namespace fsattn::device {

// A box is kTmaColumns columns of 128 windows of a head. Row 8 n + 2 q + e of it holds window 32 q + 2 n + e, so
// that the columns of lane q of an accumulator are 32 windows side by side. The coordinate of e is the first
// window. The map does not know where the last one is: a box must lie inside the tensor.
inline CUtensorMap make_windows_map(const Rows& rows, DType dtype, int64_t windows, int64_t heads,
                                    int64_t dim) {
  const auto pitch = static_cast<cuuint64_t>(rows.token_stride) * 2;
  const cuuint64_t dims[5] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(windows), 4, 16,
                              static_cast<cuuint64_t>(heads)};
  const cuuint64_t strides[4] = {pitch, 32 * pitch, 2 * pitch,
                                 static_cast<cuuint64_t>(rows.head_stride) * 2};
  const cuuint32_t box[5] = {kTmaColumns, 2, 4, 16, 1};
  return encode_map<5>(rows.data, dtype, dims, strides, box);
}

__device__ __forceinline__ void tma_load_windows(uint32_t dst, const CUtensorMap* map, int column,
                                                 int window, int head, uint32_t bar,
                                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %7, %7, %4}], [%5], %6;" ::"r"(dst),
      "l"(map), "r"(column), "r"(window), "r"(head), "r"(bar), "l"(policy), "r"(0)
      : "memory");
}

}  // namespace fsattn::device
