// selected_attn_fwd, query-major, mma.sync: one CTA a query token and KV head, for large groups.
//
// Math    o = softmax(softmax_scale * q K^T) V over the visible keys of the row of topk_idx; lse in
//         natural logarithm. A row without visible keys: o = 0, lse = -inf.
// Shapes  params/attention.h; up to 64 heads a group; head dims up to the row's, padded with zeros in
//         shared memory.
// Tiles   grid (tokens, KV heads), 4 warps. Warp w owns heads 16 w .. 16 w + 15 of the group. The blocks of
//         the row become a list in shared memory; K and V come in tiles of 64 keys, two stages, and all
//         warps read the same tile.
// Memory  Q + 2 x (K + V): 80 KiB at head dims 128, 160 KiB at 256.
// Bound   the L2: 2 * (D + Dv) bytes a key for G heads, so G FLOP a byte; block-major moves a fixed
//         516 bytes a head and block through memory instead. Measured: docs/kernels/selected_attn.md.
#pragma once
#include "base/cuda_check.h"
#include "cuda/device/packing.cuh"
#include "cuda/device/scan.cuh"
#include "cuda/selected_attn/selected_attn_fwd_block_major_sm80.cuh"

namespace fsattn::selected {

template <SelectedAttnFwdConfig kConfig>
struct QueryMajorTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = kConfig.head_dim, kDv = kConfig.head_dim_v;
  static constexpr int kTileKeys = 64, kTiles = 1;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kM = 1, kRows = 64, kMaxTopk = 128, kSummedKeys = kMaxTopk * 256;
};

// The visible keys of one block: they start at the block's first key.
struct VisibleBlock {
  int row;    // of k and v
  int count;  // 0 behind the last block
};

template <class T>
struct QueryMajorStorage {
  uint4 q[T::kRows * T::kD / 8];
  uint4 k[2][T::kTileKeys * T::kD / 8], v[2][T::kTileKeys * T::kDv / 8];
  int ids[T::kMaxTopk];
  VisibleBlock blocks[T::kMaxTopk + 1];
  int warp_sums[kWarpSize];
};

struct QueryMajorArgs {
  AttnFwdTensors attn;
  SelectedMask mask;
  float scale_log2;
};

// The block that thread j's place of the row names; empty when it does not count.
template <class T>
__device__ __forceinline__ VisibleBlock find_block(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                                   int token, int kv_head) {
  const Packing& packing = a.attn.packing;
  const int topk = static_cast<int>(a.mask.topk), j = threadIdx.x;
  if (j < topk) {
    s.ids[j] =
        __ldg(a.mask.topk_idx + kv_head * a.mask.head_stride + token * a.mask.token_stride + j);
  }
  __syncthreads();
  const int seq = device::find_sequence(packing.cu_q, static_cast<int>(packing.batch), token);
  if (j >= topk || seq >= packing.batch) return {0, 0};
  const int id = s.ids[j];
  bool is_repeat = false;
  for (int i = 0; i < j; ++i) is_repeat |= s.ids[i] == id;
  const device::KeyRange keys = device::find_keys(packing, seq);
  const int64_t k0 = keys.begin, k1 = keys.end;
  const int64_t end = min(k1 - k0, token + device::position_shift(packing, seq) + 1);
  const int64_t first = id * a.mask.block_size;
  if (is_repeat || id < 0 || first >= end) return {0, 0};
  return {static_cast<int>(k0 + first), static_cast<int>(min(end - first, a.mask.block_size))};
}

// Fills s.blocks in the order of the row, closed by an empty one.
template <class T>
__device__ __forceinline__ void list_blocks(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                            int token, int kv_head) {
  const VisibleBlock block = find_block<T>(a, s, token, kv_head);
  int total;
  const int at = device::cta_exclusive_scan(block.count > 0, s.warp_sums, total);
  if (block.count > 0) s.blocks[at] = block;
  if (threadIdx.x == 0) s.blocks[total] = {0, 0};
  __syncthreads();
}

// Walks over the tiles of the listed blocks.
struct TileWalk {
  int block = 0;
  int key = 0;  // first key of the tile in its block

  template <class T>
  __device__ __forceinline__ VisibleBlock tile(const QueryMajorStorage<T>& s) const {
    const VisibleBlock b = s.blocks[block];
    return {b.row + key, min(b.count - key, T::kTileKeys)};
  }
  template <class T>
  __device__ __forceinline__ void advance(const QueryMajorStorage<T>& s) {
    key += T::kTileKeys;
    if (key >= s.blocks[block].count) {
      ++block;
      key = 0;
    }
  }
};

template <class T, int kRows, int kCols>
__device__ __forceinline__ void load_rows(const void* first, int64_t stride, int rows, int64_t cols,
                                          const uint4* tile) {
  using Element = typename T::Element;
  const device::MatrixView<Element> view{static_cast<const Element*>(first), stride, rows,
                                         static_cast<int>(cols)};
  device::load_tile<kRows, kCols, T::kThreads>(
      device::smem_address(tile), device::thread_part(view, threadIdx.x), 0, threadIdx.x);
}

template <class T>
__device__ __forceinline__ void load_keys(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                          const VisibleBlock& tile, int stage, int kv_head) {
  using Element = typename T::Element;
  const AttnFwdTensors& t = a.attn;
  const auto first = [&](const Rows& rows) {
    return static_cast<const Element*>(rows.data) + tile.row * rows.token_stride +
           kv_head * rows.head_stride;
  };
  load_rows<T, T::kTileKeys, T::kD>(first(t.k), t.k.token_stride, tile.count, t.shape.head_dim,
                                    s.k[stage]);
  load_rows<T, T::kTileKeys, T::kDv>(first(t.v), t.v.token_stride, tile.count, t.shape.head_dim_v,
                                     s.v[stage]);
}

// One tile of keys for this warp's 16 heads.
template <class T>
__device__ __forceinline__ void attend_keys(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                            int stage, int count, bool is_first, int warp, int lane,
                                            RowState<T>& state, float (&o)[1][T::kDv / 8][4]) {
  using Element = typename T::Element;
  float score[1][8][4] = {};
  const uint32_t q = device::smem_address(s.q) + device::tile_bytes<T::kD>(warp * 16);
  device::mma_a_bt<Element, T::kD, T::kD>(
      score, device::lane_rows16<T::kD>(q, lane),
      device::lane_rows8x2<T::kD>(device::smem_address(s.k[stage]), lane));
  if (count < T::kTileKeys) mask_scores<T>(score, 0, count - 1, lane);
  uint32_t p[1][8][2];
  softmax_tile<T>(score, is_first, a.scale_log2, state, p);
  if (!is_first) {
#pragma unroll
    for (int i = 0; i < T::kDv / 2; ++i) o[0][i / 4][i % 4] *= state.keep[i % 4 / 2];
  }
  device::mma_p_b<Element, T::kDv>(
      o, p, device::lane_rows16<T::kDv>(device::smem_address(s.v[stage]), lane));
}

// Normalises and writes o and lse of the warp's heads, through the shared memory of their queries.
template <class T>
__device__ __forceinline__ void write_heads(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                            int token, int head0, int num_heads, bool is_empty,
                                            int warp, int lane, const RowState<T>& state,
                                            const float (&o)[1][T::kDv / 8][4]) {
  using Element = typename T::Element;
  const AttnFwdTensors& t = a.attn;
  const uint32_t stage = device::smem_address(s.q) + device::tile_bytes<T::kD>(warp * 16);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = is_empty ? 0.f : device::quad_sum(state.sum[half]);
    const float inverse = is_empty ? 0.f : 1.f / sum;
    const int row = half * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < T::kDv / 8; ++n) {
      device::store_shared_u32(
          stage + device::tile_offset<T::kD>(row, n) + lane % 4 * 4,
          pack_average<Element>(o[0][n][2 * half] * inverse, o[0][n][2 * half + 1] * inverse));
    }
    if (lane % 4 == 0 && warp * 16 + row < num_heads) {
      static_cast<float*>(t.lse.data)[(head0 + warp * 16 + row) * t.lse.head_stride + token] =
          is_empty ? -INFINITY : (state.top[half] + log2f(sum)) * device::kLn2;
    }
  }
  __syncwarp();
  const int chunks = static_cast<int>(t.shape.head_dim_v / 8),
            rows = min(16, num_heads - warp * 16);
  for (int c = lane; c < rows * chunks; c += kWarpSize) {
    const int row = c / chunks, chunk = c - row * chunks;
    Element* to = static_cast<Element*>(t.o.data) + token * t.o.token_stride +
                  (head0 + warp * 16 + row) * t.o.head_stride;
    reinterpret_cast<uint4*>(to)[chunk] =
        device::load_shared_u128(stage + device::tile_offset<T::kD>(row, chunk));
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads)
    selected_attn_fwd_query_major_kernel(const __grid_constant__ QueryMajorArgs a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& s = *reinterpret_cast<QueryMajorStorage<T>*>(smem);
  const AttnFwdTensors& t = a.attn;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int token = blockIdx.x, kv_head = blockIdx.y;
  const int num_heads = static_cast<int>(t.shape.group_size()), head0 = kv_head * num_heads;
  list_blocks<T>(a, s, token, kv_head);
  const auto* q = static_cast<const typename T::Element*>(t.q.data) + token * t.q.token_stride +
                  head0 * t.q.head_stride;
  load_rows<T, T::kRows, T::kD>(q, t.q.head_stride, num_heads, t.shape.head_dim, s.q);
  TileWalk next;
  const bool is_empty = s.blocks[0].count == 0;
  VisibleBlock tile = next.tile(s);
  if (!is_empty) load_keys<T>(a, s, tile, 0, kv_head);
  device::cp_async_commit();
  RowState<T> state;
  float o[1][T::kDv / 8][4] = {};
  for (int i = 0; tile.count > 0; ++i) {
    next.advance(s);
    const VisibleBlock next_tile = next.tile(s);
    if (next_tile.count > 0) load_keys<T>(a, s, next_tile, (i & 1) ^ 1, kv_head);
    device::cp_async_commit();
    device::cp_async_wait<1>();
    __syncthreads();  // tile i has landed for everyone
    if (warp * 16 < num_heads) {
      attend_keys<T>(a, s, i & 1, tile.count, i == 0, warp, lane, state, o);
    }
    __syncthreads();  // the stage may be refilled
    tile = next_tile;
  }
  device::cp_async_wait<0>();
  __syncthreads();  // without keys, the queries may still be landing
  if (warp * 16 < num_heads) {
    write_heads<T>(a, s, token, head0, num_heads, is_empty, warp, lane, state, o);
  }
}

template <SelectedAttnFwdConfig kConfig>
void run_fwd_query_major(const SelectedAttnFwdParams& params, cudaStream_t stream) {
  using T = QueryMajorTraits<kConfig>;
  const AttnFwdTensors& t = params.attn;
  FSATTN_ASSERT(params.mask.topk <= T::kMaxTopk && t.shape.group_size() <= T::kRows);
  const QueryMajorArgs a{t, params.mask,
                         static_cast<float>(t.shape.softmax_scale) * device::kLog2E};
  constexpr int kBytes = sizeof(QueryMajorStorage<T>);
  const auto kernel = selected_attn_fwd_query_major_kernel<T>;
  allow_shared_memory(kernel, kBytes);
  const dim3 grid(static_cast<unsigned>(t.packing.total_q),
                  static_cast<unsigned>(t.shape.num_heads_kv));
  kernel<<<grid, T::kThreads, kBytes, stream>>>(a);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn::selected
