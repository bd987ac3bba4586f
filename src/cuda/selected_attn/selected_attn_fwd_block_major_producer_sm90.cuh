// The producers of selected_attn_fwd_block_major_sm90.cuh: the warp that walks the work items, and the
// warps that gather query rows. Also the shared memory between them and the consumers.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/copy_sm80.cuh"
#include "cuda/selected_attn/partial_row.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"
#include "cuda/selected_attn/selected_attn_kv_sm90.cuh"

namespace fsattn::selected {

template <SelectedAttnFwdConfig kConfig>
struct WgmmaTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = 128, kKeys = 64;
  static_assert(kConfig.head_dim == kD && kConfig.head_dim_v == kD && kConfig.keys == kKeys);
  static constexpr int kGroups = 3, kStages = 2, kLoaders = kGroups;
  static constexpr int kWarps = kGroups * 4, kItemWarp = kWarps + kLoaders;
  static constexpr int kThreads = (kItemWarp + 1) * kWarpSize;
  static constexpr bool kIsPacked = device::kIsBf16<Element>;  // partial rows: partial_row.cuh
  static constexpr int kRows = 16, kTileRows = 64;  // query rows of a warp, of a warpgroup
  static constexpr int kRowBytes = kD * 2;
  static constexpr int kStageBytes = kTileRows * kRowBytes;
  static constexpr int kPanelBytes = kKeys * 128;  // 64 columns of K or V
  static constexpr int kTileBytes = 2 * kPanelBytes;
  static constexpr int kKvBuffers = 3, kEntryBuffers = kKvBuffers + 1, kMaxEntries = 512;
  static constexpr int kRingOffset = kKvBuffers * 2 * kTileBytes;
  static constexpr int kEntryOffset = kRingOffset + kGroups * kStages * kStageBytes;
  static constexpr int kItemOffset = kEntryOffset + kEntryBuffers * kMaxEntries * 4;
  static constexpr int kWindowOffset = kItemOffset + kEntryBuffers * int{sizeof(Item)};
  static constexpr int kBarrierOffset = kWindowOffset + kKvBuffers * int{sizeof(Window)};
  static constexpr int kBarriers = 3 * kKvBuffers + kEntryBuffers + 2 * kGroups * kStages;
  static constexpr int kPrefixOffset = kBarrierOffset + kBarriers * 8;

  static int smem_bytes(int num_segments) { return kPrefixOffset + (num_segments + 1) * 4; }
};

template <class T>
struct WgmmaSmem {
  unsigned char* memory;
  uint32_t base;

  __device__ uint32_t kv(int buffer) const { return base + buffer * 2 * T::kTileBytes; }
  __device__ uint32_t stage(int group, int s) const {
    return base + T::kRingOffset + (group * T::kStages + s) * T::kStageBytes;
  }
  __device__ int* entries(int buffer) const {
    return reinterpret_cast<int*>(memory + T::kEntryOffset) + buffer * T::kMaxEntries;
  }
  __device__ Item* items() const { return reinterpret_cast<Item*>(memory + T::kItemOffset); }
  __device__ Window* windows() const {
    return reinterpret_cast<Window*>(memory + T::kWindowOffset);
  }
  __device__ int* prefix() const { return reinterpret_cast<int*>(memory + T::kPrefixOffset); }
  __device__ uint32_t bar(int i) const { return base + T::kBarrierOffset + i * 8; }
  __device__ uint32_t kv_full(int buffer) const { return bar(buffer); }
  __device__ uint32_t kv_empty(int buffer) const { return bar(T::kKvBuffers + buffer); }
  __device__ uint32_t window_full(int buffer) const { return bar(2 * T::kKvBuffers + buffer); }
  __device__ uint32_t item_full(int buffer) const { return bar(3 * T::kKvBuffers + buffer); }
  __device__ uint32_t q_full(int group, int s) const {
    return bar(3 * T::kKvBuffers + T::kEntryBuffers + group * T::kStages + s);
  }
  __device__ uint32_t q_empty(int group, int s) const { return q_full(group + T::kGroups, s); }
};

// A ring position: stage and the parity of its current round.
template <class T>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
};

// ---- Item warp ----

// Hands item n and its entries to everyone. Its buffer is free: the item before in it was released by
// all before K, V of item n - 1 could be loaded.
template <class T>
__device__ __forceinline__ void announce_item(const FwdArgs& a, const WgmmaSmem<T>& s,
                                              const Item& item, int n, int lane) {
  const int buffer = n % T::kEntryBuffers;
  if (lane == 0) s.items()[buffer] = item;
  const int head = (a.space.first_segment + item.segment) / a.space.num_ranges;
  const int32_t* from = a.entries + head * a.entry_stride + item.first;
  const uint32_t to = device::smem_address(s.entries(buffer));
  for (int i = lane; i < item.count; i += kWarpSize) device::cp_async_4(to + i * 4, from + i);
  device::cp_async_arrive(s.item_full(buffer));
  if (lane == 0) device::mbarrier_arrive(s.item_full(buffer));
}

// The largest bits of |V| below `limit` in both halves of the words of a tile, for the whole warp.
__device__ __forceinline__ uint32_t largest_below(uint32_t v_tile, uint32_t limit, int lane) {
  uint32_t most[2] = {0, 0};
#pragma unroll 8
  for (int i = 0; i < kPartTileBytes; i += kWarpSize * 16) {
    const uint4 x = device::load_shared_u128(v_tile + i + lane * 16);
    const auto size = [&](uint32_t pair) {
      pair &= 0x7fff7fffu;
      return limit == 0 ? pair : pair & __vcmpltu2(pair, limit);
    };
    most[0] = __vimax3_u16x2(size(x.x), size(x.y), most[0]);
    most[1] = __vimax3_u16x2(size(x.z), size(x.w), most[1]);
  }
  const uint32_t both = __vmaxu2(most[0], most[1]);
  return __reduce_max_sync(kFullMask, max(both >> 16, both & 0xffffu));
}

// The window of the partial rows of an item, from its V.
__device__ __forceinline__ Window find_window(uint32_t v_tile, int lane) {
  constexpr uint32_t kInfinity = 0x7f80;
  const uint32_t largest = largest_below(v_tile, 0, lane);
  if (largest < kInfinity) return Window::of(largest, false);
  return Window::of(largest_below(v_tile, kInfinity * 0x10001u, lane), true);
}

template <class T>
__device__ __forceinline__ void produce_items(const FwdArgs& a, const CUtensorMap* k_map,
                                              const CUtensorMap* v_map, const WgmmaSmem<T>& s,
                                              int lane) {
  const uint64_t policy = device::l2_evict_last();
  const auto take_item = [&] {
    int number = 0;
    if (lane == 0) number = gridDim.x + atomicAdd(a.list.counter, 1);
    return fetch_item(a.list, s.prefix(), __shfl_sync(kFullMask, number, 0));
  };
  Item item = fetch_item(a.list, s.prefix(), blockIdx.x), next = take_item();
  announce_item<T>(a, s, item, 0, lane);
  for (int n = 0; item.count > 0; ++n) {
    const int buffer = n % T::kKvBuffers;
    if (n >= T::kKvBuffers) device::mbarrier_wait(s.kv_empty(buffer), (n / T::kKvBuffers - 1) & 1);
    const int head = a.key_head((a.space.first_segment + item.segment) / a.space.num_ranges);
    if (item.num_keys < T::kKeys) {
      load_short_part(a, s.kv(buffer), s.kv_full(buffer), item.key_row, item.num_keys, head, lane);
    } else if (lane == 0) {
      const uint32_t full = s.kv_full(buffer);
      device::mbarrier_arrive_expect(full, 2 * T::kTileBytes);
      load_part(s.kv(buffer), k_map, v_map, item.key_row, head, full, policy);
    }
    announce_item<T>(a, s, next, n + 1, lane);
    item = next;
    if (next.count > 0) next = take_item();
    if constexpr (T::kIsPacked) {
      device::mbarrier_wait(s.kv_full(buffer), n / T::kKvBuffers & 1);
      const Window window = find_window(s.kv(buffer) + T::kTileBytes, lane);
      if (lane == 0) {
        s.windows()[buffer] = window;
        device::mbarrier_arrive(s.window_full(buffer));
      }
    }
  }
}

// ---- Loader warps ----

// Copies rows of 256 bytes to a stage, two rows a step, 16 lanes each. offset[i]: where row 32 i + lane is.
template <class T>
__device__ __forceinline__ void gather_rows(uint32_t stage, const char* lane_source,
                                            const uint32_t (&offset)[T::kTileRows / kWarpSize],
                                            uint64_t policy, int lane) {
  const int chunk = lane % 16, first_row = lane / 16;
  const uint32_t first =
      stage + chunk / 8 * T::kPanelBytes + first_row * 128 + ((chunk ^ first_row) & 7) * 16;
  // Rows 2 i and 2 i + 8 have the same place in their swizzle.
  const uint32_t to[4] = {first, first ^ 32, first ^ 64, first ^ 96};
#pragma unroll
  for (int i = 0; i < T::kTileRows / 2; ++i) {
    const uint32_t from = __shfl_sync(kFullMask, offset[i / 16], 2 * i % kWarpSize + first_row);
    device::cp_async_16_hint(to[i % 4] + 2 * i * 128, lane_source + uint64_t{from} * 16, policy);
  }
}

template <class T>
__device__ __forceinline__ void load_queries(const FwdArgs& a, const WgmmaSmem<T>& s, int group,
                                             int lane) {
  const uint64_t policy = device::l2_evict_last();
  const char* lane_source = static_cast<const char*>(a.q.data) + lane % 16 * 16;
  asm volatile("" : "+l"(lane_source));  // one address, not one a copy
  const auto token_step = static_cast<uint32_t>(a.q.token_stride / 8),
             head_step = static_cast<uint32_t>(a.q.head_stride / 8);
  Ring<T> ring;
  int first_tile = group;
  for (int n = 0;; ++n) {
    const int buffer = n % T::kEntryBuffers;
    device::mbarrier_wait(s.item_full(buffer), n / T::kEntryBuffers & 1);
    const Item item = s.items()[buffer];
    if (item.count == 0) break;
    const int rows = item.count * a.space.group;
    const int num_tiles = (rows + T::kTileRows - 1) / T::kTileRows;
    const int segment = a.space.first_segment + item.segment;
    const int head0 = a.ranges_div.quotient(segment) * a.space.group;
    const int* entries = s.entries(buffer);
    int tile = first_tile;
    for (; tile < num_tiles; tile += T::kGroups, ring.advance()) {
      uint32_t offset[T::kTileRows / kWarpSize];
#pragma unroll
      for (int i = 0; i < T::kTileRows / kWarpSize; ++i) {
        // Behind the last row of the item: that one again.
        const int r = min(tile * T::kTileRows + i * kWarpSize + lane, rows - 1);
        const int e = a.space.group_div.quotient(r);
        const int token = a.space.topk_div.quotient(entries[e]);
        offset[i] = token * token_step + (head0 + a.space.group_div.remainder(r, e)) * head_step;
      }
      device::mbarrier_wait(s.q_empty(group, ring.stage), ring.parity ^ 1);  // at once in round 0
      gather_rows<T>(s.stage(group, ring.stage), lane_source, offset, policy, lane);
      device::cp_async_arrive(s.q_full(group, ring.stage));
    }
    first_tile = tile - num_tiles;
    // A loader may be kKvBuffers items ahead of the consumers. K and V of item n land only after
    // everyone released the item before in their buffer, so this wait keeps the arrival for item n out
    // of the barrier phase of that one.
    device::mbarrier_wait(s.kv_full(n % T::kKvBuffers), n / T::kKvBuffers & 1);
    if (lane == 0) device::mbarrier_arrive(s.kv_empty(n % T::kKvBuffers));
  }
  device::cp_async_commit();
  device::cp_async_wait<0>();
}

}  // namespace fsattn::selected
