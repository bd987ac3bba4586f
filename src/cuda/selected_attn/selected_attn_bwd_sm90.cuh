// selected_attn_bwd, block-major, sm_90a: wgmma, TMA and loader warps; head
// dims 128, parts of 64 keys.
//
// Math    as selected_attn_bwd_sm80.cuh, per tile of 64 rows.
// Tiles   persistent CTAs, two an SM, that share nothing: one consumer
// warpgroup and four loader warps.
//         While one CTA waits for its products, the other one computes.
// Roles   the consumers hold dK, dV of the item in registers and keys in the
// rows of the accumulators:
//         S^T = K Q^T and dP^T = V dO^T from shared memory; P^T and dS^T are A
//         operands as they are; dS goes through shared memory for dQ = dS K. A
//         loader warp gathers 16 rows of Q and dO, two tiles deep, across item
//         borders. Loader 0 also walks the work items and brings K and V.
// Memory  K, V 32 KiB, two stages of Q and dO 64 KiB, dS 8 KiB. dQ leaves
// through the
//         stage of its dO.
// Regs    dK 64, dV 64, 32 of S, dP or dQ: 208 a consumer thread, 48 a loader
//         thread. With S and dP at the same time ptxas serialises the products.
// Bound   as selected_attn_bwd_sm80.cuh; tensor cores 1280 clocks a tile.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/device/wgmma_ss_sm90.cuh"
#include "cuda/selected_attn/selected_attn_bwd_args.cuh"

namespace fsattn::selected {

template <SelectedAttnBwdConfig kConfig> struct BwdWgmmaTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = 128, kKeys = kSelectedBwdKeys, kRows = 64;
  static_assert(kConfig.head_dim == kD && kConfig.head_dim_v == kD &&
                kKeys == 64);
  static constexpr int kLoaders = 4, kLoaderRows = kRows / kLoaders,
                       kConsumers = 4;
  static constexpr int kThreads = (kConsumers + kLoaders) * kWarpSize,
                       kCtasPerSm = 2;
  static constexpr int kConsumerRegisters = 208, kLoaderRegisters = 48;
  static constexpr int kStages = 2, kItems = 4;
  static constexpr int kRowBytes = kD * 2, kChunks = kD / 8;
  // Tiles have 64 rows and two panels of 64 columns: rows of 128 bytes,
  // 128-byte swizzle.
  static constexpr int kPanelBytes = 64 * 128, kTileBytes = 2 * kPanelBytes;
};

template <class T> struct alignas(1024) BwdWgmmaStorage {
  unsigned char k[T::kTileBytes], v[T::kTileBytes];
  unsigned char q[T::kStages][T::kTileBytes], dout[T::kStages][T::kTileBytes];
  unsigned char ds[T::kPanelBytes]; // [row][key]
  float lse[T::kStages][T::kRows], delta[T::kStages][T::kRows];
  int limit[T::kStages][T::kRows]; // last visible key
  int out_row[T::kStages]
             [T::kRows];      // partial row of dQ; -1: the row does not exist
  int4 is_masked[T::kStages]; // one number a loader: rows with a limit below
                              // the last key
  Item items[T::kItems];
  ItemRows at[T::kItems];
  uint64_t rows_full[T::kStages], rows_empty[T::kStages];
  uint64_t item_full[T::kItems];
  uint64_t kv_full, kv_empty;
  int prefix[kMaxSegmentsPerLaunch + 1];
};

template <class T>
__device__ __forceinline__ void init_barriers(BwdWgmmaStorage<T> &s) {
  const auto init = [](uint64_t &bar, int arrivals) {
    device::mbarrier_init(device::smem_address(&bar),
                          static_cast<uint32_t>(arrivals));
  };
  for (int i = 0; i < T::kStages; ++i) {
    // The copies of every lane, and each loader's own writes.
    init(s.rows_full[i], T::kLoaders * (kWarpSize + 1));
    init(s.rows_empty[i], T::kConsumers);
  }
  for (int i = 0; i < T::kItems; ++i)
    init(s.item_full[i], 1);
  init(s.kv_full, 1);
  init(s.kv_empty, T::kConsumers);
  device::mbarrier_init_fence();
}

// ---- Loader warps ----

// Hands item n to everyone. Item n - 4 was in its buffer: K and V of item n - 3
// have been asked for, and that waited until the consumers, and so all loaders,
// were done with item n - 4.
template <class T>
__device__ __forceinline__ void announce_item(const BwdArgs &a,
                                              BwdWgmmaStorage<T> &s, int n) {
  const int i = n == 0 ? blockIdx.x : gridDim.x + atomicAdd(a.list.counter, 1);
  const Item item = fetch_item(a.list, s.prefix, i);
  s.items[n % T::kItems] = item;
  s.at[n % T::kItems] = ItemRows(a.space, item);
  device::mbarrier_arrive(device::smem_address(&s.item_full[n % T::kItems]));
}

// Waits for item n; true when there is one. Loader 0 announces the item after
// it first.
template <class T>
__device__ __forceinline__ bool
enter_item(const BwdArgs &a, BwdWgmmaStorage<T> &s, int n, int warp, int lane) {
  device::mbarrier_wait(device::smem_address(&s.item_full[n % T::kItems]),
                        n / T::kItems & 1);
  const bool exists = s.items[n % T::kItems].count > 0;
  if (exists && warp == 0 && lane == 0)
    announce_item(a, s, n + 1);
  __syncwarp();
  return exists;
}

// A part with fewer than 64 keys: what follows them in memory may belong to
// another sequence, so its rows are zeroed. The whole warp copies; the layout
// is that of the copy engine.
template <class T>
__device__ __forceinline__ void
load_short_part(const BwdArgs &a, BwdWgmmaStorage<T> &s, const Item &item,
                int head, int lane) {
  const auto load = [&](const Rows &rows, uint32_t tile) {
    const char *first =
        static_cast<const char *>(rows.data) +
        (item.key_row * rows.token_stride + head * rows.head_stride) * 2;
#pragma unroll 1
    for (int c = lane; c < T::kKeys * T::kChunks; c += kWarpSize) {
      const int row = c / T::kChunks, chunk = c % T::kChunks;
      const bool is_inside = row < item.num_keys;
      const uint32_t to = tile + chunk / 8 * T::kPanelBytes + row * 128 +
                          ((chunk ^ row) & 7) * 16;
      device::cp_async_16(
          to,
          first + (is_inside ? row * rows.token_stride * 2 + chunk * 16 : 0),
          is_inside);
    }
  };
  load(a.attn.k, device::smem_address(s.k));
  load(a.attn.v, device::smem_address(s.v));
  device::cp_async_commit();
  device::cp_async_wait<0>();
  device::fence_async_proxy();
  __syncwarp();
  if (lane == 0)
    device::mbarrier_arrive(device::smem_address(&s.kv_full));
}

// K and V of item n, once the consumers are done with those of the item before.
template <class T>
__device__ __forceinline__ void
load_part(const BwdArgs &a, BwdWgmmaStorage<T> &s, const CUtensorMap *k_map,
          const CUtensorMap *v_map, int n, int lane) {
  if (n > 0)
    device::mbarrier_wait(device::smem_address(&s.kv_empty), (n - 1) & 1);
  const Item &item = s.items[n % T::kItems];
  const int head = s.at[n % T::kItems].kv_head;
  if (item.num_keys < T::kKeys) {
    load_short_part<T>(a, s, item, head, lane);
  } else if (lane == 0) {
    const uint32_t full = device::smem_address(&s.kv_full);
    const uint64_t policy = device::l2_evict_last();
    device::mbarrier_arrive_expect(full, 2 * T::kTileBytes);
    for (int panel = 0; panel < 2; ++panel) {
      const int column = panel * device::kTmaColumns;
      device::tma_load_3d(device::smem_address(s.k) + panel * T::kPanelBytes,
                          k_map, column, head, item.key_row, full, policy);
      device::tma_load_3d(device::smem_address(s.v) + panel * T::kPanelBytes,
                          v_map, column, head, item.key_row, full, policy);
    }
  }
  __syncwarp();
}

// A row that a lane looks up: lane r < 16 of loader w owns row 16 w + r of a
// tile.
struct LoaderRow {
  int entry; // -1: there is none
  int h;
};

template <class T>
__device__ __forceinline__ LoaderRow find_row(const BwdArgs &a,
                                              const BwdWgmmaStorage<T> &s,
                                              int n, int tile, int warp,
                                              int lane) {
  const Item &item = s.items[n % T::kItems];
  const int r = tile * T::kRows + warp * T::kLoaderRows + lane;
  const int e = a.space.group_div.quotient(r);
  if (lane >= T::kLoaderRows || e >= item.count)
    return {-1, 0};
  const int32_t *entries =
      a.entries + s.at[n % T::kItems].kv_head * a.entry_stride;
  return {__ldg(entries + item.first + e), a.space.group_div.remainder(r, e)};
}

// What the consumers need to know of this warp's rows.
template <class T>
__device__ __forceinline__ void
publish_rows(const BwdArgs &a, BwdWgmmaStorage<T> &s, int n, int stage,
             const LoaderRow &row, int token, int warp, int lane) {
  const int r = warp * T::kLoaderRows + lane;
  int limit = T::kKeys - 1;
  if (row.entry >= 0) {
    const Item &item = s.items[n % T::kItems];
    const ItemRows &at = s.at[n % T::kItems];
    const int place = a.space.topk_div.remainder(row.entry, token);
    const int out_row = at.partial_row(a.space, token, place, row.h);
    limit = min(token - item.diag_token, item.num_keys - 1);
    s.limit[stage][r] = limit;
    s.out_row[stage][r] = out_row;
    if (row.h == 0)
      a.marks[a.space.group_div.quotient(out_row)] = 1;
    const float2 *stats = a.stats + token * a.attn.shape.num_heads_q +
                          at.kv_head * a.space.group + row.h;
    device::cp_async_4(device::smem_address(&s.lse[stage][r]), &stats->x);
    device::cp_async_4(device::smem_address(&s.delta[stage][r]), &stats->y);
  } else if (lane < T::kLoaderRows) {
    s.limit[stage][r] = limit;
    s.out_row[stage][r] = -1;
    s.lse[stage][r] = s.delta[stage][r] = 0.f;
  }
  const bool is_masked = __any_sync(kFullMask, limit < T::kKeys - 1);
  if (lane == 0)
    reinterpret_cast<int *>(&s.is_masked[stage])[warp] = is_masked;
}

// Starts the copies of this warp's 16 rows of a matrix; rows that do not exist
// become zero.
template <class T>
__device__ __forceinline__ void
gather_rows(uint32_t tile, const Rows &rows, const LoaderRow &row, int token,
            int head0, uint64_t policy, int warp, int lane) {
  const auto offset_of_lane = static_cast<uint32_t>(
      (token * rows.token_stride + (head0 + row.h) * rows.head_stride) / 8);
  const unsigned exists = __ballot_sync(kFullMask, row.entry >= 0);
  const int half = lane / 16, chunk = lane % 16;
  const char *source = static_cast<const char *>(rows.data) + chunk * 16;
  const uint32_t to = tile + (warp * T::kLoaderRows + half) * 128 +
                      chunk / 8 * T::kPanelBytes + ((chunk ^ half) & 7) * 16;
#pragma unroll
  for (int i = 0; i < T::kLoaderRows / 2;
       ++i) { // two rows a step, 16 lanes each
    const int r = 2 * i + half;
    const uint32_t offset = __shfl_sync(kFullMask, offset_of_lane, r);
    device::cp_async_16_zero_fill((to ^ (2 * i % 8 * 16)) + i * 256,
                                  source + int64_t{offset} * 16,
                                  exists >> r & 1 ? 16 : 0, policy);
  }
}

template <class T>
__device__ __forceinline__ void
load_rows(const BwdArgs &a, BwdWgmmaStorage<T> &s, const CUtensorMap *k_map,
          const CUtensorMap *v_map, int warp, int lane) {
  const uint64_t policy = device::l2_evict_last();
  if (warp == 0) {
    load_item_prefix(a.list, s.prefix, lane);
    __syncwarp();
    if (lane == 0)
      announce_item(a, s, 0);
  }
  int n = 0, tile = 0;
  bool exists = enter_item<T>(a, s, n, warp, lane);
  LoaderRow next = {-1, 0};
  if (exists)
    next = find_row<T>(a, s, n, tile, warp, lane);
  for (int use = 0; exists; ++use) {
    const LoaderRow row = next;
    const int item = n;
    const bool is_first = tile == 0;
    // The entries of the next tile are under way while this one is gathered.
    if (++tile * T::kRows >= s.at[n % T::kItems].num_rows) {
      tile = 0;
      exists = enter_item<T>(a, s, ++n, warp, lane);
    }
    if (exists)
      next = find_row<T>(a, s, n, tile, warp, lane);
    const int stage = use % T::kStages;
    device::mbarrier_wait(device::smem_address(&s.rows_empty[stage]),
                          (use / T::kStages & 1) ^ 1);
    const int token = row.entry < 0 ? 0 : a.space.topk_div.quotient(row.entry);
    const int head0 = s.at[item % T::kItems].kv_head * a.space.group;
    publish_rows<T>(a, s, item, stage, row, token, warp, lane);
    gather_rows<T>(device::smem_address(s.q[stage]), a.attn.q, row, token,
                   head0, policy, warp, lane);
    gather_rows<T>(device::smem_address(s.dout[stage]), a.attn.dout, row, token,
                   head0, policy, warp, lane);
    const uint32_t full = device::smem_address(&s.rows_full[stage]);
    device::cp_async_arrive(full);
    __syncwarp();
    if (lane == 0)
      device::mbarrier_arrive(full);
    if (is_first && warp == 0)
      load_part<T>(a, s, k_map, v_map, item, lane);
  }
  device::cp_async_commit();
  device::cp_async_wait<0>();
}

// ---- Consumer warps ----

__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, 128;" ::: "memory");
}

// Issues acc = A B^T over 128 columns; A and B are tiles of 64 rows.
template <class T>
__device__ __forceinline__ void start_scores(float (&acc)[32], uint32_t a,
                                             uint32_t b) {
#pragma unroll
  for (int kk = 0; kk < T::kD / 16; ++kk) {
    const uint32_t at = kk / 4 * T::kPanelBytes + kk % 4 * 32;
    device::wgmma_ss_m64n64k16<typename T::Element>(
        acc, device::wgmma_descriptor(a + at, 16),
        device::wgmma_descriptor(b + at, 16), kk > 0);
  }
  device::wgmma_commit();
}

// Issues acc += X^T B for packed X^T [64 keys][64 rows] and a tile B of 64
// rows.
template <class T>
__device__ __forceinline__ void
start_gradient(float (&acc)[64], const uint32_t (&x)[16], uint32_t b) {
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const uint32_t fragment[4] = {x[4 * kk], x[4 * kk + 1], x[4 * kk + 2],
                                  x[4 * kk + 3]};
    device::wgmma_m64n128k16_mn_major<typename T::Element>(
        acc, fragment, device::wgmma_descriptor(b + kk * 2048, T::kPanelBytes),
        1);
  }
  device::wgmma_commit();
}

// P^T, packed in pairs of rows. Word 2 n + half: rows 8 n + 2 (lane % 4) and
// the next one, key 16 warp + lane / 4 + 8 half.
template <class T>
__device__ __forceinline__ void
probabilities(uint32_t (&prob)[16], const float (&score)[32], const float *lse,
              float scale_log2, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 shift =
        reinterpret_cast<const float2 *>(lse)[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // P is at most 1; where logits are so large that lse lacks the digits, it
      // may not explode.
      const float x0 =
          fminf(fmaf(score[4 * n + 2 * half], scale_log2, -shift.x), 0.f);
      const float x1 =
          fminf(fmaf(score[4 * n + 2 * half + 1], scale_log2, -shift.y), 0.f);
      prob[2 * n + half] = device::pack_pair<typename T::Element>(
          device::exp2_approx(x0), device::exp2_approx(x1));
    }
  }
}

// Keys behind a row's limit get probability zero.
__device__ __forceinline__ void
mask_probabilities(uint32_t (&prob)[16], const int *limit, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int2 last = reinterpret_cast<const int2 *>(limit)[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp * 16 + lane / 4 + half * 8;
      prob[2 * n + half] &= (key <= last.x ? 0x0000ffffu : 0u) |
                            (key <= last.y ? 0xffff0000u : 0u);
    }
  }
}

// dS^T = P^T (dP^T - delta), packed like P^T.
template <class T>
__device__ __forceinline__ void
score_gradient(uint32_t (&ds)[16], const float (&dp)[32],
               const uint32_t (&prob)[16], const float *delta, int lane) {
  using Element = typename T::Element;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 d = reinterpret_cast<const float2 *>(delta)[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 p = device::unpack_pair<Element>(prob[2 * n + half]);
      ds[2 * n + half] =
          device::pack_pair<Element>(p.x * (dp[4 * n + 2 * half] - d.x),
                                     p.y * (dp[4 * n + 2 * half + 1] - d.y));
    }
  }
}

// dS^T of this warp's 16 keys -> dS [row][key], the A operand of dQ.
__device__ __forceinline__ void store_score_gradient(uint32_t tile,
                                                     const uint32_t (&ds)[16],
                                                     int warp, int lane) {
  const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  const uint32_t to = tile + row * 128 + ((chunk ^ row) & 7) * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) { // 16 rows
    device::stmatrix_x4_trans(to + i * 2048, ds[4 * i], ds[4 * i + 1],
                              ds[4 * i + 2], ds[4 * i + 3]);
  }
}

// Issues 64 columns of dQ = dS K.
template <class T>
__device__ __forceinline__ void start_dq(float (&dq)[32], uint32_t ds_tile,
                                         uint32_t k_panel) {
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    device::wgmma_ss_m64n64k16_mn_major<typename T::Element>(
        dq, device::wgmma_descriptor(ds_tile + kk * 32, 16),
        device::wgmma_descriptor(k_panel + kk * 2048, T::kPanelBytes), kk > 0);
  }
  device::wgmma_commit();
}

// 64 columns of the warp's 16 rows of dQ, scaled and packed: word i holds
// elements 2 i and 2 i + 1.
template <class T>
__device__ __forceinline__ void pack_dq(uint32_t (&packed)[16],
                                        const float (&dq)[32], float scale) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    packed[i] = device::pack_pair<typename T::Element>(dq[2 * i] * scale,
                                                       dq[2 * i + 1] * scale);
  }
}

// They go to shared memory. `lane_at`: the lane's row, first 16 bytes.
__device__ __forceinline__ void stage_dq(const uint32_t (&packed)[16],
                                         uint32_t lane_at) {
#pragma unroll
  for (int j = 0; j < 4;
       ++j) { // 16 columns: two 8 x 8 column groups x two row halves
    device::stmatrix_x4(lane_at ^ (j * 32), packed[4 * j], packed[4 * j + 1],
                        packed[4 * j + 2], packed[4 * j + 3]);
  }
}

// The warp's 16 rows of dQ, staged at `here`, to the partial rows.
template <class T>
__device__ __forceinline__ void write_dq(const BwdArgs &a, uint32_t here,
                                         const int *out_row, int lane) {
  const uint64_t policy = device::l2_evict_first();
  const int half = lane / 16, chunk = lane % 16;
  char *partial = static_cast<char *>(a.dq_partial) + chunk * 16;
  const uint32_t from = here + half * T::kRowBytes + (chunk ^ half) * 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int to = out_row[2 * i + half];
    const uint4 x = device::load_shared_u128((from ^ (2 * i % 8 * 16)) +
                                             i * 2 * T::kRowBytes);
    if (to >= 0)
      device::store_global_u128_hint(partial + int64_t{to} * T::kRowBytes, x,
                                     policy);
  }
}

// One tile: its part of dK and dV, and its rows of dQ.
template <class T>
__device__ __forceinline__ void
consume_tile(const BwdArgs &a, BwdWgmmaStorage<T> &s, int stage, bool is_last,
             int warp, int lane, float (&dk)[64], float (&dv)[64]) {
  const uint32_t q = device::smem_address(s.q[stage]),
                 dout = device::smem_address(s.dout[stage]);
  const uint32_t k = device::smem_address(s.k),
                 ds_tile = device::smem_address(s.ds);
  uint32_t prob[16], ds[16];
  {
    float score[32];
    device::wgmma_fence();
    start_scores<T>(score, k, q);
    const int4 masked = s.is_masked[stage];
    device::wgmma_wait_group<0>();
    device::pin_registers(score);
    probabilities<T>(prob, score, s.lse[stage], a.scale_log2, lane);
    if (masked.x | masked.y | masked.z | masked.w) {
      mask_probabilities(prob, s.limit[stage], warp, lane);
    }
  }
  {
    float dp[32];
    device::wgmma_fence();
    start_scores<T>(dp, device::smem_address(s.v), dout);
    start_gradient<T>(dv, prob, dout);
    device::wgmma_wait_group<0>();
    device::pin_registers(dp);
    score_gradient<T>(ds, dp, prob, s.delta[stage], lane);
  }
  start_gradient<T>(dk, ds, q);
  sync_consumers(); // nobody's wgmma reads dS of the tile before
  store_score_gradient(ds_tile, ds, warp, lane);
  device::fence_async_proxy();
  sync_consumers(); // dS is complete
  uint32_t packed[2][16];
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
    float dq[32];
    start_dq<T>(dq, ds_tile, k + panel * T::kPanelBytes);
    device::wgmma_wait_group<0>();
    device::pin_registers(dq);
    pack_dq<T>(packed[panel], dq, a.scale);
  }
  if (is_last && lane == 0)
    device::mbarrier_arrive(device::smem_address(&s.kv_empty));
  // dV, that read dO, was complete in all warps before dS was.
  const uint32_t here = dout + warp * 16 * T::kRowBytes;
  const uint32_t lane_at =
      here + lane % 16 * T::kRowBytes + ((lane / 16 ^ lane) & 7) * 16;
  stage_dq(packed[0], lane_at);
  stage_dq(packed[1], lane_at + 128);
  __syncwarp();
  write_dq<T>(a, here, s.out_row[stage] + warp * 16, lane);
  __syncwarp();
  if (lane == 0)
    device::mbarrier_arrive(device::smem_address(&s.rows_empty[stage]));
}

// The item's dK and dV, fp32 [keys][D + Dv]; `out` is the lane's first element.
template <class T>
__device__ __forceinline__ void store_dkv(float *out, int num_keys, float scale,
                                          const float (&dk)[64],
                                          const float (&dv)[64]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half * 8 >= num_keys)
      continue;
    float *row = out + half * 8 * 2 * T::kD;
#pragma unroll
    for (int n = 0; n < T::kD / 8; ++n) {
      const int i = 4 * n + 2 * half;
      *reinterpret_cast<float2 *>(row + n * 8) = {dk[i] * scale,
                                                  dk[i + 1] * scale};
      *reinterpret_cast<float2 *>(row + T::kD + n * 8) = {dv[i], dv[i + 1]};
    }
  }
}

template <class T>
__device__ __forceinline__ void consume(const BwdArgs &a, BwdWgmmaStorage<T> &s,
                                        int warp, int lane) {
  int use = 0;
  for (int n = 0;; ++n) {
    const int buffer = n % T::kItems;
    device::mbarrier_wait(device::smem_address(&s.item_full[buffer]),
                          n / T::kItems & 1);
    const Item &item = s.items[buffer];
    if (item.count == 0)
      break;
    // Behind the last tile the buffer belongs to another item.
    const int num_rows = s.at[buffer].num_rows, key = warp * 16 + lane / 4;
    const int num_keys = item.num_keys - key;
    float *out =
        a.dkv_items +
        ((int64_t{item.segment} * a.list.capacity + item.number) * T::kKeys +
         key) *
            2 * T::kD +
        lane % 4 * 2;
    float dk[64] = {}, dv[64] = {};
    device::mbarrier_wait(device::smem_address(&s.kv_full), n & 1);
    for (int row = 0; row < num_rows; row += T::kRows, ++use) {
      const int stage = use % T::kStages;
      device::mbarrier_wait(device::smem_address(&s.rows_full[stage]),
                            use / T::kStages & 1);
      device::fence_async_proxy(); // the copies of the loaders are ordinary
                                   // writes
      consume_tile<T>(a, s, stage, row + T::kRows >= num_rows, warp, lane, dk,
                      dv);
    }
    device::pin_registers(dk);
    device::pin_registers(dv);
    store_dkv<T>(out, num_keys, a.scale, dk, dv);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm)
    selected_attn_bwd_wgmma_kernel(const __grid_constant__ BwdArgs a,
                                   const __grid_constant__ CUtensorMap k_map,
                                   const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto &s = *reinterpret_cast<BwdWgmmaStorage<T> *>(smem);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0)
    init_barriers(s);
  __syncthreads();
  if (warp < T::kConsumers) {
    asm volatile(
        "setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kConsumerRegisters));
    consume<T>(a, s, warp, lane);
  } else {
    asm volatile(
        "setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::kLoaderRegisters));
    load_rows<T>(a, s, &k_map, &v_map, warp - T::kConsumers, lane);
  }
}

} // namespace fsattn::selected
