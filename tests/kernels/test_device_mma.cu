// Tensor-core primitives of sm_80 against naive products: fragment maps, swizzled tiles, the
// softmax. Operands are small integers, so the products are exact and results compare with ==.
#include <algorithm>
#include <cmath>

#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "kernels/kernel_test.cuh"

namespace fsattn::test {
namespace {

using device::MatrixView;
using device::smem_address;

// C[16 x 8] = A[16 x 16] B[16 x 8], every operand placed by the map in mma_sm80.cuh.
template <class Element>
__global__ void mma_kernel(const Element* a, const Element* b, float* c) {
  const int lane = threadIdx.x, k = lane % 4 * 2;
  const auto a_pair = [&](int row, int col) {
    return device::pack_pair<Element>(static_cast<float>(a[row * 16 + col]),
                                      static_cast<float>(a[row * 16 + col + 1]));
  };
  const auto b_pair = [&](int row, int col) {
    return device::pack_pair<Element>(static_cast<float>(b[row * 8 + col]),
                                      static_cast<float>(b[(row + 1) * 8 + col]));
  };
  const uint32_t af[4] = {a_pair(lane / 4, k), a_pair(lane / 4 + 8, k), a_pair(lane / 4, k + 8),
                          a_pair(lane / 4 + 8, k + 8)};
  float acc[4] = {};
  device::mma_m16n8k16<Element>(acc, af, b_pair(k, lane / 4), b_pair(k + 8, lane / 4));
  for (int i = 0; i < 4; ++i) c[fragment_row(lane, i) * 8 + fragment_col(lane, i)] = acc[i];
}

template <class Element>
void test_mma_map() {
  const Matrix<Element> a(16, 16, 1), b(16, 8, 2);
  const DeviceArray<Element> da(a.data), db(b.data);
  const DeviceArray<float> dc(16 * 8);
  mma_kernel<Element><<<1, 32>>>(da.get(), db.get(), dc.get());
  finish_kernel();
  EXPECT_EQ(count_wrong(dc.host(), 16, 8,
                        [&](int r, int c) {
                          float sum = 0;
                          for (int k = 0; k < 16; ++k) sum += a.at(r, k) * b.at(k, c);
                          return sum;
                        }),
            0);
}

TEST(mma_fragment_map) {
  test_mma_map<__nv_bfloat16>();
  test_mma_map<__half>();
}

constexpr int kTileThreads = 128;

// Loads one tile and writes it back row by row through the swizzle formula.
template <class Element, int kRows, int kCols>
__global__ void tile_kernel(MatrixView<Element> m, int first, Element* out) {
  extern __shared__ __align__(128) char smem[];
  const uint32_t tile = smem_address(smem);
  const int thread = threadIdx.x;
  device::load_tile<kRows, kCols, kTileThreads>(tile, device::thread_part(m, thread), first,
                                                thread);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  __syncthreads();
  for (int i = thread; i < kRows * kCols / 8; i += kTileThreads) {
    const int row = i / (kCols / 8), chunk = i % (kCols / 8);
    reinterpret_cast<uint4*>(out)[i] =
        device::load_shared_u128(tile + device::tile_offset<kCols>(row, chunk));
  }
}

// Rows and columns outside the view are NaN in memory and must read as zero.
template <class Element, int kRows, int kCols>
void test_tile(int rows, int cols, int first) {
  const int stride = kCols + 8;
  Matrix<Element> m(rows + kRows, stride, 3);
  for (int r = 0; r < m.rows; ++r) {
    for (int c = 0; c < stride; ++c) {
      if (r >= rows || c >= cols) m.data[static_cast<size_t>(r * stride + c)] = Element(NAN);
    }
  }
  const DeviceArray<Element> in(m.data), out(size_t{kRows} * kCols);
  tile_kernel<Element, kRows, kCols><<<1, kTileThreads, kRows * kCols * 2>>>(
      MatrixView<Element>{in.get(), stride, rows, cols}, first, out.get());
  finish_kernel();
  const int wrong = count_wrong(out.host(), kRows, kCols, [&](int r, int c) {
    return r + first < rows && c < cols ? m.at(r + first, c) : 0.f;
  });
  EXPECT_EQ(wrong, 0);
}

TEST(load_tile_fills_partial_rows_and_columns_with_zeros) {
  for (int rows : {64, 63, 17, 1, 0}) {
    test_tile<__nv_bfloat16, 32, 64>(rows, 64, 0);
    test_tile<__nv_bfloat16, 32, 64>(rows, 40, 32);
    test_tile<__half, 64, 128>(rows, 72, 0);
    test_tile<__nv_bfloat16, 32, 192>(rows, 136, 16);
  }
}

// out_s = A B^T (32 x 64, depth kCols), out_o = round(S) V (32 x kCols) with the packed S as
// operand.
template <class Element, int kCols>
__global__ void products_kernel(MatrixView<Element> a, MatrixView<Element> b, MatrixView<Element> v,
                                float* out_s, float* out_o) {
  extern __shared__ __align__(128) char smem[];
  const uint32_t sa = smem_address(smem), sb = sa + device::tile_bytes<kCols>(32),
                 sv = sb + device::tile_bytes<kCols>(64);
  const int thread = threadIdx.x, lane = thread % 32;
  device::load_tile<32, kCols, kTileThreads>(sa, device::thread_part(a, thread), 0, thread);
  device::load_tile<64, kCols, kTileThreads>(sb, device::thread_part(b, thread), 0, thread);
  device::load_tile<64, kCols, kTileThreads>(sv, device::thread_part(v, thread), 0, thread);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  __syncthreads();
  if (thread >= 32) return;
  float s[2][8][4] = {}, o[2][kCols / 8][4] = {};
  device::mma_a_bt<Element, kCols, kCols>(s, device::lane_rows16<kCols>(sa, lane),
                                          device::lane_rows8x2<kCols>(sb, lane));
  uint32_t p[2][8][2];
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        out_s[(m * 16 + fragment_row(lane, i)) * 64 + n * 8 + fragment_col(lane, i)] = s[m][n][i];
      }
      p[m][n][0] = device::pack_pair<Element>(s[m][n][0], s[m][n][1]);
      p[m][n][1] = device::pack_pair<Element>(s[m][n][2], s[m][n][3]);
    }
  }
  device::mma_p_b<Element, kCols>(o, p, device::lane_rows16<kCols>(sv, lane));
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < kCols / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        out_o[(m * 16 + fragment_row(lane, i)) * kCols + n * 8 + fragment_col(lane, i)] =
            o[m][n][i];
      }
    }
  }
}

// Entries in -1 .. 1: |S| <= depth <= 128 is exact in both types, and so is every sum of S V.
template <class Element, int kCols>
void test_products() {
  const Matrix<Element> a(32, kCols, 5, 1), b(64, kCols, 6, 1), v(64, kCols, 7, 1);
  const DeviceArray<Element> da(a.data), db(b.data), dv(v.data);
  const DeviceArray<float> ds(32 * 64), dout(32 * kCols);
  const auto kernel = products_kernel<Element, kCols>;
  const int smem = 160 * kCols * 2;
  cuda_ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  kernel<<<1, kTileThreads, smem>>>(MatrixView<Element>{da.get(), kCols, 32, kCols},
                                    MatrixView<Element>{db.get(), kCols, 64, kCols},
                                    MatrixView<Element>{dv.get(), kCols, 64, kCols}, ds.get(),
                                    dout.get());
  finish_kernel();
  const auto score = [&](int r, int c) {
    float sum = 0;
    for (int k = 0; k < kCols; ++k) sum += a.at(r, k) * b.at(c, k);
    return sum;
  };
  EXPECT_EQ(count_wrong(ds.host(), 32, 64, score), 0);
  EXPECT_EQ(count_wrong(dout.host(), 32, kCols,
                        [&](int r, int c) {
                          float sum = 0;
                          for (int k = 0; k < 64; ++k) sum += score(r, k) * v.at(k, c);
                          return sum;
                        }),
            0);
}

TEST(products_of_attention) {
  test_products<__nv_bfloat16, 64>();
  test_products<__nv_bfloat16, 128>();
  test_products<__half, 64>();
  test_products<__half, 128>();
}

// Accumulators [32 x 64] to rows of a larger matrix.
template <class Element>
__global__ void store_rows_kernel(const float* acc, device::OutputRows<Element> out) {
  __shared__ __align__(128) char stage[32 * 64 * 2];
  const int lane = threadIdx.x;
  float c[2][8][4];
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        c[m][n][i] = acc[(m * 16 + fragment_row(lane, i)) * 64 + n * 8 + fragment_col(lane, i)];
      }
    }
  }
  device::store_rows<Element>(out, smem_address(stage), c, lane);
}

template <class Element>
void test_store_rows(int rows, int cols, bool accumulate) {
  constexpr int kStride = 72, kGuard = 100;
  const Matrix<float> acc(32, 64, 8);
  std::vector<Element> before(32 * kStride, Element(float{kGuard}));
  const DeviceArray<float> in(acc.data);
  const DeviceArray<Element> out(before);
  store_rows_kernel<Element><<<1, 32>>>(
      in.get(), device::OutputRows<Element>{out.get(), kStride, rows, cols, accumulate});
  finish_kernel();
  const int wrong = count_wrong(out.host(), 32, kStride, [&](int r, int c) {
    if (r >= rows || c >= cols) return float{kGuard};
    return accumulate ? kGuard + acc.at(r, c) : acc.at(r, c);
  });
  EXPECT_EQ(wrong, 0);
}

TEST(store_rows_writes_only_its_rows_and_columns) {
  for (int rows : {32, 31, 9, 0, -3}) {
    for (bool accumulate : {false, true}) {
      test_store_rows<__nv_bfloat16>(rows, 64, accumulate);
      test_store_rows<__half>(rows, 40, accumulate);
    }
  }
}

constexpr float kScaleLog2 = 0.25f * device::kLog2E;

// `steps` tiles of scores [16 x 64]; o gathers the probabilities of each tile at their own place,
// so after finish() element (r, c) holds the sum over tiles of softmax(r)[tile, c].
template <class Element>
__global__ void softmax_kernel(const float* scores, int steps, float* out, float* out_lse) {
  const int lane = threadIdx.x;
  device::OnlineSoftmax<Element, 1> softmax;
  softmax.init();
  float o[1][8][4] = {}, lse[2];
  for (int step = 0; step < steps; ++step) {
    float s[1][8][4];
    uint32_t p[1][8][2];
    for (int n = 0; n < 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        s[0][n][i] =
            scores[(step * 16 + fragment_row(lane, i)) * 64 + n * 8 + fragment_col(lane, i)];
      }
    }
    softmax.step(s, p, o, kScaleLog2);
    for (int n = 0; n < 8; ++n) {
      for (int half = 0; half < 2; ++half) {
        const float2 pair = device::unpack_pair<Element>(p[0][n][half]);
        o[0][n][half * 2] += pair.x;
        o[0][n][half * 2 + 1] += pair.y;
      }
    }
  }
  softmax.finish(o, lse);
  for (int n = 0; n < 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      out[fragment_row(lane, i) * 64 + n * 8 + fragment_col(lane, i)] = o[0][n][i];
    }
  }
  for (int half = 0; half < 2; ++half) out_lse[lane / 4 + half * 8] = lse[half];
}

// Row 0 sees nothing, row 1 nothing in the first tile, row 2 one key, row 3 has huge scores,
// row 4 such that a unit in the last place of a logit is worth 64 or more.
std::vector<float> softmax_scores(int steps) {
  std::vector<float> s;
  for (int i = 0; i < steps * 16 * 64; ++i) {
    const int step = i / 1024, row = i / 64 % 16, col = i % 64;
    float x = static_cast<float>(small_integer(static_cast<uint32_t>(i), 40)) * 0.5f;
    if (row == 3) x *= 500.f;
    if (row == 4) x *= 4e8f;
    const bool is_hidden =
        row == 0 || (row == 1 && step == 0) || (row == 2 && (step != 1 || col != 5));
    s.push_back(is_hidden ? -INFINITY : x);
  }
  return s;
}

template <class Element>
void test_softmax(double tolerance) {
  constexpr int kSteps = 3;
  const std::vector<float> s = softmax_scores(kSteps);
  const DeviceArray<float> ds(s), dout(16 * 64), dlse(16);
  softmax_kernel<Element><<<1, 32>>>(ds.get(), kSteps, dout.get(), dlse.get());
  finish_kernel();
  const std::vector<float> o = dout.host(), lse = dlse.host();
  for (int r = 0; r < 16; ++r) {
    const auto x = [&](int step, int c) {
      return 0.25 * s[static_cast<size_t>((step * 16 + r) * 64 + c)];
    };
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < kSteps * 64; ++i) top = std::max(top, x(i / 64, i % 64));
    for (int i = 0; i < kSteps * 64 && r > 0; ++i) sum += std::exp(x(i / 64, i % 64) - top);
    const double want_lse = r == 0 ? -INFINITY : top + std::log(sum);
    EXPECT_NEAR(lse[static_cast<size_t>(r)], want_lse, 2e-6 * (1 + std::fabs(top)));
    for (int c = 0; c < 64; ++c) {
      double want = 0;
      for (int step = 0; step < kSteps && r > 0; ++step) want += std::exp(x(step, c) - want_lse);
      EXPECT_NEAR(o[static_cast<size_t>(r * 64 + c)], want, tolerance);
    }
  }
}

TEST(online_softmax) {
  // Half a unit in the last place of a probability of at most 1, and the error of ex2 at |x| ~
  // 2500.
  test_softmax<__nv_bfloat16>(std::ldexp(1.0, -8));
  test_softmax<__half>(std::ldexp(1.0, -10));
}

__global__ void copies_kernel(const char* src, char* dst) {
  __shared__ __align__(16) char smem[64];
  const uint32_t to = smem_address(smem);
  device::cp_async_16_hint(to, src, device::l2_evict_first());
  device::cp_async_16_zero_fill(to + 16, src + 16, 0, device::l2_evict_last());
  device::cp_async_4(to + 32, src + 32);
  device::cp_async_4(to + 36, src + 36);
  device::cp_async_8(to + 40, src + 40);
  device::cp_async_16(to + 48, src + 48, false);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) {
    device::store_global_u128_hint(dst + i * 16, device::load_shared_u128(to + i * 16),
                                   device::l2_evict_first());
  }
}

TEST(async_copies_and_zero_fill) {
  std::vector<char> bytes;
  for (int i = 1; i <= 64; ++i) bytes.push_back(static_cast<char>(i));
  const DeviceArray<char> src(bytes), dst(64);
  copies_kernel<<<1, 1>>>(src.get(), dst.get());
  finish_kernel();
  const std::vector<char> got = dst.host();
  for (int i = 0; i < 64; ++i) {
    const bool is_zero = (i >= 16 && i < 32) || i >= 48;
    EXPECT_EQ(int{got[static_cast<size_t>(i)]}, is_zero ? 0 : i + 1);
  }
}

}  // namespace
}  // namespace fsattn::test

FSATTN_KERNEL_TEST_MAIN()
