// selected_attn_merge: adds up the partial rows of a query row.
//
// Math    M = max_s m_s, w_s = l_s 2^(m_s - M), o = sum_s w_s o_s / sum_s w_s, lse = M + log2 sum_s w_s
//         over the written partial rows, in ascending order of s, so the result does not depend on who
//         wrote them when; the one of the popular blocks, which `o` itself holds until then, is the
//         last. None written: o = 0, lse = -inf.
// Tiles   kLanes lanes a row (16 bytes each), 128 threads a CTA, grid (rows of a segment, segments).
// Gate    within native_sparse_attention the rows of o go through the gate on their way out.
// Bound   memory: (2 Dv + 8) bytes per partial row; eight rows in flight a lane.
#pragma once
#include "cuda/device/gate.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"

namespace fsattn::selected {

inline constexpr int kMergeThreads = 128;

// The {shift, sum} of up to 32 partial rows of a query row. Lane l holds places l, l + kLanes, ...
template <int kLanes>
struct StatsBatch {
  static constexpr int kSlots = kWarpSize / kLanes;
  float2 stats[kSlots];  // {-inf, 0} where nobody wrote the row
  unsigned written;      // by place

  // `marks`: null where the statistics mark themselves.
  __device__ __forceinline__ StatsBatch(const float2* from, const uint8_t* marks, int count,
                                        int stride, int lane) {
    written = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int place = i * kLanes + lane;
      bool is_written = false;
      float2 x = {-INFINITY, 0.f};
      if (place < count) {  // both loads at once: with marks, rows that nobody wrote hold anything
        is_written = marks == nullptr || marks[place] != 0;
        x = __ldcs(from + place * stride);
        is_written &= __float_as_uint(x.y) != kNoPartial;
      }
      stats[i] = is_written ? x : float2{-INFINITY, 0.f};
      const unsigned votes = __ballot_sync(kFullMask, is_written);
      written |= (votes >> (threadIdx.x % kWarpSize - lane) & (kFullMask >> (kWarpSize - kLanes)))
                 << (i * kLanes);
    }
  }
  __device__ __forceinline__ float top() const {
    float x = stats[0].x;
#pragma unroll
    for (int i = 1; i < kSlots; ++i) x = fmaxf(x, stats[i].x);
    return x;
  }
  // Turns the sums into weights; returns this lane's part of their sum. Equal shifts give the factor 1
  // however large they are.
  __device__ __forceinline__ float weigh(float top) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      stats[i].y = stats[i].x == -INFINITY ? 0.f : stats[i].y * exp2f(stats[i].x - top);
      sum += stats[i].y;
    }
    return sum;
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) stats[i].y *= factor;
  }
  __device__ __forceinline__ float weight(int place) const {
    float w = __shfl_sync(kFullMask, stats[0].y, place % kLanes, kLanes);
#pragma unroll
    for (int i = 1; i < kSlots; ++i) {
      const float x = __shfl_sync(kFullMask, stats[i].y, place % kLanes, kLanes);
      if (place / kLanes == i) w = x;
    }
    return w;
  }
};

template <int kLanes>
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, d));
  return x;
}

template <int kLanes>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) x += __shfl_xor_sync(kFullMask, x, d);
  return x;
}

// The most set bits among the rows of the warp.
template <int kLanes>
__device__ __forceinline__ int most_bits(unsigned x) {
  int n = __popc(x);
#pragma unroll
  for (int d = kLanes; d < kWarpSize; d *= 2) n = max(n, __shfl_xor_sync(kFullMask, n, d));
  return n;
}

// One lane's 16 bytes of a query row.
template <class Element, int kLanes>
struct RowSum {
  static constexpr int kUnroll = 4;  // rows in flight
  float acc[8] = {};
  unsigned loading;  // the places whose rows are under way
  uint4 chunk[kUnroll];

  static __device__ __forceinline__ int lowest(unsigned places) {
    return max(__ffs(static_cast<int>(places)) - 1, 0);
  }
  // Starts the loads of the first kUnroll partial rows of `left`, and takes them out of it.
  __device__ __forceinline__ void load(const uint4* source, int stride, unsigned& left,
                                       bool is_inside) {
    loading = left;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const bool is_needed = is_inside && left != 0;
      chunk[i] = is_needed ? __ldcs(source + lowest(left) * stride) : uint4{0, 0, 0, 0};
      left &= left - 1;
    }
  }
  __device__ __forceinline__ void add(const StatsBatch<kLanes>& batch) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      add(chunk[i], batch.weight(lowest(loading)));  // times zero where no row was loaded
      loading &= loading - 1;
    }
  }
  __device__ __forceinline__ void add(const uint4& row, float w) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = device::unpack_pair<Element>(words[j]);
      acc[2 * j] = fmaf(w, pair.x, acc[2 * j]);
      acc[2 * j + 1] = fmaf(w, pair.y, acc[2 * j + 1]);
    }
  }
};

// What the popular blocks of its tile gave a query row.
struct TilePartial {
  float2 stats = {-INFINITY, 0.f};
  uint4 chunk = {0, 0, 0, 0};

  // All loads at once: where nobody wrote the row it holds anything.
  __device__ __forceinline__ void load(const FwdArgs& a, int64_t query, int h, const uint4* row) {
    const bool is_written = a.tile_marks[query] != 0;
    const float2 x = __ldcs(a.tile_stats + query * a.space.group + h);
    const uint4 y = __ldcs(row);
    if (!is_written) return;
    stats = x;
    chunk = y;
  }
  // As StatsBatch::weigh().
  __device__ __forceinline__ float weigh(float top) {
    stats.y = stats.x == -INFINITY ? 0.f : stats.y * exp2f(stats.x - top);
    return stats.y;
  }
};

// Sends 16 bytes of a row of o_sel through the gate.
template <class Element>
__device__ __forceinline__ void apply_gate(const GateFwdParams& gate, int64_t token, int head,
                                           int column, const uint4& sel) {
  float g[device::kBranches];
  device::load_gates<Element>(gate.gates, gate.shape.activation, token, head, g);
  const uint4 cmp = device::load_chunk<Element>(gate.o_cmp, token, head, column);
  const uint4 win = device::load_chunk<Element>(gate.o_win, token, head, column);
  device::mix_branches<Element>(g, cmp, sel, win)
      .store(device::row_pointer<Element>(gate.o, token, head, column));
}

// kIsFragments: the rows are in the order of fragment_chunk(). kHasTiles: there are marks of the written rows
// and the partial rows of popular blocks; otherwise the statistics tell. kIsShort: at most 32 partial rows a
// query row beside that one.
template <class Element, int kLanes, bool kIsFragments, bool kHasTiles, bool kIsShort>
__global__ void __launch_bounds__(kMergeThreads, kIsShort&& kLanes == 16 ? 8 : 5)
    selected_attn_merge_kernel(const __grid_constant__ FwdArgs a) {
  const RowSpace& space = a.space;
  const int segment = space.first_segment + blockIdx.y, kv_head = segment / space.num_ranges;
  const int row = blockIdx.x * (kMergeThreads / kLanes) + threadIdx.x / kLanes;
  const int local = space.group_div.quotient(row), h = space.group_div.remainder(row, local);
  const int token = (segment - kv_head * space.num_ranges) * space.range + local;
  const bool is_row = local < space.range && token < a.total_q;
  const int lane = threadIdx.x % kLanes, count = is_row ? space.partials : 0;
  const bool is_inside = lane < a.chunks_v;

  const int slot0 = (static_cast<int>(blockIdx.y) * space.range + local) * space.partials;
  const int row0 = slot0 * space.group + h;
  const auto read_batch = [&](int first) {
    return StatsBatch<kLanes>(a.partial_stats + row0 + first * space.group,
                              kHasTiles ? a.marks + slot0 + first : nullptr, count - first,
                              space.group, lane);
  };
  const uint4* source = static_cast<const uint4*>(a.partial) + int64_t{row0} * a.chunks_v + lane;
  const int stride = space.group * a.chunks_v;
  RowSum<Element, kLanes> sum;
  StatsBatch<kLanes> batch = read_batch(0);
  const int head = kv_head * space.group + h;
  auto* out = reinterpret_cast<uint4*>(static_cast<Element*>(a.o.data) + token * a.o.token_stride +
                                       head * a.o.head_stride) +
              lane;
  [[maybe_unused]] TilePartial tile;
  if constexpr (kHasTiles) {
    if (is_row) tile.load(a, int64_t{kv_head} * a.total_q + token, h, out);
  }
  // The first rows are under way while the weights are found.
  unsigned left = batch.written;
  int num_left = most_bits<kLanes>(left) - sum.kUnroll;
  sum.load(source, stride, left, is_inside);
  float top = batch.top();
  if constexpr (kHasTiles) top = fmaxf(top, tile.stats.x);
  for (int first = kWarpSize; !kIsShort && first < space.partials; first += kWarpSize) {
    top = fmaxf(top, read_batch(first).top());
  }
  top = row_max<kLanes>(top);
  float total = batch.weigh(top);
  for (int first = kWarpSize; !kIsShort && first < space.partials; first += kWarpSize) {
    total += read_batch(first).weigh(top);
  }
  total = row_sum<kLanes>(total);
  if constexpr (kHasTiles) total += tile.weigh(top);
  // Weights are normalised before they are used: sums of anything larger could overflow.
  const float inverse = total > 0.f ? 1.f / total : 0.f;
  batch.scale(inverse);
  for (int first = 0;;) {
    sum.add(batch);
    for (; num_left > 0; num_left -= sum.kUnroll) {
      sum.load(source, stride, left, is_inside);
      sum.add(batch);
    }
    first += kWarpSize;
    if (kIsShort || first >= space.partials) break;
    batch = read_batch(first);
    batch.weigh(top);
    batch.scale(inverse);
    left = batch.written;
    num_left = most_bits<kLanes>(left) - sum.kUnroll;
    source += int64_t{kWarpSize} * stride;
    sum.load(source, stride, left, is_inside);
  }
  if constexpr (kHasTiles) sum.add(tile.chunk, tile.stats.y * inverse);
  const float* x = sum.acc;
  uint4 row_chunk = {pack_average<Element>(x[0], x[1]), pack_average<Element>(x[2], x[3]),
                     pack_average<Element>(x[4], x[5]), pack_average<Element>(x[6], x[7])};
  if constexpr (kIsFragments) row_chunk = order_columns(row_chunk, lane);
  if (!is_row) return;
  if (is_inside) {
    *out = row_chunk;
    if (a.gate.o.data != nullptr) apply_gate<Element>(a.gate, token, head, lane * 8, row_chunk);
  }
  if (lane == 0) {
    static_cast<float*>(a.lse.data)[head * a.lse.head_stride + token] =
        total > 0.f ? (top + log2f(total)) * device::kLn2 : -INFINITY;
  }
}

}  // namespace fsattn::selected
