// What the forward kernels of selected attention are given.
#pragma once
#include "cuda/device/element.cuh"
#include "cuda/selected_attn/work_items.cuh"
#include "params/attention.h"

namespace fsattn::selected {

// What the tiles kernel leaves of a query: nothing, a partial row of its popular blocks, or its results.
enum TileMark : uint8_t { kNoTileRow, kTileRow, kFinalRow };

struct FwdArgs {
  Rows q, k, v, o;
  Stats lse;
  const int32_t* entries;  // [Hkv, total_q * topk]
  int64_t entry_stride;    // total_q * topk
  ItemList list;
  RowSpace space;
  FastDiv ranges_div;  // by the ranges of a KV head
  int total_q;
  int chunks_qk;  // 16-byte chunks of a row of q and k
  int chunks_v;   // and of v, o and a partial row
  float scale_log2;
  void* partial;  // [segments of the launch, range, partials, G, Dv] normalised, input dtype
  // [segments of the launch, range, partials, G] {shift, sum}: what the row's exponents (base 2) were
  // relative to and the sum of the powers. Not one lse: to a shift of 2^60 a sum would add nothing.
  // Without marks the sum is kNoPartial before the launch.
  float2* partial_stats;
  // [segments of the launch, range, partials] 1 where the partial rows of the group are written; zero before
  // the launch. Null when the statistics have to tell.
  uint8_t* marks;
  // Of the popular blocks, where there are tiles. Their partial rows are in `o` until the merge.
  float2* tile_stats;   // [Hkv, total_q, G]
  uint8_t* tile_marks;  // [Hkv, total_q] TileMark
  GateFwdParams gate;   // o.data is null without one
  PagedKeys pages;

  // Which head of a row of k and v.
  __device__ int key_head(int head) const { return pages.head_rows > 0 ? 0 : head; }
};

// Bytes 0xff: a NaN that no arithmetic produces.
inline constexpr uint32_t kNoPartial = 0xffffffffu;

// Rows are addressed in units of 16 bytes by 32 bits: 64 GiB.
inline constexpr uint32_t kNoRow = 0xffffffffu;

// Scaled logits (base 2) beyond this size are subtracted after rounding, s * scale - top, and not in one
// fused step: there the rounding of `top` alone, up to 2^-12 here, would show in every exponent.
inline constexpr float kLargeLogit = 4096.f;

// Powers of two by which probabilities are kept below 1, so that the sum over `keys` of them times any
// values of v stays in range: bf16 values reach the end of fp32, fp16 ones do not.
template <class Element>
__device__ constexpr float headroom(int keys) {
  if (!device::kIsBf16<Element>) return 0.f;
  float log2_keys = 0.f;
  for (int n = 1; n < keys; n *= 2) log2_keys += 1.f;
  return log2_keys;
}

// Two results to a packed pair. An average of finite values is finite: rounding may not make it inf.
template <class Element>
__device__ __forceinline__ uint32_t pack_average(float low, float high) {
  uint32_t r;
  if constexpr (device::kIsBf16<Element>) {
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

// The wgmma kernels write partial rows straight from their accumulators. 16-byte chunk 4 k + q of a row
// holds what lane q of the row's quad has of columns 32 k .. 32 k + 31: 8 i + 2 q and the next one, for i
// below 4.
template <class Element>
__device__ __forceinline__ uint4 fragment_chunk(const float (&o)[64], int k, int half,
                                                float scale) {
  const float* x = o + k * 16 + half * 2;
  return {pack_average<Element>(x[0] * scale, x[1] * scale),
          pack_average<Element>(x[4] * scale, x[5] * scale),
          pack_average<Element>(x[8] * scale, x[9] * scale),
          pack_average<Element>(x[12] * scale, x[13] * scale)};
}

// Four lanes, kStep apart, have word w of chunk i in word i of lane w; afterwards lane i has chunk i. Of
// rows of 16-bit values these are chunks of consecutive columns. `lane`: divided by kStep.
template <int kStep>
__device__ __forceinline__ uint4 order_columns(const uint4& chunk, int lane) {
  const uint32_t word[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  const auto pick = [](const uint32_t(&w)[4], int i) {
    return i & 2 ? (i & 1 ? w[3] : w[2]) : (i & 1 ? w[1] : w[0]);
  };
  // Lane q of a quad ends up with word q of all four. Step r swaps with lane q ^ r.
  uint32_t got[4];
#pragma unroll
  for (int r = 0; r < 4; ++r)
    got[r] = __shfl_xor_sync(kFullMask, pick(word, (lane ^ r) & 3), r * kStep);
  return {pick(got, lane & 3), pick(got, (lane ^ 1) & 3), pick(got, (lane ^ 2) & 3),
          pick(got, (lane ^ 3) & 3)};
}

__device__ __forceinline__ uint32_t row_offset16(const Rows& rows, int token, int head) {
  return static_cast<uint32_t>((token * rows.token_stride + head * rows.head_stride) / 8);
}

}  // namespace fsattn::selected
