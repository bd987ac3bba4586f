// selected_attn_fwd, block-major, sm_90a: wgmma, TMA and loader warps; head dims 128, blocks of 64.
//
// Math    as selected_attn_fwd_block_major_sm80.cuh.
// Tiles   one persistent CTA an SM: three consumer warpgroups, each 64 query rows a tile, and a
//         warpgroup of producers.
// Roles   loader warp g gathers the query rows of consumer group g with 16-byte cp.async, three tiles
//         deep, across item borders. The item warp walks the work items: K and V of item n (TMA, two
//         buffers) and the CSR entries of item n + 1 (three buffers). Tiles are dealt out in turn over
//         all items of the CTA: every third goes to the same group, into the next stage of its ring.
// Memory  K, V 2 x 32 KiB, queries 3 groups x 3 stages x 16 KiB (144 KiB), entries 6 KiB; K, V and queries
//         in panels of 64 columns with the 128-byte swizzle, as wgmma reads them.
// Regs    S 32, then P 16 + O 64. 16 warps x 128 are the whole register file.
// Bound   per row and block 256 B read (L2), 264 B written (memory), 32.8 kFLOP. What limits is the
//         consumers' chain of instructions: docs/kernels/selected_attn.md.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/mma_sm80.cuh"
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/wgmma_sm90.cuh"
#include "cuda/selected_attn/partial_row.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"
#include "cuda/selected_attn/selected_attn_kv_sm90.cuh"

namespace fsattn::selected {

template <SelectedAttnFwdConfig kConfig>
struct WgmmaTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = 128, kKeys = 64;
  static_assert(kConfig.head_dim == kD && kConfig.head_dim_v == kD && kConfig.keys == kKeys);
  static constexpr int kGroups = 3, kStages = 3, kLoaders = kGroups;
  static constexpr int kWarps = kGroups * 4, kItemWarp = kWarps + kLoaders;
  static constexpr int kThreads = (kItemWarp + 1) * kWarpSize;
  static constexpr bool kIsPacked = device::kIsBf16<Element>;  // partial rows: partial_row.cuh
  static constexpr int kRows = 16, kTileRows = 64;  // query rows of a warp, of a warpgroup
  static constexpr int kRowBytes = kD * 2;
  static constexpr int kStageBytes = kTileRows * kRowBytes;
  static constexpr int kPanelBytes = kKeys * 128;  // 64 columns of K or V
  static constexpr int kTileBytes = 2 * kPanelBytes;
  static constexpr int kKvBuffers = 2, kEntryBuffers = 3, kMaxEntries = 512;
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
  int stage, parity;
  __device__ explicit Ring(int use) : stage(use % T::kStages), parity(use / T::kStages & 1) {}
};

// ---- Item warp ----

// Hands item n and its entries to everyone. Its buffer is free: item n - 3 was released by all before
// K, V of item n - 1 could be loaded.
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

template <class T>
__device__ __forceinline__ void load_queries(const FwdArgs& a, const WgmmaSmem<T>& s, int group,
                                             int lane) {
  constexpr int kRounds = T::kTileRows / kWarpSize;
  const uint64_t policy = device::l2_evict_last();
  const char* lane_source = static_cast<const char*>(a.q.data) + lane % 16 * 16;
  const int chunk = lane % 16, first_row = lane / 16;
  const uint32_t lane_offset =
      chunk / 8 * T::kPanelBytes + first_row * 128 + ((chunk ^ first_row) & 7) * 16;
  int first_tile = group, use = 0;
  for (int n = 0;; ++n) {
    const int buffer = n % T::kEntryBuffers;
    device::mbarrier_wait(s.item_full(buffer), n / T::kEntryBuffers & 1);
    const Item item = s.items()[buffer];
    if (item.count == 0) break;
    const int rows = item.count * a.space.group;
    const int num_tiles = (rows + T::kTileRows - 1) / T::kTileRows;
    const int head0 = (a.space.first_segment + item.segment) / a.space.num_ranges * a.space.group;
    const int* entries = s.entries(buffer);
    int tile = first_tile;
    for (; tile < num_tiles; tile += T::kGroups, ++use) {
      const Ring<T> ring(use);
      uint32_t offset_of_lane[kRounds];  // of rows lane and lane + 32
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int r = tile * T::kTileRows + i * kWarpSize + lane;
        offset_of_lane[i] = kNoRow;
        if (r >= rows) continue;
        const int e = a.space.group_div.quotient(r);
        const int token = a.space.topk_div.quotient(entries[e]);
        offset_of_lane[i] = row_offset16(a.q, token, head0 + a.space.group_div.remainder(r, e));
      }
      device::mbarrier_wait(s.q_empty(group, ring.stage), ring.parity ^ 1);  // at once in round 0
      const uint32_t to = s.stage(group, ring.stage) + lane_offset;
#pragma unroll
      for (int i = 0; i < T::kTileRows / 2; ++i) {  // two rows a step, 16 lanes each
        const uint32_t offset =
            __shfl_sync(kFullMask, offset_of_lane[i / 16], 2 * i % kWarpSize + lane / 16);
        if (offset == kNoRow) continue;
        device::cp_async_16_hint((to ^ (2 * i % 8 * 16)) + 2 * i * 128,
                                 lane_source + int64_t{offset} * 16, policy);
      }
      device::cp_async_arrive(s.q_full(group, ring.stage));
    }
    first_tile = tile - num_tiles;
    // A loader may be two items ahead of the consumers. K and V of item n land only after everyone
    // released item n - 2, so this wait keeps the arrival for item n out of the barrier phase of
    // item n - 2.
    device::mbarrier_wait(s.kv_full(n % T::kKvBuffers), n / T::kKvBuffers & 1);
    if (lane == 0) device::mbarrier_arrive(s.kv_empty(n % T::kKvBuffers));
  }
  device::cp_async_commit();
  device::cp_async_wait<0>();
}

// ---- Consumer warps ----

// Starts S = Q K^T of a tile.
template <class T>
__device__ __forceinline__ void start_scores(const WgmmaSmem<T>& s, uint32_t kv, int group, int use,
                                             float (&acc)[32]) {
  const Ring<T> ring(use);
  device::mbarrier_wait(s.q_full(group, ring.stage), ring.parity);
  device::fence_async_proxy();
  device::wgmma_fence();
  device::panel_product<typename T::Element>(acc, s.stage(group, ring.stage), kv);
  device::wgmma_commit();
}

// Keys behind a row's limit get -inf. Element i belongs to row half i / 2 % 2.
__device__ __forceinline__ void mask_scores(float (&acc)[32], int limit_of_lane, int lane) {
  const int limit0 = __shfl_sync(kFullMask, limit_of_lane, lane / 4);
  const int limit1 = __shfl_sync(kFullMask, limit_of_lane, 8 + lane / 4);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (i / 4 * 8 + lane % 4 * 2 + i % 2 > (i / 2 % 2 ? limit1 : limit0)) acc[i] = -INFINITY;
  }
}

// Scores -> probabilities as A operands; returns the maximum that they are relative to and this lane's
// sum of both rows.
template <class T>
__device__ __forceinline__ void softmax(float (&acc)[32], float scale_log2, float (&top)[2],
                                        float (&sum)[2], uint32_t (&prob)[4][4]) {
  top[0] = top[1] = -INFINITY;
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int i = 0; i < 32; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], acc[i]);
  top[0] = device::quad_max(top[0]) * scale_log2;
  top[1] = device::quad_max(top[1]) * scale_log2;
  // What a row gets must not depend on the other rows of its tile, some of which do not even exist.
  const bool is_large[2] = {fabsf(top[0]) > kLargeLogit, fabsf(top[1]) > kLargeLogit};
  const float scale[2] = {is_large[0] ? 1.f : scale_log2, is_large[1] ? 1.f : scale_log2};
  if (__any_sync(kFullMask, is_large[0] || is_large[1])) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (is_large[i / 2 % 2]) acc[i] *= scale_log2;
    }
  }
  top[0] += headroom<typename T::Element>(T::kKeys);
  top[1] += headroom<typename T::Element>(T::kKeys);
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const int half = i / 2 % 2;
    const float p0 = device::exp2_approx(fmaf(acc[i], scale[half], -top[half]));
    const float p1 = device::exp2_approx(fmaf(acc[i + 1], scale[half], -top[half]));
    sum[half] += p0 + p1;
    prob[i / 8][i / 2 % 4] = device::pack_pair<typename T::Element>(p0, p1);
  }
}

// Normalised rows to the partial rows, in the order of fragment_chunk().
template <class T>
__device__ __forceinline__ void write_tile(const FwdArgs& a, const float (&o)[64],
                                           const float (&scale)[2], int out_row, int lane) {
  using Element = typename T::Element;
  const uint64_t policy = device::l2_evict_first();
  constexpr int kBytes = T::kIsPacked ? kPackedRowBytes : T::kRowBytes;
  char* partial = static_cast<char*>(a.partial) + lane % 4 * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int to = __shfl_sync(kFullMask, out_row, half * 8 + lane / 4);
    if (to < 0) continue;
    char* row = partial + int64_t{to} * kBytes;
    if constexpr (T::kIsPacked) {
      uint32_t host[4][3], hidden[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = o + i * 4 + half * 2;
        const auto pair = [&](int k) {
          return device::pack_pair<Element>(x[16 * k] * scale[half], x[16 * k + 1] * scale[half]);
        };
        hidden[i] = pair(3);
#pragma unroll
        for (int k = 0; k < 3; ++k) host[i][k] = pair(k);
        hide_pair(hidden[i], host[i]);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        device::store_global_u128_hint(row + k * 64,
                                       {host[0][k], host[1][k], host[2][k], host[3][k]}, policy);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        device::store_global_u128_hint(row + k * 64,
                                       fragment_chunk<Element>(o, k, half, scale[half]), policy);
      }
    }
  }
}

// One warp of a consumer group: 16 rows of one tile.
template <class T>
__device__ __forceinline__ void consume_tile(const FwdArgs& a, const WgmmaSmem<T>& s,
                                             const Item& item, const ItemRows& at,
                                             const int* entries, int tile, uint32_t kv,
                                             const Window& window, int group, int use, int row0,
                                             int lane) {
  const Ring<T> ring(use);
  float acc[32];
  start_scores<T>(s, kv, group, use, acc);
  // Meanwhile: where the rows go (lane r owns row r), and how far they see.
  const int row = tile * T::kTileRows + row0 + lane;
  int out_row = -1, limit = item.num_keys - 1;
  if (lane < T::kRows && row < at.num_rows) {
    const int e = a.space.group_div.quotient(row), entry = entries[e];
    const int token = a.space.topk_div.quotient(entry);
    const int slot = at.partial_slot(a.space, token, a.space.topk_div.remainder(entry, token));
    const int h = a.space.group_div.remainder(row, e);
    out_row = slot * a.space.group + h;
    if (a.marks != nullptr && h == 0) a.marks[slot] = 1;
    limit = min(token - item.diag_token, limit);
  }
  const bool is_masked = __any_sync(kFullMask, limit < T::kKeys - 1);
  device::wgmma_wait_group<0>();
  device::pin_registers(acc);
  if (lane == 0) device::mbarrier_arrive(s.q_empty(group, ring.stage));
  if (is_masked) mask_scores(acc, limit, lane);
  float top[2], sum[2];
  uint32_t prob[4][4];
  softmax<T>(acc, a.scale_log2, top, sum, prob);
  float o[64];
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    device::wgmma_m64n128k16_mn_major<typename T::Element>(
        o, prob[kk], device::wgmma_descriptor(kv + T::kTileBytes + kk * 2048, T::kPanelBytes),
        kk > 0);
  }
  device::wgmma_commit();
  const float total0 = device::quad_sum(sum[0]), total1 = device::quad_sum(sum[1]);
  // Lane r's row: its quad has lane r % 8 * 4 first.
  const int owner = lane % 8 * 4;
  const float2 low = {__shfl_sync(kFullMask, top[0], owner), __shfl_sync(kFullMask, total0, owner)};
  const float2 high = {__shfl_sync(kFullMask, top[1], owner),
                       __shfl_sync(kFullMask, total1, owner)};
  float2 stats = lane < 8 ? low : high;
  if constexpr (T::kIsPacked) stats = pack_stats(stats.x, stats.y, window.code());
  if (out_row >= 0) __stcs(a.partial_stats + out_row, stats);
  float scale[2] = {__fdividef(1.f, total0), __fdividef(1.f, total1)};
  device::wgmma_wait_group<0>();
  device::pin_registers(o);
  if constexpr (T::kIsPacked) {
    if (window.is_far()) {
      const float down = window.first_step();
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] *= down;
    }
    const float down = window.step();
    scale[0] *= down;
    scale[1] *= down;
  }
  write_tile<T>(a, o, scale, out_row, lane);
}

// Where a consumer warp stands in the tiles that are dealt out over all items.
struct TileCursor {
  int first_tile;  // of the next item
  int use;         // tiles taken so far
};

// Item n; returns false behind the last one. kBuffer = n % kKvBuffers is a constant, so that addresses
// and descriptors of K and V are too.
template <class T, int kBuffer>
__device__ __forceinline__ bool consume_item(const FwdArgs& a, const WgmmaSmem<T>& s, int n,
                                             TileCursor& cursor, int warp, int lane) {
  const int group = warp / 4, row0 = warp % 4 * T::kRows, entry_buffer = n % T::kEntryBuffers;
  device::mbarrier_wait(s.item_full(entry_buffer), n / T::kEntryBuffers & 1);
  const Item item = s.items()[entry_buffer];
  if (item.count == 0) return false;
  const ItemRows at(a.space, item);
  const int num_tiles = (at.num_rows + T::kTileRows - 1) / T::kTileRows;
  device::mbarrier_wait(s.kv_full(kBuffer), n / T::kKvBuffers & 1);
  if constexpr (T::kIsPacked) {
    device::mbarrier_wait(s.window_full(kBuffer), n / T::kKvBuffers & 1);
  }
  int tile = cursor.first_tile;
  for (; tile < num_tiles; tile += T::kGroups, ++cursor.use) {
    consume_tile<T>(a, s, item, at, s.entries(entry_buffer), tile, s.kv(kBuffer),
                    s.windows()[kBuffer], group, cursor.use, row0, lane);
  }
  cursor.first_tile = tile - num_tiles;
  __syncwarp();  // all lanes are done with the entries
  if (lane == 0) device::mbarrier_arrive(s.kv_empty(kBuffer));
  return true;
}

template <class T>
__device__ __forceinline__ void consume(const FwdArgs& a, const WgmmaSmem<T>& s, int warp,
                                        int lane) {
  static_assert(T::kKvBuffers == 2);
  TileCursor cursor{warp / 4, 0};
  for (int n = 0;; n += 2) {
    if (!consume_item<T, 0>(a, s, n, cursor, warp, lane)) break;
    if (!consume_item<T, 1>(a, s, n + 1, cursor, warp, lane)) break;
  }
}

template <class T>
__device__ __forceinline__ void init_barriers(const WgmmaSmem<T>& s) {
  for (int i = 0; i < T::kKvBuffers; ++i) {
    device::mbarrier_init(s.kv_full(i), 1);
    device::mbarrier_init(s.kv_empty(i), T::kWarps + T::kLoaders);
    device::mbarrier_init(s.window_full(i), 1);
  }
  // The lanes' copies, and lane 0 for the item itself.
  for (int i = 0; i < T::kEntryBuffers; ++i) device::mbarrier_init(s.item_full(i), kWarpSize + 1);
  for (int g = 0; g < T::kGroups; ++g) {
    for (int i = 0; i < T::kStages; ++i) {
      device::mbarrier_init(s.q_full(g, i), kWarpSize);
      device::mbarrier_init(s.q_empty(g, i), 4);
    }
  }
  device::mbarrier_init_fence();
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    selected_attn_fwd_block_major_wgmma_kernel(const __grid_constant__ FwdArgs a,
                                               const __grid_constant__ CUtensorMap k_map,
                                               const __grid_constant__ CUtensorMap v_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  const WgmmaSmem<T> s{smem, device::smem_address(smem)};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) init_barriers<T>(s);
  __syncthreads();
  if (warp < T::kWarps) {
    consume<T>(a, s, warp, lane);
  } else if (warp < T::kItemWarp) {
    load_queries<T>(a, s, warp - T::kWarps, lane);
  } else {
    load_item_prefix(a.list, s.prefix(), lane);
    __syncwarp();
    produce_items<T>(a, &k_map, &v_map, s, lane);
  }
#endif
}

}  // namespace fsattn::selected
