// Which keys a query sees when they form an interval.
#pragma once
#include <cstdint>

#include "base/math.h"
#include "params/attention.h"

namespace fsattn::device {

// Key i stands at position i * stride + size - 1, the last token it was made from. A query sees the
// keys that stand at most `reach` positions back and none after itself:
//     compressed attention  stride = d, size = l, reach unlimited
//     window attention      stride = 1, size = 1, reach = w
// Both ends of the visible interval grow with the query, so the corners of a tile decide for all.
struct Band {
  int stride;
  int size;
  int reach;

  // Beyond any sequence, and far enough from 2^31 that positions stay 32-bit.
  static constexpr int kUnlimited = 1 << 30;

  // The interval of keys that position t sees is empty when last_key < first_key.
  FSATTN_HOST_DEVICE constexpr int first_key(int t) const {
    const int back = t - reach - (size - 1);
    return back <= 0 ? 0 : (back + stride - 1) / stride;
  }
  FSATTN_HOST_DEVICE constexpr int last_key(int t) const {
    return t < size - 1 ? -1 : (t - (size - 1)) / stride;
  }
  FSATTN_HOST_DEVICE constexpr int64_t first_position(int key) const {
    return int64_t{key} * stride + size - 1;
  }
  FSATTN_HOST_DEVICE constexpr int64_t last_position(int key) const {
    return first_position(key) + reach;
  }
};

// What keys there are: rows of k and v.
struct KeySet {
  Band band;
  const int32_t* cu_keys;  // [batch + 1]
  int total_keys;
  PagedKeys pages = {};  // where the keys are instead, for the forward pass on Hopper
};

}  // namespace fsattn::device
