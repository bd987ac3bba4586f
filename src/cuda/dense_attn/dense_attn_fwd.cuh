// dense_attn_fwd: attention over an interval of keys (compressed attention, window attention).
//
// Math     S = softmax_scale Q K^T over the visible keys,  P = exp(S - lse),  O = P V,
//          lse = log sum exp S. No visible key: O = 0, lse = -inf.
// Shapes   params/attention.h; the visible interval: device/band.h.
// Tiles    one CTA per (128 queries of a sequence, head), 64 keys a step. A warp owns 32 rows, so that
//          each K and V fragment that ldmatrix brings feeds four products; 16 rows at head_dim 256,
//          where the output of 32 does not fit the registers.
// Order    latest queries first: they see the most compressed keys. Heads are the fastest index, so
//          that the heads of a group read the same K and V from L2.
// Memory   Q + one tile of K + one of V: 64 KB at head_dim 128, two CTAs an SM. V of a step is copied
//          during Q K^T, K of the next step during P V.
// Bound    tensor cores: 256 FLOP a (query, key) at head_dim 128.
// Numbers  scores, sums and output fp32; P rounded to the input type before P V.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/dense_attn.h"
#include "cuda/device/sequence_tile.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseFwdTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kDimV = kConfig.head_dim_v;
  static constexpr int kM = kDimV <= 128 ? 2 : 1;  // m16 tiles of a warp
  static constexpr int kRowsPerWarp = 16 * kM;
  static constexpr int kTileQ = 128, kTileKv = 64;
  static constexpr int kWarps = kTileQ / kRowsPerWarp, kThreads = kWarps * device::kWarpSize;
  static constexpr int kMinCtas = kM == 2 ? 2 : 1;
  static constexpr int kQBytes = device::tile_bytes<kDim>(kTileQ);
  static constexpr int kKBytes = device::tile_bytes<kDim>(kTileKv);
  static constexpr int kVBytes = device::tile_bytes<kDimV>(kTileKv);
  static constexpr int kSmemBytes = kQBytes + kKBytes + kVBytes;
  static_assert(kDimV <= kDim);  // the output goes through the memory of the queries
};

// Sets scores outside the visible interval of their row to -inf.
template <int kM, int kN>
__device__ __forceinline__ void mask_scores(float (&s)[kM][kN][4], const device::Band& band,
                                            int position, int first_key, int num_keys, int lane) {
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int t = position + i * 8 + lane / 4;
    const int low = band.first_key(t) - first_key;
    const int high = min(band.last_key(t), num_keys - 1) - first_key;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = n * 8 + lane % 4 * 2 + e;
        if (key < low || key > high) s[i / 2][n][i % 2 * 2 + e] = -INFINITY;
      }
    }
  }
}

// What one CTA computes. It stays in shared memory: only a few values are needed in the loop.
struct DenseFwdWork {
  int64_t token;               // of the first query
  int64_t k_offset, v_offset;  // elements
  int head;
  int position;     // of the first query
  int num_queries;  // from the first one to the end of the sequence; 0 or less: nothing to do
  int num_keys;
  int first_key, last_key;    // some row sees them
  int full_first, full_last;  // every row sees them
};

template <class Traits>
__device__ DenseFwdWork find_fwd_work(const AttnFwdTensors& p, const device::KeySet& keys) {
  const int num_heads = static_cast<int>(p.shape.num_heads_q);
  const int batch = static_cast<int>(p.packing.batch);
  const int slot = static_cast<int>(gridDim.x) / num_heads - 1 - blockIdx.x / num_heads;
  const device::TileSlot tile = device::find_tile(p.packing.cu_q, batch, slot, Traits::kTileQ);
  const device::RowRange queries =
      device::rows_of(p.packing.cu_q, batch, tile.seq, static_cast<int>(p.packing.total_q));
  const device::RowRange kv = device::rows_of(keys.cu_keys, batch, tile.seq, keys.total_keys);
  DenseFwdWork work;
  work.head = blockIdx.x % num_heads;
  const int kv_head = work.head / (num_heads / static_cast<int>(p.shape.num_heads_kv));
  work.token = int64_t{queries.begin} + tile.first;
  work.k_offset = kv.begin * p.k.token_stride + kv_head * p.k.head_stride;
  work.v_offset = kv.begin * p.v.token_stride + kv_head * p.v.head_stride;
  work.num_queries = queries.count - tile.first;
  work.num_keys = tile.seq == batch ? 0 : kv.count;
  work.position = device::query_offset(p.packing, tile.seq, queries.count) + tile.first;
  const int last = work.position + min(Traits::kTileQ, work.num_queries) - 1;
  work.first_key = keys.band.first_key(work.position);
  work.last_key = min(keys.band.last_key(last), work.num_keys - 1);
  work.full_first = keys.band.first_key(last);
  work.full_last = min(keys.band.last_key(work.position), work.num_keys - 1);
  return work;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    dense_attn_fwd_kernel(const __grid_constant__ AttnFwdTensors p,
                          const __grid_constant__ device::KeySet keys) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kTileKv / 8;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ DenseFwdWork shared_work;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  if (thread == 0) shared_work = find_fwd_work<Traits>(p, keys);
  __syncthreads();
  // Read where it is used: kept in registers, it would push the loop over 255 of them.
  const DenseFwdWork& work = shared_work;
  if (work.num_queries <= 0) return;
  const int num_keys = work.num_keys;
  const auto k = thread_part(
      MatrixView<Element>{static_cast<const Element*>(p.k.data) + work.k_offset, p.k.token_stride,
                          num_keys, static_cast<int>(p.shape.head_dim)},
      thread);
  const auto v = thread_part(
      MatrixView<Element>{static_cast<const Element*>(p.v.data) + work.v_offset, p.v.token_stride,
                          num_keys, static_cast<int>(p.shape.head_dim_v)},
      thread);
  const uint32_t q_tile = smem_address(smem), k_tile = q_tile + Traits::kQBytes,
                 v_tile = k_tile + Traits::kKBytes;
  const uint32_t q_rows = q_tile + tile_bytes<Traits::kDim>(warp * Traits::kRowsPerWarp);
  const uint32_t q_lane = lane_rows16<Traits::kDim>(q_rows, lane);
  const uint32_t k_lane = lane_rows8x2<Traits::kDim>(k_tile, lane);
  const uint32_t v_lane = lane_rows16<Traits::kDimV>(v_tile, lane);
  const float scale_log2 = static_cast<float>(p.shape.softmax_scale) * kLog2E;

  float o[kM][Traits::kDimV / 8][4] = {};
  OnlineSoftmax<kM> softmax;
  softmax.init();

  if (work.first_key <= work.last_key) {
    const int first_tile = work.first_key / Traits::kTileKv;
    int step = work.last_key / Traits::kTileKv;
    const auto q = thread_part(
        MatrixView<Element>{static_cast<const Element*>(p.q.data) + work.token * p.q.token_stride +
                                work.head * p.q.head_stride,
                            p.q.token_stride, work.num_queries, static_cast<int>(p.shape.head_dim)},
        thread);
    load_tile<Traits::kTileQ, Traits::kDim, Traits::kThreads>(q_tile, q, 0, thread);
    load_tile<Traits::kTileKv, Traits::kDim, Traits::kThreads>(k_tile, k, step * Traits::kTileKv,
                                                               thread);
    cp_async_commit();
    for (; step >= first_tile; --step) {
      const int base = step * Traits::kTileKv;
      cp_async_wait<0>();
      __syncthreads();  // K of this step has landed, and nobody reads V of the last one
      load_tile<Traits::kTileKv, Traits::kDimV, Traits::kThreads>(v_tile, v, base, thread);
      cp_async_commit();
      float s[kM][kN][4] = {};
      mma_a_bt<Element, Traits::kDim, Traits::kDim>(s, q_lane, k_lane);
      if (base < work.full_first || base + Traits::kTileKv - 1 > work.full_last) {
        mask_scores(s, keys.band, work.position + warp * Traits::kRowsPerWarp, base, work.num_keys,
                    lane);
      }
      uint32_t prob[kM][kN][2];
      softmax.template step<Element>(s, prob, o, scale_log2);
      cp_async_wait<0>();
      __syncthreads();  // V has landed, and nobody reads K any more
      if (step > first_tile) {
        load_tile<Traits::kTileKv, Traits::kDim, Traits::kThreads>(k_tile, k,
                                                                   base - Traits::kTileKv, thread);
        cp_async_commit();
      }
      mma_p_b<Element, Traits::kDimV>(o, prob, v_lane);
    }
  }

  float lse[2 * kM];
  softmax.finish(o, lse);
  const int64_t token = work.token;
  const int head = work.head;
  const int row = warp * Traits::kRowsPerWarp, rows_left = work.num_queries - row;
  float* lse_out = static_cast<float*>(p.lse.data) + head * p.lse.head_stride + token + row;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int r = i * 8 + lane / 4;
    if (lane % 4 == 0 && r < rows_left) lse_out[r] = lse[i];
  }
  // The warp's own query rows become its output stage; no other warp reads them.
  __syncwarp();
  store_rows(
      OutputRows<Element>{static_cast<Element*>(p.o.data) + (token + row) * p.o.token_stride +
                              head * p.o.head_stride,
                          p.o.token_stride, rows_left, static_cast<int>(p.shape.head_dim_v), false},
      q_rows, o, lane);
}

template <DenseAttnConfig kConfig>
void launch_dense_attn_fwd(const AttnFwdTensors& tensors, const device::KeySet& keys,
                           Stream stream) {
  using Traits = DenseFwdTraits<kConfig>;
  const Packing& packing = tensors.packing;
  if (packing.total_q == 0) return;
  const int64_t ctas = device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) *
                       tensors.shape.num_heads_q;
  auto* kernel = dense_attn_fwd_kernel<Traits>;
  FSATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         Traits::kSmemBytes));
  kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, Traits::kSmemBytes,
           static_cast<cudaStream_t>(stream)>>>(tensors, keys);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
