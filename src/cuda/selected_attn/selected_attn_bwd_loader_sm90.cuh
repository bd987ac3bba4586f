// The loader side of selected_attn_bwd_sm90.cuh: what the roles share, the walk over the work items, and
// the copies of K, V and of the gathered rows of Q and dO.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/selected_attn/selected_attn_bwd_args.cuh"

namespace fsattn::selected {

template <SelectedAttnBwdConfig kConfig>
struct BwdWgmmaTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = kConfig.head_dim, kKeys = kSelectedBwdKeys, kRows = 64;
  static_assert((kD == 64 || kD == 128) && kConfig.head_dim_v == kD && kKeys == 64);
  static constexpr int kLoaders = 4, kLoaderRows = kRows / kLoaders, kConsumers = 4;
  static constexpr int kThreads = (kConsumers + kLoaders) * kWarpSize, kCtasPerSm = 2;
  static constexpr int kConsumerRegisters = 208, kLoaderRegisters = 48;
  static constexpr int kStages = 256 / kD, kItems = 4;
  static constexpr int kRowBytes = kD * 2, kChunks = kD / 8;
  static constexpr int kDkvRowBytes = 2 * kRowBytes;     // of a key of an item
  static constexpr int kStepRows = kWarpSize / kChunks;  // of one 16-byte access of a warp
  // Tiles have 64 rows and panels of 64 columns: rows of 128 bytes, 128-byte swizzle.
  static constexpr int kPanels = kD / 64, kPanelBytes = 64 * 128;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  using Gradient = float[kD / 2];  // a thread's part of 64 rows of dK or dV
};

template <class T>
struct alignas(1024) BwdWgmmaStorage {
  unsigned char k[T::kTileBytes], v[T::kTileBytes];
  unsigned char q[T::kStages][T::kTileBytes], dout[T::kStages][T::kTileBytes];
  unsigned char ds[T::kPanelBytes];  // [row][key]
  float lse[T::kStages][T::kRows], delta[T::kStages][T::kRows];
  int limit[T::kStages][T::kRows];    // last visible key
  int out_row[T::kStages][T::kRows];  // partial row of dQ; -1: the row does not exist
  int4 is_masked[T::kStages];         // one number a loader: rows with a limit below the last key
  Item items[T::kItems];
  ItemRows at[T::kItems];
  uint64_t q_full[T::kStages], q_empty[T::kStages];        // with lse, delta and the limits
  uint64_t dout_full[T::kStages], dout_empty[T::kStages];  // with the partial rows
  uint64_t item_full[T::kItems];
  uint64_t kv_full, kv_empty;
  int prefix[kMaxSegmentsPerLaunch + 1];
};

template <class T>
__device__ __forceinline__ void init_barriers(BwdWgmmaStorage<T>& s) {
  const auto init = [](uint64_t& bar, int arrivals) {
    device::mbarrier_init(device::smem_address(&bar), static_cast<uint32_t>(arrivals));
  };
  for (int i = 0; i < T::kStages; ++i) {
    // The copies of every lane, and each loader's own writes.
    init(s.q_full[i], T::kLoaders * (kWarpSize + 1));
    init(s.dout_full[i], T::kLoaders * (kWarpSize + 1));
    init(s.q_empty[i], T::kConsumers);
    init(s.dout_empty[i], T::kConsumers);
  }
  for (int i = 0; i < T::kItems; ++i) init(s.item_full[i], 1);
  init(s.kv_full, 1);
  init(s.kv_empty, T::kConsumers);
  device::mbarrier_init_fence();
}

// Hands item n to everyone. Item n - 4 was in its buffer: K and V of item n - 3 have been asked for, and
// that waited until the consumers, and so all loaders, were done with item n - 4.
template <class T>
__device__ __forceinline__ void announce_item(const BwdArgs& a, BwdWgmmaStorage<T>& s, int n) {
  const int i = n == 0 ? blockIdx.x : gridDim.x + atomicAdd(a.list.counter, 1);
  const Item item = fetch_item(a.list, s.prefix, i);
  s.items[n % T::kItems] = item;
  s.at[n % T::kItems] = ItemRows(a.space, item);
  device::mbarrier_arrive(device::smem_address(&s.item_full[n % T::kItems]));
}

// Waits for item n; true when there is one. Loader 0 announces the item after it first.
template <class T>
__device__ __forceinline__ bool enter_item(const BwdArgs& a, BwdWgmmaStorage<T>& s, int n, int warp,
                                           int lane) {
  device::mbarrier_wait(device::smem_address(&s.item_full[n % T::kItems]), n / T::kItems & 1);
  const bool exists = s.items[n % T::kItems].count > 0;
  if (exists && warp == 0 && lane == 0) announce_item(a, s, n + 1);
  __syncwarp();
  return exists;
}

// A part with fewer than 64 keys: what follows them in memory may belong to another sequence, so its
// rows are zeroed. The whole warp copies; the layout is that of the copy engine.
template <class T>
__device__ __forceinline__ void load_short_part(const BwdArgs& a, BwdWgmmaStorage<T>& s,
                                                const Item& item, int head, int lane) {
  const auto load = [&](const Rows& rows, uint32_t tile) {
    const char* first = static_cast<const char*>(rows.data) +
                        (item.key_row * rows.token_stride + head * rows.head_stride) * 2;
#pragma unroll 1
    for (int c = lane; c < T::kKeys * T::kChunks; c += kWarpSize) {
      const int row = c / T::kChunks, chunk = c % T::kChunks;
      const bool is_inside = row < item.num_keys;
      const uint32_t to = tile + chunk / 8 * T::kPanelBytes + row * 128 + ((chunk ^ row) & 7) * 16;
      device::cp_async_16(to, first + (is_inside ? row * rows.token_stride * 2 + chunk * 16 : 0),
                          is_inside);
    }
  };
  load(a.attn.k, device::smem_address(s.k));
  load(a.attn.v, device::smem_address(s.v));
  device::cp_async_commit();
  device::cp_async_wait<0>();
  device::fence_async_proxy();
  __syncwarp();
  if (lane == 0) device::mbarrier_arrive(device::smem_address(&s.kv_full));
}

// K and V of item n, once the consumers are done with those of the item before.
template <class T>
__device__ __forceinline__ void load_part(const BwdArgs& a, BwdWgmmaStorage<T>& s,
                                          const CUtensorMap* k_map, const CUtensorMap* v_map, int n,
                                          int lane) {
  if (n > 0) device::mbarrier_wait(device::smem_address(&s.kv_empty), (n - 1) & 1);
  const Item& item = s.items[n % T::kItems];
  const int head = s.at[n % T::kItems].kv_head;
  if (item.num_keys < T::kKeys) {
    load_short_part<T>(a, s, item, head, lane);
  } else if (lane == 0) {
    const uint32_t full = device::smem_address(&s.kv_full);
    const uint64_t policy = device::l2_evict_last();
    device::mbarrier_arrive_expect(full, 2 * T::kTileBytes);
    for (int panel = 0; panel < T::kPanels; ++panel) {
      const int column = panel * device::kTmaColumns;
      device::tma_load_3d(device::smem_address(s.k) + panel * T::kPanelBytes, k_map, column, head,
                          item.key_row, full, policy);
      device::tma_load_3d(device::smem_address(s.v) + panel * T::kPanelBytes, v_map, column, head,
                          item.key_row, full, policy);
    }
  }
  __syncwarp();
}

// A row that a lane looks up: lane r < 16 of loader w owns row 16 w + r of a tile.
struct LoaderRow {
  int entry;  // -1: there is none
  int h;
};

template <class T>
__device__ __forceinline__ LoaderRow find_row(const BwdArgs& a, const BwdWgmmaStorage<T>& s, int n,
                                              int tile, int warp, int lane) {
  const Item& item = s.items[n % T::kItems];
  const int r = tile * T::kRows + warp * T::kLoaderRows + lane;
  const int e = a.space.group_div.quotient(r);
  if (lane >= T::kLoaderRows || e >= item.count) return {-1, 0};
  const int32_t* entries = a.entries + s.at[n % T::kItems].kv_head * a.entry_stride;
  return {__ldg(entries + item.first + e), a.space.group_div.remainder(r, e)};
}

// What the consumers need to know of this warp's rows with Q.
template <class T>
__device__ __forceinline__ void publish_rows(const BwdArgs& a, BwdWgmmaStorage<T>& s, int n,
                                             int stage, const LoaderRow& row, int token, int warp,
                                             int lane) {
  const int r = warp * T::kLoaderRows + lane;
  int limit = T::kKeys - 1;
  if (row.entry >= 0) {
    const Item& item = s.items[n % T::kItems];
    limit = min(token - item.diag_token, item.num_keys - 1);
    s.limit[stage][r] = limit;
    const float2* stats = a.stats + token * a.attn.shape.num_heads_q +
                          s.at[n % T::kItems].kv_head * a.space.group + row.h;
    device::cp_async_4(device::smem_address(&s.lse[stage][r]), &stats->x);
    device::cp_async_4(device::smem_address(&s.delta[stage][r]), &stats->y);
  } else if (lane < T::kLoaderRows) {
    s.limit[stage][r] = limit;
    s.lse[stage][r] = s.delta[stage][r] = 0.f;
  }
  const bool is_masked = __any_sync(kFullMask, limit < T::kKeys - 1);
  if (lane == 0) reinterpret_cast<int*>(&s.is_masked[stage])[warp] = is_masked;
}

// And with dO: where dQ goes.
template <class T>
__device__ __forceinline__ void publish_partial_rows(const BwdArgs& a, BwdWgmmaStorage<T>& s, int n,
                                                     int stage, const LoaderRow& row, int token,
                                                     int warp, int lane) {
  int out_row = -1;
  if (row.entry >= 0) {
    const int place = a.space.topk_div.remainder(row.entry, token);
    out_row = s.at[n % T::kItems].partial_row(a.space, token, place, row.h);
    if (row.h == 0) a.marks[a.space.group_div.quotient(out_row)] = 1;
  }
  if (lane < T::kLoaderRows) s.out_row[stage][warp * T::kLoaderRows + lane] = out_row;
}

// The rows of this warp are complete when its copies so far have landed.
__device__ __forceinline__ void announce_rows(uint64_t& full, int lane) {
  device::cp_async_arrive(device::smem_address(&full));
  __syncwarp();
  if (lane == 0) device::mbarrier_arrive(device::smem_address(&full));
}

// Where the lane's row begins in a matrix, in units of 16 bytes.
inline constexpr uint32_t kNoLoaderRow = 0xffffffffu;
__device__ __forceinline__ uint32_t offset_of_row(const Rows& rows, const LoaderRow& row, int token,
                                                  int head0) {
  if (row.entry < 0) return kNoLoaderRow;
  return static_cast<uint32_t>((token * rows.token_stride + (head0 + row.h) * rows.head_stride) /
                               8);
}

// Starts the copies of this warp's 16 rows of a matrix; rows that do not exist become zero.
template <class T>
__device__ __forceinline__ void gather_rows(uint32_t tile, const Rows& rows,
                                            uint32_t offset_of_lane, uint64_t policy, int warp,
                                            int lane) {
  const int first = lane / T::kChunks, chunk = lane % T::kChunks;
  const char* source = static_cast<const char*>(rows.data) + chunk * 16;
  const uint32_t to = tile + (warp * T::kLoaderRows + first) * 128 + chunk / 8 * T::kPanelBytes +
                      ((chunk ^ first) & 7) * 16;
#pragma unroll
  for (int r0 = 0; r0 < T::kLoaderRows; r0 += T::kStepRows) {
    const uint32_t offset = __shfl_sync(kFullMask, offset_of_lane, r0 + first);
    const bool exists = offset != kNoLoaderRow;
    device::cp_async_16_zero_fill((to ^ (r0 % 8 * 16)) + r0 * 128,
                                  source + (exists ? int64_t{offset} * 16 : 0), exists ? 16 : 0,
                                  policy);
  }
}

template <class T>
__device__ __forceinline__ void load_rows(const BwdArgs& a, BwdWgmmaStorage<T>& s,
                                          const CUtensorMap* k_map, const CUtensorMap* v_map,
                                          int warp, int lane) {
  const uint64_t policy = device::l2_evict_last();
  if (warp == 0) {
    load_item_prefix(a.list, s.prefix, lane);
    __syncwarp();
    if (lane == 0) announce_item(a, s, 0);
  }
  int n = 0, tile = 0;
  bool exists = enter_item<T>(a, s, n, warp, lane);
  LoaderRow next = {-1, 0};
  if (exists) next = find_row<T>(a, s, n, tile, warp, lane);
  for (int use = 0; exists; ++use) {
    const LoaderRow row = next;
    const int item = n;
    const bool is_first = tile == 0;
    // The entries of the next tile are under way while this one is gathered.
    if (++tile * T::kRows >= s.at[n % T::kItems].num_rows) {
      tile = 0;
      exists = enter_item<T>(a, s, ++n, warp, lane);
    }
    if (exists) next = find_row<T>(a, s, n, tile, warp, lane);
    const int stage = use % T::kStages, parity = (use / T::kStages & 1) ^ 1;
    const int token = row.entry < 0 ? 0 : a.space.topk_div.quotient(row.entry);
    const int head0 = s.at[item % T::kItems].kv_head * a.space.group;
    const uint32_t q_at = offset_of_row(a.attn.q, row, token, head0);
    const uint32_t dout_at = offset_of_row(a.attn.dout, row, token, head0);
    device::mbarrier_wait(device::smem_address(&s.q_empty[stage]), parity);
    gather_rows<T>(device::smem_address(s.q[stage]), a.attn.q, q_at, policy, warp, lane);
    publish_rows<T>(a, s, item, stage, row, token, warp, lane);
    announce_rows(s.q_full[stage], lane);
    device::mbarrier_wait(device::smem_address(&s.dout_empty[stage]), parity);
    gather_rows<T>(device::smem_address(s.dout[stage]), a.attn.dout, dout_at, policy, warp, lane);
    publish_partial_rows<T>(a, s, item, stage, row, token, warp, lane);
    announce_rows(s.dout_full[stage], lane);
    if (is_first && warp == 0) load_part<T>(a, s, k_map, v_map, item, lane);
  }
  device::cp_async_commit();
  device::cp_async_wait<0>();
}

}  // namespace fsattn::selected
