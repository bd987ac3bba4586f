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
  int query_slot;              // of the sequence's first tile of 64 queries
  int split;
  int kv_head;
  int first_head, last_head;
  int first_query, last_query;  // some key is seen by them
  int full_first, full_last;    // every key is seen by them
  float scale_log2;             // softmax_scale * log2(e)
};

// A tile of keys of a KV head and part of its group.
struct KeyTileIndex {
  int slot;
  int part;
};

template <int kTileKv>
__device__ KeyTileWork find_key_tile(const AttnBwdTensors& p, const device::KeySet& keys,
                                     int splits, KeyTileIndex index) {
  const int num_kv_heads = static_cast<int>(p.shape.num_heads_kv);
  const int group = static_cast<int>(p.shape.num_heads_q) / num_kv_heads;
  const int batch = static_cast<int>(p.packing.batch);
  const int slot = index.slot;
  const device::TileSlot tile = device::find_tile(keys.cu_keys, batch, slot, kTileKv);
  const device::RowRange kv = device::rows_of(keys.cu_keys, batch, tile.seq, keys.total_keys);
  const device::RowRange queries =
      device::rows_of(p.packing.cu_q, batch, tile.seq, static_cast<int>(p.packing.total_q));
  KeyTileWork work;
  work.kv_head = index.part % num_kv_heads;
  work.split = index.part / num_kv_heads;
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
  work.query_slot = queries.begin / kTurnQueries + tile.seq;
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
        packed[m][n][half] = device::probability_pair<Element>(
            {s[m][n][2 * half], s[m][n][2 * half + 1]}, scale_log2, {x, y});
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

// What a warp reads and writes in shared memory.
struct PairTiles {
  uint32_t a;         // lane address of the keys or values
  uint32_t queries;   // the stage: Q, then dO
  const float2* lse;  // of the stage, followed by delta
  uint32_t exchange;  // of the pair
};

// The part of a step before P is exchanged. Role 0: A = K, S to P, which is left in the first two
// values of each four of s. Role 1: A = V, s is dP.
template <class Traits, int kRole>
__device__ __forceinline__ void first_product(float (&s)[Traits::kM][Traits::kTileQ / 8][4],
                                              const PairTiles& tiles, const device::Band& band,
                                              const KeyTileWork& work, int first_key,
                                              int first_query, int lane) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kTileQ / 8;
  constexpr int kDepth = kRole == 0 ? Traits::kDim : Traits::kDimV;
  const uint32_t b = tiles.queries + (kRole == 0 ? 0 : Traits::kQBytes);
  mma_a_bt<Element, kDepth, kDepth>(s, tiles.a, lane_rows8x2<kDepth>(b, lane));
  if constexpr (kRole == 0) {
    uint32_t packed[kM][kN][2];
    probabilities<Traits>(packed, s, tiles.lse, work.scale_log2, lane);
    if (first_query < work.full_first || first_query + Traits::kTileQ - 1 > work.full_last) {
      mask_probabilities(packed, band, work, first_key, first_query, lane);
    }
    send_packed(tiles.exchange, packed, lane);
#pragma unroll
    for (int i = 0; i < kM * kN * 2; ++i) {
      s[i / (2 * kN)][i / 2 % kN][i % 2] = __uint_as_float(packed[i / (2 * kN)][i / 2 % kN][i % 2]);
    }
  }
}

// The part behind it. Role 0: dV += P^T dO. Role 1: dP to dS, dK += dS^T Q.
template <class Traits, int kRole>
__device__ __forceinline__ void second_product(float (&acc)[Traits::kM][Traits::kDim / 8][4],
                                               const float (&s)[Traits::kM][Traits::kTileQ / 8][4],
                                               const PairTiles& tiles, int lane) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kTileQ / 8;
  uint32_t packed[kM][kN][2];
  if constexpr (kRole == 0) {
    static_assert(kM == 1 || Traits::kDimV == Traits::kDim);  // the layout of dV in acc
#pragma unroll
    for (int i = 0; i < kM * kN * 2; ++i) {
      packed[i / (2 * kN)][i / 2 % kN][i % 2] = __float_as_uint(s[i / (2 * kN)][i / 2 % kN][i % 2]);
    }
    auto& dv = reinterpret_cast<float(&)[kM][Traits::kDimV / 8][4]>(acc);
    mma_p_b<Element, Traits::kDimV>(
        dv, packed, lane_rows16<Traits::kDimV>(tiles.queries + Traits::kQBytes, lane));
  } else {
    score_gradient_t<Element>(packed, s, tiles.exchange, tiles.lse + Traits::kTileQ / 2, lane);
    mma_p_b<Element, Traits::kDim>(acc, packed, lane_rows16<Traits::kDim>(tiles.queries, lane));
  }
}

// The loop of one warp: dV in role 0, dK in role 1. The roles take turns between barriers that all
// warps reach in one place.
template <class Traits>
__device__ __forceinline__ void accumulate_tile(float (&acc)[Traits::kM][Traits::kDim / 8][4],
                                                const AttnBwdTensors& p, const device::Band& band,
                                                const float* deltas, const KeyTileWork& work,
                                                unsigned char* smem) {
  using namespace device;
  constexpr int kTileQ = Traits::kTileQ;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int pair = thread / kWarpSize % Traits::kPairs;
  const int row = pair * Traits::kKeysPerPair;
  const bool is_first = thread < Traits::kThreads / 2;
  const uint32_t base = smem_address(smem);
  PairTiles tiles;
  tiles.a = is_first ? lane_rows16<Traits::kDim>(base + tile_bytes<Traits::kDim>(row), lane)
                     : lane_rows16<Traits::kDimV>(
                           base + Traits::kKBytes + tile_bytes<Traits::kDimV>(row), lane);
  tiles.exchange = base + Traits::kExchangeOffset + pair * Traits::kExchangeBytes;
  constexpr int kStages = Traits::kKBytes + Traits::kVBytes;  // byte offset of the first stage
  Step at{work.first_head, work.last_query / kTileQ};
  int stage = kStages;

  while (at.head <= work.last_head) {
    const int other = 2 * kStages + Traits::kStageBytes - stage;
    cp_async_wait<0>();
    __syncthreads();  // this stage has landed; nobody reads the other stage or P of the last step
    if (const Step next = next_step(work, at, kTileQ); next.head <= work.last_head) {
      load_queries<Traits>(base + other, p, deltas, work, next.head, next.index * kTileQ,
                           reread_thread_index());
    }
    tiles.queries = base + stage;
    tiles.lse =
        reinterpret_cast<const float2*>(smem + stage + Traits::kQBytes + Traits::kDoutBytes);
    float s[Traits::kM][kTileQ / 8][4] = {};
    if (is_first) {
      first_product<Traits, 0>(s, tiles, band, work, work.first_key + row, at.index * kTileQ, lane);
    } else {
      first_product<Traits, 1>(s, tiles, band, work, 0, 0, lane);
    }
    sync_pair(pair);  // P is there
    if (is_first) {
      second_product<Traits, 0>(acc, s, tiles, lane);
    } else {
      second_product<Traits, 1>(acc, s, tiles, lane);
    }
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

// Writes dV in role 0, dK in role 1.
template <class Traits, int kRole>
__device__ __forceinline__ void store_role(float (&acc)[Traits::kM][Traits::kDim / 8][4],
                                           const AttnBwdTensors& p, const DenseBwdBuffers& buffers,
                                           const KeyTileWork& work, unsigned char* smem) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kOutCols = kRole == 0 ? Traits::kDimV : Traits::kDim;
  const int lane = threadIdx.x % kWarpSize;
  const int row = threadIdx.x / kWarpSize % Traits::kPairs * Traits::kKeysPerPair;
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
  // dK is staged over K and dV over V, of this pair alone.
  store_gradient(
      reinterpret_cast<float(&)[Traits::kM][kOutCols / 8][4]>(acc),
      kRole == 0 ? 1.f : static_cast<float>(p.shape.softmax_scale),
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
  if (thread == 0) {
    const int block = blockIdx.x;
    const int parts = static_cast<int>(p.shape.num_heads_kv) * buffers.splits;
    work = find_key_tile<Traits::kTileKv>(p, keys, buffers.splits, {block / parts, block % parts});
  }
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
  float acc[Traits::kM][Traits::kDim / 8][4] = {};
  if (work.first_query <= work.last_query) {
    accumulate_tile<Traits>(acc, p, keys.band, buffers.delta, work, smem);
  }
  __syncthreads();  // nobody reads K or V any more: the output is staged there
  if (thread < Traits::kThreads / 2) {
    store_role<Traits, 0>(acc, p, buffers, work, smem);
  } else {
    store_role<Traits, 1>(acc, p, buffers, work, smem);
  }
}

}  // namespace fsattn
