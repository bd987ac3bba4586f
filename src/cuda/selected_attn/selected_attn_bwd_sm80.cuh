// selected_attn_bwd, block-major, mma.sync: dK, dV of a part of a block, and partial rows of dQ.
//
// Math    for an item (one part of a block, rows = (query, head of the group)), per tile of 64 rows:
//             P = 2^(scale_log2 * Q K^T - lse), dP = dO V^T, dS = P (dP - delta)
//             dV += P^T dO, dK += scale * dS^T Q, dQ = scale * dS K
//         with delta = rowsum(dO * O) - dlse. dQ rows leave in the input dtype, one per (query, place);
//         dK and dV leave in fp32 once an item. Two more kernels sum both in a fixed order.
// Tiles   persistent CTAs of 8 warps. Transposed scores S^T: warp w holds keys 16 (w % 4) .. + 15 and
//         rows 32 (w / 4) .. + 31. P^T and dS^T go through shared memory; in the three products after
//         that the warps w and w + 4 share the rows of the result and take turns in pairs of column
//         chunks.
// Memory  K, V resident; Q in two stages (one at head_dim 256), dO in one: 98 KiB at head dims 128, two
//         CTAs an SM on sm_90. dQ leaves through the stage of its queries.
// Sync    A: tile i has landed and tile i - 1 is done with; B: P^T, dS^T are complete; C: Q and dO of
//         tile i were read for the last time.
// Bound   10 * keys * D FLOP per row against 2 D + 2 Dv bytes read and 2 D written.
#pragma once
#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/selected_attn/selected_attn_bwd_args.cuh"

namespace fsattn::selected {

template <SelectedAttnBwdConfig kConfig>
struct BwdTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kD = kConfig.head_dim, kDv = kConfig.head_dim_v;
  static constexpr int kKeys = kSelectedBwdKeys, kRows = 64;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kRowsPerWarp = kRows / kWarps;
  static constexpr int kStages = kD <= 192 ? 2 : 1;
  // Pairs of 16-byte chunks that one warp owns of a row of dQ and dK, and of dV.
  static constexpr int kPairs = kD / 32, kPairsV = kDv / 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kCtasPerSm = kD <= 64 ? 2 : 1;  // of 164 KiB of shared memory
#else
  static constexpr int kCtasPerSm = kD <= 128 ? 2 : 1;
#endif
};

template <class T>
struct BwdStorage {
  uint4 k[T::kKeys * T::kD / 8], v[T::kKeys * T::kDv / 8];
  uint4 q[T::kStages][T::kRows * T::kD / 8];
  uint4 dout[T::kRows * T::kDv / 8];
  uint4 p[T::kKeys * T::kRows / 8], ds[T::kKeys * T::kRows / 8];  // [key][row]
  float2 stats[2][T::kRows];
  int entry[2][T::kRows];    // CSR entry of a row, -1 if there is none; its own warp alone reads it
  int limit[2][T::kRows];    // last visible key; -1: the row does not exist
  int out_row[2][T::kRows];  // partial row of dQ; -1: none
  Item item, next_item;
  ItemRows at;  // of item; both live here and not in registers, which the accumulators need
  int prefix[kMaxSegmentsPerLaunch + 1];
};

// The thread's number, read anew at every call: what is computed from it stays inside its phase instead
// of taking a register, or a spill, for the whole kernel.
__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int fresh_lane() { return fresh_thread() % kWarpSize; }
__device__ __forceinline__ int fresh_warp() { return fresh_thread() / kWarpSize; }

// A row that a lane looks up: lane r < 8 of warp w owns row 8 w + r of a tile.
struct BwdRow {
  int entry;  // -1: there is none
  int h;
};

// Starts to bring the entries of this warp's rows of `tile`; one that does not exist becomes -1.
template <class T>
__device__ __forceinline__ void request_entries(const BwdArgs& a, BwdStorage<T>& s, int tile,
                                                int warp, int lane) {
  if (lane >= T::kRowsPerWarp) return;
  const int local = warp * T::kRowsPerWarp + lane, r = tile * T::kRows + local;
  int* to = &s.entry[tile & 1][local];
  if (r < s.at.num_rows) {
    const int e = a.space.group_div.quotient(r);
    device::cp_async_4(device::smem_address(to),
                       a.entries + s.at.kv_head * a.entry_stride + s.item.first + e);
  } else {
    *to = -1;
  }
}

// The lane's row of `tile`, whose entries have landed.
template <class T>
__device__ __forceinline__ BwdRow find_row(const BwdArgs& a, const BwdStorage<T>& s, int tile,
                                           int warp, int lane) {
  if (lane >= T::kRowsPerWarp) return {-1, 0};
  const int local = warp * T::kRowsPerWarp + lane, r = tile * T::kRows + local;
  return {s.entry[tile & 1][local], a.space.group_div.remainder(r, a.space.group_div.quotient(r))};
}

// Starts the copies of this warp's rows of a tile; rows that do not exist and columns behind the head
// dim become zero.
template <class T, int kCols>
__device__ __forceinline__ void gather_tile(uint32_t tile, const Rows& rows, const BwdArgs& a,
                                            const ItemRows& at, const BwdRow& row, int num_chunks,
                                            int warp, int lane) {
  constexpr int kChunks = kCols / 8;
  const int token = row.entry < 0 ? 0 : a.space.topk_div.quotient(row.entry);
  const int head = at.kv_head * a.space.group + row.h;
  const auto offset_of_lane =
      static_cast<uint32_t>((token * rows.token_stride + head * rows.head_stride) / 8);
  const unsigned exists = __ballot_sync(kFullMask, row.entry >= 0);
#pragma unroll 1
  for (int i = 0; i < T::kRowsPerWarp * kChunks / kWarpSize; ++i) {
    const int c = i * kWarpSize + lane, r = c / kChunks, chunk = c % kChunks;
    const uint32_t offset = __shfl_sync(kFullMask, offset_of_lane, r);
    const bool is_inside = (exists >> r & 1) && chunk < num_chunks;
    const char* from =
        static_cast<const char*>(rows.data) + (is_inside ? (int64_t{offset} + chunk) * 16 : 0);
    const uint32_t to = tile + device::tile_offset<kCols>(warp * T::kRowsPerWarp + r, chunk);
    device::cp_async_16(to, from, is_inside);
  }
}

// What the other warps need to know of this warp's rows of `tile`.
template <class T>
__device__ __forceinline__ void publish_rows(const BwdArgs& a, BwdStorage<T>& s, int tile, int warp,
                                             int lane) {
  if (lane >= T::kRowsPerWarp) return;
  const BwdRow row = find_row<T>(a, s, tile, warp, lane);
  const int r = warp * T::kRowsPerWarp + lane, buffer = tile & 1;
  int limit = -1, out_row = -1;
  if (row.entry >= 0) {
    const int token = a.space.topk_div.quotient(row.entry);
    const int place = a.space.topk_div.remainder(row.entry, token);
    limit = min(token - s.item.diag_token, s.item.num_keys - 1);
    out_row = s.at.partial_row(a.space, token, place, row.h);
    if (row.h == 0) a.marks[a.space.group_div.quotient(out_row)] = 1;
    const int64_t head = s.at.kv_head * a.space.group + row.h;
    device::cp_async_8(device::smem_address(&s.stats[buffer][r]),
                       a.stats + token * a.attn.shape.num_heads_q + head);
  } else {
    s.stats[buffer][r] = float2{0.f, 0.f};
  }
  s.limit[buffer][r] = limit;
  s.out_row[buffer][r] = out_row;
}

// acc += A B^T for 16 rows of A and 8 kN rows of B, kCols wide. Two steps at a time: fully unrolled, the
// loads run so far ahead that accumulators are spilled.
template <class Element, int kCols, int kN>
__device__ __forceinline__ void mma_rows(float (&acc)[1][kN][4], uint32_t a, uint32_t b) {
#pragma unroll 2
  for (int kk = 0; kk < kCols / 16; ++kk) {
    uint32_t af[4];
    device::ldmatrix_x4(af, device::chunk_pair(a, kk));
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t bf[4];
      device::ldmatrix_x4(bf, device::chunk_pair(b, kk) + device::tile_bytes<kCols>(n * 16));
      device::mma_m16n8k16<Element>(acc[0][2 * n], af, bf[0], bf[1]);
      device::mma_m16n8k16<Element>(acc[0][2 * n + 1], af, bf[2], bf[3]);
    }
  }
}

// S^T and dP^T of this warp's 16 keys and 32 rows -> P^T and dS^T in shared memory.
template <class T>
__device__ __forceinline__ void compute_scores(const BwdArgs& a, BwdStorage<T>& s, int stage,
                                               int buffer, int warp, int lane) {
  using Element = typename T::Element;
  const int key0 = warp % 4 * 16, row0 = warp / 4 * 32;
  float score[1][4][4] = {}, dp[1][4][4] = {};
  mma_rows<Element, T::kD>(
      score,
      device::lane_rows16<T::kD>(device::smem_address(s.k) + device::tile_bytes<T::kD>(key0), lane),
      device::lane_rows8x2<T::kD>(
          device::smem_address(s.q[stage]) + device::tile_bytes<T::kD>(row0), lane));
  mma_rows<Element, T::kDv>(
      dp,
      device::lane_rows16<T::kDv>(device::smem_address(s.v) + device::tile_bytes<T::kDv>(key0),
                                  lane),
      device::lane_rows8x2<T::kDv>(device::smem_address(s.dout) + device::tile_bytes<T::kDv>(row0),
                                   lane));
  const uint32_t p_tile = device::smem_address(s.p), ds_tile = device::smem_address(s.ds);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = row0 + n * 8 + lane % 4 * 2;
    const float4 stats = *reinterpret_cast<const float4*>(&s.stats[buffer][row]);
    const int2 limit = *reinterpret_cast<const int2*>(&s.limit[buffer][row]);
    const float lse[2] = {stats.x, stats.z}, delta[2] = {stats.y, stats.w};
    const int last[2] = {limit.x, limit.y};
    float p[4], ds[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = key0 + lane / 4 + e / 2 * 8;
      // P is at most 1; where logits are so large that lse lacks the digits, it may not explode.
      const float x =
          device::exp2_approx(fminf(fmaf(score[0][n][e], a.scale_log2, -lse[e % 2]), 0.f));
      p[e] = key <= last[e % 2] ? x : 0.f;
      ds[e] = p[e] * (dp[0][n][e] - delta[e % 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at =
          device::tile_offset<T::kRows>(key0 + lane / 4 + half * 8, row0 / 8 + n) + lane % 4 * 4;
      device::store_shared_u32(p_tile + at,
                               device::pack_pair<Element>(p[2 * half], p[2 * half + 1]));
      device::store_shared_u32(ds_tile + at,
                               device::pack_pair<Element>(ds[2 * half], ds[2 * half + 1]));
    }
  }
}

// acc += A B for 64 rows of B, kCols wide. `b`: the lane's address at the warp's first column pair;
// its others follow at every second pair. load_a(kk, fragment) gives columns 16 kk .. of A.
template <class Element, int kCols, int kPairs, class LoadA>
__device__ __forceinline__ void mma_pairs(float (&acc)[2 * kPairs][4], uint32_t b,
                                          const LoadA& load_a) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    uint32_t af[4];
    load_a(kk, af);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t bf[4];
      device::ldmatrix_x4_trans(bf,
                                device::chunk_pair(b, 2 * n) + device::tile_bytes<kCols>(kk * 16));
      device::mma_m16n8k16<Element>(acc[2 * n], af, bf[0], bf[1]);
      device::mma_m16n8k16<Element>(acc[2 * n + 1], af, bf[2], bf[3]);
    }
  }
}

// dV += P^T dO and dK += dS^T Q for the warp's 16 keys and its half of the columns.
template <class T>
__device__ __forceinline__ void accumulate_dkv(BwdStorage<T>& s, int stage, int warp, int lane,
                                               float (&dk)[2 * T::kPairs][4],
                                               float (&dv)[2 * T::kPairsV][4]) {
  using Element = typename T::Element;
  const uint32_t keys =
      device::lane_rows16<T::kRows>(device::tile_bytes<T::kRows>(warp % 4 * 16), lane);
  const uint32_t pair = warp / 4 * 32;
  const auto from = [&](const uint4* tile) {
    return [a = keys + device::smem_address(tile)](int kk, uint32_t(&af)[4]) {
      device::ldmatrix_x4(af, device::chunk_pair(a, kk));
    };
  };
  const uint32_t dout = device::lane_rows16<T::kDv>(device::smem_address(s.dout), lane) ^ pair;
  mma_pairs<Element, T::kDv, T::kPairsV>(dv, dout, from(s.p));
  const uint32_t q = device::lane_rows16<T::kD>(device::smem_address(s.q[stage]), lane) ^ pair;
  mma_pairs<Element, T::kD, T::kPairs>(dk, q, from(s.ds));
}

// dQ = scale dS K for rows 16 (warp % 4) .. of the tile and the warp's half of the columns, four column
// chunks at a time. The result leaves through the stage of the queries; no other warp touches the same
// 16-byte chunks.
template <class T>
__device__ __forceinline__ void compute_dq(const BwdArgs& a, BwdStorage<T>& s, int stage,
                                           int buffer, int warp, int lane) {
  using Element = typename T::Element;
  constexpr int kStepPairs = 2, kSteps = T::kPairs / kStepPairs;
  const int row0 = warp % 4 * 16, half = warp / 4;
  const uint32_t ds = device::chunk_pair(
      device::lane_rows8x2<T::kRows>(device::smem_address(s.ds), lane), warp % 4);
  const uint32_t k = device::lane_rows16<T::kD>(device::smem_address(s.k), lane) ^ (half * 32);
  const uint32_t tile = device::smem_address(s.q[stage]);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    float dq[2 * kStepPairs][4] = {};
    mma_pairs<Element, T::kD, kStepPairs>(dq, k + step * 128, [ds](int kk, uint32_t(&af)[4]) {
      device::ldmatrix_x4_trans(af, ds + device::tile_bytes<T::kRows>(kk * 16));
    });
#pragma unroll
    for (int n = 0; n < 2 * kStepPairs; ++n) {
      const int chunk = step * 8 + n / 2 * 4 + half * 2 + n % 2, row = row0 + lane / 4;
      const uint32_t at = tile + lane % 4 * 4;
      device::store_shared_u32(at + device::tile_offset<T::kD>(row, chunk),
                               device::pack_pair<Element>(dq[n][0] * a.scale, dq[n][1] * a.scale));
      device::store_shared_u32(at + device::tile_offset<T::kD>(row + 8, chunk),
                               device::pack_pair<Element>(dq[n][2] * a.scale, dq[n][3] * a.scale));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = i * kWarpSize + lane, row = row0 + c / 4, n = c % 4;
      const int chunk = step * 8 + n / 2 * 4 + half * 2 + n % 2, to = s.out_row[buffer][row];
      if (to < 0 || chunk >= a.chunks_qk) continue;
      char* at = static_cast<char*>(a.dq_partial) + (int64_t{to} * a.chunks_qk + chunk) * 16;
      const uint4 x = device::load_shared_u128(tile + device::tile_offset<T::kD>(row, chunk));
      __stcs(reinterpret_cast<uint4*>(at), x);
    }
  }
}

// The item's dK and dV, fp32 [keys][D + Dv].
template <class T>
__device__ __forceinline__ void store_dkv(const BwdArgs& a, const Item& item, int warp, int lane,
                                          const float (&dk)[2 * T::kPairs][4],
                                          const float (&dv)[2 * T::kPairsV][4]) {
  const int dims_qk = a.chunks_qk * 8, dims_v = a.chunks_v * 8, dims = dims_qk + dims_v;
  const int64_t number = int64_t{item.segment} * a.list.capacity + item.number;
  float* out = a.dkv_items + number * a.keys * dims;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = warp % 4 * 16 + lane / 4 + half * 8;
    if (key >= item.num_keys) continue;
    float* row = out + int64_t{key} * dims;
#pragma unroll
    for (int n = 0; n < 2 * T::kPairs; ++n) {
      const int column = (n / 2 * 4 + warp / 4 * 2 + n % 2) * 8 + lane % 4 * 2;
      if (column >= dims_qk) continue;
      *reinterpret_cast<float2*>(row + column) = {dk[n][2 * half] * a.scale,
                                                  dk[n][2 * half + 1] * a.scale};
    }
#pragma unroll
    for (int n = 0; n < 2 * T::kPairsV; ++n) {
      const int column = (n / 2 * 4 + warp / 4 * 2 + n % 2) * 8 + lane % 4 * 2;
      if (column >= dims_v) continue;
      *reinterpret_cast<float2*>(row + dims_qk + column) = {dv[n][2 * half], dv[n][2 * half + 1]};
    }
  }
}

template <class T>
__device__ __forceinline__ void load_part(const BwdArgs& a, const Item& item, int kv_head,
                                          BwdStorage<T>& s) {
  using Element = typename T::Element;
  const int thread = fresh_thread();
  const auto view = [&](const Rows& rows, int chunks) {
    const Element* first = row_pointer16<const Element>(rows, item.key_row, kv_head);
    return device::MatrixView<Element>{first, rows.token_stride, item.num_keys, chunks * 8};
  };
  device::load_tile<T::kKeys, T::kD, T::kThreads>(
      device::smem_address(s.k), thread_part(view(a.attn.k, a.chunks_qk), thread), 0, thread);
  device::load_tile<T::kKeys, T::kDv, T::kThreads>(
      device::smem_address(s.v), thread_part(view(a.attn.v, a.chunks_v), thread), 0, thread);
}

template <class T>
__device__ __forceinline__ void process_item(const BwdArgs& a, BwdStorage<T>& s) {
  const Item& item = s.item;
  const ItemRows& at = s.at;
  const auto gather_q = [&](int tile, int warp, int lane) {
    const int stage = T::kStages == 2 ? tile & 1 : 0;
    gather_tile<T, T::kD>(device::smem_address(s.q[stage]), a.attn.q, a, at,
                          find_row<T>(a, s, tile, warp, lane), a.chunks_qk, warp, lane);
  };
  const auto gather_dout = [&](int tile, int warp, int lane) {
    gather_tile<T, T::kDv>(device::smem_address(s.dout), a.attn.dout, a, at,
                           find_row<T>(a, s, tile, warp, lane), a.chunks_v, warp, lane);
  };
  float dk[2 * T::kPairs][4] = {}, dv[2 * T::kPairsV][4] = {};
  request_entries<T>(a, s, 0, fresh_warp(), fresh_lane());
  request_entries<T>(a, s, 1, fresh_warp(), fresh_lane());
  device::cp_async_commit();
  load_part<T>(a, item, at.kv_head, s);
  device::cp_async_commit();
  device::cp_async_wait<1>();
  __syncwarp();
  gather_q(0, fresh_warp(), fresh_lane());
  gather_dout(0, fresh_warp(), fresh_lane());
  publish_rows<T>(a, s, 0, fresh_warp(), fresh_lane());

  for (int tile = 0; tile * T::kRows < at.num_rows; ++tile) {
    const int stage = T::kStages == 2 ? tile & 1 : 0;
    device::cp_async_commit();
    device::cp_async_wait<0>();
    __syncthreads();  // A
    const bool has_next = (tile + 1) * T::kRows < at.num_rows;
    if (has_next) {
      if constexpr (T::kStages == 2) gather_q(tile + 1, fresh_warp(), fresh_lane());
      publish_rows<T>(a, s, tile + 1, fresh_warp(), fresh_lane());
      request_entries<T>(a, s, tile + 2, fresh_warp(), fresh_lane());
    }
    compute_scores<T>(a, s, stage, tile & 1, fresh_warp(), fresh_lane());
    __syncthreads();  // B
    accumulate_dkv<T>(s, stage, fresh_warp(), fresh_lane(), dk, dv);
    __syncthreads();  // C
    if (has_next) gather_dout(tile + 1, fresh_warp(), fresh_lane());
    compute_dq<T>(a, s, stage, tile & 1, fresh_warp(), fresh_lane());
    if constexpr (T::kStages == 1) {
      __syncthreads();  // the only stage was read as dQ by everyone
      if (has_next) gather_q(tile + 1, fresh_warp(), fresh_lane());
    }
  }
  store_dkv<T>(a, item, fresh_warp(), fresh_lane(), dk, dv);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm)
    selected_attn_bwd_kernel(const __grid_constant__ BwdArgs a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& s = *reinterpret_cast<BwdStorage<T>*>(smem);
  if (threadIdx.x < kWarpSize) {
    load_item_prefix(a.list, s.prefix, threadIdx.x);
    __syncwarp();
    if (threadIdx.x == 0) s.next_item = fetch_item(a.list, s.prefix, blockIdx.x);
  }
  for (;;) {
    if (threadIdx.x == 0) {
      s.item = s.next_item;
      s.at = ItemRows(a.space, s.item);
    }
    __syncthreads();
    if (s.item.count == 0) break;
    if (threadIdx.x == 0) {
      s.next_item = fetch_item(a.list, s.prefix, gridDim.x + atomicAdd(a.list.counter, 1));
    }
    process_item<T>(a, s);
    __syncthreads();  // shared memory is free
  }
}

}  // namespace fsattn::selected
