// Where a token of a packed batch stands. The values in cu_seqlens and q_offset are the caller's and
// were never seen by the host: results are clamped so that no address leaves its tensor.
#pragma once
#include <cstdint>

#include "base/math.h"
#include "params/common.h"

namespace fsattn::device {

// The last sequence whose start is at or before `token`; empty sequences own no token. `batch` when
// the token lies behind the last sequence.
__device__ __forceinline__ int find_sequence(const int32_t* cu_seqlens, int batch, int token) {
  int low = 0, high = batch + 1;  // cu_seqlens[low] <= token < cu_seqlens[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldg(cu_seqlens + middle) <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sequence that owns slot `slot` of the block index.
__device__ __forceinline__ int find_slot_sequence(const int32_t* cu_k, int batch, int slot,
                                                  int block_size) {
  int low = 0, high = batch;  // first slot of low <= slot < first slot of high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldg(cu_k + middle) / block_size + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows of k and v that a sequence owns.
struct KeyRange {
  int begin, end;
};

__device__ __forceinline__ KeyRange find_keys(const Packing& packing, int seq) {
  const int total = static_cast<int>(packing.total_k);
  const int begin = min(max(__ldg(packing.cu_k + seq), 0), total);
  return {begin, min(max(__ldg(packing.cu_k + seq + 1), begin), total)};
}

// Position of a sequence's query token 0 (of the whole batch): position = token + shift.
__device__ __forceinline__ int64_t position_shift(const Packing& packing, int seq) {
  const int64_t q0 = __ldg(packing.cu_q + seq), q1 = __ldg(packing.cu_q + seq + 1);
  const int64_t k0 = __ldg(packing.cu_k + seq), k1 = __ldg(packing.cu_k + seq + 1);
  const int64_t offset = packing.q_offset ? __ldg(packing.q_offset + seq) : (k1 - k0) - (q1 - q0);
  return offset - q0;
}

}  // namespace fsattn::device
