// Hopper's primitives against naive products and plain copies: barriers, tensor copies, wgmma.
// Operands are small integers, so the products are exact and results compare with ==.
#include <algorithm>
#include <cmath>

#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/bulk_sm90.cuh"
#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/mma_sm80.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/device/wgmma_ss_sm90.cuh"
#include "kernels/kernel_test.cuh"

namespace fsattn::test {
namespace {

using device::smem_address;

constexpr int kStages = 2, kTurns = 7;

// A warp fills stages with cp.async, another adds 1 and writes them out: both halves of the parity,
// and a buffer that is overwritten only after the reader has freed it.
__global__ void ring_kernel(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t stage[kStages][128];
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      device::mbarrier_init(smem_address(full + s), 32);
      device::mbarrier_init(smem_address(empty + s), 32);
    }
    device::mbarrier_init_fence();
  }
  __syncthreads();
  for (int turn = 0; turn < kTurns; ++turn) {
    const int s = turn % kStages;
    const uint32_t parity = turn / kStages % 2;
    if (threadIdx.x < 32) {
      device::mbarrier_wait(smem_address(empty + s), parity ^ 1);
      device::cp_async_16(smem_address(stage[s] + lane * 4), in + turn * 128 + lane * 4, true);
      device::cp_async_arrive(smem_address(full + s));
    } else {
      device::mbarrier_wait(smem_address(full + s), parity);
      for (int i = lane; i < 128; i += 32) out[turn * 128 + i] = stage[s][127 - i] + 1;
      device::mbarrier_arrive(smem_address(empty + s));
    }
  }
}

TEST(sm90_barriers_guard_a_ring) {
  std::vector<uint32_t> in;
  for (uint32_t i = 0; i < kTurns * 128; ++i) in.push_back(i * 3);
  const DeviceArray<uint32_t> din(in), dout(in.size());
  ring_kernel<<<1, 64>>>(din.get(), dout.get());
  finish_kernel();
  const std::vector<uint32_t> got = dout.host();
  for (uint32_t i = 0; i < got.size(); ++i)
    EXPECT_EQ(got[i], (i / 128 * 128 + 127 - i % 128) * 3 + 1);
}

constexpr int kBoxTokens = 16;

// One box, written out row by row through the 128-byte swizzle.
template <class Element>
__global__ void tma_kernel(const __grid_constant__ CUtensorMap map, int column, int head, int token,
                           Element* out) {
  __shared__ __align__(1024) char box[kBoxTokens * 128];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    device::mbarrier_init(smem_address(&bar), 1);
    device::mbarrier_init_fence();
    device::mbarrier_arrive_expect(smem_address(&bar), sizeof(box));
    device::tma_load_3d(smem_address(box), &map, column, head, token, smem_address(&bar),
                        device::l2_evict_last());
  }
  __syncthreads();
  device::mbarrier_wait(smem_address(&bar), 0);
  for (int i = threadIdx.x; i < kBoxTokens * 8; i += blockDim.x) {
    reinterpret_cast<uint4*>(out)[i] =
        device::load_shared_u128(smem_address(box) + device::tile_offset<64>(i / 8, i % 8));
  }
}

template <class Element>
void test_tma(DType dtype, int column, int head, int token) {
  constexpr int kTokens = 40, kHeads = 3, kDim = 96, kHeadStride = kDim + 8,
                kTokenStride = kHeads * kHeadStride + 16;
  const Matrix<Element> x(kTokens, kTokenStride, 11, 100);
  const DeviceArray<Element> dx(x.data), dout(kBoxTokens * 64);
  const Rows rows{dx.get(), kTokenStride, kHeadStride};
  const CUtensorMap map = device::make_rows_map(rows, dtype, kTokens, kHeads, kDim, kBoxTokens);
  tma_kernel<Element><<<1, 32>>>(map, column, head, token, dout.get());
  finish_kernel();
  const int wrong = count_wrong(dout.host(), kBoxTokens, 64, [&](int r, int c) {
    const bool is_inside = token + r < kTokens && column + c < kDim;
    return is_inside ? x.at(token + r, head * kHeadStride + column + c) : 0.f;
  });
  EXPECT_EQ(wrong, 0);
}

TEST(sm90_tensor_copies_fill_with_zeros) {
  for (int token : {0, 7, 30, 39}) {
    for (int column : {0, 64}) {
      test_tma<__nv_bfloat16>(DType::kBFloat16, column, token % 3, token);
      test_tma<__half>(DType::kFloat16, column, 2, token);
    }
  }
}

// Copies one box from a tensor to the same place of another.
__global__ void tma_move_kernel(const __grid_constant__ CUtensorMap from,
                                const __grid_constant__ CUtensorMap to, int column, int head,
                                int token) {
  __shared__ __align__(1024) char box[kBoxTokens * 128];
  __shared__ __align__(8) uint64_t bar;
  device::mbarrier_init(smem_address(&bar), 1);
  device::mbarrier_init_fence();
  device::mbarrier_arrive_expect(smem_address(&bar), sizeof(box));
  device::tma_load_3d(smem_address(box), &from, column, head, token, smem_address(&bar),
                      device::l2_evict_last());
  device::mbarrier_wait(smem_address(&bar), 0);
  device::tma_store_3d(&to, smem_address(box), column, head, token);
  device::bulk_commit();
  device::bulk_wait();
}

// What lies outside of the tensor stays as it is, the gaps between its rows included.
TEST(sm90_tensor_copies_write_inside_alone) {
  using Element = __nv_bfloat16;
  constexpr int kTokens = 40, kHeads = 3, kDim = 96, kHeadStride = kDim + 8,
                kTokenStride = kHeads * kHeadStride + 16;
  const Matrix<Element> x(kTokens, kTokenStride, 12, 100), y(kTokens, kTokenStride, 13, 100);
  const int head = 1;
  for (int token : {0, 7, 30}) {
    for (int column : {0, 64}) {
      const DeviceArray<Element> dx(x.data), dy(y.data);
      const auto map = [&](const DeviceArray<Element>& data) {
        return device::make_rows_map({data.get(), kTokenStride, kHeadStride}, DType::kBFloat16,
                                     kTokens, kHeads, kDim, kBoxTokens);
      };
      tma_move_kernel<<<1, 1>>>(map(dx), map(dy), column, head, token);
      finish_kernel();
      const int wrong = count_wrong(dy.host(), kTokens, kTokenStride, [&](int r, int c) {
        const int col = c - head * kHeadStride;
        const bool is_copied = r >= token && r < token + kBoxTokens && col >= column &&
                               col < std::min(column + 64, kDim);
        return is_copied ? x.at(r, c) : y.at(r, c);
      });
      EXPECT_EQ(wrong, 0);
    }
  }
}

constexpr int kWarpgroup = 128;

// Rows of 64 elements in the 128-byte swizzle, 8 rows every 1024 bytes; all threads copy.
template <class Element>
__device__ void load_panel(char* panel, const Element* from, int rows, int stride) {
  for (int i = threadIdx.x; i < rows * 8; i += kWarpgroup) {
    *reinterpret_cast<uint4*>(panel + device::tile_offset<64>(i / 8, i % 8)) =
        *reinterpret_cast<const uint4*>(from + i / 8 * stride + i % 8 * 8);
  }
}

// A[64 x 64] as operand registers of this warpgroup.
template <class Element>
__device__ void load_a(uint32_t (&a)[4][4], const Element* from) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, col = lane % 4 * 2;
  for (int kk = 0; kk < 4; ++kk) {
    for (int j = 0; j < 4; ++j) {
      a[kk][j] = *reinterpret_cast<const uint32_t*>(from + (row + j % 2 * 8) * 64 + kk * 16 + col +
                                                    j / 2 * 8);
    }
  }
}

template <int kCount>
__device__ void store_d(float* out, const float (&d)[kCount]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < kCount; ++i) {
    const int row = threadIdx.x / 32 * 16 + fragment_row(lane, i % 4);
    out[row * kCount * 2 + i / 4 * 8 + fragment_col(lane, i % 4)] = d[i];
  }
}

// Three products of 64 x 64 x 64 and 64 x 128 x 64: A in registers with B [n][k], A in shared
// memory with B [n][k], A in registers with B [k][n].
template <class Element>
__global__ void __launch_bounds__(kWarpgroup)
    wgmma_kernel(const Element* a, const Element* b, const Element* v, float* out_rs, float* out_ss,
                 float* out_mn) {
  __shared__ __align__(1024) char sa[8192], sb[8192], sv[2][8192];
  load_panel(sa, a, 64, 64);
  load_panel(sb, b, 64, 64);
  load_panel(sv[0], v, 64, 128);
  load_panel(sv[1], v + 64, 64, 128);
  device::fence_async_proxy();
  __syncthreads();
  uint32_t ar[4][4];
  load_a(ar, a);
  float rs[32], ss[32], mn[64];
  device::pin_registers(rs);
  device::pin_registers(ss);
  device::pin_registers(mn);
  device::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const uint64_t bk = device::wgmma_descriptor(smem_address(sb) + kk * 32, 16);
    device::wgmma_m64n64k16_k_major<Element>(rs, ar[kk], bk, kk > 0);
    device::wgmma_ss_m64n64k16<Element>(
        ss, device::wgmma_descriptor(smem_address(sa) + kk * 32, 16), bk, kk > 0);
    device::wgmma_m64n128k16_mn_major<Element>(
        mn, ar[kk], device::wgmma_descriptor(smem_address(sv) + kk * 2048, 8192), kk > 0);
  }
  device::wgmma_commit();
  device::wgmma_wait_group<0>();
  device::pin_registers(rs);
  device::pin_registers(ss);
  device::pin_registers(mn);
  store_d(out_rs, rs);
  store_d(out_ss, ss);
  store_d(out_mn, mn);
}

template <class Element>
void test_wgmma() {
  const Matrix<Element> a(64, 64, 21), b(64, 64, 22), v(64, 128, 23);
  const DeviceArray<Element> da(a.data), db(b.data), dv(v.data);
  const DeviceArray<float> rs(64 * 64), ss(64 * 64), mn(64 * 128);
  wgmma_kernel<Element>
      <<<1, kWarpgroup>>>(da.get(), db.get(), dv.get(), rs.get(), ss.get(), mn.get());
  finish_kernel();
  const auto a_bt = [&](int r, int c) {
    float sum = 0;
    for (int k = 0; k < 64; ++k) sum += a.at(r, k) * b.at(c, k);
    return sum;
  };
  EXPECT_EQ(count_wrong(rs.host(), 64, 64, a_bt), 0);
  EXPECT_EQ(count_wrong(ss.host(), 64, 64, a_bt), 0);
  EXPECT_EQ(count_wrong(mn.host(), 64, 128,
                        [&](int r, int c) {
                          float sum = 0;
                          for (int k = 0; k < 64; ++k) sum += a.at(r, k) * v.at(k, c);
                          return sum;
                        }),
            0);
}

TEST(sm90_wgmma_products) {
  test_wgmma<__nv_bfloat16>();
  test_wgmma<__half>();
}

// stmatrix writes what ldmatrix reads.
__global__ void stmatrix_kernel(uint32_t* out) {
  __shared__ __align__(128) char tile[16 * 32];
  const int lane = threadIdx.x;
  const uint32_t address = smem_address(tile) + lane % 16 * 32 + lane / 16 * 16;
  device::stmatrix_x4(address, lane, lane + 100, lane + 200, lane + 300);
  __syncwarp();
  uint32_t r[4];
  device::ldmatrix_x4(r, address);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

TEST(sm90_stmatrix_mirrors_ldmatrix) {
  const DeviceArray<uint32_t> out(32 * 4);
  stmatrix_kernel<<<1, 32>>>(out.get());
  finish_kernel();
  const std::vector<uint32_t> got = out.host();
  for (uint32_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], i / 4 + i % 4 * 100);
}

}  // namespace
}  // namespace fsattn::test

FSATTN_KERNEL_TEST_MAIN()
