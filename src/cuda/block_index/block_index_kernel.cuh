// block_index: inverts topk_idx into block -> queries (CSR), deterministically.
//
// Math    entry (t * topk + j) belongs to slot first_block_slot(sequence of t) + topk_idx[h, t, j] iff
//         that id names a block of the sequence at or before the query's own and stands in no earlier
//         place of the row. The entries of a slot ascend.
// Shapes  params/select_blocks.h. Scratch: int32 counts [Hkv, chunks, num_slots].
// Tiles   grid (chunks, Hkv, windows of slots), 256 threads. A group of 16 or 32 lanes owns consecutive
//         queries and a byte per slot that counts them; it takes one query at a time, a lane a pick.
//           count    the bytes of all groups, added up per chunk
//           prefix   counts along the chunks of a slot -> exclusive sums; totals -> start
//           start    exclusive sums along the slots of a head
//           scatter  what a byte holds before a pick is its rank in the group; prefix sums over groups
//                    and slots make it a place in a staging buffer in slot order, from which runs of
//                    one slot leave together
// Order   all picks of a query read their bytes before any of them writes: a repeated id agrees on
//         rank and count, and the least of its entries stays in the common place. No atomics.
// Memory  a byte a slot and group, 10 a slot, 16 KiB of staging.
// Bound   instructions: about 20 a pick when counting, 40 when scattering. Reads topk_idx twice.
#pragma once
#include <algorithm>
#include <climits>

#include "base/check.h"
#include "base/cuda_check.h"
#include "base/math.h"
#include "cuda/block_index/block_index.h"
#include "cuda/device/fast_div.cuh"
#include "cuda/device/packing.cuh"
#include "cuda/device/scan.cuh"

namespace fsattn {
namespace block_index_detail {

using device::FastDiv;
using device::kWarpSize;

inline constexpr int kThreads = 256;

template <BlockIndexConfig kConfig>
struct Traits {
  static constexpr int kLanes = kConfig.lanes;    // of a group
  static constexpr int kPlaces = kConfig.places;  // picks of one query that a lane has
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kPicks = kBlockIndexPicks / kThreads;
  static constexpr int kQueries = kPicks / kPlaces;  // of a group in a step
  static constexpr int kStep = kGroups * kQueries;
  static constexpr int kWindow = kConfig.window;
  static constexpr int kSteps = 255 / kQueries;  // until a byte may be full
  // Bytes hold what the groups before one have counted in a step.
  static_assert((kGroups - 1) * kQueries <= 255 && kQueries <= kLanes);
};

struct Args {
  Packing packing;
  SelectedMask mask;
  int32_t* counts;
  int num_chunks;
  int chunk;
  int window;  // slots of a window
  int stride;  // bytes of a group: one more, for the picks that do not count, in units of 16
  FastDiv block_div;
};

// Where the blocks of one query's sequence start, and how many of them it may see.
struct QueryBlocks {
  int first_slot;
  int num_visible;
};

__device__ __forceinline__ QueryBlocks find_query_blocks(const Args& a, int token) {
  const Packing& packing = a.packing;
  const int seq = device::find_sequence(packing.cu_q, static_cast<int>(packing.batch), token);
  if (seq >= packing.batch) return {0, 0};
  const device::KeyRange keys = device::find_keys(packing, seq);
  const int64_t position = token + device::position_shift(packing, seq);
  if (position < 0 || keys.end <= keys.begin) return {0, 0};
  const int first_slot = a.block_div.quotient(keys.begin) + seq;
  const auto last_key = static_cast<int>(min(position, int64_t{keys.end} - keys.begin - 1));
  const int num_visible = min(a.block_div.quotient(last_key) + 1,
                              static_cast<int>(a.mask.index.num_slots) - first_slot);
  return {first_slot, max(num_visible, 0)};
}

// A pick's slot in the upper half; below it its rank, then its place in the staging buffer.
using Pick = uint32_t;
__device__ __forceinline__ int slot_of(Pick pick) { return static_cast<int>(pick >> 16); }
__device__ __forceinline__ int rank_of(Pick pick) { return static_cast<int>(pick & 0xffff); }

// This lane's picks of the group's queries from `first` on. Slots are relative to the window; its size
// stands for a pick that does not count. A repeated id yields its slot every time.
template <class T>
__device__ __forceinline__ void load_picks(const Args& a, int first, int last, int window,
                                           Pick (&pick)[T::kPicks]) {
  const int lane = threadIdx.x % T::kLanes, topk = static_cast<int>(a.mask.topk);
  const int32_t* ids =
      a.mask.topk_idx + blockIdx.y * a.mask.head_stride + first * a.mask.token_stride + lane;
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    const int query = i / T::kPlaces, before = i % T::kPlaces * T::kLanes;
    const bool is_pick = first + query < last && before + lane < topk;
    const int32_t* id = ids + query * a.mask.token_stride + before;
    pick[i] = static_cast<uint32_t>(is_pick ? __ldg(id) : -1);
  }
  QueryBlocks own{0, 0};  // lane q finds them for query q
  if (lane < T::kQueries && first + lane < last) own = find_query_blocks(a, first + lane);
  own.first_slot -= static_cast<int>(blockIdx.z) * a.window;
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    const int query = i / T::kPlaces;
    const auto visible =
        static_cast<uint32_t>(__shfl_sync(device::kFullMask, own.num_visible, query, T::kLanes));
    const uint32_t slot = pick[i] + static_cast<uint32_t>(__shfl_sync(
                                        device::kFullMask, own.first_slot, query, T::kLanes));
    const bool counts = pick[i] < visible && slot < static_cast<uint32_t>(window);
    pick[i] = (counts ? slot : static_cast<uint32_t>(window)) << 16;
  }
}

// Counts the picks, which are slots here, in the bytes of their group. Adds their ranks: how many queries
// of the group were there before.
template <class T>
__device__ __forceinline__ void rank_picks(uint8_t* bytes, Pick (&pick)[T::kPicks]) {
#pragma unroll
  for (int query = 0; query < T::kQueries; ++query) {
    const int begin = query * T::kPlaces, end = begin + T::kPlaces;
#pragma unroll
    for (int i = begin; i < end; ++i) pick[i] |= bytes[slot_of(pick[i])];
    __syncwarp();
#pragma unroll
    for (int i = begin; i < end; ++i) {
      bytes[slot_of(pick[i])] = static_cast<uint8_t>(rank_of(pick[i]) + 1);
    }
    __syncwarp();
  }
}

// Zeroes the bytes of this thread's warp.
template <class T>
__device__ __forceinline__ void clear_bytes(const Args& a, unsigned char* smem) {
  constexpr int kGroupsPerWarp = kWarpSize / T::kLanes;
  auto* words =
      reinterpret_cast<uint4*>(smem + threadIdx.x / kWarpSize * kGroupsPerWarp * a.stride);
  for (int i = threadIdx.x % kWarpSize; i < kGroupsPerWarp * a.stride / 16; i += kWarpSize) {
    words[i] = {0, 0, 0, 0};
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 5)
    block_index_count_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char smem[];
  auto* histogram = reinterpret_cast<int*>(smem + T::kGroups * a.stride);
  const int group = threadIdx.x / T::kLanes;
  const int num_slots = static_cast<int>(a.mask.index.num_slots);
  const int window_begin = blockIdx.z * a.window, window = min(a.window, num_slots - window_begin);
  const int first = blockIdx.x * a.chunk;
  const int last = min(first + a.chunk, static_cast<int>(a.packing.total_q));
  for (int s = threadIdx.x; s < window; s += kThreads) histogram[s] = 0;
  for (int part = first; part < last; part += T::kSteps * T::kStep) {
    clear_bytes<T>(a, smem);
    const int part_end = min(part + T::kSteps * T::kStep, last);
    for (int step = part; step < part_end; step += T::kStep) {
      Pick pick[T::kPicks];
      load_picks<T>(a, step + group * T::kQueries, last, window, pick);
      rank_picks<T>(smem + group * a.stride, pick);
    }
    __syncthreads();
    for (int s = threadIdx.x; s < window; s += kThreads) {
      int sum = 0;
#pragma unroll
      for (int g = 0; g < T::kGroups; ++g) sum += smem[g * a.stride + s];
      histogram[s] += sum;
    }
    __syncthreads();
  }
  int32_t* counts = a.counts + (int64_t{blockIdx.y} * a.num_chunks + blockIdx.x) * num_slots;
  for (int s = threadIdx.x; s < window; s += kThreads) counts[window_begin + s] = histogram[s];
}

inline constexpr int kPrefixThreads = 128;

// Grid (slots / 128, Hkv): one thread a slot. This kernel and the next are templates so that several
// translation units may hold them.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    block_index_prefix_kernel(const __grid_constant__ Args a) {
  constexpr int kUnroll = 16;  // loads in flight
  const int64_t num_slots = a.mask.index.num_slots;
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= num_slots) return;
  int32_t* counts = a.counts + int64_t{blockIdx.y} * a.num_chunks * num_slots + slot;
  int sum = 0;
  for (int c0 = 0; c0 < a.num_chunks; c0 += kUnroll) {
    int n[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      n[i] = c0 + i < a.num_chunks ? counts[(c0 + i) * num_slots] : 0;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (c0 + i < a.num_chunks) counts[(c0 + i) * num_slots] = sum;
      sum += n[i];
    }
  }
  a.mask.index.start[int64_t{blockIdx.y} * (num_slots + 1) + slot] = sum;
}

inline constexpr int kStartThreads = 1024;

// Grid (Hkv): totals of the slots -> first entries, in place.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    block_index_start_kernel(const __grid_constant__ Args a) {
  __shared__ int warp_sums[kWarpSize];
  const int num_slots = static_cast<int>(a.mask.index.num_slots);
  int32_t* start = a.mask.index.start + int64_t{blockIdx.x} * (num_slots + 1);
  int base = 0;
  for (int s0 = 0; s0 < num_slots; s0 += kThreads) {
    const int slot = s0 + threadIdx.x;
    int total;
    const int before =
        device::cta_exclusive_scan(slot < num_slots ? start[slot] : 0, warp_sums, total);
    if (slot < num_slots) start[slot] = base + before;
    base += total;
  }
  if (threadIdx.x == 0) start[num_slots] = base;
}

// Shared memory of the scattering pass.
template <class T>
struct ScatterSmem {
  unsigned char* bytes;  // [groups, stride] counts of a step, then what the groups before have
  int stride;
  uint32_t* staged;       // {slot, entry of the step} in slot order
  int* cursor;            // the slot's next free place in the CSR row
  int* shift;             // from a place in `staged` to one in the CSR row
  uint16_t* local_start;  // the slot's first staged entry

  __device__ ScatterSmem(unsigned char* smem, int stride_)
      : bytes(smem),
        stride(stride_),
        staged(reinterpret_cast<uint32_t*>(smem + T::kGroups * stride)),
        cursor(reinterpret_cast<int*>(staged + kBlockIndexPicks)),
        shift(cursor + stride),
        local_start(reinterpret_cast<uint16_t*>(shift + stride)) {}
  static int size(int stride) { return stride * (T::kGroups + 10) + kBlockIndexPicks * 4; }
};

inline constexpr int kScanSlots = 8;  // that a thread takes at a time

// Turns the bytes of eight slots into sums over the groups before; leaves the totals in local_start and
// returns their sum.
template <class T>
__device__ __forceinline__ int scan_groups(const ScatterSmem<T>& s, int slot, int window) {
  uint2 before = {0, 0}, n = {0, 0};
#pragma unroll
  for (int g = 0; g < T::kGroups; ++g) {
    auto* at = reinterpret_cast<uint2*>(s.bytes + g * s.stride + slot);
    before = {before.x + n.x, before.y + n.y};  // no byte of a slot overflows
    n = *at;
    *at = before;
  }
  int sum = 0;
  uint32_t totals[kScanSlots / 2] = {};
#pragma unroll
  for (int i = 0; i < kScanSlots; ++i) {
    const uint32_t x = i < 4 ? before.x : before.y, y = i < 4 ? n.x : n.y;
    uint32_t total = (x >> i % 4 * 8 & 255) + (y >> i % 4 * 8 & 255);
    if (slot + i >= window) total = 0;
    totals[i / 2] |= total << i % 2 * 16;
    sum += static_cast<int>(total);
  }
  *reinterpret_cast<uint4*>(s.local_start + slot) = {totals[0], totals[1], totals[2], totals[3]};
  return sum;
}

// Places in `staged` for the slots, whose totals are in local_start. Returns the number of entries.
template <class T>
__device__ __forceinline__ int scan_slots(const ScatterSmem<T>& s, int window, int* warp_sums) {
  const int units = s.stride / kScanSlots, share = ceil_div(units, kThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * share, units);
  const int end = min(begin + share, units);
  int sum = 0;
  for (int u = begin; u < end; ++u) sum += scan_groups<T>(s, u * kScanSlots, window);
  int num_staged;
  int at = device::cta_exclusive_scan(sum, warp_sums, num_staged);
  for (int u = begin; u < end; ++u) {
    // Four slots at a time: with words, the lanes of a warp would meet in four banks.
    auto* starts = reinterpret_cast<uint2*>(s.local_start + u * kScanSlots);
    auto* cursors = reinterpret_cast<int4*>(s.cursor + u * kScanSlots);
    auto* shifts = reinterpret_cast<int4*>(s.shift + u * kScanSlots);
#pragma unroll
    for (int i = 0; i < kScanSlots / 4; ++i) {
      const uint2 packed = starts[i];
      const int4 cursor = cursors[i];
      const int n0 = packed.x & 0xffff, n1 = packed.x >> 16, n2 = packed.y & 0xffff;
      const int n3 = packed.y >> 16, at1 = at + n0, at2 = at1 + n1, at3 = at2 + n2;
      starts[i] = {static_cast<uint32_t>(at | at1 << 16), static_cast<uint32_t>(at2 | at3 << 16)};
      shifts[i] = {cursor.x - at, cursor.y - at1, cursor.z - at2, cursor.w - at3};
      cursors[i] = {cursor.x + n0, cursor.y + n1, cursor.z + n2, cursor.w + n3};
      at = at3 + n3;
    }
  }
  return num_staged;
}

// Puts the entries of this lane's picks where their slots and ranks say. Repeats agree on the place; the
// least of their entries has to stay there.
template <class T>
__device__ __forceinline__ void stage_entries(const Args& a, const ScatterSmem<T>& s, int window,
                                              Pick (&pick)[T::kPicks]) {
  const int group = threadIdx.x / T::kLanes, lane = threadIdx.x % T::kLanes;
  const int topk = static_cast<int>(a.mask.topk);
  const uint32_t first_entry = static_cast<uint32_t>(group * T::kQueries * topk + lane);
  const auto value = [&](int i) {
    const int entry = i / T::kPlaces * topk + i % T::kPlaces * T::kLanes;
    return (pick[i] & 0xffff0000) + first_entry + static_cast<uint32_t>(entry);
  };
  const uint8_t* before = s.bytes + group * s.stride;
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    const int slot = slot_of(pick[i]);
    pick[i] += s.local_start[slot] + before[slot];
    if (slot != window) s.staged[rank_of(pick[i])] = value(i);
  }
  __syncwarp();
  const auto is_lost = [&](int i) {
    return slot_of(pick[i]) != window && s.staged[rank_of(pick[i])] > value(i);
  };
  bool is_any_lost = false;
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) is_any_lost |= is_lost(i);
  if (!__any_sync(device::kFullMask, is_any_lost)) return;
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    while (__any_sync(device::kFullMask, is_lost(i))) {  // what is there gets less every time
      if (is_lost(i)) s.staged[rank_of(pick[i])] = value(i);
      __syncwarp();
    }
  }
}

// The places behind the last entry are never read, but two runs shall give the same bits in the
// whole tensor.
__device__ __forceinline__ void fill_tail(const Args& a, int head, int32_t* entries) {
  const int64_t num_slots = a.mask.index.num_slots;
  const int64_t end = a.packing.total_q * a.mask.topk;
  const int64_t begin = a.mask.index.start[head * (num_slots + 1) + num_slots];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = begin + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += stride) {
    entries[i] = -1;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    block_index_scatter_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char smem[];
  __shared__ int warp_sums[kWarpSize];
  const ScatterSmem<T> s(smem, a.stride);
  const int group = threadIdx.x / T::kLanes, head = blockIdx.y;
  const int num_slots = static_cast<int>(a.mask.index.num_slots);
  const int window_begin = blockIdx.z * a.window, window = min(a.window, num_slots - window_begin);
  const int first = blockIdx.x * a.chunk;
  const int last = min(first + a.chunk, static_cast<int>(a.packing.total_q));
  const int32_t* before =
      a.counts + (int64_t{head} * a.num_chunks + blockIdx.x) * num_slots + window_begin;
  const int32_t* start = a.mask.index.start + int64_t{head} * (num_slots + 1) + window_begin;
  int32_t* out = a.mask.index.entry + head * a.packing.total_q * a.mask.topk;
  for (int i = threadIdx.x; i < a.stride; i += kThreads) {
    s.cursor[i] = i < window ? start[i] + before[i] : 0;
  }
  if (blockIdx.z == 0) fill_tail(a, head, out);

  for (int step = first; step < last; step += T::kStep) {
    Pick pick[T::kPicks];
    clear_bytes<T>(a, smem);
    load_picks<T>(a, step + group * T::kQueries, last, window, pick);
    rank_picks<T>(smem + group * a.stride, pick);
    __syncthreads();
    const int num_staged = scan_slots<T>(s, window, warp_sums);
    __syncthreads();
    stage_entries<T>(a, s, window, pick);
    __syncthreads();
    const int first_entry = step * static_cast<int>(a.mask.topk);
    for (int i = threadIdx.x; i < num_staged; i += kThreads) {
      const uint32_t x = s.staged[i];
      out[s.shift[x >> 16] + i] = first_entry + static_cast<int>(x & 0xffff);
    }
  }
}

}  // namespace block_index_detail

template <BlockIndexConfig kConfig>
void launch_block_index(const BlockIndexParams& params, Stream stream) {
  using namespace block_index_detail;
  using T = Traits<kConfig>;
  const Packing& packing = params.packing;
  const SelectedMask& mask = params.mask;
  FSATTN_ASSERT(mask.topk <= T::kLanes * T::kPlaces);
  FSATTN_ASSERT(packing.total_q * mask.topk < INT32_MAX);
  const int64_t chunk = block_index_chunk(packing.total_q);
  const int64_t chunks = ceil_div(packing.total_q, chunk), num_slots = mask.index.num_slots;
  FSATTN_ASSERT(params.scratch.bytes >=
                block_index_workspace(params.num_heads_kv, packing.total_q, num_slots));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto heads = static_cast<unsigned>(params.num_heads_kv);
  if (heads == 0) return;
  if (packing.total_q == 0 || num_slots == 0) {
    const size_t bytes = heads * static_cast<size_t>(num_slots + 1) * sizeof(int32_t);
    FSATTN_CUDA_CHECK(cudaMemsetAsync(mask.index.start, 0, bytes, cuda_stream));
    return;
  }
  const int window = static_cast<int>(std::min<int64_t>(num_slots, T::kWindow));
  const Args args{packing,
                  mask,
                  static_cast<int32_t*>(params.scratch.data),
                  static_cast<int>(chunks),
                  static_cast<int>(chunk),
                  window,
                  round_up(window + 1, 16),
                  FastDiv(mask.block_size)};
  const dim3 grid(static_cast<unsigned>(chunks), heads,
                  static_cast<unsigned>(ceil_div<int64_t>(num_slots, window)));
  const int count_bytes = args.stride * (T::kGroups + static_cast<int>(sizeof(int)));
  const int scatter_bytes = ScatterSmem<T>::size(args.stride);
  allow_shared_memory(block_index_count_kernel<T>, count_bytes);
  allow_shared_memory(block_index_scatter_kernel<T>, scatter_bytes);

  block_index_count_kernel<T><<<grid, kThreads, count_bytes, cuda_stream>>>(args);
  const dim3 prefix_grid(static_cast<unsigned>(ceil_div<int64_t>(num_slots, kPrefixThreads)),
                         heads);
  block_index_prefix_kernel<kPrefixThreads><<<prefix_grid, kPrefixThreads, 0, cuda_stream>>>(args);
  block_index_start_kernel<kStartThreads><<<heads, kStartThreads, 0, cuda_stream>>>(args);
  block_index_scatter_kernel<T><<<grid, kThreads, scatter_bytes, cuda_stream>>>(args);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
