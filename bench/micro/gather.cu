// Question  What is the fastest way to gather query rows into shared memory, and how deep must it
//           run?
// Method    Q [65536, 32, 128] bf16, sorted random row lists, one CTA an SM. 1 or 4 producer warps
//           fill a ring of 16 KB stages (64 rows of 256 B) with cp.async (16 B a thread), with one
//           bulk copy of G * 256 B a query, or with the two tensor-map boxes a swizzled tile needs;
//           one consumer warp frees them.
// Read      TB/s against the depth of the ring; (WRONG) when the sum of all gathered words differs.
#include <cuda.h>

#include "micro.cuh"

enum { kCpAsync, kBulk, kTensor };
constexpr int kTokens = 65536, kHeads = 32, kTokenBytes = kHeads * 256, kStageBytes = 16384,
              kNumLists = 832;  // 832 lists of 1024 = 13 picks a query
struct Args {
  const char* q;
  const int* list;
  uint32_t* sum;
  int num_items, len, log_stages, hkv, depth, check;
};
constexpr int kPrefetch = 8;  // indices are loaded this many stages ahead

// stage n of this CTA -> list position and head offset
template <int kGroup>
__device__ __forceinline__ const int* stage_list(const Args& a, int n, int& head_offset) {
  constexpr int kHeadsKv = kHeads / kGroup;
  int it = blockIdx.x + (n >> a.log_stages) * gridDim.x, s = n & ((1 << a.log_stages) - 1),
      b = it % kNumLists, ch = it / kNumLists;
  head_offset = (ch % kHeadsKv) * kGroup * 256;
  return a.list + ((size_t)(ch / kHeadsKv) * kNumLists + b) * a.len + s * (64 / kGroup);
}
template <int kMethod, int kGroup, int kProducers>
__global__ void __launch_bounds__(kProducers * 32 + 32)
    gather_kernel(Args a, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) char smraw[];
  __shared__ uint64_t bar[64];
  constexpr int kStageQueries = 64 / kGroup, kRowBytes = kGroup * 256;
  uint32_t base = (smem_address(smraw) + 1023) & ~1023u, full = smem_address(bar),
           empty = full + 256;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int items = (a.num_items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x,
      total = items << a.log_stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.depth; i++) {
      mbarrier_init(full + 8 * i, kMethod == kCpAsync ? kProducers * 32 : kProducers);
      mbarrier_init(empty + 8 * i, 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < kProducers) {
    int ho[kPrefetch], i0s[kPrefetch], i1s[kPrefetch];
    auto load = [&](int n, int u) {
      i0s[u] = i1s[u] = ho[u] = 0;
      if (n < total) {
        const int* p = stage_list<kGroup>(a, n, ho[u]);
        if (lane < kStageQueries) i0s[u] = p[lane];
        if (kStageQueries == 64) i1s[u] = p[lane + 32];
      }
    };
#pragma unroll
    for (int u = 0; u < kPrefetch; u++) load(u, u);
    int slot = 0, ph = 0;
    for (int nn = 0; nn < total; nn += kPrefetch)
#pragma unroll
      for (int u = 0; u < kPrefetch; u++) {
        int n = nn + u, i0 = i0s[u], i1 = i1s[u], head_offset = ho[u];
        if (n >= total) break;
        load(n + kPrefetch, u);
        if (n >= a.depth) mbarrier_wait(empty + 8 * slot, ph ^ 1);
        uint32_t dst = base + slot * kStageBytes, fb = full + 8 * slot;
        const char* src = a.q + head_offset;
        if constexpr (kMethod == kCpAsync) {
          int c = lane & 15;
#pragma unroll
          for (int k = 0; k < 32 / kProducers; k++) {
            int r = warp * (64 / kProducers) + k * 2 + lane / 16, qi = r / kGroup;
            int tok = __shfl_sync(~0u, i0, qi & 31);
            if (kStageQueries == 64) {
              int t1 = __shfl_sync(~0u, i1, qi & 31);
              if (qi >= 32) tok = t1;
            }
            asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(
                             dst + (c >> 3) * 8192 + r * 128 + (((c & 7) ^ (r & 7)) << 4)),
                         "l"(src + (size_t)tok * kTokenBytes + (r % kGroup) * 256 + c * 16)
                         : "memory");
          }
          asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(fb) : "memory");
        } else {
          if (lane == 0) mbarrier_expect(fb, kStageBytes / kProducers);
          __syncwarp();
          constexpr int PER =
              kStageQueries / kProducers * (kMethod == kTensor ? 2 : 1);  // copies of this warp
#pragma unroll
          for (int k = 0; k < (PER + 31) / 32; k++) {
            int x = k * 32 + lane,
                qi = warp * (kStageQueries / kProducers) + (kMethod == kTensor ? x >> 1 : x),
                pn = x & 1;
            int tok = __shfl_sync(~0u, i0, qi & 31);
            if (kStageQueries == 64) {
              int t1 = __shfl_sync(~0u, i1, qi & 31);
              if (qi >= 32) tok = t1;
            }
            if (x < PER) {
              if constexpr (kMethod == kBulk)
                bulk_load(dst + qi * kRowBytes, src + (size_t)tok * kTokenBytes, kRowBytes, fb);
              else
                asm volatile(
                    "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst + pn * 8192 + qi * kGroup * 128),
                    "l"(&map), "r"(pn * 64), "r"(head_offset / 256), "r"(tok), "r"(fb)
                    : "memory");
            }
          }
        }
        if (++slot == a.depth) {
          slot = 0;
          ph ^= 1;
        }
      }
  } else {
    uint32_t s = 0;
    for (int n = 0, slot = 0, ph = 0; n < total; n++) {
      mbarrier_wait(full + 8 * slot, ph);
      if (a.check)
        for (int i = lane * 16; i < kStageBytes; i += 512) {
          uint32_t x, y, z, w;
          asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                       : "r"(base + slot * kStageBytes + i));
          s += x + y * 3 + z * 5 + w * 7;
        }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty + 8 * slot);
      if (++slot == a.depth) {
        slot = 0;
        ph ^= 1;
      }
    }
    if (a.check) atomicAdd(a.sum, s);
  }
}
__global__ void reference_kernel(Args a, int g) {  // the same sum by plain loads, one item a block
  int it = blockIdx.x, b = it % kNumLists, ch = it / kNumLists;
  uint32_t s = 0;
  const int* p = a.list + ((size_t)(ch / a.hkv) * kNumLists + b) * a.len;
  for (int i = threadIdx.x; i < a.len * g * 16; i += blockDim.x) {
    uint4 v = *(const uint4*)(a.q + (size_t)p[i / (g * 16)] * kTokenBytes + (ch % a.hkv) * g * 256 +
                              (i % (g * 16)) * 16);
    s += v.x + v.y * 3 + v.z * 5 + v.w * 7;
  }
  atomicAdd(a.sum, s);
}
static CUtensorMap map;
static uint32_t* device_sum;
template <int kMethod, int kGroup, int kProducers>
static void measure(Args a, const char* name, uint32_t want) {
  auto k = gather_kernel<kMethod, kGroup, kProducers>;
  CUDA_OK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               13 * kStageBytes + 1024));
  double bytes = (double)a.num_items * a.len * kGroup * 256;
  printf("  %-22s g %2d", name, kGroup);
  for (int d : {1, 2, 3, 4, 6, 8, 12}) {
    a.depth = d;
    a.check = 1;
    CUDA_OK(cudaMemset(device_sum, 0, 4));
    auto go = [&] { k<<<132, kProducers * 32 + 32, d * kStageBytes + 1024>>>(a, map); };
    go();
    uint32_t got;
    CUDA_OK(cudaMemcpy(&got, device_sum, 4, cudaMemcpyDeviceToHost));
    a.check = 0;
    float ms = median_ms(go, 5);
    printf(" %5.2f%s", bytes / ms / 1e9, got == want ? "" : "(WRONG)");
  }
  printf("\n");
  fflush(stdout);
}
template <int kGroup>
static void suite(Args a) {
  a.hkv = kHeads / kGroup;
  a.num_items = (kTokens / (a.len * 64)) * a.hkv * kNumLists;
  a.log_stages = 0;
  while ((1 << a.log_stages) < a.len / (64 / kGroup)) a.log_stages++;
  CUDA_OK(cudaMemset(device_sum, 0, 4));
  reference_kernel<<<a.num_items, 256>>>(a, kGroup);
  uint32_t want;
  CUDA_OK(cudaMemcpy(&want, device_sum, 4, cudaMemcpyDeviceToHost));
  measure<kCpAsync, kGroup, 1>(a, "cp.async 1 warp", want);
  measure<kCpAsync, kGroup, 4>(a, "cp.async 4 warps", want);
  measure<kBulk, kGroup, 1>(a, "bulk 1 warp", want);
  measure<kBulk, kGroup, 4>(a, "bulk 4 warps", want);
  measure<kTensor, kGroup, 1>(a, "tensor box x2 1 warp", want);
  measure<kTensor, kGroup, 4>(a, "tensor box x2 4 warps", want);
}
static void make_map(void* q, int g) {
  void* fn = nullptr;
  cudaDriverEntryPointQueryResult r;
  CUDA_OK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault,
                                           &r));
  cuuint64_t dim[3] = {128, kHeads, kTokens}, st[2] = {256, kTokenBytes};
  cuuint32_t box[3] = {64, (cuuint32_t)g, 1}, es[3] = {1, 1, 1};
  CUresult e =
      ((CUresult(*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill))fn)(
          &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, q, dim, st, box, es,
          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e) {
    printf("tensor map error %d\n", (int)e);
    exit(1);
  }
}
int main() {
  char* q;
  size_t qb = (size_t)kTokens * kTokenBytes;
  CUDA_OK(cudaMalloc(&q, qb));
  CUDA_OK(cudaMalloc(&device_sum, 4));
  fill_bf16<<<1056, 256>>>((__nv_bfloat162*)q, qb / 4, 1);
  int* list;
  CUDA_OK(cudaMalloc(&list, 4ull * kNumLists * 1024));
  for (int len : {1024, 128}) {  // lists over the whole sequence; over chunks of 8192 queries
    std::vector<int> h((size_t)kNumLists * 1024);
    int chunks = kTokens / (len * 64);
    for (int c = 0; c < chunks; c++)
      for (int b = 0; b < kNumLists; b++)
        for (int j = 0; j < len; j++)
          h[((size_t)c * kNumLists + b) * len + j] =
              c * len * 64 + j * 64 +
              hash32((c * kNumLists + b) * 1024 + j) % 64;  // sorted, one query in 64
    CUDA_OK(cudaMemcpy(list, h.data(), 4 * h.size(), cudaMemcpyHostToDevice));
    Args a{q, list, device_sum, 0, len, 0, 0, 0, 0};
    printf(
        "lists of %d rows over %d queries; TB/s at ring depth 1 2 3 4 6 8 12 (x 16 KB in flight "
        "per SM)\n",
        len, len * 64);
    make_map(q, 1);
    suite<1>(a);
    make_map(q, 4);
    suite<4>(a);
    make_map(q, 8);
    suite<8>(a);
    make_map(q, 16);
    suite<16>(a);
  }
}
