// dense_attn_bwd_dkv: the gradients of k and v over an interval of keys.
//
// Math     P^T = exp(K Q^T - lse),  dP^T = V dO^T,  dS^T = P^T * (dP^T - delta),
//          dV = P^T dO,  dK = softmax_scale dS^T Q, summed over the queries of all heads of a
//          group.
// Shapes   params/attention.h; delta: dense_attn_delta.cuh; the visible interval: device/band.h.
// Tiles    one CTA of 8 warps per (128 keys of a sequence, KV head, part of the group's heads), 64
//          queries a step in two stages. 64 keys and 32 queries where a head dim exceeds 128, or 64
//          on a device with 99 KiB of shared memory; there 4 warps and 32 keys at head_dim 256.
// Roles    dK and dV of the same 32 keys do not fit the registers of one warp (2 x 128), so that
//          two warps share them: warp i computes P and dV, warp i + 4 dP, dS and dK. Both do two
//          products of equal size and differ in their operands alone; P goes from one to the other
//          through shared memory, rounded to the input type as dV uses it.
// Memory   K, V, two stages of Q and dO, the exchange of P: 145 KB at head_dim 128, one CTA an SM.
// Bound    tensor cores: 1024 FLOP a (query, key) at head_dim 128.
// Numbers  P and dS rounded to the input type before the products, all sums fp32 in a fixed order.
//          A group that is split writes fp32 partial sums for dense_attn_reduce.cuh. No atomics.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/dense_attn.h"
#include "cuda/device/sequence_tile.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseDkvTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kDimV = kConfig.head_dim_v;
  static constexpr bool kHasLittle = kConfig.smem_kib < 163;  // shared memory
  static constexpr bool kIsNarrow = kDim > (kHasLittle ? 64 : 128);
  static constexpr int kM = kIsNarrow ? 1 : 2;
  static constexpr int kPairs = kHasLittle && kDim > 192 ? 2 : 4;
  static constexpr int kThreads = 2 * kPairs * device::kWarpSize;
  static constexpr int kKeysPerPair = 16 * kM, kTileKv = kPairs * kKeysPerPair;
  static constexpr int kTileQ = kIsNarrow ? 32 : 64;
  static constexpr int kStages = 2;
  static constexpr int kKBytes = device::tile_bytes<kDim>(kTileKv);
  static constexpr int kVBytes = device::tile_bytes<kDimV>(kTileKv);
  static constexpr int kQBytes = device::tile_bytes<kDim>(kTileQ);
  static constexpr int kDoutBytes = device::tile_bytes<kDimV>(kTileQ);
  static constexpr int kStatsBytes = 2 * kTileQ * 4;  // lse, then delta
  static constexpr int kStageBytes = kQBytes + kDoutBytes + kStatsBytes;
  static constexpr int kPackedP = kM * kTileQ / 8 * 2;  // registers of a lane
  static constexpr int kExchangeBytes = kPackedP * 4 * device::kWarpSize;
  static constexpr int kExchangeOffset = kKBytes + kVBytes + kStages * kStageBytes;
  static constexpr int kSmemBytes = kExchangeOffset + kPairs * kExchangeBytes;
  static_assert(kSmemBytes + 256 <= kConfig.smem_kib * 1024);  // 256: KeyTileWork and alignment
  static_assert(kStatsBytes % 128 == 0 && 2 * kTileQ <= kThreads);
};

// What one CTA computes; in shared memory, since only a few values are needed in the loop.
struct KeyTileWork {
  int64_t k_offset, v_offset;  // elements, of the first key
  int64_t token;               // of the sequence's first query
  int key_row;                 // row of k of the first key
  int num_keys;                // from the first one to the end of the sequence; 0 or less: no work
  int num_queries;             // of the sequence
  int first_key;               // index in the sequence
  int offset;                  // position of the sequence's first query
  int split;
  int kv_head;
  int first_head, last_head;
  int first_query, last_query;  // some key is seen by them
  int full_first, full_last;    // every key is seen by them
  float scale_log2;             // softmax_scale * log2(e)
};

template <int kTileKv>
__device__ KeyTileWork find_key_tile(const AttnBwdTensors& p, const device::KeySet& keys,
                                     int splits) {
  const int num_kv_heads = static_cast<int>(p.shape.num_heads_kv);
  const int group = static_cast<int>(p.shape.num_heads_q) / num_kv_heads;
  const int batch = static_cast<int>(p.packing.batch);
  const int slot = blockIdx.x / (num_kv_heads * splits);
  const device::TileSlot tile = device::find_tile(keys.cu_keys, batch, slot, kTileKv);
  const device::RowRange kv = device::rows_of(keys.cu_keys, batch, tile.seq, keys.total_keys);
  const device::RowRange queries =
      device::rows_of(p.packing.cu_q, batch, tile.seq, static_cast<int>(p.packing.total_q));
  KeyTileWork work;
  work.kv_head = blockIdx.x % num_kv_heads;
  work.split = blockIdx.x / num_kv_heads % splits;
  const int heads = (group + splits - 1) / splits;
  work.first_head = work.kv_head * group + work.split * heads;
  work.last_head = work.kv_head * group + min((work.split + 1) * heads, group) - 1;
  work.key_row = kv.begin + tile.first;
  work.k_offset = work.key_row * p.k.token_stride + work.kv_head * p.k.head_stride;
  work.v_offset = work.key_row * p.v.token_stride + work.kv_head * p.v.head_stride;
  work.first_key = tile.first;
  work.num_keys = kv.count - tile.first;
  work.token = queries.begin;
  work.num_queries = tile.seq == batch ? 0 : queries.count;
  work.offset = device::query_offset(p.packing, tile.seq, queries.count);
  const int64_t last_key = tile.first + min(kTileKv, work.num_keys) - 1;
  const auto query = [&](int64_t position) {
    return static_cast<int>(min(max(position - work.offset, int64_t{-1}), int64_t{1} << 30));
  };
  work.first_query = max(query(keys.band.first_position(tile.first)), 0);
  work.last_query = min(query(keys.band.last_position(last_key)), work.num_queries - 1);
  work.full_first = query(keys.band.first_position(last_key));
  work.full_last = min(query(keys.band.last_position(tile.first)), work.num_queries - 1);
  work.scale_log2 = static_cast<float>(p.shape.softmax_scale) * device::kLog2E;
  return work;
}

// The loop runs over the heads and, from the last one back, over the query tiles.
struct Step {
  int head;
  int index;
};

__device__ __forceinline__ Step next_step(const KeyTileWork& work, Step at, int tile_q) {
  const bool wraps = at.index == work.first_query / tile_q;
  return {wraps ? at.head + 1 : at.head, wraps ? work.last_query / tile_q : at.index - 1};
}

// Copies 4 bytes, or writes a zero.
__device__ __forceinline__ void cp_async_4(uint32_t dst, const float* src, bool is_valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src),
               "r"(is_valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void sync_pair(int pair) {
  asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
}

// All warps of the CTA, which reach this barrier in the code of two roles: __syncthreads() would
// have to be one place for all of them.
template <class Traits>
__device__ __forceinline__ void sync_roles() {
  asm volatile("bar.sync %0, %1;" ::"n"(Traits::kPairs + 1), "n"(Traits::kThreads) : "memory");
}

// The queries, output gradients and statistics of one step.
template <class Traits>
__device__ __forceinline__ void load_queries(uint32_t stage, const AttnBwdTensors& p,
                                             const float* deltas, const KeyTileWork& work, int head,
                                             int first, int thread) {
  using namespace device;
  using Element = typename Traits::Element;
  const MatrixView<Element> q{static_cast<const Element*>(p.q.data) +
                                  work.token * p.q.token_stride + head * p.q.head_stride,
                              p.q.token_stride, work.num_queries,
                              static_cast<int>(p.shape.head_dim)};
  const MatrixView<Element> dout{static_cast<const Element*>(p.dout.data) +
                                     work.token * p.dout.token_stride + head * p.dout.head_stride,
                                 p.dout.token_stride, work.num_queries,
                                 static_cast<int>(p.shape.head_dim_v)};
  load_tile<Traits::kTileQ, Traits::kDim, Traits::kThreads>(stage, thread_part(q, thread), first,
                                                            thread);
  load_tile<Traits::kTileQ, Traits::kDimV, Traits::kThreads>(
      stage + Traits::kQBytes, thread_part(dout, thread), first, thread);
  if (thread < 2 * Traits::kTileQ) {
    const int row = first + thread % Traits::kTileQ;
    const float* from = thread < Traits::kTileQ
                            ? static_cast<const float*>(p.lse.data) + head * p.lse.head_stride
                            : deltas + head * p.packing.total_q;
    cp_async_4(stage + Traits::kQBytes + Traits::kDoutBytes + thread * 4, from + work.token + row,
               row < work.num_queries);
  }
  cp_async_commit();
}

// Scores to P, in place and packed.
template <class Traits, int kM, int kN>
__device__ __forceinline__ void probabilities(uint32_t (&packed)[kM][kN][2], float (&s)[kM][kN][4],
                                              const float2* lse, float scale_log2, int lane) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 shift = lse[n * 4 + lane % 4];
    const float x = shift.x * device::kLog2E, y = shift.y * device::kLog2E;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        packed[m][n][half] = device::pack_pair<Element>(
            device::probability<Element>(s[m][n][2 * half], scale_log2, x),
            device::probability<Element>(s[m][n][2 * half + 1], scale_log2, y));
      }
    }
  }
}

// Clears P where the query does not see the key or does not exist.
template <int kM, int kN>
__device__ __forceinline__ void mask_probabilities(uint32_t (&packed)[kM][kN][2],
                                                   const device::Band& band,
                                                   const KeyTileWork& work, int first_key,
                                                   int first_query, int lane) {
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int key = first_key + i * 8 + lane / 4;
    const int64_t base = int64_t{work.offset} + first_query;
    const auto low = band.first_position(key) - base;
    const auto high =
        min(band.last_position(key) - base, int64_t{work.num_queries} - 1 - first_query);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int query = n * 8 + lane % 4 * 2;
      if (query < low || query > high) packed[i / 2][n][i % 2] &= 0xffff0000u;
      if (query + 1 < low || query + 1 > high) packed[i / 2][n][i % 2] &= 0x0000ffffu;
    }
  }
}

// dS = P * (dP - delta); P comes packed from the partner.
template <class Element, int kM, int kN>
__device__ __forceinline__ void score_gradient_t(uint32_t (&packed)[kM][kN][2],
                                                 const float (&dp)[kM][kN][4], uint32_t exchange,
                                                 const float2* delta, int lane) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    const float2 d0 = delta[n * 4 + lane % 4], d1 = delta[(n + 1) * 4 + lane % 4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const uint4 x =
          device::load_shared_u128(exchange + ((m * kN + n) / 2 * device::kWarpSize + lane) * 16);
      const uint32_t p[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 prob = device::unpack_pair<Element>(p[i]), d = i < 2 ? d0 : d1;
        const float* g = &dp[m][n + i / 2][i % 2 * 2];
        packed[m][n + i / 2][i % 2] =
            device::pack_pair<Element>(prob.x * (g[0] - d.x), prob.y * (g[1] - d.y));
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void send_packed(uint32_t exchange, const uint32_t (&packed)[kM][kN][2],
                                            int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(
                       exchange + ((m * kN + n) / 2 * device::kWarpSize + lane) * 16),
                   "r"(packed[m][n][0]), "r"(packed[m][n][1]), "r"(packed[m][n + 1][0]),
                   "r"(packed[m][n + 1][1])
                   : "memory");
    }
  }
}

// The loop of one warp. Role 0: A = K, first = Q, second = dO, result dV; role 1: A = V, first =
// dO, second = Q, result dK. Both roles meet the same barriers.
template <class Traits, int kRole, int kOut>
__device__ __forceinline__ void accumulate_tile(float (&acc)[Traits::kM][kOut][4],
                                                const AttnBwdTensors& p, const device::Band& band,
                                                const float* deltas, const KeyTileWork& work,
                                                unsigned char* smem) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kTileQ / 8, kTileQ = Traits::kTileQ;
  constexpr int kDepth = kRole == 0 ? Traits::kDim : Traits::kDimV;
  constexpr int kOutCols = kRole == 0 ? Traits::kDimV : Traits::kDim;
  static_assert(kOut * 8 == kOutCols);
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int pair = thread / kWarpSize % Traits::kPairs;
  const uint32_t tiles = smem_address(smem);
  const uint32_t a = lane_rows16<kDepth>(
      tiles + (kRole == 0 ? 0 : Traits::kKBytes) + tile_bytes<kDepth>(pair * Traits::kKeysPerPair),
      lane);
  const uint32_t exchange = tiles + Traits::kExchangeOffset + pair * Traits::kExchangeBytes;
  constexpr int kStages = Traits::kKBytes + Traits::kVBytes;  // byte offset of the first stage
  Step at{work.first_head, work.last_query / kTileQ};
  int stage = kStages;

  while (at.head <= work.last_head) {
    const int other = 2 * kStages + Traits::kStageBytes - stage;
    cp_async_wait<0>();
    // This stage has landed; nobody reads the other stage or P of the last step.
    sync_roles<Traits>();
    if (const Step next = next_step(work, at, kTileQ); next.head <= work.last_head) {
      load_queries<Traits>(tiles + other, p, deltas, work, next.head, next.index * kTileQ,
                           reread_thread_index());
    }
    const uint32_t first = tiles + stage + (kRole == 0 ? 0 : Traits::kQBytes);
    const uint32_t second = tiles + stage + (kRole == 0 ? Traits::kQBytes : 0);
    const auto* stats =
        reinterpret_cast<const float2*>(smem + stage + Traits::kQBytes + Traits::kDoutBytes);
    float s[kM][kN][4] = {};
    mma_a_bt<Element, kDepth, kDepth>(s, a, lane_rows8x2<kDepth>(first, lane));
    uint32_t packed[kM][kN][2];
    if constexpr (kRole == 0) {
      probabilities<Traits>(packed, s, stats, work.scale_log2, lane);
      const int base = at.index * kTileQ;
      if (base < work.full_first || base + kTileQ - 1 > work.full_last) {
        mask_probabilities(packed, band, work, work.first_key + pair * Traits::kKeysPerPair, base,
                           lane);
      }
      send_packed(exchange, packed, lane);
      sync_pair(pair);  // P is there for the partner
    } else {
      sync_pair(pair);  // the partner has written P
      score_gradient_t<Element>(packed, s, exchange, stats + kTileQ / 2, lane);
    }
    mma_p_b<Element, kOutCols>(acc, packed, lane_rows16<kOutCols>(second, lane));
    at = next_step(work, at, kTileQ);
    stage = other;
  }
}

// Writes a warp's result: rounded, or as a partial sum when the group is split.
template <class Element, int kM, int kN>
__device__ __forceinline__ void store_gradient(float (&acc)[kM][kN][4], float scale,
                                               const device::OutputRows<Element>& out,
                                               float* partial, int64_t partial_stride,
                                               uint32_t stage, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] *= scale;
    }
  }
  if (partial == nullptr) {
    store_rows(out, stage, acc, lane);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = i * 8 + lane / 4;
    float* to = partial + row * partial_stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (row < out.rows && n * 8 < out.cols) {
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]);
      }
    }
  }
}

template <class Traits, int kRole>
__device__ __forceinline__ void run_role(const AttnBwdTensors& p, const device::KeySet& keys,
                                         const DenseBwdBuffers& buffers, const KeyTileWork& work,
                                         unsigned char* smem) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kOutCols = kRole == 0 ? Traits::kDimV : Traits::kDim;
  float acc[Traits::kM][kOutCols / 8][4] = {};
  if (work.first_query <= work.last_query) {
    accumulate_tile<Traits, kRole>(acc, p, keys.band, buffers.delta, work, smem);
  }
  const int lane = threadIdx.x % kWarpSize;
  const int row = threadIdx.x / kWarpSize % Traits::kPairs * Traits::kKeysPerPair;
  // dK is staged over K and dV over V, of this pair alone. K is read by the partner until its loop
  // ends, and V by this one's.
  sync_roles<Traits>();
  const Rows& rows = kRole == 0 ? p.dv : p.dk;
  const int cols = static_cast<int>(kRole == 0 ? p.shape.head_dim_v : p.shape.head_dim);
  float* partial = kRole == 0 ? buffers.partial_dv : buffers.partial_dk;
  const int64_t partial_stride = p.shape.num_heads_kv * cols;
  if (buffers.splits == 1) {
    partial = nullptr;
  } else {
    partial += (int64_t{work.split} * buffers.partial_rows + work.key_row + row) * partial_stride +
               work.kv_head * cols;
  }
  store_gradient(
      acc, kRole == 0 ? 1.f : static_cast<float>(p.shape.softmax_scale),
      OutputRows<Element>{static_cast<Element*>(rows.data) +
                              (int64_t{work.key_row} + row) * rows.token_stride +
                              work.kv_head * rows.head_stride,
                          rows.token_stride, work.num_keys - row, cols, p.accumulate_dkv},
      partial, partial_stride,
      smem_address(smem) + (kRole == 0 ? Traits::kKBytes : 0) + tile_bytes<kOutCols>(row), lane);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_bwd_dkv_kernel(const __grid_constant__ AttnBwdTensors p,
                              const __grid_constant__ device::KeySet keys,
                              const __grid_constant__ DenseBwdBuffers buffers) {
  using namespace device;
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ KeyTileWork work;
  const int thread = threadIdx.x;
  if (thread == 0) work = find_key_tile<Traits::kTileKv>(p, keys, buffers.splits);
  __syncthreads();
  if (work.num_keys <= 0) return;
  if (work.first_query <= work.last_query) {
    const MatrixView<Element> k{static_cast<const Element*>(p.k.data) + work.k_offset,
                                p.k.token_stride, work.num_keys,
                                static_cast<int>(p.shape.head_dim)};
    const MatrixView<Element> v{static_cast<const Element*>(p.v.data) + work.v_offset,
                                p.v.token_stride, work.num_keys,
                                static_cast<int>(p.shape.head_dim_v)};
    const uint32_t tiles = smem_address(smem);
    load_tile<Traits::kTileKv, Traits::kDim, Traits::kThreads>(tiles, thread_part(k, thread), 0,
                                                               thread);
    load_tile<Traits::kTileKv, Traits::kDimV, Traits::kThreads>(tiles + Traits::kKBytes,
                                                                thread_part(v, thread), 0, thread);
    load_queries<Traits>(tiles + Traits::kKBytes + Traits::kVBytes, p, buffers.delta, work,
                         work.first_head, work.last_query / Traits::kTileQ * Traits::kTileQ,
                         thread);
  }
  if (thread < Traits::kThreads / 2) {
    run_role<Traits, 0>(p, keys, buffers, work, smem);
  } else {
    run_role<Traits, 1>(p, keys, buffers, work, smem);
  }
}

}  // namespace fsattn
