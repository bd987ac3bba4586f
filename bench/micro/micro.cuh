// What the measurements of this folder share: error check, timing, random inputs, and the PTX they
// need.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>
#define CUDA_OK(x)                                                      \
  do {                                                                  \
    cudaError_t e_ = (x);                                               \
    if (e_ != cudaSuccess) {                                            \
      printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); \
      exit(1);                                                          \
    }                                                                   \
  } while (0)

// median over reps of the event time of f(), after warm untimed calls
template <class F>
float median_ms(F f, int reps = 5, int warm = 1) {
  static cudaEvent_t s = nullptr, e = nullptr;
  if (!s) {
    CUDA_OK(cudaEventCreate(&s));
    CUDA_OK(cudaEventCreate(&e));
  }
  for (int i = 0; i < warm; i++) f();
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<float> t;
  for (int i = 0; i < reps; i++) {
    CUDA_OK(cudaEventRecord(s));
    f();
    CUDA_OK(cudaEventRecord(e));
    CUDA_OK(cudaEventSynchronize(e));
    float ms;
    CUDA_OK(cudaEventElapsedTime(&ms, s, e));
    t.push_back(ms);
  }
  CUDA_OK(cudaGetLastError());
  std::sort(t.begin(), t.end());
  return t[reps / 2];
}

__host__ __device__ inline uint32_t hash32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}
__host__ __device__ inline float random_unit(uint32_t x) {
  return (int)(hash32(x) >> 8) * (2.f / 16777216.f) - 1.f;
}  // [-1, 1)

static __global__ void fill_bf16(__nv_bfloat162* p, size_t n2,
                                 uint32_t seed) {  // random bf16 in [-1, 1)
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n2;
       i += (size_t)gridDim.x * blockDim.x)
    p[i] = __floats2bfloat162_rn(random_unit(2 * (uint32_t)i + seed),
                                 random_unit(2 * (uint32_t)i + 1 + seed));
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void mbarrier_init(uint32_t b, uint32_t n) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(n));
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint32_t b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nW:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra D;\nbra "
      "W;\nD:\n}" ::"r"(b),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, uint32_t bytes,
                                          uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- wgmma, bf16 x bf16 -> fp32, M = 64, K = 16, both operands K-major in the 128-byte swizzle
// ---- A K-major tile of R rows x 64 columns: row r at r*128 B, its 16-byte chunk c at ((c ^ (r &
// 7)) * 16); 1024 B aligned.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t saddr) {
  return (uint64_t)((saddr & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define L4 "%0,%1,%2,%3"
#define L8 L4 ",%4,%5,%6,%7"
#define L16 L8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define L32 L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define L64                                                                                        \
  L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%" \
      "54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define C4(d, o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define C8(d, o) C4(d, o), C4(d, o + 4)
#define C16(d, o) C8(d, o), C8(d, o + 8)
#define C32(d, o) C16(d, o), C16(d, o + 16)
#define C64(d, o) C32(d, o), C32(d, o + 32)
#define WG_SS(n, r, x, y, z)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #z                                 \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" L##r \
               "}, %" #x ", %" #y ", p, 1, 1, 0, 0;\n}"                                \
               : C##r(d, 0)                                                            \
               : "l"(da), "l"(db), "r"(acc))
#define WG_RS(n, r, x, y, z, u, v)                                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32.bf16.bf16 {" L##r "}, {%" #x ",%" #y ",%" #z ",%" #u "}, %" #v        \
                                          ", p, 1, 1, 0;\n}"                                  \
               : C##r(d, 0)                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db))
template <int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t da, uint64_t db,
                                         int acc = 1) {  // acc 0: D = A B, 1: D += A B
  if constexpr (N == 8)
    WG_SS(8, 4, 4, 5, 6);
  else if constexpr (N == 16)
    WG_SS(16, 8, 8, 9, 10);
  else if constexpr (N == 32)
    WG_SS(32, 16, 16, 17, 18);
  else if constexpr (N == 64)
    WG_SS(64, 32, 32, 33, 34);
  else if constexpr (N == 128)
    WG_SS(128, 64, 64, 65, 66);
}
template <int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t db) {
  if constexpr (N == 8)
    WG_RS(8, 4, 4, 5, 6, 7, 8);
  else if constexpr (N == 16)
    WG_RS(16, 8, 8, 9, 10, 11, 12);
  else if constexpr (N == 32)
    WG_RS(32, 16, 16, 17, 18, 19, 20);
  else if constexpr (N == 64)
    WG_RS(64, 32, 32, 33, 34, 35, 36);
  else if constexpr (N == 128)
    WG_RS(128, 64, 64, 65, 66, 67, 68);
}
// copy an R x 128 row-major bf16 matrix into two swizzled 64-column panels, all threads of the
// block
__device__ __forceinline__ void load_swizzled(char* dst, const __nv_bfloat16* src, int R) {
  for (int i = threadIdx.x; i < R * 16; i += blockDim.x) {
    int r = i / 16, c = i % 16;
    *(uint4*)(dst + (c / 8) * R * 128 + r * 128 + (((c & 7) ^ (r & 7)) << 4)) =
        ((const uint4*)src)[i];
  }
}
