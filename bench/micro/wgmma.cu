// Question  What does wgmma m64nNk16 (bf16) deliver for narrow N?
// Method    A from shared memory (SS) or registers (RS), one or two warpgroups an SM, 1, 2 or 4
//           independent accumulators. A [64 x 128] and the B tiles [N x 128] stay resident, as in a
//           swapped Q K^T with 64 keys on M and N query rows.
// Read      FLOP/clk/SM by clock64 (peak 4096), TFLOP/s by events; WRONG when a product differs
//           from the host's.
#include "micro.cuh"

template <int kN, bool kFromRegisters, int kAccumulators, int kPasses>
__device__ __forceinline__ void batch(float (&d)[kAccumulators][kN / 2], uint32_t sa, uint32_t sb,
                                      const uint32_t (&ar)[8][4]) {
#pragma unroll
  for (int p = 0; p < kPasses; p++)
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
      for (int i = 0; i < kAccumulators; i++) {
        uint64_t db = wgmma_descriptor(sb + i * kN * 256 + (k / 4) * kN * 128 + (k % 4) * 32);
        if constexpr (kFromRegisters)
          wgmma_rs<kN>(d[i], ar[k], db);
        else
          wgmma_ss<kN>(d[i], wgmma_descriptor(sa + (k / 4) * 8192 + (k % 4) * 32), db);
      }
}
template <int kN, bool kFromRegisters, int kWarpgroups, int kAccumulators>
__global__ void __launch_bounds__(kWarpgroups * 128, 1)
    rate_kernel(const __nv_bfloat16* A, const __nv_bfloat16* B, float* out, long long* clocks,
                int iters) {
  extern __shared__ __align__(1024) char smraw[];
  constexpr int kPasses = kN >= 128 ? 1 : kN == 64 ? 2 : 4;
  char* sm = smraw + (1024 - (smem_address(smraw) & 1023) & 1023);
  for (int w = 0; w < kWarpgroups; w++) load_swizzled(sm + w * 16384, A + w * 8192, 64);
  for (int i = 0; i < kAccumulators; i++)
    load_swizzled(sm + kWarpgroups * 16384 + i * kN * 256, B + i * kN * 128, kN);
  fence_async_proxy();
  __syncthreads();
  int wg = threadIdx.x / 128, t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4,
      col = t % 4 * 2;
  uint32_t ar[8][4];
#pragma unroll
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      ar[k][j] = *(const uint32_t*)(A + wg * 8192 + (row + (j & 1) * 8) * 128 + k * 16 + col +
                                    (j >> 1) * 8);
  float d[kAccumulators][kN / 2] = {};
  uint32_t sa = __shfl_sync(~0u, smem_address(sm) + wg * 16384, 0),
           sb = smem_address(sm) + kWarpgroups * 16384;
  __syncthreads();
  long long c0 = clock64();
  for (int it = 0; it < iters; it++) {
    wgmma_fence();
    batch<kN, kFromRegisters, kAccumulators, kPasses>(d, sa, sb, ar);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  long long c1 = clock64();
  if (t == 0) clocks[blockIdx.x * kWarpgroups + wg] = c1 - c0;
#pragma unroll
  for (int i = 0; i < kAccumulators; i++)
#pragma unroll
    for (int j = 0; j < kN / 2; j++)  // out[wg][acc][64][N]
      if (blockIdx.x == 0)
        out[((size_t)(wg * kAccumulators + i) * 64 + row + (j >> 1 & 1) * 8) * kN + (j >> 2) * 8 +
            col + (j & 1)] = d[i][j];
}
static __nv_bfloat16 *A, *B;
static float* out;
static long long* clocks;
static std::vector<float> host_a(2 * 64 * 128), host_b(512 * 128);
template <int kN, bool kFromRegisters, int kWarpgroups, int kAccumulators>
static void measure() {
  auto k = rate_kernel<kN, kFromRegisters, kWarpgroups, kAccumulators>;
  constexpr int kPasses = kN >= 128 ? 1 : kN == 64 ? 2 : 4;
  int smem = kWarpgroups * 16384 + kAccumulators * kN * 256 + 1024;
  CUDA_OK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  std::vector<float> o(kWarpgroups * kAccumulators * 64 * kN);
  CUDA_OK(cudaMemset(out, 0xff, 4 * o.size()));
  k<<<132, kWarpgroups * 128, smem>>>(A, B, out, clocks, 1);
  CUDA_OK(cudaMemcpy(o.data(), out, 4 * o.size(), cudaMemcpyDeviceToHost));
  double num = 0, den = 0;
  for (int w = 0; w < kWarpgroups; w++)
    for (int i = 0; i < kAccumulators; i++)
      for (int r = 0; r < 64; r++)
        for (int c = 0; c < kN; c++) {
          double s = 0;
          for (int x = 0; x < 128; x++)
            s += (double)host_a[(w * 64 + r) * 128 + x] * host_b[(i * kN + c) * 128 + x];
          double e = o[((size_t)(w * kAccumulators + i) * 64 + r) * kN + c] - s * kPasses;
          num += e * e;
          den += s * s * kPasses * kPasses;
        }
  double per =
      2.0 * 64 * kN * 128 * kAccumulators * kPasses * kWarpgroups;  // FLOP per SM per iteration
  int iters = (int)(3e6 / (per / 4096) / (kN < 64 ? 2 : 1)) + 1;
  float ms = median_ms([&] { k<<<132, kWarpgroups * 128, smem>>>(A, B, out, clocks, iters); }, 5);
  std::vector<long long> c(132 * kWarpgroups);
  CUDA_OK(cudaMemcpy(c.data(), clocks, 8 * c.size(), cudaMemcpyDeviceToHost));
  std::sort(c.begin(), c.end());
  double cy = (double)c[c.size() / 2];
  printf(
      "N %3d %s WG %d acc %d: %7.1f FLOP/clk/SM (%5.1f %%), %5.1f clk per wgmma per SM, %6.1f "
      "TFLOP/s, %.2f GHz, rel err %.1e%s\n",
      kN, kFromRegisters ? "RS" : "SS", kWarpgroups, kAccumulators, per * iters / cy,
      per * iters / cy / 40.96, cy / iters / (8.0 * kAccumulators * kPasses * kWarpgroups),
      per * iters * 132 / ms / 1e9, cy / ms / 1e6, sqrt(num / den),
      sqrt(num / den) < 1e-5 ? "" : " WRONG");
  fflush(stdout);
}
template <int kN>
static void suite() {
  measure<kN, false, 1, 1>();
  measure<kN, false, 1, 2>();
  if constexpr (kN <= 64) measure<kN, false, 1, 4>();
  measure<kN, false, 2, 1>();
  measure<kN, false, 2, 2>();
  if constexpr (kN <= 64) measure<kN, false, 2, 4>();
  measure<kN, true, 1, 1>();
  measure<kN, true, 1, 2>();
  if constexpr (kN <= 64) measure<kN, true, 1, 4>();
  measure<kN, true, 2, 1>();
  measure<kN, true, 2, 2>();
  if constexpr (kN <= 64) measure<kN, true, 2, 4>();
}
int main() {
  std::vector<__nv_bfloat16> a(host_a.size()), b(host_b.size());
  for (size_t i = 0; i < host_a.size(); i++) {
    a[i] = __float2bfloat16(random_unit(i + 7));
    host_a[i] = __bfloat162float(a[i]);
  }
  for (size_t i = 0; i < host_b.size(); i++) {
    b[i] = __float2bfloat16(random_unit(i + 70007));
    host_b[i] = __bfloat162float(b[i]);
  }
  CUDA_OK(cudaMalloc(&A, 2 * a.size()));
  CUDA_OK(cudaMalloc(&B, 2 * b.size()));
  CUDA_OK(cudaMalloc(&out, 4 << 20));
  CUDA_OK(cudaMalloc(&clocks, 8 * 264));
  CUDA_OK(cudaMemcpy(A, a.data(), 2 * a.size(), cudaMemcpyHostToDevice));
  CUDA_OK(cudaMemcpy(B, b.data(), 2 * b.size(), cudaMemcpyHostToDevice));
  suite<8>();
  suite<16>();
  suite<32>();
  suite<64>();
  suite<128>();
}
