// The kernels of overlap.cu.
#pragma once
#include "micro.cuh"

constexpr int kTokens = 65536, kBlocks = 1024, kSlots = 13;
enum { kForward, kLoadStore, kPartial, kReduce };
template <int kWhat>
struct Config {
  static constexpr int kMainWarps = kWhat == kLoadStore ? 16 : 4, kIsBackward = kWhat >= kPartial,
                       kStageBytes = kIsBackward ? 8192 : 4096, kStages = kIsBackward ? 6 : 8,
                       L = kIsBackward ? 3 : 4, kSignalLag = 16,
                       kSmemBytes = kWhat == kLoadStore ? 0
                                                        : kMainWarps * kStages * kStageBytes +
                                                              8192 + 8192 * kIsBackward;
};
struct Args {
  const char *q, *dO, *kv;
  char *part, *out;
  float *lse, *acc, *dkv;
  const uint32_t* list;
  // Quarter items {list offset, queries, chunk, block * 4 + quarter}, a list entry query << 4 | slot.
  const int4* items;
  const int* nitem;
  int *work, *done, *merged;  // per chunk: quarter items, counters
  int i0, i1, c0, c1, R, H, rph, nbuf;
  int split;  // CTAs < split only merge (0: all do both; -1: main only; -2: merge only)
  int gate, kvload, lseon, wg_merge;
};
__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(int* p) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(p) : "memory");
}
__device__ __forceinline__ void bulk_reduce_add(void* d, uint32_t s, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(d), "r"(s),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ bool may_write(const Args& a, int chunk) {
  int c = chunk - a.nbuf;
  return !a.gate || c < a.c0 || load_acquire(a.merged + c) >= a.wg_merge;
}
__host__ __device__ inline float pattern(uint32_t e) { return (int)(hash32(e) & 255) - 128; }

template <int kGroup, int kWhat>
__device__ void main_role(const Args& a, int wi, int nw) {
  extern __shared__ __align__(128) char sm[];
  using C = Config<kWhat>;
  constexpr int kMainWarps = C::kMainWarps, kStages = C::kStages, L = C::L,
                kRowBytes = kGroup * 256, PER = C::kIsBackward ? 2 * kRowBytes : kRowBytes,
                TQ = C::kStageBytes / PER, K = kStages - 1 - L,
                NE = 512 / kGroup / 32 > 0 ? 512 / kGroup / 32 : 1;
  __shared__ uint64_t bars[kMainWarps][kStages];
  __shared__ int2 metas[kMainWarps][32];
  __shared__ uint32_t ents[kMainWarps][32][4];
  int lane = threadIdx.x % 32, w = threadIdx.x / 32;
  int2* meta = metas[w];
  uint32_t s0 = smem_address(sm) + w * kStages * C::kStageBytes,
           kv0 = smem_address(sm) + kMainWarps * kStages * C::kStageBytes, pat = kv0 + 8192,
           b0 = smem_address(bars[w]);
  if (lane == 0) {
    for (int i = 0; i < kStages; i++) mbarrier_init(b0 + 8 * i, 1);
    mbarrier_init_fence();
  }
  if (C::kIsBackward) {
    for (int e = lane; e < 2048; e += 32)
      *(float*)(sm + (pat - smem_address(sm)) + e * 4) = pattern(e);
    fence_async_proxy();
  }  // every warp writes the same
  __syncwarp();
  uint32_t ec[NE], en[NE];  // this and the next item's list entries; items are known two ahead
  auto get = [&](int i) { return i < a.i1 ? a.items[i] : make_int4(0, 0, 0, 0); };
  auto entries = [&](uint32_t(&e)[NE], int4 t) {
#pragma unroll
    for (int x = 0; x < NE; x++) e[x] = x * 32 + lane < t.y ? a.list[t.x + x * 32 + lane] : 0;
  };
  int idx = a.i0 + wi;
  int4 it = get(idx), nx = get(idx + nw), nn = get(idx + 2 * nw);
  entries(ec, it);
  entries(en, nx);
  int tk = lane == 0 ? atomicAdd(a.work, 1) : 0;  // ticket of the item after nn
  bool more = it.y > 0, open = false;
  int pos = 0, total = more ? 1 << 30 : 0;
  for (int i = 0; i - L - C::kSignalLag < total; i++) {
    if (more) {
      if (pos == 0 && !open) {
        open = may_write(a, it.z);
        if (open && a.gate) fence_async_proxy();
      }  // buffer not free: an empty tile
      int n = open ? min(TQ, it.y - pos) : 0, last = n && pos + n == it.y,
          first = n && pos == 0 && a.kvload, head = it.z / a.rph;
      uint32_t fb = b0 + 8 * (i % kStages), e = ec[0];
#pragma unroll
      for (int x = 1; x < NE; x++)
        if (pos / 32 == x) e = ec[x];
      e = __shfl_sync(~0u, e, (pos & 31) + (lane % TQ));
      if (lane == 0) {
        meta[i & 31] = make_int2(n | last << 8 | it.w << 9, it.z);
        mbarrier_expect(fb, n * PER + (first ? 8192 : 0));
      }
      if (lane < n) ents[w][i & 31][lane] = e;
      __syncwarp();
      if (lane < n) {
        size_t o = ((size_t)(e >> 4) * a.H + head) * kRowBytes;
        uint32_t d = s0 + (i % kStages) * C::kStageBytes + lane * PER;
        bulk_load(d, a.q + o, kRowBytes, fb);
        if (C::kIsBackward) bulk_load(d + kRowBytes, a.dO + o, kRowBytes, fb);
      }
      if (first && lane == 31)
        bulk_load(kv0, a.kv + ((size_t)head * kBlocks * 4 + it.w) * 8192, 8192,
                  fb);  // contents unused
      pos += n;
      if (last) {
        pos = 0;
        open = false;
        it = nx;
        nx = nn;
        nn = get(a.i0 + 3 * nw + __shfl_sync(~0u, tk, 0));
        if (lane == 0) tk = atomicAdd(a.work, 1);
#pragma unroll
        for (int x = 0; x < NE; x++) ec[x] = en[x];
        entries(en, nx);
        if (it.y == 0) {
          more = false;
          total = i + 1;
        }
      }
    }
    int j = i - L;
    if (j >= 0 && j < total) {  // tile arrived: write its rows
      mbarrier_wait(b0 + 8 * (j % kStages), (j / kStages) & 1);
      int2 m = meta[j & 31];
      int head = m.y / a.rph;
      if (lane < (m.x & 255)) {
        uint32_t e = ents[w][j & 31][lane];
        int tok = (e >> 4) % a.R, buf = m.y % a.nbuf;
        size_t row = ((size_t)buf * a.R + tok) * kSlots + (e & 15);
        if (kWhat == kReduce)
          bulk_reduce_add((char*)a.acc + ((size_t)head * kTokens + (e >> 4)) * kRowBytes * 2, pat,
                          kRowBytes * 2);
        else
          bulk_store(a.part + row * kRowBytes, s0 + (j % kStages) * C::kStageBytes + lane * PER,
                     kRowBytes);
        if (a.lseon)
          for (int x = 0; x < kGroup; x += 4)
            *(float4*)(a.lse + row * kGroup + x) = make_float4(1.f, 1.f, 1.f, 1.f);
      }
      if (C::kIsBackward && (m.x >> 8 & 1) && lane >= 30)
        bulk_reduce_add(
            (char*)a.dkv + (((size_t)head * kBlocks * 4 + (m.x >> 9)) * 2 + lane - 30) * 8192, pat,
            8192);
    }
    bulk_commit();
    bulk_wait_read<K>();         // the stage of the next tile is free again
    bulk_wait<C::kSignalLag>();  // rows of tile t are written
    int t = i - L - C::kSignalLag;
    if (t >= 0 && t < total && (meta[t & 31].x >> 8 & 1)) {
      __syncwarp();
      if (lane == 0) {
        fence_async_proxy();
        __threadfence();
        add_release(a.done + meta[t & 31].y);
      }
    }
    __syncwarp();
  }
}
template <int kGroup>
__device__ void main_lsu(
    const Args& a, int wi,
    int nw) {  // the same work by 16-byte loads and stores, 4 KB a warp in flight
  constexpr int kRowBytes = kGroup * 256, TQ = 4096 / kRowBytes;
  int lane = threadIdx.x % 32, idx = a.i0 + wi, nidx = idx + nw;
  int4 nx = idx < a.i1 ? a.items[idx] : int4{};
  while (idx < a.i1) {
    int4 it = nx;
    idx = nidx;
    if (idx < a.i1) nx = a.items[idx];
    int tk = lane == 0 ? atomicAdd(a.work, 1) : 0;
    int head = it.z / a.rph;
    const uint4* kp = (const uint4*)(a.kv + ((size_t)head * kBlocks * 4 + it.w) * 8192) + lane;
    uint32_t x = 0;
    if (a.kvload) {
#pragma unroll
      for (int k = 0; k < 16; k++) {
        uint4 v = __ldg(kp + k * 32);
        x ^= v.x ^ v.y ^ v.z ^ v.w;
      }
    }
    while (!may_write(a, it.z)) __nanosleep(100);
    size_t b = (size_t)(it.z % a.nbuf) * a.R;
    for (int pos = 0; pos < it.y; pos += TQ) {
      uint32_t e = a.list[it.x + min(pos + lane % TQ, it.y - 1)];
      uint4 v[8];
      size_t row = (b + (e >> 4) % a.R) * kSlots + (e & 15);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        int o = k * 512 + lane * 16;
        uint32_t tok = __shfl_sync(~0u, e, o / kRowBytes) >> 4;
        if (pos + o / kRowBytes < it.y)
          v[k] =
              __ldg((const uint4*)(a.q + ((size_t)tok * a.H + head) * kRowBytes + o % kRowBytes));
      }
#pragma unroll
      for (int k = 0; k < 8; k++) {
        int o = k * 512 + lane * 16;
        size_t r = __shfl_sync(~0u, row, o / kRowBytes);
        if (pos + o / kRowBytes < it.y)
          __stcg((uint4*)(a.part + r * kRowBytes + o % kRowBytes), v[k]);
      }
      if (a.lseon && lane < min(TQ, it.y - pos))
        for (int y = 0; y < kGroup; y += 4)
          *(float4*)(a.lse + row * kGroup + y) = make_float4(1.f, 1.f, 1.f, 1.f);
    }
    if (x == 0x12345678 && a.kvload == 2) a.lse[0] = 0;
    if (a.gate) {
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        add_release(a.done + it.z);
      }
    }
    nidx = a.i0 + 2 * nw + __shfl_sync(~0u, tk, 0);
  }
}
template <int kGroup>
__global__ void __launch_bounds__(256) simple_kernel(Args a, int l0, int l1, int chunk) {
  constexpr int ROW = kGroup * 16;
  const uint4* q = (const uint4*)a.q;
  uint4* part = (uint4*)a.part;
  for (int i0 = threadIdx.x; i0 < 32 * ROW; i0 += 2048) {
    uint4 v[8];
    size_t d[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      int i = i0 + k * 256, x = l0 + blockIdx.x * 32 + i / ROW;
      d[k] = ~0ull;
      if (x < l1) {
        uint32_t e = a.list[x];
        v[k] = __ldg(q + ((size_t)(e >> 4) * a.H + chunk / a.rph) * ROW + i % ROW);
        d[k] =
            (((size_t)(chunk % a.nbuf) * a.R + (e >> 4) % a.R) * kSlots + (e & 15)) * ROW + i % ROW;
      }
    }
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (d[k] != ~0ull) __stcg(part + d[k], v[k]);
  }
}
template <int kGroup>
__device__ void merge_role(const Args& a, int w, int nw) {
  int lane = threadIdx.x & 31, l16 = lane & 15;
  for (int c = a.c0; c < a.c1; c++) {
    if (a.gate) {
      if (lane == 0)
        while (load_acquire(a.done + c) < a.nitem[c]) __nanosleep(100);
      __syncwarp();
    }
    int head = c / a.rph, r0 = (c % a.rph) * a.R;
    size_t b = (size_t)(c % a.nbuf) * a.R;
    for (int r = w * 2 + lane / 16; r < a.R * kGroup; r += nw * 2) {
      size_t q = b + r / kGroup;
      int h = r % kGroup;
      uint4 v[kSlots];
      float acc[8] = {}, wt = 1.f;
#pragma unroll
      for (int s = 0; s < kSlots; s++)
        asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[s].x), "=r"(v[s].y), "=r"(v[s].z), "=r"(v[s].w)
                     : "l"(a.part + ((q * kSlots + s) * kGroup + h) * 256 + l16 * 16)
                     : "memory");
      if (a.lseon && l16 < kSlots)
        asm volatile("ld.global.cg.f32 %0, [%1];"
                     : "=f"(wt)
                     : "l"(a.lse + (q * kSlots + l16) * kGroup + h)
                     : "memory");
#pragma unroll
      for (int s = 0; s < kSlots; s++) {
        float f = __shfl_sync(~0u, wt, s, 16);
        const __nv_bfloat162* p = (const __nv_bfloat162*)&v[s];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float2 x = __bfloat1622float2(p[k]);
          acc[2 * k] += f * x.x;
          acc[2 * k + 1] += f * x.y;
        }
      }
      uint4 o;
      __nv_bfloat162* po = (__nv_bfloat162*)&o;
      for (int k = 0; k < 4; k++) po[k] = __floats2bfloat162_rn(acc[2 * k], acc[2 * k + 1]);
      *(uint4*)(a.out + (((size_t)(r0 + r / kGroup) * a.H + head) * kGroup + h) * 256 + l16 * 16) =
          o;
    }
    if (a.gate) {
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        add_release(a.merged + c);
      }
    }
  }
}
// 32 * (MW + merge warps) threads: warps < MW main, the others merge
template <int kGroup, int kWhat>
__global__ void __launch_bounds__(768) run_kernel(Args a) {
  constexpr int kMainWarps = Config<kWhat>::kMainWarps;
  int warp = threadIdx.x / 32, mw = blockDim.x / 32 - kMainWarps, bx = blockIdx.x,
      m0 = max(a.split, 0);
  if (warp < kMainWarps) {
    if (a.split != -2 && bx >= a.split) {
      if constexpr (kWhat == kLoadStore)
        main_lsu<kGroup>(a, (bx - m0) * kMainWarps + warp, (gridDim.x - m0) * kMainWarps);
      else
        main_role<kGroup, kWhat>(a, (bx - m0) * kMainWarps + warp, (gridDim.x - m0) * kMainWarps);
    }
  } else if (a.split == 0 || a.split == -2)
    merge_role<kGroup>(a, bx * mw + warp - kMainWarps, gridDim.x * mw);
  else if (bx < a.split)
    merge_role<kGroup>(a, bx * mw + warp - kMainWarps, a.split * mw);
}
__global__ void convert_kernel(
    const float4* acc, __nv_bfloat162* o,
    size_t n4) {  // fp32 accumulator -> bf16 (same order, for its traffic)
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n4;
       i += (size_t)gridDim.x * blockDim.x) {
    float4 v = acc[i];
    o[2 * i] = __floats2bfloat162_rn(v.x, v.y);
    o[2 * i + 1] = __floats2bfloat162_rn(v.z, v.w);
  }
}
__global__ void check_kernel(const __nv_bfloat16* q, const __nv_bfloat16* o, size_t n, int kGroup,
                             int red, unsigned long long* bad) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    float s = 0, x = red ? pattern(i % (kGroup * 128)) : __bfloat162float(q[i]);
    for (int k = 0; k < kSlots; k++) s += x;
    if (__bfloat162float(__float2bfloat16(s)) != __bfloat162float(o[i])) atomicAdd(bad, 1ull);
  }
}
