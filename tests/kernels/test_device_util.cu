// Scans, the top-k list of a warp, packed-batch searches, conversions and divisions against plain
// loops.
#include <algorithm>
#include <climits>
#include <numeric>

#include "cuda/device/band.h"
#include "cuda/device/fast_div.cuh"
#include "cuda/device/packing.cuh"
#include "cuda/device/scan.cuh"
#include "cuda/device/sequence_tile.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/device/warp_topk.cuh"
#include "kernels/kernel_test.cuh"

namespace fsattn::test {
namespace {

// Two scans in a row over the same scratch: the second must not see the first's sums.
__global__ void scan_kernel(const int* in, int* out, int* totals) {
  __shared__ int warp_sums[device::kWarpSize];
  const int i = threadIdx.x, n = blockDim.x;
  for (int turn = 0; turn < 2; ++turn) {
    int total = 0;
    out[turn * n + i] = device::cta_exclusive_scan(in[turn * n + i], warp_sums, total);
    totals[turn * n + i] = total;
  }
}

TEST(cta_exclusive_scan) {
  for (int threads : {32, 64, 256, 1024}) {
    std::vector<int> in;
    for (int i = 0; i < 2 * threads; ++i) in.push_back(small_integer(static_cast<uint32_t>(i), 9));
    const DeviceArray<int> din(in), dout(in.size()), dtotals(in.size());
    scan_kernel<<<1, threads>>>(din.get(), dout.get(), dtotals.get());
    finish_kernel();
    const std::vector<int> out = dout.host(), totals = dtotals.host();
    for (int turn = 0; turn < 2; ++turn) {
      const auto first = in.begin() + turn * threads;
      const int total = std::accumulate(first, first + threads, 0);
      for (int i = 0; i < threads; ++i) {
        const auto at = static_cast<size_t>(turn * threads + i);
        EXPECT_EQ(out[at], std::accumulate(first, first + i, 0));
        EXPECT_EQ(totals[at], total);
      }
    }
  }
}

// Scores arrive in batches of up to 32, batch sizes as given. List 1 gets the keys of list 0 from
// the highest lane down, so both must end the same.
__global__ void topk_kernel(const float* scores, const int* index, const int* batches,
                            int num_batches, int capacity, device::RankKey* out) {
  __shared__ device::RankKey keys[2][128];
  device::RankKey* const lists[2] = {keys[0], keys[1]};
  const int lane = threadIdx.x;
  for (int i = lane; i < 2 * 128; i += device::kWarpSize) keys[i / 128][i % 128] = 0;
  __syncwarp();
  int first = 0;
  for (int b = 0; b < num_batches; ++b) {
    device::RankKey fresh[2] = {};
    if (lane < batches[b]) fresh[0] = device::rank_key(scores[first + lane], index[first + lane]);
    fresh[1] = __shfl_sync(device::kFullMask, fresh[0], device::kWarpSize - 1 - lane);
    device::merge_into(lists, capacity, fresh, lane);
    first += batches[b];
  }
  __syncwarp();
  for (int i = lane; i < 2 * capacity; i += device::kWarpSize)
    out[i] = keys[i / capacity][i % capacity];
}

// Few distinct scores, so most comparisons are ties; `order` permutes the arrival.
void test_topk(int count, int capacity, int distinct, int order) {
  std::vector<float> scores;
  std::vector<int> index(static_cast<size_t>(count)), batches;
  std::iota(index.begin(), index.end(), 0);
  if (order == 1) std::reverse(index.begin(), index.end());
  if (order == 2) {
    std::sort(index.begin(), index.end(), [](int a, int b) {
      return std::pair(small_integer(static_cast<uint32_t>(a), 1000), a) <
             std::pair(small_integer(static_cast<uint32_t>(b), 1000), b);
    });
  }
  const auto score = [&](int i) {
    return static_cast<float>(small_integer(static_cast<uint32_t>(i) + 77, distinct) + distinct) *
           0.125f;
  };
  for (int i : index) scores.push_back(score(i));
  for (int left = count, turn = 0; left > 0; ++turn) {
    batches.push_back(std::min(left, turn % 3 == 0 ? 32 : 1 + (turn * 11) % 32));
    left -= batches.back();
  }
  const DeviceArray<float> dscores(scores);
  const DeviceArray<int> dindex(index), dbatches(batches);
  const DeviceArray<device::RankKey> dout(static_cast<size_t>(2 * capacity));
  topk_kernel<<<1, 32>>>(dscores.get(), dindex.get(), dbatches.get(),
                         static_cast<int>(batches.size()), capacity, dout.get());
  finish_kernel();

  std::vector<int> want(index);
  std::sort(want.begin(), want.end(),
            [&](int a, int b) { return score(a) != score(b) ? score(a) > score(b) : a < b; });
  const std::vector<device::RankKey> got = dout.host();
  for (int i = 0; i < 2 * capacity; ++i) {
    const device::RankKey key = got[static_cast<size_t>(i)];
    const int rank = i % capacity;
    if (rank >= count) {
      EXPECT_EQ(key, device::RankKey{0});
    } else {
      EXPECT_EQ(static_cast<int>(~static_cast<uint32_t>(key)), want[static_cast<size_t>(rank)]);
    }
  }
}

TEST(warp_topk_ranks_ties_by_index_in_any_order) {
  for (int capacity : {32, 64, 96, 128}) {
    for (int count : {1, 31, 33, 128, 1000}) {
      for (int order : {0, 1, 2}) {
        test_topk(count, capacity, 2, order);
        test_topk(count, capacity, 5000, order);
      }
    }
  }
}

// Empty sequences at both ends and in the middle; tokens behind the last sequence belong to none.
const std::vector<int32_t> kCu{0, 0, 5, 5, 5, 70, 71, 200, 200};
constexpr int kBatch = 8, kTotal = 208;

__global__ void find_kernel(const int32_t* cu, int* sequence, int* slot_sequence, int slots,
                            int block_size) {
  for (int t = threadIdx.x; t < kTotal; t += blockDim.x) {
    sequence[t] = device::find_sequence(cu, kBatch, t);
  }
  for (int s = threadIdx.x; s < slots; s += blockDim.x) {
    slot_sequence[s] = device::find_slot_sequence(cu, kBatch, s, block_size);
  }
}

TEST(packing_searches) {
  constexpr int kBlock = 16, kSlots = 200 / kBlock + kBatch;
  const DeviceArray<int32_t> cu(kCu);
  const DeviceArray<int> sequence(kTotal), slot_sequence(kSlots);
  find_kernel<<<1, 64>>>(cu.get(), sequence.get(), slot_sequence.get(), kSlots, kBlock);
  finish_kernel();
  const std::vector<int> seq = sequence.host(), slot_seq = slot_sequence.host();
  for (int t = 0; t < kTotal; ++t) {
    int want = kBatch;
    for (int b = 0; b < kBatch; ++b) {
      if (kCu[static_cast<size_t>(b)] <= t && t < kCu[static_cast<size_t>(b) + 1]) want = b;
    }
    EXPECT_EQ(seq[static_cast<size_t>(t)], want);
  }
  // Sequence b owns the slots cu[b] / block + b and on, up to the first slot of the next.
  for (int s = 0; s < kSlots; ++s) {
    int want = 0;
    for (int b = 0; b < kBatch; ++b) {
      if (kCu[static_cast<size_t>(b)] / kBlock + b <= s) want = b;
    }
    EXPECT_EQ(slot_seq[static_cast<size_t>(s)], want);
  }
}

__global__ void tiles_kernel(const int32_t* cu, int tile_rows, int slots, int* visits) {
  for (int s = threadIdx.x; s < slots; s += blockDim.x) {
    const device::TileSlot tile = device::find_tile(cu, kBatch, s, tile_rows);
    const device::RowRange rows = device::rows_of(cu, kBatch, tile.seq, kTotal);
    for (int r = tile.first; r < min(tile.first + tile_rows, rows.count); ++r) {
      atomicAdd(visits + rows.begin + r, 1);
    }
  }
}

TEST(tiles_cover_every_row_once) {
  for (int tile_rows : {1, 16, 64, 256}) {
    const auto slots = static_cast<int>(device::num_tile_slots(kTotal, kBatch, tile_rows));
    const DeviceArray<int32_t> cu(kCu);
    const DeviceArray<int> visits(std::vector<int>(kTotal, 0));
    tiles_kernel<<<1, 64>>>(cu.get(), tile_rows, slots, visits.get());
    finish_kernel();
    const std::vector<int> got = visits.host();
    EXPECT_EQ(std::count(got.begin(), got.end(), 1), kTotal);
  }
}

// Hostile cu_seqlens: descending, negative and beyond the end.
__global__ void rows_of_kernel(const int32_t* cu, int batch, int total, device::RowRange* out) {
  for (int b = threadIdx.x; b <= batch; b += blockDim.x)
    out[b] = device::rows_of(cu, batch, b, total);
}

TEST(rows_stay_inside_the_tensor) {
  const std::vector<int32_t> hostile{-7, 30, 10, INT_MAX, INT_MIN, 12};
  const int batch = static_cast<int>(hostile.size()) - 1, total = 20;
  const DeviceArray<int32_t> cu(hostile);
  const DeviceArray<device::RowRange> out(hostile.size());
  rows_of_kernel<<<1, 32>>>(cu.get(), batch, total, out.get());
  finish_kernel();
  for (const device::RowRange& rows : out.host()) {
    EXPECT_TRUE(rows.begin >= 0 && rows.count >= 0 && rows.begin + rows.count <= total);
  }
}

__global__ void positions_kernel(Packing packing, int64_t* shift, int* offset) {
  const int seq = threadIdx.x;
  shift[seq] = device::position_shift(packing, seq);
  offset[seq] = device::query_offset(packing, seq, packing.cu_q[seq + 1] - packing.cu_q[seq]);
}

TEST(query_positions) {
  const std::vector<int32_t> cu_q{0, 3, 3, 10}, cu_k{0, 8, 9, 12}, given{4, -2, 100};
  const DeviceArray<int32_t> dq(cu_q), dk(cu_k), doffset(given);
  for (bool has_offset : {false, true}) {
    const Packing packing{3,  dq.get(), dk.get(), has_offset ? doffset.get() : nullptr,
                          10, 12,       7,        8};
    const DeviceArray<int64_t> shift(3);
    const DeviceArray<int> offset(3);
    positions_kernel<<<1, 3>>>(packing, shift.get(), offset.get());
    finish_kernel();
    for (size_t b = 0; b < 3; ++b) {
      const int want = has_offset ? given[b] : (cu_k[b + 1] - cu_k[b]) - (cu_q[b + 1] - cu_q[b]);
      EXPECT_EQ(offset.host()[b], want);
      EXPECT_EQ(shift.host()[b], want - cu_q[b]);
    }
  }
}

TEST(band_is_the_interval_of_visible_keys) {
  for (const device::Band& band : {
           device::Band{16, 32, device::Band::kUnlimited},
           device::Band{8,  8,  device::Band::kUnlimited},
           device::Band{1,  1,  10                      },
           device::Band{1,  1,  0                       }
  }) {
    for (int t = -5; t < 200; ++t) {
      int first = 0, count = 0;
      for (int key = 0; key < 200; ++key) {
        const int64_t back = t - (int64_t{key} * band.stride + band.size - 1);
        if (back < 0 || back > band.reach) continue;
        if (count++ == 0) first = key;
      }
      if (count == 0) {
        EXPECT_TRUE(band.last_key(t) < band.first_key(t));
      } else {
        EXPECT_EQ(band.first_key(t), first);
        EXPECT_EQ(band.last_key(t), first + count - 1);
      }
    }
  }
}

template <class Element>
__global__ void vector_kernel(const Element* in, Element* out, float* wide) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * device::kVector;
  const auto v = device::Vector8<Element>::load(in + i);
  for (int j = 0; j < device::kVector; ++j) wide[i + j] = v.x[j];
  v.store(out + i);
}

// All 65536 bit patterns: exact to fp32, and back to the same bits unless NaN.
template <class Element>
void test_vectors() {
  std::vector<Element> in(65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    std::memcpy(&in[i], &bits, 2);
  }
  const DeviceArray<Element> din(in), dout(in.size());
  const DeviceArray<float> dwide(in.size());
  vector_kernel<Element><<<32, 256>>>(din.get(), dout.get(), dwide.get());
  finish_kernel();
  const std::vector<Element> out = dout.host();
  const std::vector<float> wide = dwide.host();
  int wrong = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const auto want = static_cast<float>(in[i]);
    const bool is_nan = want != want;
    wrong += is_nan ? wide[i] == wide[i]
                    : wide[i] != want || std::memcmp(&in[i], &out[i], sizeof(Element)) != 0;
  }
  EXPECT_EQ(wrong, 0);
}

TEST(vector_conversions) {
  test_vectors<__nv_bfloat16>();
  test_vectors<__half>();
}

template <class Element>
__global__ void pack_kernel(const float* x, uint32_t* packed) {
  packed[threadIdx.x] = device::pack_pair<Element>(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}

template <class Element>
void test_rounding() {
  std::vector<float> x;
  for (uint32_t i = 0; i < 512;
       ++i) {  // around ties of both types: few bits behind the last kept one
    x.push_back(
        std::ldexp(static_cast<float>(65536 + small_integer(i, 4096) * 8 + int(i % 3)), -16));
  }
  const DeviceArray<float> dx(x);
  const DeviceArray<Element> packed(512);
  pack_kernel<Element><<<1, 256>>>(dx.get(), reinterpret_cast<uint32_t*>(packed.get()));
  finish_kernel();
  const std::vector<Element> got = packed.host();
  int wrong = 0;
  for (size_t i = 0; i < 512; ++i) {
    const Element want(x[i]);
    wrong += std::memcmp(&got[i], &want, sizeof(Element)) != 0;
  }
  EXPECT_EQ(wrong, 0);
}

TEST(pack_pair_rounds_to_nearest_even_low_half_first) {
  test_rounding<__nv_bfloat16>();
  test_rounding<__half>();
}

__global__ void divide_kernel(device::FastDiv div, const int* n, int count, int* quotient,
                              int* remainder) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  quotient[i] = div.quotient(n[i]);
  remainder[i] = div.remainder(n[i], quotient[i]);
}

TEST(fast_division_is_exact) {
  for (int divisor :
       {1, 2, 3, 7, 10, 16, 31, 100, 127, 641, 4095, 32768, 65535, 65537, 1 << 30, INT_MAX}) {
    std::vector<int> n{0, 1, INT_MAX, INT_MAX - 1};
    for (int multiple = 1; multiple < 2000; ++multiple) {
      const int64_t m = int64_t{multiple} * multiple * divisor;
      for (int64_t x : {m - 1, m, m + 1}) {
        if (x <= INT_MAX) n.push_back(static_cast<int>(x));
      }
    }
    const int count = static_cast<int>(n.size());
    const DeviceArray<int> dn(n), dq(n.size()), dr(n.size());
    divide_kernel<<<(count + 255) / 256, 256>>>(device::FastDiv(divisor), dn.get(), count, dq.get(),
                                                dr.get());
    finish_kernel();
    const std::vector<int> q = dq.host(), r = dr.host();
    int wrong = 0;
    for (size_t i = 0; i < n.size(); ++i) wrong += q[i] != n[i] / divisor || r[i] != n[i] % divisor;
    EXPECT_EQ(wrong, 0);
  }
}

}  // namespace
}  // namespace fsattn::test

FSATTN_KERNEL_TEST_MAIN()
