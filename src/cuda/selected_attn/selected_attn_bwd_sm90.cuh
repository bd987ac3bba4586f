// selected_attn_bwd, block-major, sm_90a: wgmma, TMA and loader warps; parts of 64 keys.
//
// Math    as selected_attn_bwd_sm80.cuh, per tile of 64 rows.
// Tiles   persistent CTAs, two an SM, that share nothing: one consumer warpgroup and four loader warps.
//         While one CTA waits for its products, the other one computes.
// Roles   the consumers hold dK, dV of the item in registers and keys in the rows of the accumulators:
//         S^T = K Q^T and dP^T = V dO^T from shared memory; P^T and dS^T are A operands as they are;
//         dS goes through shared memory for dQ = dS K, and dQ leaves from the accumulators. A loader
//         warp gathers 16 rows of Q and dO, two tiles deep, across item borders; dO of a tile is given
//         back before its dK and dQ, Q after dK. Loader 0 also walks the work items and brings K and V.
// Memory  K, V 32 KiB, two stages of Q and dO 64 KiB, dS 8 KiB.
// Regs    dK 64, dV 64, 32 of S, dP or dQ: 208 a consumer thread, 48 a loader thread. With S and dP, or dV
//         and dS, in flight together a consumer needs 224 to 240, or ptxas serialises all products.
// Bound   as selected_attn_bwd_sm80.cuh; tensor cores 1280 clocks a tile.
#pragma once
#include "cuda/device/wgmma_ss_sm90.cuh"
#include "cuda/selected_attn/selected_attn_bwd_loader_sm90.cuh"

namespace fsattn::selected {

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

// Issues acc = A B^T over all columns; A and B are tiles of 64 rows.
template <class T>
__device__ __forceinline__ void start_scores(float (&acc)[32], uint32_t a, uint32_t b) {
  const uint64_t a0 = device::wgmma_descriptor(a, 16), b0 = device::wgmma_descriptor(b, 16);
#pragma unroll
  for (int kk = 0; kk < T::kD / 16; ++kk) {
    const int at = kk / 4 * T::kPanelBytes + kk % 4 * 32;
    device::wgmma_ss_m64n64k16<typename T::Element>(acc, device::wgmma_descriptor_behind(a0, at),
                                                    device::wgmma_descriptor_behind(b0, at),
                                                    kk > 0);
  }
  device::wgmma_commit();
}

// Issues acc += X^T B for packed X^T [64 keys][64 rows] and a tile B of 64 rows.
template <class T>
__device__ __forceinline__ void start_gradient(typename T::Gradient& acc, const uint32_t (&x)[16],
                                               uint32_t b) {
  const uint64_t b0 = device::wgmma_descriptor(b, T::kPanelBytes);
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const uint32_t fragment[4] = {x[4 * kk], x[4 * kk + 1], x[4 * kk + 2], x[4 * kk + 3]};
    const uint64_t rows = device::wgmma_descriptor_behind(b0, kk * 2048);
    if constexpr (T::kPanels == 2) {
      device::wgmma_m64n128k16_mn_major<typename T::Element>(acc, fragment, rows, 1);
    } else {
      device::wgmma_m64n64k16_mn_major<typename T::Element>(acc, fragment, rows, 1);
    }
  }
  device::wgmma_commit();
}

// P^T, packed in pairs of rows. Word 2 n + half: rows 8 n + 2 (lane % 4) and the next one, key
// 16 warp + lane / 4 + 8 half.
template <class T>
__device__ __forceinline__ void probabilities(uint32_t (&prob)[16], const float (&score)[32],
                                              const float* lse, float scale_log2, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 shift = reinterpret_cast<const float2*>(lse)[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // P is at most 1; where logits are so large that lse lacks the digits, it may not explode.
      const float x0 = fminf(fmaf(score[4 * n + 2 * half], scale_log2, -shift.x), 0.f);
      const float x1 = fminf(fmaf(score[4 * n + 2 * half + 1], scale_log2, -shift.y), 0.f);
      prob[2 * n + half] =
          device::pack_pair<typename T::Element>(device::exp2_approx(x0), device::exp2_approx(x1));
    }
  }
}

// Keys behind a row's limit get probability zero.
__device__ __forceinline__ void mask_probabilities(uint32_t (&prob)[16], const int* limit, int warp,
                                                   int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int2 last = reinterpret_cast<const int2*>(limit)[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp * 16 + lane / 4 + half * 8;
      prob[2 * n + half] &= (key <= last.x ? 0x0000ffffu : 0u) | (key <= last.y ? 0xffff0000u : 0u);
    }
  }
}

// dS^T = P^T (dP^T - delta), packed like P^T.
template <class T>
__device__ __forceinline__ void score_gradient(uint32_t (&ds)[16], const float (&dp)[32],
                                               const uint32_t (&prob)[16], const float* delta,
                                               int lane) {
  using Element = typename T::Element;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 d = reinterpret_cast<const float2*>(delta)[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 p = device::unpack_pair<Element>(prob[2 * n + half]);
      ds[2 * n + half] = device::pack_pair<Element>(p.x * (dp[4 * n + 2 * half] - d.x),
                                                    p.y * (dp[4 * n + 2 * half + 1] - d.y));
    }
  }
}

// dS^T of this warp's 16 keys -> dS [row][key], the A operand of dQ.
__device__ __forceinline__ void store_score_gradient(uint32_t tile, const uint32_t (&ds)[16],
                                                     int warp, int lane) {
  const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  const uint32_t to = tile + row * 128 + ((chunk ^ row) & 7) * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // 16 rows
    device::stmatrix_x4_trans(to + i * 2048, ds[4 * i], ds[4 * i + 1], ds[4 * i + 2],
                              ds[4 * i + 3]);
  }
}

// Issues 64 columns of dQ = dS K.
template <class T>
__device__ __forceinline__ void start_dq(float (&dq)[32], uint32_t ds_tile, uint32_t k_panel) {
  const uint64_t ds0 = device::wgmma_descriptor(ds_tile, 16);
  const uint64_t k0 = device::wgmma_descriptor(k_panel, T::kPanelBytes);
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    device::wgmma_ss_m64n64k16_mn_major<typename T::Element>(
        dq, device::wgmma_descriptor_behind(ds0, kk * 32),
        device::wgmma_descriptor_behind(k0, kk * 2048), kk > 0);
  }
  device::wgmma_commit();
}

// 64 columns of the warp's 16 rows of dQ, scaled and packed in the order of the accumulators.
template <class T>
__device__ __forceinline__ void pack_dq(uint32_t (&packed)[16], const float (&dq)[32],
                                        float scale) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    packed[i] = device::pack_pair<typename T::Element>(dq[2 * i] * scale, dq[2 * i + 1] * scale);
  }
}

// They go to the partial rows in that order: 16 bytes hold the lane's two columns of four 8-column
// groups, and a quad writes 64 bytes of a row. The sum of dQ puts the columns back (kInterleaved).
// `to`: rows lane / 4 and 8 behind it.
template <class T>
__device__ __forceinline__ void write_dq(const uint32_t (&packed)[16], char* columns,
                                         const int (&to)[2]) {
  const uint64_t policy = device::l2_evict_first();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (to[half] < 0) continue;
    char* row = columns + int64_t{to[half]} * T::kRowBytes;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t* x = packed + 8 * j + half;
      device::store_global_u128_hint(row + j * 64, uint4{x[0], x[2], x[4], x[6]}, policy);
    }
  }
}

// P^T and dS^T of a tile, and dV += P^T dO. Gives dO back and returns where the lane's rows of dQ go.
template <class T>
__device__ __forceinline__ void compute_scores(const BwdArgs& a, BwdWgmmaStorage<T>& s, int stage,
                                               int parity, int warp, int lane, uint32_t (&ds)[16],
                                               typename T::Gradient& dv, int (&to)[2]) {
  const uint32_t dout = device::smem_address(s.dout[stage]);
  uint32_t prob[16];
  // The copies of the loaders are ordinary writes, and wgmma reads through another proxy.
  device::mbarrier_wait(device::smem_address(&s.q_full[stage]), parity);
  device::fence_async_proxy();
  {
    float score[32];
    device::wgmma_fence();
    start_scores<T>(score, device::smem_address(s.k), device::smem_address(s.q[stage]));
    const int4 masked = s.is_masked[stage];
    device::wgmma_wait_group<0>();
    device::pin_registers(score);
    probabilities<T>(prob, score, s.lse[stage], a.scale_log2, lane);
    if (masked.x | masked.y | masked.z | masked.w) {
      mask_probabilities(prob, s.limit[stage], warp, lane);
    }
  }
  device::mbarrier_wait(device::smem_address(&s.dout_full[stage]), parity);
  device::fence_async_proxy();
  float dp[32];
  device::wgmma_fence();
  start_scores<T>(dp, device::smem_address(s.v), dout);
  start_gradient<T>(dv, prob, dout);
  device::wgmma_wait_group<0>();
  device::pin_registers(dp);
  score_gradient<T>(ds, dp, prob, s.delta[stage], lane);
  to[0] = s.out_row[stage][warp * 16 + lane / 4];
  to[1] = s.out_row[stage][warp * 16 + lane / 4 + 8];
  __syncwarp();
  if (lane == 0) device::mbarrier_arrive(device::smem_address(&s.dout_empty[stage]));
}

// One tile: its part of dK and dV, and its rows of dQ.
template <class T>
__device__ __forceinline__ void consume_tile(const BwdArgs& a, BwdWgmmaStorage<T>& s, int stage,
                                             int parity, bool is_last, int warp, int lane,
                                             typename T::Gradient& dk, typename T::Gradient& dv) {
  uint32_t ds[16];
  int to[2];
  compute_scores<T>(a, s, stage, parity, warp, lane, ds, dv, to);
  const uint32_t ds_tile = device::smem_address(s.ds);
  start_gradient<T>(dk, ds, device::smem_address(s.q[stage]));
  sync_consumers();  // nobody's wgmma reads dS of the tile before
  store_score_gradient(ds_tile, ds, warp, lane);
  device::fence_async_proxy();
  sync_consumers();  // dS is complete
  char* columns = static_cast<char*>(a.dq_partial) + lane % 4 * 16;
  uint32_t packed[16];
#pragma unroll
  for (int panel = 0; panel < T::kPanels; ++panel) {
    float dq[32];
    start_dq<T>(dq, ds_tile, device::smem_address(s.k) + panel * T::kPanelBytes);
    if (panel > 0) write_dq<T>(packed, columns + (panel - 1) * 128, to);
    device::wgmma_wait_group<0>();
    device::pin_registers(dq);
    // dK is complete with the first panel, and with it the last use of Q.
    if (panel == 0 && lane == 0) device::mbarrier_arrive(device::smem_address(&s.q_empty[stage]));
    pack_dq<T>(packed, dq, a.scale);
  }
  if (is_last && lane == 0) device::mbarrier_arrive(device::smem_address(&s.kv_empty));
  write_dq<T>(packed, columns + (T::kPanels - 1) * 128, to);
}

// The item's dK and dV, [keys][D + Dv] in the order of dQ's columns; `out` is the lane's first 16 bytes.
template <class T>
__device__ __forceinline__ void store_dkv(char* out, int num_keys, float scale,
                                          const typename T::Gradient& dk,
                                          const typename T::Gradient& dv) {
  using Element = typename T::Element;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half * 8 >= num_keys) continue;
    char* row = out + half * 8 * T::kDkvRowBytes;
#pragma unroll
    for (int j = 0; j < T::kD / 32; ++j) {
      uint32_t x[4], y[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = 16 * j + 4 * n + 2 * half;
        x[n] = device::pack_pair<Element>(dk[i] * scale, dk[i + 1] * scale);
        y[n] = device::pack_pair<Element>(dv[i], dv[i + 1]);
      }
      *reinterpret_cast<uint4*>(row + j * 64) = {x[0], x[1], x[2], x[3]};
      *reinterpret_cast<uint4*>(row + T::kRowBytes + j * 64) = {y[0], y[1], y[2], y[3]};
    }
  }
}

template <class T>
__device__ __forceinline__ void consume(const BwdArgs& a, BwdWgmmaStorage<T>& s, int warp,
                                        int lane) {
  int use = 0;
  for (int n = 0;; ++n) {
    const int buffer = n % T::kItems;
    device::mbarrier_wait(device::smem_address(&s.item_full[buffer]), n / T::kItems & 1);
    const Item& item = s.items[buffer];
    if (item.count == 0) break;
    // Behind the last tile the buffer belongs to another item.
    const int num_rows = s.at[buffer].num_rows, key = warp * 16 + lane / 4;
    const int num_keys = item.num_keys - key;
    const int64_t first = (int64_t{item.segment} * a.list.capacity + item.number) * T::kKeys + key;
    char* out = reinterpret_cast<char*>(a.dkv_items) + first * T::kDkvRowBytes + lane % 4 * 16;
    typename T::Gradient dk = {}, dv = {};
    device::mbarrier_wait(device::smem_address(&s.kv_full), n & 1);
    for (int row = 0; row < num_rows; row += T::kRows, ++use) {
      const int stage = use % T::kStages;
      consume_tile<T>(a, s, stage, use / T::kStages & 1, row + T::kRows >= num_rows, warp, lane, dk,
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
  auto& s = *reinterpret_cast<BwdWgmmaStorage<T>*>(smem);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();
  if (warp < T::kConsumers) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kConsumerRegisters));
    consume<T>(a, s, warp, lane);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::kLoaderRegisters));
    load_rows<T>(a, s, &k_map, &v_map, warp - T::kConsumers, lane);
  }
}

}  // namespace fsattn::selected
