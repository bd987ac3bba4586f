// Tensor copies (sm_90): boxes of a tensor [tokens, heads, dim] to shared memory, 128-byte swizzle.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "base/cuda_check.h"
#include "base/dtype.h"
#include "params/common.h"

namespace fsattn::device {

inline constexpr int kTmaColumns = 64;  // of 16 bits: the 128 bytes of one swizzled row

// A map of 16-bit values in panels with the 128-byte swizzle: sizes, strides in bytes (the first dimension
// is contiguous) and the box, fastest dimension first.
template <int kRank>
CUtensorMap encode_map(void* data, DType dtype, const cuuint64_t (&dims)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    FSATTN_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                       cudaEnableDefault, &found));
    FSATTN_ASSERT(found == cudaDriverEntryPointSuccess);
    return reinterpret_cast<Encode>(function);
  }();
  cuuint32_t ones[kRank];
  for (cuuint32_t& x : ones) x = 1;
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, kRank, data, dims, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FSATTN_ASSERT(result == CUDA_SUCCESS);
  return map;
}

// A box is kTmaColumns columns of `box_heads` heads of `box_tokens` tokens, heads fastest; tokens behind the
// last read as zero.
inline CUtensorMap make_rows_map(const Rows& rows, DType dtype, int64_t tokens, int64_t heads,
                                 int64_t dim, int box_tokens, int box_heads = 1) {
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(rows.head_stride) * 2,
                                 static_cast<cuuint64_t>(rows.token_stride) * 2};
  const cuuint32_t box[3] = {kTmaColumns, static_cast<cuuint32_t>(box_heads),
                             static_cast<cuuint32_t>(box_tokens)};
  return encode_map<3>(rows.data, dtype, dims, strides, box);
}

__device__ __forceinline__ void tma_load_3d(uint32_t dst, const CUtensorMap* map, int column,
                                            int head, int token, uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
      "l"(map), "r"(column), "r"(head), "r"(token), "r"(bar), "l"(policy)
      : "memory");
}

// Writes a box from shared memory, in the bulk group of the calling thread.
__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, uint32_t src, int column,
                                             int head, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(src), "r"(column), "r"(head), "r"(token)
      : "memory");
}

}  // namespace fsattn::device
