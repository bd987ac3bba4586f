// dense_attn_fwd: attention over an interval of keys (compressed attention, window attention).
//
// Math     S = softmax_scale Q K^T over the visible keys,  P = exp(S - lse),  O = P V,
//          lse = log sum exp S. No visible key: O = 0, lse = -inf.
// Shapes   params/attention.h; the visible interval: device/band.h.
// Tiles    one CTA per (128 queries of a sequence, head), 64 keys a step. A warp owns 32 rows, so
//          that each K and V fragment that ldmatrix brings feeds four products; 16 rows at head_dim
//          256, where the output of 32 does not fit the registers. 32 keys a step at head_dim 256 on a
//          device with 99 KiB of shared memory.
// Order    latest queries first: they see the most compressed keys. Heads are the fastest index, so
//          that the heads of a group read the same K and V from L2.
// Memory   Q + one tile of K + one of V: 64 KB at head_dim 128, two CTAs an SM. V of a step is
//          copied during Q K^T, K of the next step during P V.
// Bound    tensor cores: 256 FLOP a (query, key) at head_dim 128.
// Numbers  scores, sums and output fp32; P rounded to the input type before P V.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/query_tile.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseFwdTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kDimV = kConfig.head_dim_v;
  static constexpr int kM = kDimV <= 128 ? 2 : 1;  // m16 tiles of a warp
  static constexpr int kRowsPerWarp = 16 * kM;
  static constexpr int kTileQ = 128, kTileKv = kDim > 192 && kConfig.smem_kib < 163 ? 32 : 64;
  static constexpr int kWarps = kTileQ / kRowsPerWarp, kThreads = kWarps * device::kWarpSize;
  static constexpr int kMinCtas = kM == 2 ? 2 : 1;
  static constexpr int kQBytes = device::tile_bytes<kDim>(kTileQ);
  static constexpr int kKBytes = device::tile_bytes<kDim>(kTileKv);
  static constexpr int kVBytes = device::tile_bytes<kDimV>(kTileKv);
  static constexpr int kSmemBytes = kQBytes + kKBytes + kVBytes;
  static_assert(kSmemBytes + 128 + sizeof(QueryTileWork) <= kConfig.smem_kib * 1024);
  static_assert(kDimV <= kDim);  // the output goes through the memory of the queries
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    dense_attn_fwd_kernel(const __grid_constant__ AttnFwdTensors p,
                          const __grid_constant__ device::KeySet keys) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kTileKv = Traits::kTileKv, kN = kTileKv / 8;
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ QueryTileWork shared_work;
  if (threadIdx.x == 0) shared_work = find_query_tile<Traits::kTileQ>(p, keys);
  __syncthreads();
  // Read where it is used: kept in registers, it would push the loop over 255 of them.
  const QueryTileWork& work = shared_work;
  if (work.num_queries <= 0) return;
  const uint32_t q_tile = smem_address(smem), k_tile = q_tile + Traits::kQBytes,
                 v_tile = k_tile + Traits::kKBytes;
  const auto load_k = [&](int first) {
    load_rows<kTileKv, Traits::kDim, Traits::kThreads, Element>(
        k_tile, p.k, work.k_offset, work.num_keys, p.shape.head_dim, first);
    cp_async_commit();
  };
  const auto load_v = [&](int first) {
    load_rows<kTileKv, Traits::kDimV, Traits::kThreads, Element>(
        v_tile, p.v, work.v_offset, work.num_keys, p.shape.head_dim_v, first);
    cp_async_commit();
  };
  const auto warp_rows = [&](int thread) {
    return q_tile + tile_bytes<Traits::kDim>(thread / kWarpSize * Traits::kRowsPerWarp);
  };

  float o[kM][Traits::kDimV / 8][4] = {};
  OnlineSoftmax<Element, kM> softmax;
  softmax.init();

  if (work.first_key <= work.last_key) {
    int step = work.last_key / kTileKv;
    load_rows<Traits::kTileQ, Traits::kDim, Traits::kThreads, Element>(
        q_tile, p.q, work.token * p.q.token_stride + work.head * p.q.head_stride, work.num_queries,
        p.shape.head_dim, 0);
    load_k(step * kTileKv);
    for (; step >= work.first_key / kTileKv; --step) {
      const int base = step * kTileKv;
      cp_async_wait<0>();
      __syncthreads();  // K of this step has landed, and nobody reads V of the last one
      load_v(base);
      // Lane addresses live for one product: kept over the loop, they would not fit the registers.
      const int at = reread_thread_index();
      float s[kM][kN][4] = {};
      mma_a_bt<Element, Traits::kDim, Traits::kDim>(
          s, lane_rows16<Traits::kDim>(warp_rows(at), at % kWarpSize),
          lane_rows8x2<Traits::kDim>(k_tile, at % kWarpSize));
      if (base < work.full_first || base + kTileKv - 1 > work.full_last) {
        mask_scores(s, keys.band, work, base);
      }
      uint32_t prob[kM][kN][2];
      softmax.step(s, prob, o, work.scale_log2);
      cp_async_wait<0>();
      __syncthreads();  // V has landed, and nobody reads K any more
      if (step > work.first_key / kTileKv) load_k(base - kTileKv);
      mma_p_b<Element, Traits::kDimV>(
          o, prob, lane_rows16<Traits::kDimV>(v_tile, reread_thread_index() % kWarpSize));
    }
  }

  const int thread = reread_thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
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
      warp_rows(thread), o, lane);
}

}  // namespace fsattn
