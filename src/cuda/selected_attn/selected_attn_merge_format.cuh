// The two forms of partial rows as the merge reads them: who holds what of a row.
#pragma once
#include "cuda/selected_attn/partial_row.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"

namespace fsattn::selected {

// What the windows of the rows of a query row have in common.
struct RowRange {
  int exponent = 0;         // the largest one
  bool is_special = false;  // one of them has infinities or NaN

  __device__ __forceinline__ void include(const RowRange& other) {
    exponent = max(exponent, other.exponent);
    is_special |= other.is_special;
  }
  // For all lanes of the row. Returns by how many binades the sum has to be kept lower, so that what stored
  // values are multiplied by is a float.
  template <int kLanes>
  __device__ __forceinline__ int reduce() {
    int both = exponent << 1 | is_special;
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      const int other = __shfl_xor_sync(kFullMask, both, d);
      both = max(both, other) | ((both | other) & 1);
    }
    is_special = both & 1;
    return max((both >> 1) - (Window::kTop + 125), 0);
  }
};

// Rows of the input type: 16 bytes a lane.
template <class Element_, int kLanes_, bool kIsFragments>
struct WholeRows {
  using Element = Element_;
  using Chunk = uint4;
  static constexpr int kLanes = kLanes_, kPairs = 4, kChunks = 1, kLaneBytes = 16,
                       kPlaces = kWarpSize;
  static constexpr bool kHasRange = false;
  static constexpr bool kIsFinite = false;
  static constexpr int min_ctas(bool is_short) { return is_short && kLanes == 16 ? 8 : 5; }

  static __device__ bool is_inside(const FwdArgs& a, int lane) { return lane < a.chunks_v; }
  static __device__ int row_bytes(const FwdArgs& a) { return a.chunks_v * 16; }
  static __device__ float2 no_stats() { return {-INFINITY, 0.f}; }
  static __device__ RowRange range(const float2&) { return {}; }
  static __device__ float sum(const float2& stats) { return stats.y; }
  static __device__ float unit(const float2&, int) { return 1.f; }
  static __device__ __forceinline__ Chunk load(const char* from) {
    return __ldcs(reinterpret_cast<const uint4*>(from));
  }
  static __device__ __forceinline__ void unpack(const Chunk& chunk, uint32_t (&pairs)[kPairs]) {
    pairs[0] = chunk.x;
    pairs[1] = chunk.y;
    pairs[2] = chunk.z;
    pairs[3] = chunk.w;
  }
  // A row as the tiles kernel leaves it in `o`.
  static __device__ __forceinline__ void load_fragments(const char* row, int lane,
                                                        uint32_t (&pairs)[kPairs]) {
    unpack(load(row + lane * 16), pairs);
  }
  // To chunks of consecutive columns, and which ones.
  static __device__ __forceinline__ void order(const float (&x)[2 * kPairs], int lane,
                                               uint4 (&chunks)[kChunks]) {
    chunks[0] = {pack_average<Element>(x[0], x[1]), pack_average<Element>(x[2], x[3]),
                 pack_average<Element>(x[4], x[5]), pack_average<Element>(x[6], x[7])};
    if constexpr (kIsFragments) chunks[0] = order_columns<1>(chunks[0], lane);
  }
  static __device__ __forceinline__ int chunk_column(int lane, int) { return lane * 8; }
};

// Rows of 12 bits a value: of lane q of a quad that wrote them, lane 2 q + j has words 2 j and 2 j + 1 of
// each chunk, which is columns 32 k + 8 i + 2 q and the next one for k below 4, i = 2 j and 2 j + 1.
struct PackedRows {
  using Element = __nv_bfloat16;
  struct Chunk {
    uint2 words[3];
  };
  static constexpr int kLanes = 8, kPairs = 8, kChunks = 2, kLaneBytes = 8, kPlaces = 16;
  static constexpr bool kHasRange = true;
  static constexpr bool kIsFinite = true;  // whatever the bits
  static constexpr int min_ctas(bool is_short) { return is_short ? 6 : 5; }

  static __device__ bool is_inside(const FwdArgs&, int) { return true; }
  static __device__ int row_bytes(const FwdArgs&) { return kPackedRowBytes; }
  static __device__ float2 no_stats() {
    return {-INFINITY, __uint_as_float(Window{Window::kTop, false}.code() + Window::kSumBase)};
  }
  static __device__ RowRange range(const float2& stats) {
    const Window window = Window::from(__float_as_uint(stats.y));
    return {window.exponent, window.has_special};
  }
  static __device__ float sum(const float2& stats) {
    return Window::sum_of(__float_as_uint(stats.y));
  }
  static __device__ float unit(const float2& stats, int down) {
    return power_of_two(range(stats).exponent - Window::kTop - down);
  }
  static __device__ __forceinline__ Chunk load(const char* from) {
    const auto* words = reinterpret_cast<const uint2*>(from);
    return {
        {__ldcs(words), __ldcs(words + 8), __ldcs(words + 16)}
    };
  }
  // Pair 4 b + k is word 2 j + b of chunk k.
  static __device__ __forceinline__ void unpack(const Chunk& chunk, uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      uint32_t host[3], found[4];
#pragma unroll
      for (int k = 0; k < 3; ++k) host[k] = b == 0 ? chunk.words[k].x : chunk.words[k].y;
      find_pairs(host, found);
#pragma unroll
      for (int k = 0; k < 4; ++k) pairs[4 * b + k] = found[k];
    }
  }
  // A row as the tiles kernel leaves it in `o`: 16 bits a value.
  static __device__ __forceinline__ void load_fragments(const char* row, int lane,
                                                        uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint2 words = __ldcs(reinterpret_cast<const uint2*>(row + lane * 8) + k * 8);
      pairs[k] = words.x;
      pairs[4 + k] = words.y;
    }
  }
  // Chunk 2 lane + b is what the four lanes with the same j have of word 2 j + b; neighbours swap one, so
  // that together they store 32 bytes at a time.
  static __device__ __forceinline__ void order(const float (&x)[2 * kPairs], int lane,
                                               uint4 (&chunks)[kChunks]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float* y = x + 8 * b;
      const uint4 words = {pack_average<Element>(y[0], y[1]), pack_average<Element>(y[2], y[3]),
                           pack_average<Element>(y[4], y[5]), pack_average<Element>(y[6], y[7])};
      chunks[b] = order_columns<2>(words, lane / 2);
    }
    const bool is_odd = lane & 1;
    const uint4 give = is_odd ? chunks[0] : chunks[1];
    const uint4 take = {
        __shfl_xor_sync(kFullMask, give.x, 1), __shfl_xor_sync(kFullMask, give.y, 1),
        __shfl_xor_sync(kFullMask, give.z, 1), __shfl_xor_sync(kFullMask, give.w, 1)};
    (is_odd ? chunks[0] : chunks[1]) = take;
  }
  static __device__ __forceinline__ int chunk_column(int lane, int i) {
    return lane / 2 * 32 + i * 16 + lane % 2 * 8;
  }
};

}  // namespace fsattn::selected
