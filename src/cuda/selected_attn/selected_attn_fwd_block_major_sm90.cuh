// selected_attn_fwd, block-major, sm_90a: wgmma, TMA and loader warps; head dims 128, blocks of 64.
//
// Math    as selected_attn_fwd_block_major_sm80.cuh.
// Tiles   one persistent CTA an SM: three consumer warpgroups, each 64 query rows a tile, and a
//         warpgroup of producers.
// Roles   loader warp g gathers the query rows of consumer group g with 16-byte cp.async, two tiles
//         deep, across item borders. The item warp walks the work items: K and V of item n (TMA, three
//         buffers, so that a short item does not wait for them) and the CSR entries of item n + 1 (four
//         buffers). Tiles are dealt out in turn over all items of the CTA: every third goes to the same
//         group, into the next stage of its ring.
// Memory  K, V 3 x 32 KiB, queries 3 groups x 2 stages x 16 KiB (96 KiB), entries 8 KiB; K, V and queries
//         in panels of 64 columns with the 128-byte swizzle, as wgmma reads them.
// Regs    S 32, then P 16 + O 64. 16 warps x 128 are the whole register file.
// Bound   per row and block 256 B read (L2), 200 B (fp16: 264) written (memory), 32.8 kFLOP. What limits is
//         the consumers' chain of instructions: docs/kernels/selected_attn.md.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/mma_sm80.cuh"
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/wgmma_sm90.cuh"
#include "cuda/selected_attn/partial_row.cuh"
#include "cuda/selected_attn/selected_attn_fwd_block_major_producer_sm90.cuh"

namespace fsattn::selected {

// ---- Consumer warps ----

// What the consumers have of an item.
struct ItemView {
  const int* entries;
  int num_rows;
  int first_slot;  // slot of the partial row of an entry, less the entry
  int diag_token, last_key;
  uint32_t k, v;  // operands (panels_sm90.cuh)
  // Of the window of its rows, where they are packed.
  uint32_t window_code = 0;
  float first_step = 1.f, step = 1.f;
  bool is_far = false, has_special = false;
};

// Starts S = Q K^T of a tile.
template <class T>
__device__ __forceinline__ void start_scores(const WgmmaSmem<T>& s, const ItemView& item, int group,
                                             const Ring<T>& ring, float (&acc)[32]) {
  const uint32_t q = device::k_major(s.stage(group, ring.stage));
  const uint32_t k = __shfl_sync(kFullMask, item.k, 0);  // known to be uniform here
  device::mbarrier_wait(s.q_full(group, ring.stage), ring.parity);
  device::fence_async_proxy();
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < T::kD / 16; ++kk) {
    const uint32_t at = (kk / 4 * T::kPanelBytes + kk % 4 * 32) >> 4;
    device::wgmma_ss_m64n64k16<typename T::Element>(acc, device::descriptor(q + at),
                                                    device::descriptor(k + at), kk > 0);
  }
  device::wgmma_commit();
}

// Keys behind a row's limit get -inf. Element i belongs to row half i / 2 % 2.
__device__ __forceinline__ void mask_scores(float (&acc)[32], int limit_of_lane, int lane) {
  const int limit0 = __shfl_sync(kFullMask, limit_of_lane, lane / 4);
  const int limit1 = __shfl_sync(kFullMask, limit_of_lane, 8 + lane / 4);
  asm volatile("" : "+r"(lane));  // or the columns are kept in registers from the first item on
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

// One of a lane's two rows in 12 bits a value: words of three chunks of 16 bytes.
template <class Element>
__device__ __forceinline__ void pack_row(const float (&o)[64], int half, float scale,
                                         bool has_special, uint4 (&chunk)[3]) {
  uint32_t host[4][3], hidden[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* x = o + i * 4 + half * 2;
    const auto pair = [&](int k) {
      return device::pack_pair<Element>(x[16 * k] * scale, x[16 * k + 1] * scale);
    };
#pragma unroll
    for (int k = 0; k < 3; ++k) host[i][k] = pair(k);
    hidden[i] = pair(3);
  }
  if (has_special) {
#pragma unroll
    for (int i = 0; i < 4; ++i) keep_special(host[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) hide_pair(hidden[i], host[i]);
#pragma unroll
  for (int k = 0; k < 3; ++k) chunk[k] = {host[0][k], host[1][k], host[2][k], host[3][k]};
}

// Normalised rows to the partial rows, in the order of fragment_chunk().
template <class T>
__device__ __forceinline__ void write_tile(const FwdArgs& a, const float (&o)[64],
                                           const float (&scale)[2], bool has_special, int out_row,
                                           int lane) {
  using Element = typename T::Element;
  constexpr int kBytes = T::kIsPacked ? kPackedRowBytes : T::kRowBytes, kChunks = kBytes / 64;
  char* partial = static_cast<char*>(a.partial) + lane % 4 * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int to = __shfl_sync(kFullMask, out_row, half * 8 + lane / 4);
    if (to < 0) continue;
    uint4 chunk[kChunks];
    if constexpr (T::kIsPacked) {
      pack_row<Element>(o, half, scale[half], has_special, chunk);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) chunk[k] = fragment_chunk<Element>(o, k, half, scale[half]);
    }
    auto* row = reinterpret_cast<uint4*>(partial + int64_t{to} * kBytes);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) __stcs(row + k * 4, chunk[k]);
  }
}

// One warp of a consumer group: 16 rows of one tile.
template <class T>
__device__ __forceinline__ void consume_tile(const FwdArgs& a, const WgmmaSmem<T>& s,
                                             const ItemView& item, int tile, const Ring<T>& ring,
                                             int warp, int lane) {
  const int group = warp / 4, row0 = warp % 4 * T::kRows;
  float acc[32];
  start_scores<T>(s, item, group, ring, acc);
  // Meanwhile: where the rows go (lane r owns row r), and how far they see.
  const int row = tile * T::kTileRows + row0 + lane;
  int out_row = -1, limit = item.last_key;
  if (lane < T::kRows && row < item.num_rows) {
    const int e = a.space.group_div.quotient(row), entry = item.entries[e];
    const int h = a.space.group_div.remainder(row, e), slot = item.first_slot + entry;
    out_row = slot * a.space.group + h;
    if (a.marks != nullptr && h == 0) a.marks[slot] = 1;
    limit = min(a.space.topk_div.quotient(entry) - item.diag_token, limit);
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
        o, prob[kk], device::descriptor(item.v + kk * (2048 >> 4)), kk > 0);
  }
  device::wgmma_commit();
  const float total0 = device::quad_sum(sum[0]), total1 = device::quad_sum(sum[1]);
  // Lane r's row: its quad has lane r % 8 * 4 first.
  const int owner = lane % 8 * 4;
  const float2 low = {__shfl_sync(kFullMask, top[0], owner), __shfl_sync(kFullMask, total0, owner)};
  const float2 high = {__shfl_sync(kFullMask, top[1], owner),
                       __shfl_sync(kFullMask, total1, owner)};
  float2 stats = lane < 8 ? low : high;
  if constexpr (T::kIsPacked) stats = pack_stats(stats.x, stats.y, item.window_code);
  if (out_row >= 0) __stcs(a.partial_stats + out_row, stats);
  float scale[2] = {device::reciprocal_approx(total0), device::reciprocal_approx(total1)};
  if constexpr (T::kIsPacked) {
    scale[0] *= item.step;
    scale[1] *= item.step;
  }
  device::wgmma_wait_group<0>();
  device::pin_registers(o);
  if constexpr (T::kIsPacked) {
    if (item.is_far) {
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] *= item.first_step;
    }
  }
  write_tile<T>(a, o, scale, item.has_special, out_row, lane);
}

// Where a consumer warp stands in the tiles that are dealt out over all items.
template <class T>
struct TileCursor {
  int first_tile;  // of the next item
  Ring<T> ring;
};

// Item n, which has landed.
template <class T>
__device__ __forceinline__ ItemView view_item(const FwdArgs& a, const WgmmaSmem<T>& s,
                                              const Item& item, int n) {
  const int buffer = n % T::kKvBuffers;
  const int segment = a.space.first_segment + item.segment;
  const int range = segment - a.ranges_div.quotient(segment) * a.space.num_ranges;
  ItemView x;
  x.entries = s.entries(n % T::kEntryBuffers);
  x.num_rows = item.count * a.space.group;
  // A block is one part here, so that the places of a segment are numbered as its entries are.
  x.first_slot = (item.segment - range) * a.space.range * a.space.partials;
  x.diag_token = item.diag_token;
  x.last_key = item.num_keys - 1;
  x.k = device::k_major(s.kv(buffer));
  x.v = device::mn_major(s.kv(buffer) + T::kTileBytes);
  if constexpr (T::kIsPacked) {
    const Window window = s.windows()[buffer];
    x.window_code = window.code();
    x.step = window.step();
    x.is_far = window.is_far();
    x.first_step = window.first_step();
    x.has_special = window.has_special;
  }
  return x;
}

// Item n; returns false behind the last one.
template <class T>
__device__ __forceinline__ bool consume_item(const FwdArgs& a, const WgmmaSmem<T>& s, int n,
                                             TileCursor<T>& cursor, int warp, int lane) {
  const int entry_buffer = n % T::kEntryBuffers;
  device::mbarrier_wait(s.item_full(entry_buffer), n / T::kEntryBuffers & 1);
  const Item item = s.items()[entry_buffer];
  if (item.count == 0) return false;
  {
    const int buffer = n % T::kKvBuffers, parity = n / T::kKvBuffers & 1;
    device::mbarrier_wait(s.kv_full(buffer), parity);
    if constexpr (T::kIsPacked) device::mbarrier_wait(s.window_full(buffer), parity);
  }
  const ItemView view = view_item<T>(a, s, item, n);
  int tile = cursor.first_tile;
  for (; tile * T::kTileRows < view.num_rows; tile += T::kGroups, cursor.ring.advance()) {
    consume_tile<T>(a, s, view, tile, cursor.ring, warp, lane);
  }
  cursor.first_tile = tile - (view.num_rows + T::kTileRows - 1) / T::kTileRows;
  __syncwarp();  // all lanes are done with the entries
  if (lane == 0) device::mbarrier_arrive(s.kv_empty(n % T::kKvBuffers));
  return true;
}

template <class T>
__device__ __forceinline__ void consume(const FwdArgs& a, const WgmmaSmem<T>& s, int warp,
                                        int lane) {
  TileCursor<T> cursor{warp / 4, {}};
#pragma unroll 1
  for (int n = 0; consume_item<T>(a, s, n, cursor, warp, lane);) ++n;
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
