// Walks over the sequences of a packed batch. Forced inline for the reason given in cpu/simd.h.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace fsattn::cpu {

// The sequence that holds `token`: the last one that starts at or before it. -1 in front of all.
FSATTN_FORCE_INLINE int64_t find_sequence(const int32_t* cu_seqlens, int64_t batch, int64_t token) {
  int64_t first = 0, last = batch + 1;  // the answer + 1 lies in [first, last]
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (cu_seqlens[middle] <= token) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first - 1;
}

// Calls visit(seq, piece_begin, piece_end) for the part of every sequence inside [begin, end), in order.
template <class Visit>
FSATTN_FORCE_INLINE void for_each_sequence(const int32_t* cu_seqlens, int64_t batch, int64_t begin,
                                           int64_t end, const Visit& visit) {
  int64_t seq = std::max<int64_t>(find_sequence(cu_seqlens, batch, begin), 0);
  for (; seq < batch && cu_seqlens[seq] < end; ++seq) {
    const int64_t piece_begin = std::max<int64_t>(begin, cu_seqlens[seq]);
    const int64_t piece_end = std::min<int64_t>(end, cu_seqlens[seq + 1]);
    if (piece_begin < piece_end) visit(seq, piece_begin, piece_end);
  }
}

}  // namespace fsattn::cpu
