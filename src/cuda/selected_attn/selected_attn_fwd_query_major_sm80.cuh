// selected_attn_fwd, query-major, mma.sync: one CTA a query token and KV head.
//
// Math    o = softmax(softmax_scale * q K^T) V over the visible keys of the row of topk_idx, for up to
//         16 heads of the group; lse in natural logarithm. A row without visible keys: o = 0, lse = -inf.
// Shapes  params/attention.h; head dims up to the row's, padded with zeros in shared memory.
// Tiles   grid (tokens, KV heads, groups of 16 heads), 4 warps. The row of topk_idx becomes a list of
//         key tiles (up to 64 keys) in shared memory. K and V tiles come in two stages; warp w takes
//         keys 16 w .. of each with a softmax of its own, and the four results are merged at the end.
// Memory  Q + 2 x (K + V): 68 KiB at head dims 128, 136 KiB at 256.
// Bound   the L2: 2 * (D + Dv) bytes a key are read for 16 heads. For few queries it wins over
//         block-major, because it is one launch without index, partial rows and merge.
#pragma once
#include "base/cuda_check.h"
#include "base/math.h"
#include "cuda/device/packing.cuh"
#include "cuda/device/scan.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "params/attention.h"
#include "plan/selected_attn_table.h"

namespace fsattn::selected {

using device::kFullMask;
using device::kWarpSize;

template <SelectedAttnFwdConfig kConfig>
struct QueryMajorTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = kConfig.head_dim, kDv = kConfig.head_dim_v;
  static constexpr int kKeys = 64, kRows = 16, kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kMaxTopk = 128, kMaxTiles = kMaxTopk * 256 / kKeys;
};

struct KeyTile {
  int row;    // of k and v
  int count;  // visible keys; 0 behind the last tile
};

template <class T>
struct QueryMajorStorage {
  uint4 q[T::kRows * T::kD / 8];
  union {
    struct {
      uint4 k[2][T::kKeys * T::kD / 8], v[2][T::kKeys * T::kDv / 8];
    };
    float o[T::kWarps][T::kRows][T::kDv];  // unnormalised, against the warp's own maximum
  };
  float max[T::kWarps][T::kRows], sum[T::kWarps][T::kRows];
  int ids[T::kMaxTopk];
  int warp_sums[kWarpSize];
  KeyTile tiles[T::kMaxTiles + 1];
};

struct QueryMajorArgs {
  AttnFwdTensors attn;
  SelectedMask mask;
  float scale_log2;
};

// Visible keys of the block that thread j's place of the row names; 0 when it does not count.
template <class T>
__device__ __forceinline__ KeyTile find_block(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
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
  const int64_t k0 = __ldg(packing.cu_k + seq), k1 = __ldg(packing.cu_k + seq + 1);
  const int64_t end = min(k1 - k0, token + device::position_shift(packing, seq) + 1);
  const int64_t first = id * a.mask.block_size;
  if (is_repeat || id < 0 || first >= end) return {0, 0};
  return {static_cast<int>(k0 + first), static_cast<int>(min(end - first, a.mask.block_size))};
}

// Fills s.tiles, closed by an empty one.
template <class T>
__device__ __forceinline__ void list_tiles(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                           int token, int kv_head) {
  const KeyTile block = find_block<T>(a, s, token, kv_head);
  const int pieces = ceil_div(block.count, T::kKeys);
  int total;
  const int at = device::cta_exclusive_scan(pieces, s.warp_sums, total);
  for (int i = 0; i < pieces; ++i) {
    s.tiles[at + i] = {block.row + i * T::kKeys, min(T::kKeys, block.count - i * T::kKeys)};
  }
  if (threadIdx.x == 0) s.tiles[total] = {0, 0};
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void load_tiles(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                           const KeyTile& tile, int stage, int kv_head) {
  using Element = typename T::Element;
  const auto load = [&](const Rows& rows, int64_t dim) {
    const Element* first = static_cast<const Element*>(rows.data) + tile.row * rows.token_stride +
                           kv_head * rows.head_stride;
    const device::MatrixView<Element> view{first, rows.token_stride, tile.count,
                                           static_cast<int>(dim)};
    return device::thread_part(view, threadIdx.x);
  };
  device::load_tile<T::kKeys, T::kD, T::kThreads>(
      device::smem_address(s.k[stage]), load(a.attn.k, a.attn.shape.head_dim), 0, threadIdx.x);
  device::load_tile<T::kKeys, T::kDv, T::kThreads>(
      device::smem_address(s.v[stage]), load(a.attn.v, a.attn.shape.head_dim_v), 0, threadIdx.x);
}

// The 16 keys of this warp in one tile.
template <class T>
__device__ __forceinline__ void attend_keys(const QueryMajorArgs& a, QueryMajorStorage<T>& s,
                                            int stage, int count, int warp, int lane,
                                            device::OnlineSoftmax<1>& softmax,
                                            float (&o)[1][T::kDv / 8][4]) {
  using Element = typename T::Element;
  float score[1][2][4] = {};
  const uint32_t k = device::smem_address(s.k[stage]) + device::tile_bytes<T::kD>(warp * 16);
  device::mma_a_bt<Element, T::kD, T::kD>(
      score, device::lane_rows16<T::kD>(device::smem_address(s.q), lane),
      device::lane_rows8x2<T::kD>(k, lane));
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (warp * 16 + n * 8 + lane % 4 * 2 + e % 2 >= count) score[0][n][e] = -INFINITY;
    }
  }
  uint32_t p[1][2][2];
  softmax.template step<Element>(score, p, o, a.scale_log2);
  const uint32_t v = device::smem_address(s.v[stage]) + device::tile_bytes<T::kDv>(warp * 16);
  device::mma_p_b<Element, T::kDv>(o, p, device::lane_rows16<T::kDv>(v, lane));
}

// The warp's state -> shared memory.
template <class T>
__device__ __forceinline__ void publish(QueryMajorStorage<T>& s, int warp, int lane,
                                        const device::OnlineSoftmax<1>& softmax,
                                        const float (&o)[1][T::kDv / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    const float sum = device::quad_sum(softmax.sum[half]);
    if (lane % 4 == 0) {
      s.max[warp][row] = softmax.max[half];
      s.sum[warp][row] = sum;
    }
#pragma unroll
    for (int n = 0; n < T::kDv / 8; ++n) {
      *reinterpret_cast<float2*>(&s.o[warp][row][n * 8 + lane % 4 * 2]) = {o[0][n][2 * half],
                                                                           o[0][n][2 * half + 1]};
    }
  }
}

// Merges the four warps in order and writes o and lse of the CTA's heads.
template <class T>
__device__ __forceinline__ void write_rows(const QueryMajorArgs& a, const QueryMajorStorage<T>& s,
                                           int token, int head0, int num_heads) {
  using Element = typename T::Element;
  const AttnFwdTensors& t = a.attn;
  const int chunks = static_cast<int>(t.shape.head_dim_v / 8);
  for (int c = threadIdx.x; c < num_heads * chunks; c += T::kThreads) {
    const int row = c / chunks, chunk = c - row * chunks;
    float top = -INFINITY;
    for (int w = 0; w < T::kWarps; ++w) top = fmaxf(top, s.max[w][row]);
    // No visible key: every sum is 0, and a shift of 0 keeps the weights numbers.
    const float shift = top == -INFINITY ? 0.f : top;
    float sum = 0.f, x[8] = {};
    for (int w = 0; w < T::kWarps; ++w) {
      const float weight = exp2f(s.max[w][row] - shift);
      sum = fmaf(weight, s.sum[w][row], sum);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = fmaf(weight, s.o[w][row][chunk * 8 + i], x[i]);
    }
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    Element* o = static_cast<Element*>(t.o.data) + token * t.o.token_stride +
                 (head0 + row) * t.o.head_stride;
    uint4 packed;
    packed.x = device::pack_pair<Element>(x[0] * inverse, x[1] * inverse);
    packed.y = device::pack_pair<Element>(x[2] * inverse, x[3] * inverse);
    packed.z = device::pack_pair<Element>(x[4] * inverse, x[5] * inverse);
    packed.w = device::pack_pair<Element>(x[6] * inverse, x[7] * inverse);
    reinterpret_cast<uint4*>(o)[chunk] = packed;
    if (chunk == 0) {
      static_cast<float*>(t.lse.data)[(head0 + row) * t.lse.head_stride + token] =
          sum > 0.f ? (top + log2f(sum)) * device::kLn2 : -INFINITY;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads)
    selected_attn_fwd_query_major_kernel(const __grid_constant__ QueryMajorArgs a) {
  using Element = typename T::Element;
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& s = *reinterpret_cast<QueryMajorStorage<T>*>(smem);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int token = blockIdx.x, kv_head = blockIdx.y;
  const int group = static_cast<int>(a.attn.shape.group_size());
  const int first = blockIdx.z * T::kRows, num_heads = min(T::kRows, group - first);
  const int head0 = kv_head * group + first;
  list_tiles<T>(a, s, token, kv_head);

  const Element* q = static_cast<const Element*>(a.attn.q.data) + token * a.attn.q.token_stride +
                     head0 * a.attn.q.head_stride;
  const device::MatrixView<Element> queries{q, a.attn.q.head_stride, num_heads,
                                            static_cast<int>(a.attn.shape.head_dim)};
  device::load_tile<T::kRows, T::kD, T::kThreads>(
      device::smem_address(s.q), device::thread_part(queries, threadIdx.x), 0, threadIdx.x);
  load_tiles<T>(a, s, s.tiles[0], 0, kv_head);
  device::cp_async_commit();
  device::OnlineSoftmax<1> softmax;
  softmax.init();
  float o[1][T::kDv / 8][4] = {};
  for (int i = 0; s.tiles[i].count > 0; ++i) {
    const int stage = i & 1;
    if (s.tiles[i + 1].count > 0) load_tiles<T>(a, s, s.tiles[i + 1], stage ^ 1, kv_head);
    device::cp_async_commit();
    device::cp_async_wait<1>();
    __syncthreads();  // tile i has landed for everyone
    if (warp * 16 < s.tiles[i].count) {
      attend_keys<T>(a, s, stage, s.tiles[i].count, warp, lane, softmax, o);
    }
    __syncthreads();  // the stage may be refilled
  }
  device::cp_async_wait<0>();
  __syncthreads();  // the tiles make room for the results
  publish<T>(s, warp, lane, softmax, o);
  __syncthreads();
  write_rows<T>(a, s, token, head0, num_heads);
}

template <SelectedAttnFwdConfig kConfig>
void run_fwd_query_major(const SelectedAttnFwdParams& params, cudaStream_t stream) {
  using T = QueryMajorTraits<kConfig>;
  const AttnFwdTensors& t = params.attn;
  FSATTN_ASSERT(params.mask.topk <= T::kMaxTopk);
  const QueryMajorArgs a{t, params.mask,
                         static_cast<float>(t.shape.softmax_scale) * device::kLog2E};
  constexpr int kBytes = sizeof(QueryMajorStorage<T>);
  const auto kernel = selected_attn_fwd_query_major_kernel<T>;
  FSATTN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(static_cast<unsigned>(t.packing.total_q),
                  static_cast<unsigned>(t.shape.num_heads_kv),
                  static_cast<unsigned>(ceil_div<int64_t>(t.shape.group_size(), T::kRows)));
  kernel<<<grid, T::kThreads, kBytes, stream>>>(a);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn::selected
