// selected_attn_merge: adds up the partial rows of a query row.
//
// Math    M = max_s m_s, w_s = l_s 2^(m_s - M), o = sum_s w_s o_s / sum_s w_s, lse = M + log2 sum_s w_s
//         over the written partial rows: first the one of the popular blocks, which `o` itself holds until
//         then, the others in ascending order of s, so the result does not depend on who wrote them
//         when. None written: o = 0, lse = -inf.
// Tiles   Format::kLanes lanes a row, 128 threads a CTA, grid (rows of a segment, segments).
// Gate    within native_sparse_attention the rows of o go through the gate on their way out.
// Bound   memory: a partial row and its 8 bytes of statistics; four rows in flight a lane.
#pragma once
#include "cuda/device/gate.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/selected_attn/selected_attn_merge_format.cuh"

namespace fsattn::selected {

inline constexpr int kMergeThreads = 128;

// The written places of a batch: where their rows are, counted in bytes from the first place, and their
// weights. The rest has the weight 0.
template <class Format>
struct PlaceList {
  int offset[Format::kPlaces];
  float weight[Format::kPlaces];
  // Of the whole query row, until its end.
  float top, total;
  int down;
  bool is_special;
  bool is_final;  // the tiles kernel has written the results
};

// The statistics of up to Format::kPlaces partial rows of a query row. Lane l holds places l, l + kLanes, ...
template <class Format>
struct StatsBatch {
  static constexpr int kLanes = Format::kLanes, kSlots = Format::kPlaces / kLanes;
  float2 stats[kSlots];  // {-inf, anything} where nobody wrote the row
  unsigned written;      // by place

  // `marks`: null where the statistics mark themselves.
  __device__ __forceinline__ StatsBatch(const float2* from, const uint8_t* marks, int count,
                                        int stride, int lane) {
    written = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int place = i * kLanes + lane;
      bool is_written = false;
      float2 x = Format::no_stats();
      if (place < count) {  // both loads at once: with marks, rows that nobody wrote hold anything
        is_written = marks == nullptr || marks[place] != 0;
        x = __ldcs(from + place * stride);
        is_written &= __float_as_uint(x.y) != kNoPartial;
      }
      stats[i] = is_written ? x : Format::no_stats();
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
  __device__ __forceinline__ RowRange range() const {
    RowRange range;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) range.include(Format::range(stats[i]));
    return range;
  }
  // This lane's part of the sum of the weights. Equal shifts give the factor 1 however large they are.
  __device__ __forceinline__ float weigh(float top) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      stats[i].x = stats[i].x == -INFINITY ? 0.f : Format::sum(stats[i]) * exp2f(stats[i].x - top);
      sum += stats[i].x;
    }
    return sum;
  }
  // Weights to what the values of the rows are multiplied by.
  __device__ __forceinline__ void scale(float inverse, int down) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      stats[i].x = stats[i].x * inverse * Format::unit(stats[i], down);  // at most the unit
    }
  }

  // The list's place of slot i: written ones first, in ascending order.
  __device__ __forceinline__ int rank(int i, int lane) const {
    const int place = i * kLanes + lane;
    const int before = __popc(written & ((1u << place) - 1));
    return written >> place & 1 ? before : __popc(written) + place - before;
  }
  __device__ __forceinline__ void list_offsets(PlaceList<Format>& list, int stride,
                                               int lane) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) list.offset[rank(i, lane)] = (i * kLanes + lane) * stride;
    __syncwarp();
  }
  __device__ __forceinline__ void list_weights(PlaceList<Format>& list, int lane) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) list.weight[rank(i, lane)] = stats[i].x;
    __syncwarp();
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

// One lane's share of a query row.
template <class Format>
struct RowSum {
  using Element = typename Format::Element;
  static constexpr int kUnroll = 4;  // rows in flight
  static constexpr int kPairs = Format::kPairs;
  float acc[2 * kPairs] = {};
  typename Format::Chunk chunk[kUnroll] = {};

  // Starts the loads of the rows of the list from `first` to `count`, at most kUnroll.
  __device__ __forceinline__ void load(const char* source, const PlaceList<Format>& list, int first,
                                       int count) {
    const int4 offset = *reinterpret_cast<const int4*>(list.offset + first);
    const int offsets[kUnroll] = {offset.x, offset.y, offset.z, offset.w};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      // What a row of weight 0 holds must be a number: the packed ones are always.
      if (!Format::kIsFinite) chunk[i] = {};
      if (first + i < count) chunk[i] = Format::load(source + offsets[i]);
    }
  }
  __device__ __forceinline__ void add(const PlaceList<Format>& list, int first) {
    const float4 weight = *reinterpret_cast<const float4*>(list.weight + first);
    const float weights[kUnroll] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      uint32_t pairs[kPairs];
      Format::unpack(chunk[i], pairs);
      add(pairs, weights[i]);
    }
  }
  __device__ __forceinline__ void add(const uint32_t (&pairs)[kPairs], float w) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float2 pair = device::unpack_pair<Element>(pairs[j]);
      acc[2 * j] = fmaf(w, pair.x, acc[2 * j]);
      acc[2 * j + 1] = fmaf(w, pair.y, acc[2 * j + 1]);
    }
  }
};

// The query row of a thread.
template <class Format>
struct MergeRow {
  int kv_head, token, h, group, lane;
  int slot0, row0;  // of its partial rows
  bool is_row;

  __device__ __forceinline__ MergeRow(const FwdArgs& a, int thread) {
    const RowSpace& space = a.space;
    const int segment = space.first_segment + static_cast<int>(blockIdx.y);
    const int row = blockIdx.x * (kMergeThreads / Format::kLanes) + thread / Format::kLanes;
    const int local = space.group_div.quotient(row);
    kv_head = a.ranges_div.quotient(segment);
    token = (segment - kv_head * space.num_ranges) * space.range + local;
    h = space.group_div.remainder(row, local);
    group = space.group;
    lane = thread % Format::kLanes;
    slot0 = (static_cast<int>(blockIdx.y) * space.range + local) * space.partials;
    row0 = slot0 * space.group + h;
    is_row = local < space.range && token < a.total_q;
  }
  __device__ __forceinline__ int head() const { return kv_head * group + h; }
  __device__ __forceinline__ typename Format::Element* out(const FwdArgs& a) const {
    return static_cast<typename Format::Element*>(a.o.data) + token * a.o.token_stride +
           head() * a.o.head_stride;
  }
};

// What the popular blocks of its tile gave a query row.
template <class Format>
struct TilePartial {
  float2 stats = {-INFINITY, 0.f};
  uint32_t pairs[Format::kPairs] = {};
  bool is_final = false;

  // All loads at once: where nobody wrote the row it holds anything.
  __device__ __forceinline__ void load(const FwdArgs& a, const MergeRow<Format>& at) {
    const int64_t query = int64_t{at.kv_head} * a.total_q + at.token;
    const uint8_t mark = a.tile_marks[query];
    const bool is_written = mark == kTileRow;
    is_final = mark == kFinalRow;
    const float2 x = __ldcs(a.tile_stats + query * a.space.group + at.h);
    Format::load_fragments(reinterpret_cast<const char*>(at.out(a)), at.lane, pairs);
    if (is_written) stats = x;
#pragma unroll
    for (uint32_t& pair : pairs) pair = is_written ? pair : 0;
  }
  // As StatsBatch::weigh().
  __device__ __forceinline__ float weigh(float top) {
    stats.y = stats.x == -INFINITY ? 0.f : stats.y * exp2f(stats.x - top);
    return stats.y;
  }
};

// Sends 16-byte chunks of a row of o_sel through the gate.
template <class Format>
__device__ __forceinline__ void apply_gate(const GateFwdParams& gate, int64_t token, int head,
                                           int lane, const uint4 (&sel)[Format::kChunks]) {
  using Element = typename Format::Element;
  float g[device::kBranches];
  device::load_gates<Element>(gate.gates, gate.shape.activation, token, head, g);
#pragma unroll
  for (int i = 0; i < Format::kChunks; ++i) {
    const int column = Format::chunk_column(lane, i);
    const uint4 cmp = device::load_chunk<Element>(gate.o_cmp, token, head, column);
    const uint4 win = device::load_chunk<Element>(gate.o_win, token, head, column);
    device::mix_branches<Element>(g, cmp, sel[i], win)
        .store(device::row_pointer<Element>(gate.o, token, head, column));
  }
}

// Adds the infinities and NaN of partial rows whose V has some: in the sum they are numbers.
template <class Format, bool kHasTiles>
__device__ __forceinline__ void add_special_values(const FwdArgs& a, const MergeRow<Format>& at,
                                                   float (&acc)[2 * Format::kPairs]) {
#pragma unroll 1
  for (int place = 0; place < a.space.partials; ++place) {
    const int row = at.row0 + place * a.space.group;
    const auto word = __float_as_uint(a.partial_stats[row].y);
    const bool is_written = kHasTiles ? a.marks[at.slot0 + place] != 0 : word != kNoPartial;
    if (!is_written || !Window::from(word).has_special) continue;
    uint32_t pairs[Format::kPairs];
    Format::unpack(Format::load(static_cast<const char*>(a.partial) +
                                int64_t{row} * kPackedRowBytes + at.lane * Format::kLaneBytes),
                   pairs);
#pragma unroll
    for (int i = 0; i < 2 * Format::kPairs; ++i) acc[i] += special_value(pairs[i / 2], i % 2 * 16);
  }
}

// The sum to its row of o, and through the gate.
template <class Format, bool kHasTiles>
__device__ __forceinline__ void finish_row(const FwdArgs& a, const MergeRow<Format>& at,
                                           float (&acc)[2 * Format::kPairs], bool is_special,
                                           int down) {
  if constexpr (Format::kHasRange) {
    if (at.is_row && is_special) add_special_values<Format, kHasTiles>(a, at, acc);
    if (down != 0) {
#pragma unroll
      for (float& x : acc) x *= power_of_two(down);
    }
  }
  uint4 chunks[Format::kChunks];
  Format::order(acc, at.lane, chunks);
  if (!at.is_row || !Format::is_inside(a, at.lane)) return;
#pragma unroll
  for (int i = 0; i < Format::kChunks; ++i) {
    *reinterpret_cast<uint4*>(at.out(a) + Format::chunk_column(at.lane, i)) = chunks[i];
  }
  if (a.gate.o.data != nullptr) apply_gate<Format>(a.gate, at.token, at.head(), at.lane, chunks);
}

// What is left to do for a row that the tiles kernel has finished.
template <class Format>
__device__ __forceinline__ void gate_final_row(const FwdArgs& a, const MergeRow<Format>& at) {
  if (a.gate.o.data == nullptr || !Format::is_inside(a, at.lane)) return;
  uint4 chunks[Format::kChunks];
#pragma unroll
  for (int i = 0; i < Format::kChunks; ++i) {
    chunks[i] = *reinterpret_cast<const uint4*>(at.out(a) + Format::chunk_column(at.lane, i));
  }
  apply_gate<Format>(a.gate, at.token, at.head(), at.lane, chunks);
}

// True when the tiles kernel has finished all rows of the warp. Looked at only where little is left to merge:
// elsewhere it would be a way to memory and back before the first loads.
template <class Format>
__device__ __forceinline__ bool finish_final_rows(const FwdArgs& a, int thread) {
  if (__ldg(a.list.item_counts + blockIdx.y) > a.space.range / 16) return false;
  const MergeRow<Format> at(a, thread);
  const bool is_final =
      !at.is_row || a.tile_marks[int64_t{at.kv_head} * a.total_q + at.token] == kFinalRow;
  if (!__all_sync(kFullMask, is_final)) return false;
  if (at.is_row) gate_final_row(a, at);
  return true;
}

// kHasTiles: there are marks of the written rows and the partial rows of popular blocks; otherwise the
// statistics tell. kIsShort: at most Format::kPlaces partial rows a query row beside that one.
template <class Format, bool kHasTiles, bool kIsShort>
__global__ void __launch_bounds__(kMergeThreads, Format::min_ctas(kIsShort))
    selected_attn_merge_kernel(const __grid_constant__ FwdArgs a) {
  constexpr int kLanes = Format::kLanes;
  const RowSpace& space = a.space;
  const int thread = threadIdx.x, lane = thread % kLanes;
  if constexpr (kHasTiles) {
    if (finish_final_rows<Format>(a, thread)) return;
  }
  __shared__ __align__(16) PlaceList<Format> lists[kMergeThreads / kLanes];
  PlaceList<Format>& list = lists[thread / kLanes];
  RowSum<Format> sum;
  {
    const MergeRow<Format> at(a, thread);
    const int count = at.is_row ? space.partials : 0;
    const auto read_batch = [&](int first) {
      return StatsBatch<Format>(a.partial_stats + at.row0 + first * space.group,
                                kHasTiles ? a.marks + at.slot0 + first : nullptr, count - first,
                                space.group, lane);
    };
    const int row_bytes = Format::row_bytes(a), stride = space.group * row_bytes;
    const char* source = static_cast<const char*>(a.partial) + int64_t{at.row0} * row_bytes +
                         lane * Format::kLaneBytes;
    StatsBatch<Format> batch = read_batch(0);
    [[maybe_unused]] TilePartial<Format> tile;
    if constexpr (kHasTiles) {
      if (at.is_row) tile.load(a, at);
    }
    // The first rows are under way while the weights are found.
    batch.list_offsets(list, stride, lane);
    const bool is_inside = Format::is_inside(a, lane);
    int listed = is_inside ? __popc(batch.written) : 0, most = most_bits<kLanes>(batch.written);
    sum.load(source, list, 0, listed);
    float top = batch.top();
    RowRange range = batch.range();
    if constexpr (kHasTiles) top = fmaxf(top, tile.stats.x);
    for (int first = Format::kPlaces; !kIsShort && first < space.partials;
         first += Format::kPlaces) {
      const StatsBatch<Format> later = read_batch(first);
      top = fmaxf(top, later.top());
      range.include(later.range());
    }
    top = row_max<kLanes>(top);
    const int down = Format::kHasRange ? range.template reduce<kLanes>() : 0;
    float total = batch.weigh(top);
    for (int first = Format::kPlaces; !kIsShort && first < space.partials;
         first += Format::kPlaces) {
      total += read_batch(first).weigh(top);
    }
    total = row_sum<kLanes>(total);
    if constexpr (kHasTiles) total += tile.weigh(top);
    // Weights are normalised before they are used: sums of anything larger could overflow.
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    batch.scale(inverse, down);
    if constexpr (kHasTiles) sum.add(tile.pairs, tile.stats.y * inverse * power_of_two(-down));
    if (lane == 0) {
      list.top = top;
      list.total = total;
      list.down = down;
      list.is_special = range.is_special;
      list.is_final = false;
      if constexpr (kHasTiles) list.is_final = tile.is_final;
    }
    batch.list_weights(list, lane);
    for (int first = 0;;) {
      sum.add(list, 0);
      for (int i = sum.kUnroll; i < most; i += sum.kUnroll) {
        sum.load(source, list, i, listed);
        sum.add(list, i);
      }
      first += Format::kPlaces;
      if (kIsShort || first >= space.partials) break;
      batch = read_batch(first);
      batch.list_offsets(list, stride, lane);
      listed = is_inside ? __popc(batch.written) : 0;
      most = most_bits<kLanes>(batch.written);
      source += int64_t{Format::kPlaces} * stride;
      sum.load(source, list, 0, listed);
      batch.weigh(top);
      batch.scale(inverse, down);
      batch.list_weights(list, lane);
    }
  }
  // Where the row is, once more: kept, it would take registers that the loop does not have.
  MergeRow<Format> at(a, device::reread_thread_index());
  if constexpr (kHasTiles) {
    if (at.is_row && list.is_final) {
      gate_final_row(a, at);
      at.is_row = false;
    }
  }
  finish_row<Format, kHasTiles>(a, at, sum.acc, list.is_special, list.down);
  if (at.is_row && at.lane == 0) {
    const float total = list.total;
    static_cast<float*>(a.lse.data)[at.head() * a.lse.head_stride + at.token] =
        total > 0.f ? (list.top + log2f(total)) * device::kLn2 : -INFINITY;
  }
}

}  // namespace fsattn::selected
