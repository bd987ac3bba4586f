// What the forward kernels of selected attention are given.
#pragma once
#include "cuda/selected_attn/work_items.cuh"
#include "params/attention.h"

namespace fsattn::selected {

struct FwdArgs {
  Rows q, k, v, o;
  Stats lse;
  const int32_t* entries;  // [Hkv, total_q * topk]
  int64_t entry_stride;    // total_q * topk
  ItemList list;
  RowSpace space;
  int total_q;
  int chunks_qk;  // 16-byte chunks of a row of q and k
  int chunks_v;   // and of v, o and a partial row
  float scale_log2;
  void* partial;  // [segments of the launch, range, partials, G, Dv] normalised, input dtype
  float*
      partial_lse;  // [segments of the launch, range, partials, G] base 2; kNoPartial if unwritten
};

// Bytes 0xff: a NaN that no arithmetic produces marks a partial row that nobody wrote.
inline constexpr uint32_t kNoPartial = 0xffffffffu;

// Rows are addressed in units of 16 bytes by 32 bits: 64 GiB.
inline constexpr uint32_t kNoRow = 0xffffffffu;

__device__ __forceinline__ uint32_t row_offset16(const Rows& rows, int token, int head) {
  return static_cast<uint32_t>((token * rows.token_stride + head * rows.head_stride) / 8);
}

}  // namespace fsattn::selected
