// The kernels around the main kernel of the selected backward: row statistics before it, and after it
// the sums of dQ over places and of dK, dV over work items, both in a fixed order.
#pragma once
#include "cuda/device/packing.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/selected_attn/selected_attn_bwd_args.cuh"
#include "plan/dense_attn_table.h"

namespace fsattn::selected {

inline constexpr int kReduceThreads = 256;

// The lanes of a group of kLanes (a power of two), as a mask for warp intrinsics.
template <int kLanes>
__device__ __forceinline__ unsigned group_lanes() {
  if constexpr (kLanes == kWarpSize) return kFullMask;
  return ((1u << kLanes) - 1) << (threadIdx.x % kWarpSize / kLanes * kLanes);
}

// stats[t, h] = {lse / ln 2, rowsum(dO * O) - dlse}. Eight lanes a row, grid (rows / 32).
template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    selected_attn_stats_kernel(const __grid_constant__ BwdArgs a) {
  constexpr int kLanes = 8;
  const AttnBwdTensors& t = a.attn;
  const int64_t heads = t.shape.num_heads_q;
  const int64_t row = (int64_t{blockIdx.x} * kReduceThreads + threadIdx.x) / kLanes;
  if (row >= t.packing.total_q * heads) return;
  const int64_t token = row / heads, head = row - token * heads;
  const int lane = threadIdx.x % kLanes;
  const Element* o = row_pointer16<const Element>(t.o, token, head);
  const Element* dout = row_pointer16<const Element>(t.dout, token, head);
  float sum = 0.f;
  for (int chunk = lane; chunk < a.chunks_v; chunk += kLanes) {
    const auto x = device::Vector8<Element>::load(o + chunk * 8);
    const auto y = device::Vector8<Element>::load(dout + chunk * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x.x[i], y.x[i], sum);
  }
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(group_lanes<kLanes>(), sum, d);
  if (lane != 0) return;
  if (t.dlse.data != nullptr) {
    sum -= static_cast<const float*>(t.dlse.data)[head * t.dlse.head_stride + token];
  }
  const float lse = static_cast<const float*>(t.lse.data)[head * t.lse.head_stride + token];
  a.stats[row] = {lse * device::kLog2E, sum};
}

// Where a lane's eight columns of dQ are. Interleaved partial rows keep the order of wgmma's accumulators:
// lane 4 k + q holds columns 2 q and 2 q + 1 of the 8-column groups 4 k .. 4 k + 3.
template <bool kInterleaved>
__device__ __forceinline__ int dq_column(int lane, int pair) {
  return kInterleaved ? lane / 4 * 32 + pair * 8 + lane % 4 * 2 : lane * 8 + pair * 2;
}

// A row of the sums of dQ that the other branches left (SharedDq in params/attention.h): 128 columns, whose
// chunks of 8 are swizzled by the row in its tile. data is null where none of their keys is seen.
struct SumsRow {
  const float* data;
  int swizzle;
};

__device__ __forceinline__ SumsRow find_sums(const BwdArgs& a, int token, int head) {
  const SharedDq& shared = a.attn.shared_dq;
  const Packing& packing = a.attn.packing;
  const int batch = static_cast<int>(packing.batch);
  const int seq = device::find_sequence(packing.cu_q, batch, token);
  if (seq >= batch) return {nullptr, 0};
  const int begin = max(__ldg(packing.cu_q + seq), 0), row = token - begin;
  if (row < 0) return {nullptr, 0};
  const int slot = begin / kTurnQueries + seq + row / kTurnQueries;
  const int64_t turn = 1 + int64_t{slot} * a.attn.shape.num_heads_q + head;
  if (shared.turns[turn] == 0 && shared.prior_turns[turn] == 0) return {nullptr, 0};
  return {shared.sums + (head * packing.total_q + token) * 128, row % 8};
}

// dq[t, h] = sum over the written partial rows, in ascending order of place, on top of what is there. kLanes lanes a row; a CTA
// takes rows of a segment.
template <class Element, int kLanes, bool kInterleaved>
__device__ __forceinline__ void sum_dq(const BwdArgs& a, int row_cta, int local_segment) {
  constexpr int kUnroll = 8;  // rows in flight a lane
  const RowSpace& space = a.space;
  const int segment = space.first_segment + local_segment, kv_head = segment / space.num_ranges;
  const int row = row_cta * (kReduceThreads / kLanes) + threadIdx.x / kLanes;
  const int local = space.group_div.quotient(row), h = space.group_div.remainder(row, local);
  const int token = (segment - kv_head * space.num_ranges) * space.range + local;
  const int lane = threadIdx.x % kLanes;
  if (local >= space.range || token >= a.attn.packing.total_q || lane >= a.chunks_qk) return;
  const int64_t slot0 = (int64_t{local_segment} * space.range + local) * space.partials;
  const uint4* source =
      static_cast<const uint4*>(a.dq_partial) + (slot0 * space.group + h) * a.chunks_qk + lane;
  const int64_t stride = int64_t{space.group} * a.chunks_qk;
  const int head = kv_head * space.group + h;
  Element* dq = row_pointer16<Element>(a.attn.dq, token, head);
  const auto pair_of_dq = [&](int i) {
    return reinterpret_cast<uint32_t*>(dq + dq_column<kInterleaved>(lane, i));
  };
  float2 sum[4] = {};
  const SumsRow sums =
      a.attn.shared_dq.sums == nullptr ? SumsRow{nullptr, 0} : find_sums(a, token, head);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (a.attn.accumulate_dq) sum[i] = device::unpack_pair<Element>(*pair_of_dq(i));
    if (sums.data == nullptr) continue;
    const int column = dq_column<kInterleaved>(lane, i);
    const float2 x = __ldcs(
        reinterpret_cast<const float2*>(sums.data + (column / 8 ^ sums.swizzle) * 8 + column % 8));
    sum[i] = {x.x * a.scale, x.y * a.scale};
  }
  for (int s0 = 0; s0 < space.partials; s0 += kUnroll) {
    uint4 chunk[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const bool is_written = s0 + i < space.partials && __ldg(a.marks + slot0 + s0 + i) != 0;
      chunk[i] = is_written ? __ldcs(source + (s0 + i) * stride) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t words[4] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = device::unpack_pair<Element>(words[j]);
        sum[j] = {sum[j].x + pair.x, sum[j].y + pair.y};
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) *pair_of_dq(i) = device::pack_pair<Element>(sum[i].x, sum[i].y);
}

// What a thread sums of the row [dk, dv] of a key in the work items of a part. Items of mma.sync are fp32: 16
// bytes are four columns.
template <class Element_>
struct DkvOfFp32 {
  using Element = Element_;
  using Loaded = float4;
  static constexpr int kColumns = 4, kVectors = 2;  // a thread
  float4 sum;

  __device__ __forceinline__ void load(const float* total) {
    sum = *reinterpret_cast<const float4*>(total);
  }
  __device__ __forceinline__ void store(float* total) const {
    *reinterpret_cast<float4*>(total) = sum;
  }
  __device__ __forceinline__ void add(const float4& x) {
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }
  // Adds `scale` times a row like that of a key, from `column` on.
  __device__ __forceinline__ void add_row(const Element* row, int column, float scale) {
    const uint2 x = *reinterpret_cast<const uint2*>(row + column);
    const float2 low = device::unpack_pair<Element>(x.x), high = device::unpack_pair<Element>(x.y);
    sum = {fmaf(low.x, scale, sum.x), fmaf(low.y, scale, sum.y), fmaf(high.x, scale, sum.z),
           fmaf(high.y, scale, sum.w)};
  }
  // To dk or dv of a key, from `column` on.
  __device__ __forceinline__ void write(Element* row, int column, bool accumulates) const {
    auto* pairs = reinterpret_cast<uint2*>(row + column);
    float4 x = sum;
    if (accumulates) {
      const float2 low = device::unpack_pair<Element>(pairs->x);
      const float2 high = device::unpack_pair<Element>(pairs->y);
      x = {x.x + low.x, x.y + low.y, x.z + high.x, x.w + high.y};
    }
    *pairs = {device::pack_pair<Element>(x.x, x.y), device::pack_pair<Element>(x.z, x.w)};
  }
};

// Items of wgmma have the input type and the order of columns of the accumulators, as dQ: 16 bytes are
// pairs of four 8-column groups.
template <class Element_>
struct DkvOfWgmma {
  using Element = Element_;
  using Loaded = uint4;
  static constexpr int kColumns = 8, kVectors = 1;  // a thread
  float2 sum[4];

  __device__ __forceinline__ void load(const float* total) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = reinterpret_cast<const float2*>(total)[i];
  }
  __device__ __forceinline__ void store(float* total) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) reinterpret_cast<float2*>(total)[i] = sum[i];
  }
  __device__ __forceinline__ void add(const uint4& x) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = device::unpack_pair<Element>(words[i]);
      sum[i] = {sum[i].x + pair.x, sum[i].y + pair.y};
    }
  }
  __device__ __forceinline__ void add_row(const Element* row, int column, float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = device::unpack_pair<Element>(
          *reinterpret_cast<const uint32_t*>(row + dq_column<true>(column / 8, i)));
      sum[i] = {fmaf(x.x, scale, sum[i].x), fmaf(x.y, scale, sum[i].y)};
    }
  }
  __device__ __forceinline__ void write(Element* row, int column, bool accumulates) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* to = reinterpret_cast<uint32_t*>(row + dq_column<true>(column / 8, i));
      float2 x = sum[i];
      if (accumulates) {
        const float2 before = device::unpack_pair<Element>(*to);
        x = {x.x + before.x, x.y + before.y};
      }
      *to = device::pack_pair<Element>(x.x, x.y);
    }
  }
};

// A part's rows of dk and dv are summed by several CTAs: the first block of a sequence may have hundreds of
// items where others have a few, and one CTA would read them all.
template <class Sum>
inline constexpr int kDkvSlice = Sum::kVectors* kReduceThreads;

// The items of a part in the ranges of a launch, in order.
struct PartItems {
  const int* begin;  // of each range, in shared memory
  const int* end;
  int num_ranges;
  int range = -1;
  int at = 0, last = 0;

  // Returns the next one, counted in its range; false behind the last.
  __device__ __forceinline__ bool next(int& item) {
    while (at == last) {
      if (range + 1 >= num_ranges) return false;
      ++range;
      at = begin[range];
      last = end[range];
    }
    item = at++;
    return true;
  }
};

struct SumArgs {
  BwdArgs bwd;
  ItemArgs items;
  int heads;       // KV heads of the launch
  int num_slices;  // of a part: CTAs that share it
  int dkv_ctas;    // num_parts * num_slices * heads
  int row_ctas;    // of a segment
};

// Adds the gradients of the means that key `key` of a sequence is part of.
template <class Sum>
__device__ __forceinline__ void add_means(Sum& sum, const MeanGradients& means, const Rows& rows,
                                          int seq, int64_t key, int kv_head, int column) {
  const int64_t first_row = max(__ldg(means.cu_cmp + seq), 0);
  const int64_t last_row = min(int64_t{__ldg(means.cu_cmp + seq + 1)}, means.total_cmp) - 1;
  const int64_t stride = key / means.kernel_stride;
  const int64_t first = max(stride - means.kernel_size / means.kernel_stride + 1, int64_t{0});
  const int64_t last = min(first_row + stride, last_row);
  const float scale = 1.f / static_cast<float>(means.kernel_size);
#pragma unroll 1
  for (int64_t row = first_row + first; row <= last; ++row) {
    sum.add_row(row_pointer16<const typename Sum::Element>(rows, row, kv_head), column, scale);
  }
}

// dk, dv of a part = sum of its items in the launch, in order, on top of the launches before. A CTA takes a
// slice of a part of a KV head. Every part that holds keys is written, wanted or not.
template <class Sum>
__device__ __forceinline__ void sum_dkv(const SumArgs& args, int cta) {
  const BwdArgs& a = args.bwd;
  const ItemArgs& b = args.items;
  const int head_ctas = a.num_parts * args.num_slices, head = cta / head_ctas;
  const int in_head = cta - head * head_ctas, part = in_head / args.num_slices;
  const int slot = part / b.splits;
  const int num_ranges = a.list.num_segments / args.heads;
  const int first_segment = head * num_ranges;
  const int kv_head = (a.space.first_segment + first_segment) / a.space.num_ranges;
  const Packing& packing = b.packing;
  const int seq =
      device::find_slot_sequence(packing.cu_k, static_cast<int>(packing.batch), slot, b.block_size);
  const auto [k0, k1] = device::find_keys(packing, seq);
  const int block = slot - static_cast<int>(first_block_slot(k0, seq, b.block_size));
  const int64_t key0 = int64_t{block} * b.block_size + (part - slot * b.splits) * b.keys;
  const int num_keys = static_cast<int>(min(int64_t{b.keys}, k1 - k0 - key0));
  if (key0 < 0 || num_keys <= 0) return;  // lengths that do not ascend: the slot has no keys

  // The items of the part in each range.
  __shared__ int begin[kMaxSegmentsPerLaunch], end[kMaxSegmentsPerLaunch];
  for (int r = threadIdx.x; r < num_ranges; r += kReduceThreads) {
    const int* part_items = a.part_items + int64_t{first_segment + r} * (a.num_parts + 1) + part;
    begin[r] = __ldg(part_items);
    end[r] = __ldg(part_items + 1);
  }
  __syncthreads();
  const int dims = (a.chunks_qk + a.chunks_v) * 8, vectors = num_keys * dims / Sum::kColumns;
  const int64_t item_vectors = int64_t{a.keys} * dims / Sum::kColumns;
  float* total = a.dkv_sum + (k0 + key0) * dims;
  const int i0 = (in_head - part * args.num_slices) * kDkvSlice<Sum> + threadIdx.x;
  Sum sum[Sum::kVectors] = {};
  bool exists[Sum::kVectors];
#pragma unroll
  for (int u = 0; u < Sum::kVectors; ++u) {
    exists[u] = i0 + u * kReduceThreads < vectors;
    if (!a.is_first && exists[u])
      sum[u].load(total + int64_t{i0 + u * kReduceThreads} * Sum::kColumns);
  }
  // Loads of several items are in flight, but they are added in order.
  constexpr int kUnroll = 8 / Sum::kVectors;
  const auto* items = reinterpret_cast<const typename Sum::Loaded*>(a.dkv_items) + i0;
  PartItems next{begin, end, num_ranges};
  for (bool has_more = true; has_more;) {
    typename Sum::Loaded x[kUnroll][Sum::kVectors] = {};
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) {
      int item;
      has_more = next.next(item);
      if (!has_more) continue;
      const int64_t number = int64_t{first_segment + next.range} * a.list.capacity + item;
#pragma unroll
      for (int u = 0; u < Sum::kVectors; ++u) {
        if (exists[u]) x[n][u] = __ldcs(items + number * item_vectors + u * kReduceThreads);
      }
    }
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) {
#pragma unroll
      for (int u = 0; u < Sum::kVectors; ++u) {
        sum[u].add(x[n][u]);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < Sum::kVectors; ++u) {
    const int i = i0 + u * kReduceThreads;
    if (!exists[u]) continue;
    if (a.is_last) {
      const int key = i * Sum::kColumns / dims, column = i * Sum::kColumns - key * dims;
      const bool is_k = column < a.chunks_qk * 8;
      using Element = typename Sum::Element;
      Element* row = row_pointer16<Element>(is_k ? a.attn.dk : a.attn.dv, k0 + key0 + key, kv_head);
      const int row_column = is_k ? column : column - a.chunks_qk * 8;
      if (a.means.dk.data != nullptr) {
        const Rows& means = is_k ? a.means.dk : a.means.dv;
        add_means(sum[u], a.means, means, seq, key0 + key, kv_head, row_column);
      }
      sum[u].write(row, row_column, a.attn.accumulate_dkv);
    } else {
      sum[u].store(total + int64_t{i} * Sum::kColumns);
    }
  }
}

// Both sums of a launch. dQ waits for memory, dK and dV of a part with few items for one load after the
// other: their CTAs alternate, so that the SMs have both.
template <class Element, int kLanes, bool kInterleaved>
__global__ void __launch_bounds__(kReduceThreads, kInterleaved ? 4 : 3)
    selected_attn_sums_kernel(const __grid_constant__ SumArgs args) {
  using Sum = std::conditional_t<kInterleaved, DkvOfWgmma<Element>, DkvOfFp32<Element>>;
  const uint64_t dkv_ctas = static_cast<uint64_t>(args.dkv_ctas);
  const int before = static_cast<int>(blockIdx.x * dkv_ctas / gridDim.x);
  const int behind = static_cast<int>((blockIdx.x + 1) * dkv_ctas / gridDim.x);
  if (behind > before) {
    sum_dkv<Sum>(args, before);
  } else {
    const int cta = static_cast<int>(blockIdx.x) - before, segment = cta / args.row_ctas;
    sum_dq<Element, kLanes, kInterleaved>(args.bwd, cta - segment * args.row_ctas, segment);
  }
}

}  // namespace fsattn::selected
