// Question  What does it cost to accumulate fp32 or bf16 rows (dQ) in global memory?
// Method    Copy-engine reduce-adds (fp32, bf16) and plain bulk stores from shared memory to
//           scattered chunks, against red.v4 of single threads. Targets: uniform; uniform inside a
//           window that sweeps the buffer (16 hits a chunk, the order of a chunked kernel); each
//           chunk once.
// Read      TB/s of payload (bytes handed to the reduction) and picoseconds a row of 128 elements.
//           "wrong" counts elements that differ from an exact recount and must be 0.
#include "micro.cuh"

enum { kF32, kBf16, kStore };  // reduce-add fp32, reduce-add bf16, plain bulk store
// Targets: uniform; uniform in a window that sweeps the buffer (16 hits a chunk); each chunk once.
enum { kUniform, kSweep, kPermutation };
struct Targets {
  uint32_t num_chunks, window, mode, seed;
  uint64_t step;
};  // step: window advance per operation, in 2^-64 chunks

__device__ inline uint32_t target(Targets t, uint64_t k) {
  uint32_t h = hash32((uint32_t)k + t.seed);
  if (t.mode == kPermutation) return ((uint32_t)k * 2654435761u) & (t.num_chunks - 1);
  if (t.mode == kSweep) return (uint32_t)__umul64hi(k, t.step) + __umulhi(h, t.window);
  return __umulhi(h, t.num_chunks);
}
__host__ __device__ inline float pattern_f32(uint32_t e) {
  return (int)(hash32(e & 127) & 255) - 128;
}  // integers: sums are exact
__host__ __device__ inline float pattern_bf16(uint32_t e) {
  return (int)(hash32(e & 127) % 3) - 1;
}  // -1, 0, 1

template <int kOp, int kDepth>
__global__ void __launch_bounds__(128)
    bulk_kernel(char* buf, Targets t, uint32_t chunk, int issuers, int iters) {
  extern __shared__ __align__(128) char sm[];
  const uint32_t kSmemBytes = 65536;
  for (uint32_t e = threadIdx.x; e < kSmemBytes / (kOp == kF32 ? 4 : 2); e += blockDim.x)
    if (kOp == kF32)
      ((float*)sm)[e] = pattern_f32(e);
    else
      ((__nv_bfloat16*)sm)[e] = __float2bfloat16(pattern_bf16(e));
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x >= issuers) return;
  uint32_t s0 = smem_address(sm), num_issuers = gridDim.x * issuers,
           id = blockIdx.x * issuers + threadIdx.x, off = threadIdx.x * chunk % kSmemBytes;
  for (int i = 0; i < iters; i++) {
    char* d = buf + (size_t)target(t, (uint64_t)i * num_issuers + id) * chunk;
    if (kOp == kF32)
      asm volatile(
          "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(d),
          "r"(s0 + off), "r"(chunk)
          : "memory");
    else if (kOp == kBf16)
      asm volatile(
          "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(
              d),
          "r"(s0 + off), "r"(chunk)
          : "memory");
    else
      bulk_store(d, s0 + off, chunk);
    bulk_commit();
    bulk_wait_read<kDepth - 1>();
    off = (off + issuers * chunk) % kSmemBytes;
  }
  bulk_wait<0>();
}
// thread-level reductions: one warp a 512-byte row (fp32, 32 x v4) or a 256-byte row (bf16, 16
// lanes of v4.bf16x2 each)
template <int kOp>
__global__ void __launch_bounds__(256) thread_reduce_kernel(char* buf, Targets t, int iters) {
  int lane = threadIdx.x & 31, per = kOp == kF32 ? 1 : 2, l = kOp == kF32 ? lane : lane & 15;
  uint32_t num_issuers = gridDim.x * (blockDim.x / 32) * per,
           id = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * per +
                (kOp == kF32 ? 0 : lane / 16);
  float f[4];
  uint32_t w[4];
  for (int j = 0; j < 4; j++) f[j] = pattern_f32(l * 4 + j);
  for (int j = 0; j < 4; j++) {
    __nv_bfloat162 v =
        __floats2bfloat162_rn(pattern_bf16(l * 8 + 2 * j), pattern_bf16(l * 8 + 2 * j + 1));
    w[j] = *(uint32_t*)&v;
  }
  for (int i = 0; i < iters; i++) {
    char* d = buf + (size_t)target(t, (uint64_t)i * num_issuers + id) * (kOp == kF32 ? 512 : 256) +
              l * 16;
    if (kOp == kF32)
      asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(d), "f"(f[0]), "f"(f[1]),
                   "f"(f[2]), "f"(f[3])
                   : "memory");
    else
      asm volatile("red.global.v4.bf16x2.add.noftz [%0], {%1,%2,%3,%4};" ::"l"(d), "r"(w[0]),
                   "r"(w[1]), "r"(w[2]), "r"(w[3])
                   : "memory");
  }
}
__global__ void count_kernel(uint32_t* counts, Targets t, uint64_t total) {
  for (uint64_t k = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; k < total;
       k += (uint64_t)gridDim.x * blockDim.x)
    atomicAdd(counts + target(t, k), 1u);
}
template <class Element>
__global__ void poison_kernel(Element* b, size_t n) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    b[i] = (Element)3.f;
}
template <int kOp, class Element>
__global__ void check_kernel(const Element* b, const uint32_t* counts, size_t n, uint32_t per,
                             unsigned long long* bad) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    float p = kOp == kF32 ? pattern_f32((uint32_t)i) : pattern_bf16((uint32_t)i);
    uint32_t c = counts[i / per];
    float want = kOp == kStore ? (c ? p : 3.f) : 3.f + c * p;
    if ((float)b[i] != want) atomicAdd(bad, 1ull);
  }
}

template <int kOp, int kDepth>
static void launch(char* buf, Targets t, uint32_t chunk, int issuers, int ctas_per_sm, int iters) {
  CUDA_OK(cudaFuncSetAttribute(bulk_kernel<kOp, kDepth>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, 65536));
  bulk_kernel<kOp, kDepth><<<132 * ctas_per_sm, 128, 65536>>>(buf, t, chunk, issuers, iters);
}
// launch with the wanted number of operations (rounded), return operations done; kind 0: bulk, 1:
// thread red
template <int kOp>
static uint64_t run_ops(int kind, char* buf, Targets& t, uint32_t chunk, int issuers,
                        int ctas_per_sm, int depth, uint64_t ops) {
  uint64_t num_issuers =
      kind ? 132 * 8 * 8 * (kOp == kF32 ? 1 : 2) : 132ull * ctas_per_sm * issuers;
  int iters = (int)std::max<uint64_t>(1, ops / num_issuers);
  if (t.mode == kPermutation)
    while ((uint64_t)iters * num_issuers > t.num_chunks) iters--;
  t.step = (uint64_t)(((unsigned __int128)(t.num_chunks - t.window) << 64) / (num_issuers * iters));
  if (kind)
    thread_reduce_kernel<kOp == kBf16 ? kBf16 : kF32><<<132 * 8, 256>>>(buf, t, iters);
  else if (depth == 1)
    launch<kOp, 1>(buf, t, chunk, issuers, ctas_per_sm, iters);
  else if (depth == 2)
    launch<kOp, 2>(buf, t, chunk, issuers, ctas_per_sm, iters);
  else if (depth == 4)
    launch<kOp, 4>(buf, t, chunk, issuers, ctas_per_sm, iters);
  else
    launch<kOp, 8>(buf, t, chunk, issuers, ctas_per_sm, iters);
  return num_issuers * iters;
}
static char* buf;
static uint32_t* counts;
static unsigned long long* bad;
template <int kOp>
static void measure(const char* name, int kind, size_t bytes, int mode, uint32_t chunk, int issuers,
                    int ctas_per_sm, int depth, int winmb = 16) {
  using Element = std::conditional_t<kOp == kF32, float, __nv_bfloat16>;
  Targets t{(uint32_t)(bytes / chunk), (uint32_t)(((size_t)winmb << 20) / chunk), (uint32_t)mode,
            77u, 0};
  size_t n = bytes / sizeof(Element);
  // correctness: about 8 additions a chunk on a poisoned buffer (the bf16 sums stay exact)
  poison_kernel<<<1056, 256>>>((Element*)buf, n);
  uint64_t ops = run_ops<kOp>(kind, buf, t, chunk, issuers, ctas_per_sm, depth,
                              mode == kPermutation ? t.num_chunks : 8ull * t.num_chunks);
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaMemset(counts, 0, 4ull * t.num_chunks));
  CUDA_OK(cudaMemset(bad, 0, 8));
  count_kernel<<<1056, 256>>>(counts, t, ops);
  check_kernel<kOp, Element><<<1056, 256>>>((Element*)buf, counts, n, chunk / sizeof(Element), bad);
  unsigned long long hb;
  CUDA_OK(cudaMemcpy(&hb, bad, 8, cudaMemcpyDeviceToHost));
  // timing: about 6 GB of payload, 16 GB when sweeping
  uint64_t want = mode == kPermutation ? t.num_chunks
                  : mode == kSweep     ? 16ull * t.num_chunks
                                       : (6ull << 30) / chunk,
           done = 0;
  float ms = median_ms(
      [&] { done = run_ops<kOp>(kind, buf, t, chunk, issuers, ctas_per_sm, depth, want); }, 5);
  uint32_t row = kOp == kF32 ? 512 : 256;
  char mn[16];
  snprintf(mn, 16, mode == kPermutation ? "perm" : mode == kSweep ? "sweep%dM" : "uniform", winmb);
  printf(
      "%-11s %-8s %6.0f MB chunk %5u issuers/CTA %3d CTA/SM %d depth %d: %6.3f TB/s payload, %6.1f "
      "ps per %u B row, wrong %llu\n",
      name, mn, bytes / 1048576.0, chunk, issuers, ctas_per_sm, depth,
      (double)done * chunk / ms / 1e9, ms * 1e9 / ((double)done * chunk / row), row, hb);
  fflush(stdout);
}
int main() {
  const size_t S = 32ull << 20, M = 1ull << 30, L = 4ull << 30;
  CUDA_OK(cudaMalloc(&buf, L));
  CUDA_OK(cudaMalloc(&counts, 4ull * (L / 256)));
  CUDA_OK(cudaMalloc(&bad, 8));
  for (size_t b : {S, M}) {
    measure<kF32>("red.v4.f32", 1, b, kUniform, 512, 0, 0, 0);
    for (uint32_t c : {512u, 2048u, 4096u, 8192u, 16384u}) {
      measure<kF32>("bulk f32", 0, b, kUniform, c, 32, 1, c >= 8192 ? 1 : 4);
      measure<kF32>("bulk f32", 0, b, kUniform, c, 1, 1, 8);
      if (c <= 2048) measure<kF32>("bulk f32", 0, b, kUniform, c, 128, 1, 4);
    }
    measure<kBf16>("red.v4.bf16", 1, b, kUniform, 256, 0, 0, 0);
    for (uint32_t c : {256u, 1024u, 4096u, 16384u}) {
      measure<kBf16>("bulk bf16", 0, b, kUniform, c, 32, 1, 4);
      if (c <= 1024) measure<kBf16>("bulk bf16", 0, b, kUniform, c, 128, 1, 4);
    }
  }
  for (int w :
       {4, 8, 16, 32, 64}) {  // a chunk order: all adds to a row fall into one window, 16 a row
    measure<kF32>("red.v4.f32", 1, M, kSweep, 512, 0, 0, 0, w);
    for (uint32_t c : {512u, 2048u, 8192u})
      measure<kF32>("bulk f32", 0, M, kSweep, c, 128, 1, 1, w);
    measure<kBf16>("bulk bf16", 0, M, kSweep, 1024, 128, 1, 1, w);
  }
  for (uint32_t c :
       {256u, 1024u, 4096u,
        16384u}) {  // partial rows written once: plain bulk stores, each chunk of 4 GB once
    measure<kStore>("bulk store", 0, L, kPermutation, c, 32, 1, 4);
    measure<kStore>("bulk store", 0, L, kPermutation, c, 32, 2, 2);
    if (c <= 1024) measure<kStore>("bulk store", 0, L, kPermutation, c, 128, 2, 4);
  }
}
