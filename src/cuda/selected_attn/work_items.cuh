// Work items of the block-major kernels: cut on the device from the block index, taken from a counter.
//
// An item is a run of CSR entries of one part (up to `keys` keys of one block), all inside one segment
// (KV head, range of query tokens). Row r of an item is head r % G of entry r / G. The entries of a
// slot ascend, so a range of tokens is a run that two binary searches find; a part that starts behind
// a query's position leaves that query out in the same way.
#pragma once
#include <cstdint>

#include "cuda/device/fast_div.cuh"
#include "cuda/device/packing.cuh"
#include "cuda/device/page_table.cuh"
#include "cuda/device/scan.cuh"
#include "params/attention.h"
#include "plan/selected_attn_table.h"

namespace fsattn::selected {

using device::FastDiv;
using device::find_key_row;
using device::kFullMask;
using device::kNoKeyRow;
using device::kWarpSize;

struct alignas(16) Item {
  int first;       // of its entries in the CSR row of the KV head
  int count;       // entries; 0 marks the end of the list
  int segment;     // counted from the first one of the launch
  int split;       // which part of the block
  int key_row;     // first row of k and v; kNoKeyRow: the keys are zeros
  int num_keys;    // keys that exist
  int diag_token;  // query token t sees the first t - diag_token + 1 keys of the part
  int number;      // of the item in its segment
};
static_assert(sizeof(Item) == kSelectedItemBytes);

struct ItemArgs {
  Packing packing;
  PagedKeys pages;  // of the forward pass
  BlockIndexView index;
  int block_size, topk, keys, splits, num_parts;
  int range, num_ranges, item_entries, item_capacity;
  int first_segment;        // of this build
  int segments_per_launch;  // items number their segments within a launch
  Item* items;              // [segments of the build, item_capacity]
  int* item_counts;         // [segments of the build]
  int* part_items;          // [segments of the build, num_parts + 1] first item of a part; or null
};

// The first of `count` ascending entries that is at least `bound`.
__device__ __forceinline__ int lower_bound(const int32_t* entries, int count, int64_t bound) {
  // At the ends there is nothing to search: always, where a range is all of a call.
  if (count == 0 || __ldg(entries) >= bound) return 0;
  if (__ldg(entries + count - 1) < bound) return count;
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(entries + middle) < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// All entries of a part between two query tokens, as one item of any length.
__device__ __forceinline__ Item find_part(const ItemArgs& a, int head, int part, int first_token,
                                          int last_token) {
  Item item{};
  const int slot = part / a.splits;
  const int32_t* start = a.index.start + head * (a.index.num_slots + 1) + slot;
  const int begin = __ldg(start), end = __ldg(start + 1);
  if (begin == end) return item;
  const Packing& packing = a.packing;
  const int seq =
      device::find_slot_sequence(packing.cu_k, static_cast<int>(packing.batch), slot, a.block_size);
  const device::KeyRange keys = device::find_keys(packing, seq);
  const int k0 = keys.begin, k1 = keys.end;
  const int block = slot - static_cast<int>(first_block_slot(k0, seq, a.block_size));
  const int64_t key = int64_t{block} * a.block_size + (part - slot * a.splits) * a.keys;
  if (key < 0) return item;  // lengths that do not ascend: the slot has no keys
  item.num_keys = static_cast<int>(min(int64_t{a.keys}, k1 - k0 - key));
  if (item.num_keys <= 0) return item;
  item.key_row = a.pages.defined() ? find_key_row(a.pages, seq, static_cast<int>(key), head)
                                   : static_cast<int>(k0 + key);
  item.split = part - slot * a.splits;
  // Far in the past is as good as any value: every key is visible.
  constexpr int64_t kFar = -(int64_t{1} << 30);
  item.diag_token = static_cast<int>(max(key - device::position_shift(packing, seq), kFar));
  const int32_t* entries = a.index.entry + head * packing.total_q * a.topk + begin;
  const int64_t from = max(first_token, item.diag_token);
  const int low = lower_bound(entries, end - begin, from * a.topk);
  const int high =
      low + lower_bound(entries + low, end - begin - low, int64_t{last_token} * a.topk);
  item.first = begin + low;
  item.count = high - low;
  return item;
}

inline constexpr int kItemThreads = 512;

// Grid (segments of the build). A template so that several translation units may hold it.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    selected_attn_items_kernel(const __grid_constant__ ItemArgs a) {
  __shared__ int warp_sums[kWarpSize];
  const int segment = a.first_segment + blockIdx.x;
  const int head = segment / a.num_ranges;
  const int first_token = (segment - head * a.num_ranges) * a.range;
  const int last_token = min(first_token + a.range, static_cast<int>(a.packing.total_q));
  Item* items = a.items + int64_t{blockIdx.x} * a.item_capacity;
  int* part_items =
      a.part_items == nullptr ? nullptr : a.part_items + int64_t{blockIdx.x} * (a.num_parts + 1);
  int base = 0;
  for (int p0 = 0; p0 < a.num_parts; p0 += kThreads) {
    const int part = p0 + threadIdx.x;
    Item item{};
    if (part < a.num_parts) item = find_part(a, head, part, first_token, last_token);
    const int pieces = (item.count + a.item_entries - 1) / a.item_entries;
    int total;
    const int at = base + device::cta_exclusive_scan(pieces, warp_sums, total);
    if (part_items != nullptr && part < a.num_parts) part_items[part] = at;
    const int end = item.first + item.count;
    item.segment = static_cast<int>(blockIdx.x) % a.segments_per_launch;
    for (int i = 0; i < pieces; ++i) {
      item.number = at + i;
      item.count = min(a.item_entries, end - item.first);
      items[at + i] = item;
      item.first += a.item_entries;
    }
    base += total;
  }
  if (threadIdx.x == 0) {
    a.item_counts[blockIdx.x] = base;
    if (part_items != nullptr) part_items[a.num_parts] = base;
  }
}

// The items of one launch, as a main kernel sees them.
template <class T>
struct ItemListOf {
  const T* items;          // [segments, capacity]
  const int* item_counts;  // [segments]
  int* counter;            // items handed out beyond the first of every CTA; zero before the launch
  int capacity;
  int num_segments;
};
using ItemList = ItemListOf<Item>;

// One warp fills prefix[0 .. num_segments] with the exclusive prefix sum of the item counts.
template <class T>
__device__ __forceinline__ void load_item_prefix(const ItemListOf<T>& list, int* prefix, int lane) {
  int base = 0;
  for (int s0 = 0; s0 < list.num_segments; s0 += kWarpSize) {
    const int segment = s0 + lane;
    const int n = segment < list.num_segments ? list.item_counts[segment] : 0;
    const int inclusive = device::warp_inclusive_scan(n, lane);
    if (segment < list.num_segments) prefix[segment] = base + inclusive - n;
    base += __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
  }
  if (lane == 0) prefix[list.num_segments] = base;
}

// Item number `i` of the launch; count = 0 past the end.
template <class T>
__device__ __forceinline__ T fetch_item(const ItemListOf<T>& list, const int* prefix, int i) {
  T item{};
  if (i >= prefix[list.num_segments]) return item;
  int low = 0, high = list.num_segments;  // prefix[low] <= i < prefix[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (prefix[middle] <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const T* from = list.items + int64_t{low} * list.capacity + (i - prefix[low]);
  auto* to = reinterpret_cast<int4*>(&item);
  to[0] = __ldg(reinterpret_cast<const int4*>(from));
  to[1] = __ldg(reinterpret_cast<const int4*>(from) + 1);
  return item;
}

// What the rows of a segment's items are numbered by.
struct RowSpace {
  int first_segment;  // of the launch
  int num_ranges;
  int range;
  int partials;  // partial rows of one query row
  int splits;
  int group;
  FastDiv group_div;
  FastDiv topk_div;
};

// Where the rows of one item live.
struct ItemRows {
  int kv_head;
  int first_token;
  int partial_slot0;  // of the segment, in the partial buffer of the launch
  int split;
  int num_rows;

  ItemRows() = default;
  __device__ __forceinline__ ItemRows(const RowSpace& space, const Item& item) {
    const int segment = space.first_segment + item.segment;
    kv_head = segment / space.num_ranges;
    first_token = (segment - kv_head * space.num_ranges) * space.range;
    partial_slot0 = item.segment * space.range * space.partials;
    split = item.split;
    num_rows = item.count * space.group;
  }
  // The partial row of head `h` of (query token, place in its row of topk_idx).
  __device__ __forceinline__ int partial_row(const RowSpace& space, int token, int place,
                                             int h) const {
    return partial_slot(space, token, place) * space.group + h;
  }
  // The same without the heads.
  __device__ __forceinline__ int partial_slot(const RowSpace& space, int token, int place) const {
    return partial_slot0 + (token - first_token) * space.partials + place * space.splits + split;
  }
};

}  // namespace fsattn::selected
