// selected_attn_fwd, block-major, mma.sync: every block of keys meets all the queries that want it.
//
// Math    for an item (one part of a block, rows = (query, head of the group)):
//             S = softmax_scale * Q K^T (causal inside the query's own block), m = rowmax S
//             P = 2^(S - m), l = rowsum P; partial = P V / l in the input dtype, with m and l
//         The merge kernel adds the partial rows of a query up.
// Shapes  params/attention.h; head dims up to the row's, padded with zeros in shared memory.
// Tiles   persistent CTAs of 4 warps (2 where shared memory is short) take items from a counter. K, V of the part stay in shared
//         memory; each warp gathers 32 query rows (16 at head_dim 256) into a private ring of two
//         stages, so tiles need no CTA barrier. The output leaves through the stage of its queries:
//         registers -> shared -> 16-byte stores.
// Memory  K + V + 4 warps x 2 stages: 96 KiB at 128/128/64 keys, two CTAs an SM on sm_90.
// Numbers two tiles of 64 keys (128-key rows) keep both P in registers against their own running
//         maximum; the first product is rescaled once, between the two halves of P V.
// Bound   per row and block: 2 D bytes read from the L2, 2 Dv + 8 written to memory; 4 D * keys FLOP.
#pragma once
#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"

namespace fsattn::selected {

template <SelectedAttnFwdConfig kConfig>
struct FwdTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = kConfig.head_dim, kDv = kConfig.head_dim_v;
  static constexpr int kTileKeys = 64, kTiles = kConfig.keys / kTileKeys;
  static constexpr int kSummedKeys = kConfig.keys;  // of one accumulator
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kStages = 2;  // warps at most
  static constexpr int kM = kD <= 192 ? 2 : 1, kRows = 16 * kM;
  static constexpr int kKBytes = device::tile_bytes<kD>(kConfig.keys);
  static constexpr int kVBytes = device::tile_bytes<kDv>(kConfig.keys);
  static constexpr int kStageBytes = device::tile_bytes<kD>(kRows);
  static_assert(kDv <= kD, "the output tile takes the stage of its queries");

  static __host__ __device__ constexpr int prefix_offset(int warps) {
    return kKBytes + kVBytes + warps * kStages * kStageBytes;
  }
  static int smem_bytes(int warps, int num_segments) {
    return prefix_offset(warps) + (num_segments + 1) * 4;
  }
};

// Starts the copy of the rows that `offset_of_lane` names (lane r owns row r) into a stage.
template <class T>
__device__ __forceinline__ void gather_rows(uint32_t stage, const void* q, uint32_t offset_of_lane,
                                            int num_chunks, int lane, uint64_t policy) {
  constexpr int kChunks = T::kD / 8;
#pragma unroll
  for (int i = 0; i < T::kRows * kChunks / kWarpSize; ++i) {
    const int c = i * kWarpSize + lane, row = c / kChunks, chunk = c % kChunks;
    const uint32_t offset = __shfl_sync(kFullMask, offset_of_lane, row);
    if (offset == kNoRow) continue;
    const bool is_inside = chunk < num_chunks;
    const char* from =
        static_cast<const char*>(q) + (int64_t{offset} + (is_inside ? chunk : 0)) * 16;
    device::cp_async_16_zero_fill(stage + device::tile_offset<T::kD>(row, chunk), from,
                                  is_inside ? 16 : 0, policy);
  }
}

// Writes the stage's rows to the partial rows that `row_of_lane` names, -1 for none.
template <class T>
__device__ __forceinline__ void scatter_rows(uint32_t stage, void* partial, int row_of_lane,
                                             int num_chunks, int lane, uint64_t policy) {
  constexpr int kChunks = T::kDv / 8;
#pragma unroll
  for (int i = 0; i < T::kRows * kChunks / kWarpSize; ++i) {
    const int c = i * kWarpSize + lane, row = c / kChunks, chunk = c % kChunks;
    const int to = __shfl_sync(kFullMask, row_of_lane, row);
    if (to < 0 || chunk >= num_chunks) continue;
    const uint4 x = device::load_shared_u128(stage + device::tile_offset<T::kD>(row, chunk));
    char* at = static_cast<char*>(partial) + (int64_t{to} * num_chunks + chunk) * 16;
    device::store_global_u128_hint(at, x, policy);
  }
}

// Keys of tile `tile` behind the row's limit get the score -inf.
template <class T>
__device__ __forceinline__ void mask_scores(float (&s)[T::kM][8][4], int tile, int limit_of_lane,
                                            int lane) {
#pragma unroll
  for (int m = 0; m < T::kM; ++m) {
    const int limit0 = __shfl_sync(kFullMask, limit_of_lane, m * 16 + lane / 4);
    const int limit1 = __shfl_sync(kFullMask, limit_of_lane, m * 16 + 8 + lane / 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = tile * T::kTileKeys + j * 8 + lane % 4 * 2 + e;
        if (key > limit0) s[m][j][e] = -INFINITY;
        if (key > limit1) s[m][j][2 + e] = -INFINITY;
      }
    }
  }
}

// Softmax state of a lane's rows: row i * 8 + lane / 4 of the tile, base 2.
template <class T>
struct RowState {
  float top[2 * T::kM];   // running maximum of the scaled scores, plus the headroom
  float sum[2 * T::kM];   // this lane's columns only
  float keep[2 * T::kM];  // what the newest tile's maximum leaves of the older ones
};

// Updates the maxima; scale[i] is what is left to apply to the scores of row i. What a row gets must not
// depend on the other rows of its tile, some of which do not even exist.
template <class T>
__device__ __forceinline__ void update_maxima(float (&s)[T::kM][8][4], bool is_first,
                                              float scale_log2, RowState<T>& state,
                                              float (&scale)[2 * T::kM]) {
  constexpr float kHeadroom = headroom<typename T::Element>(T::kSummedKeys);
  bool is_any_large = false;
#pragma unroll
  for (int i = 0; i < 2 * T::kM; ++i) {
    const int m = i / 2, half = i % 2 * 2;
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[m][j][half], s[m][j][half + 1]));
    top = device::quad_max(top) * scale_log2;
    const bool is_large = fabsf(top) > kLargeLogit;
    is_any_large |= is_large;
    scale[i] = is_large ? 1.f : scale_log2;
    top += kHeadroom;
    // The first key of a part is visible to all rows of its items, so `top` is finite from here on.
    if (!is_first) {
      top = fmaxf(top, state.top[i]);
      state.keep[i] = device::exp2_approx(state.top[i] - top);
    }
    state.top[i] = top;
  }
  if (!__any_sync(kFullMask, is_any_large)) return;
#pragma unroll
  for (int i = 0; i < T::kM * 32; ++i) {
    if (scale[i / 32 * 2 + i % 4 / 2] == 1.f) s[i / 32][i / 4 % 8][i % 4] *= scale_log2;
  }
}

template <class T>
__device__ __forceinline__ void softmax_tile(float (&s)[T::kM][8][4], bool is_first,
                                             float scale_log2, RowState<T>& state,
                                             uint32_t (&prob)[T::kM][8][2]) {
  float scale[2 * T::kM];
  update_maxima<T>(s, is_first, scale_log2, state, scale);
#pragma unroll
  for (int i = 0; i < 2 * T::kM; ++i) {
    const int m = i / 2, half = i % 2 * 2;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float p0 = device::exp2_approx(fmaf(s[m][j][half], scale[i], -state.top[i]));
      const float p1 = device::exp2_approx(fmaf(s[m][j][half + 1], scale[i], -state.top[i]));
      sum += p0 + p1;
      prob[m][j][i % 2] = device::pack_pair<typename T::Element>(p0, p1);
    }
    state.sum[i] = is_first ? sum : fmaf(state.sum[i], state.keep[i], sum);
  }
}

// What a tile of rows is computed against.
struct PartTiles {
  uint32_t k, v;
  int num_tiles;  // tiles of 64 keys that hold any
  float scale_log2;
};

// One tile of rows. On return the stage holds the normalised output; stats[i] belongs to row
// i * 8 + lane / 4. limit_of_lane: the last visible key of lane r's row.
template <class T>
__device__ __forceinline__ void attend_tile(uint32_t stage, const PartTiles& part, bool is_masked,
                                            int limit_of_lane, int lane,
                                            float2 (&stats)[2 * T::kM]) {
  using Element = typename T::Element;
  uint32_t prob[T::kTiles][T::kM][8][2];
  RowState<T> state;
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
    if (tile > 0 && tile >= part.num_tiles) continue;
    float s[T::kM][8][4] = {};
    device::mma_a_bt<Element, T::kD, T::kD>(
        s, device::lane_rows16<T::kD>(stage, lane),
        device::lane_rows8x2<T::kD>(part.k + device::tile_bytes<T::kD>(tile * T::kTileKeys), lane));
    if (is_masked) mask_scores<T>(s, tile, limit_of_lane, lane);
    softmax_tile<T>(s, tile == 0, part.scale_log2, state, prob[tile]);
  }
  float inverse[2 * T::kM];
#pragma unroll
  for (int i = 0; i < 2 * T::kM; ++i) {
    const float sum = device::quad_sum(state.sum[i]);
    inverse[i] = 1.f / sum;
    stats[i] = {state.top[i], sum};
  }
  __syncwarp();  // every lane has read its queries: the stage becomes the output tile
#pragma unroll
  for (int column = 0; column < T::kDv / 64; ++column) {
    const uint32_t v = device::lane_rows16<T::kDv>(part.v, lane) + column * 128;
    float o[T::kM][8][4] = {};
    device::mma_p_b<Element, T::kDv>(o, prob[0], v);
#pragma unroll
    for (int tile = 1; tile < T::kTiles; ++tile) {
      if (tile >= part.num_tiles) continue;
#pragma unroll
      for (int i = 0; i < T::kM * 32; ++i) {
        o[i / 32][i / 4 % 8][i % 4] *= state.keep[i / 32 * 2 + i % 4 / 2];
      }
      device::mma_p_b<Element, T::kDv>(o, prob[tile],
                                       v + device::tile_bytes<T::kDv>(tile * T::kTileKeys));
    }
#pragma unroll
    for (int m = 0; m < T::kM; ++m) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float(&x)[4] = o[m][j];
        const float a = inverse[2 * m], b = inverse[2 * m + 1];
        const int row = m * 16 + lane / 4;
        const uint32_t at = stage + lane % 4 * 4;
        device::store_shared_u32(at + device::tile_offset<T::kD>(row, column * 8 + j),
                                 pack_average<Element>(x[0] * a, x[1] * a));
        device::store_shared_u32(at + device::tile_offset<T::kD>(row + 8, column * 8 + j),
                                 pack_average<Element>(x[2] * b, x[3] * b));
      }
    }
  }
  __syncwarp();
}

// Copies K and V of the part; rows behind its last key are zero.
template <class T>
__device__ __forceinline__ void load_part(const FwdArgs& a, const Item& item, int kv_head,
                                          uint32_t k_tile, uint32_t v_tile) {
  using Element = typename T::Element;
  const auto view = [&](const Rows& rows, int chunks) {
    const Element* first = static_cast<const Element*>(rows.data) +
                           item.key_row * rows.token_stride + kv_head * rows.head_stride;
    return device::MatrixView<Element>{first, rows.token_stride, item.num_keys, chunks * 8};
  };
  constexpr int kKeys = T::kTiles * T::kTileKeys;
  for (int thread = threadIdx.x; thread < T::kThreads; thread += blockDim.x) {
    device::load_tile<kKeys, T::kD, T::kThreads>(
        k_tile, device::thread_part(view(a.k, a.chunks_qk), thread), 0, thread);
    device::load_tile<kKeys, T::kDv, T::kThreads>(
        v_tile, device::thread_part(view(a.v, a.chunks_v), thread), 0, thread);
  }
}

// The query row of a lane: one of the kRows rows of a warp's tile.
struct QueryRow {
  int entry = -1;  // -1: there is none
  int h = 0;
};

// All tiles of one item. K and V of the part are being copied; returns with every copy landed.
template <class T>
__device__ __forceinline__ void attend_item(const FwdArgs& a, const Item& item, const ItemRows& at,
                                            const PartTiles& part, uint32_t ring, int warp,
                                            int lane) {
  const uint64_t for_queries = device::l2_evict_last(), for_partials = device::l2_evict_first();
  const int32_t* entries = a.entries + at.kv_head * a.entry_stride + item.first;
  const auto query_row = [&](int tile) {
    QueryRow row;
    const int r = tile * T::kRows + lane;
    if (lane >= T::kRows || r >= at.num_rows) return row;
    const int e = a.space.group_div.quotient(r);
    row.entry = __ldg(entries + e);
    row.h = a.space.group_div.remainder(r, e);
    return row;
  };
  const auto gather = [&](uint32_t stage, const QueryRow& row) {
    const int token = a.space.topk_div.quotient(row.entry);
    const uint32_t offset =
        row.entry < 0 ? kNoRow : row_offset16(a.q, token, at.kv_head * a.space.group + row.h);
    gather_rows<T>(stage, a.q.data, offset, a.chunks_qk, lane, for_queries);
    device::cp_async_commit();
  };
  const int num_tiles = (at.num_rows + T::kRows - 1) / T::kRows;
  const int num_warps = blockDim.x / kWarpSize, last_key = item.num_keys - 1;
  int stage = 0;
  QueryRow row = query_row(warp), next_row = query_row(warp + num_warps);
  gather(ring, row);
  device::cp_async_wait<0>();
  __syncthreads();  // K and V have landed

  for (int tile = warp; tile < num_tiles; tile += num_warps) {
    const uint32_t here = ring + stage * T::kStageBytes;
    gather(ring + (stage ^ 1) * T::kStageBytes, next_row);
    const QueryRow after_next = query_row(tile + 2 * num_warps);
    device::cp_async_wait<1>();
    __syncwarp();

    int out_row = -1, limit = last_key;
    if (row.entry >= 0) {
      const int token = a.space.topk_div.quotient(row.entry);
      const int place = a.space.topk_div.remainder(row.entry, token);
      out_row = at.partial_row(a.space, token, place, row.h);
      limit = min(token - item.diag_token, last_key);
    }
    const bool is_masked = __any_sync(kFullMask, limit < part.num_tiles * T::kTileKeys - 1);
    float2 stats[2 * T::kM];
    attend_tile<T>(here, part, is_masked, limit, lane, stats);
    scatter_rows<T>(here, a.partial, out_row, a.chunks_v, lane, for_partials);
#pragma unroll
    for (int i = 0; i < 2 * T::kM; ++i) {
      const int to = __shfl_sync(kFullMask, out_row, i * 8 + lane / 4);
      if (lane % 4 == 0 && to >= 0) __stcs(a.partial_stats + to, stats[i]);
    }
    __syncwarp();  // the stage may be refilled
    row = next_row;
    next_row = after_next;
    stage ^= 1;
  }
  device::cp_async_wait<0>();
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kD <= 128 && T::kTiles == 1 ? 2 : 1)
    selected_attn_fwd_block_major_kernel(const __grid_constant__ FwdArgs a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ Item shared_item;
  int* prefix = reinterpret_cast<int*>(smem + T::prefix_offset(blockDim.x / kWarpSize));
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t k_tile = device::smem_address(smem), v_tile = k_tile + T::kKBytes;
  const uint32_t ring = v_tile + T::kVBytes + warp * T::kStages * T::kStageBytes;
  if (warp == 0) {
    load_item_prefix(a.list, prefix, lane);
    __syncwarp();
    if (lane == 0) shared_item = fetch_item(a.list, prefix, blockIdx.x);
  }
  __syncthreads();
  for (;;) {
    const Item item = shared_item;
    if (item.count == 0) break;
    const ItemRows at(a.space, item);
    __syncthreads();  // everyone has read shared_item
    if (threadIdx.x == 0) {
      shared_item = fetch_item(a.list, prefix, gridDim.x + atomicAdd(a.list.counter, 1));
    }
    load_part<T>(a, item, at.kv_head, k_tile, v_tile);
    const int num_tiles = (item.num_keys + T::kTileKeys - 1) / T::kTileKeys;
    attend_item<T>(a, item, at, {k_tile, v_tile, num_tiles, a.scale_log2}, ring, warp, lane);
    __syncthreads();  // K and V are free; shared_item is the next item
  }
}

}  // namespace fsattn::selected
