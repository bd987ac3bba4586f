// Which rows of a packed batch a tile covers.
#pragma once
#include <cstdint>

#include "params/common.h"

namespace fsattn::device {

struct RowRange {
  int begin;
  int count;
};

// Rows of sequence `seq`. Index `batch` stands for the rows behind the last sequence. The values in
// `cu` are not trusted: the range always lies inside the tensor.
__device__ __forceinline__ RowRange rows_of(const int32_t* cu, int batch, int seq, int total) {
  const int begin = min(max(__ldg(cu + seq), 0), total);
  const int end = seq == batch ? total : min(max(__ldg(cu + seq + 1), begin), total);
  return {begin, end - begin};
}

struct TileSlot {
  int seq;
  int first;  // first row of the tile inside its sequence; at or behind the end: nothing to do
};

// Tile `slot` of a packed batch cut into tiles of `tile_rows` rows. The tiles of sequence b start
// at slot cu[b] / tile_rows + b, so num_tile_slots() is enough for any lengths and no length has to
// be known on the host.
__device__ __forceinline__ TileSlot find_tile(const int32_t* cu, int batch, int slot,
                                              int tile_rows) {
  int low = 0, high = batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(cu + middle) / tile_rows + middle <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  // Where lengths are wrong, a slot may lie before the first tile, or farther behind it than an int
  // counts.
  constexpr int64_t kBehindAll = int64_t{1} << 29;
  const int64_t first = (int64_t{slot} - __ldg(cu + low) / tile_rows - low) * tile_rows;
  return {low, static_cast<int>(first < 0 ? kBehindAll : min(first, kBehindAll))};
}

constexpr int64_t num_tile_slots(int64_t total, int64_t batch, int64_t tile_rows) {
  return total / tile_rows + batch + 1;
}

// Position of the first query of a sequence.
__device__ __forceinline__ int query_offset(const Packing& packing, int seq, int num_queries) {
  if (seq >= packing.batch) return 0;
  const int64_t offset = packing.q_offset != nullptr ? int64_t{__ldg(packing.q_offset + seq)}
                                                     : int64_t{__ldg(packing.cu_k + seq + 1)} -
                                                           __ldg(packing.cu_k + seq) - num_queries;
  // Beyond any sequence, and such that no sum of it with a token or a reach overflows.
  return static_cast<int>(min(max(offset, -(int64_t{1} << 29)), int64_t{1} << 30));
}

}  // namespace fsattn::device
