// block_index: inverts topk_idx into block -> queries (CSR), deterministically.
//
// Math    entry (t * topk + j) belongs to slot first_block_slot(sequence of t) + topk_idx[h, t, j] iff
//         that id names a block of the sequence at or before the query's own and stands in no earlier
//         place of the row. The entries of a slot ascend.
// Shapes  params/select_blocks.h. Scratch: int32 counts [Hkv, chunks, num_slots].
// Tiles   grid (chunks, Hkv, windows of slots), 512 threads. A step covers 32 * query_words queries:
//           count    bit sets [slot][query] in shared memory, population counts per chunk
//           prefix   counts along the chunks of a slot -> exclusive sums; totals -> start
//           start    exclusive sums along the slots of a head
//           scatter  the same bit sets; the rank of an entry is the number of lower bits of its slot;
//                    entries are staged in slot order, so that runs of one slot leave together
// Order   bits are or-ed, a repeated id keeps the least of its entries (atomicMin): no order of the
//         atomics can show in the result.
// Memory  4 * (query_words + 4) bytes a slot of the window, 32 KiB of staging.
// Bound   shared-memory atomics, then short runs of 4-byte stores. Reads topk_idx twice.
#pragma once
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

template <BlockIndexConfig kConfig>
struct Traits {
  static constexpr int kWords = kConfig.query_words;
  static constexpr int kQueries = 32 * kWords;
  static constexpr int kWindow = kConfig.window;
  static constexpr int kThreads = 512;
  static constexpr int kPicks = kBlockIndexPicks / kThreads;
};

struct Args {
  Packing packing;
  SelectedMask mask;
  int32_t* counts;
  int num_chunks;
  int chunk;
  FastDiv topk_div;
};

// The queries of one step that want a block.
template <int kWords>
struct alignas(kWords < 4 ? kWords * 4 : 16) QuerySet {
  uint32_t word[kWords];

  __device__ int size() const {
    int n = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) n += __popc(word[w]);
    return n;
  }
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
  const int64_t k0 = keys.begin, k1 = keys.end;
  const int64_t position = token + device::position_shift(packing, seq);
  if (position < 0 || k1 <= k0) return {0, 0};
  const int64_t block_size = a.mask.block_size;
  const int64_t first_slot = first_block_slot(k0, seq, block_size);
  int64_t num_visible = min(position, k1 - k0 - 1) / block_size + 1;
  num_visible = min(num_visible, a.mask.index.num_slots - first_slot);
  return {static_cast<int>(first_slot), static_cast<int>(max(num_visible, int64_t{0}))};
}

// The picks of this thread in the step at query `first`: slots relative to the window, -1 when the
// pick does not count. A repeated id yields its slot every time.
template <class T>
__device__ __forceinline__ void load_picks(const Args& a, const QueryBlocks* blocks, int first,
                                           int last, int window_begin, int (&slot)[T::kPicks]) {
  const int64_t head_offset = blockIdx.y * a.mask.head_stride;
  const int num_picks = T::kQueries * static_cast<int>(a.mask.topk);
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    const int pick = threadIdx.x + i * T::kThreads;
    const int local = a.topk_div.quotient(pick), place = a.topk_div.remainder(pick, local);
    const int token = first + local;
    slot[i] = -1;
    if (pick >= num_picks || token >= last) continue;
    const int id = __ldg(a.mask.topk_idx + head_offset + token * a.mask.token_stride + place);
    const QueryBlocks at = blocks[local];
    const int relative = at.first_slot + id - window_begin;
    if (id >= 0 && id < at.num_visible && relative >= 0 && relative < T::kWindow) {
      slot[i] = relative;
    }
  }
}

template <class T>
__device__ __forceinline__ void load_query_blocks(const Args& a, QueryBlocks* blocks, int first,
                                                  int last) {
  for (int local = threadIdx.x; local < T::kQueries; local += T::kThreads) {
    blocks[local] = first + local < last ? find_query_blocks(a, first + local) : QueryBlocks{0, 0};
  }
}

// Returns whether a pick of this thread was there before: its row names a block twice.
template <class T>
__device__ __forceinline__ bool mark_picks(const Args& a, QuerySet<T::kWords>* sets,
                                           const int (&slot)[T::kPicks]) {
  bool is_repeat = false;
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    const int local = a.topk_div.quotient(threadIdx.x + i * T::kThreads);
    if (slot[i] < 0) continue;
    const uint32_t bit = 1u << (local & 31);
    is_repeat |= (atomicOr(&sets[slot[i]].word[local >> 5], bit) & bit) != 0;
  }
  return is_repeat;
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 3)
    block_index_count_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char smem[];
  __shared__ QueryBlocks blocks[T::kQueries];
  auto* sets = reinterpret_cast<QuerySet<T::kWords>*>(smem);
  int* histogram = reinterpret_cast<int*>(sets + T::kWindow);
  const int window_begin = blockIdx.z * T::kWindow;
  const int num_slots = static_cast<int>(a.mask.index.num_slots);
  const int window = min(T::kWindow, num_slots - window_begin);
  const int first = blockIdx.x * a.chunk;
  const int last = min(first + a.chunk, static_cast<int>(a.packing.total_q));
  for (int s = threadIdx.x; s < window; s += T::kThreads) {
    histogram[s] = 0;
    sets[s] = {};
  }
  for (int step = first; step < last; step += T::kQueries) {
    load_query_blocks<T>(a, blocks, step, last);
    __syncthreads();
    int slot[T::kPicks];
    load_picks<T>(a, blocks, step, last, window_begin, slot);
    mark_picks<T>(a, sets, slot);
    __syncthreads();
    for (int s = threadIdx.x; s < window; s += T::kThreads) {
      histogram[s] += sets[s].size();
      sets[s] = {};
    }
    // No barrier here: the next step's first one stands between this clearing and its marks, and
    // `blocks` was last read before the barrier above.
  }
  int32_t* counts = a.counts + (int64_t{blockIdx.y} * a.num_chunks + blockIdx.x) * num_slots;
  for (int s = threadIdx.x; s < window; s += T::kThreads) counts[window_begin + s] = histogram[s];
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

template <class T>
struct ScatterStorage {
  int2 staged[kBlockIndexPicks];  // {entry, place in the CSR row}, in slot order
  QuerySet<T::kWords> sets[T::kWindow];
  uint64_t before[T::kWindow];  // byte w: the queries in the words before word w
  int cursor[T::kWindow];       // the slot's next free place in the CSR row
  int local_start[T::kWindow];  // the slot's first staged entry
};

// Prefix sums of the set sizes, over the words of a slot and over the slots. Returns their sum.
template <class T>
__device__ __forceinline__ int scan_sets(ScatterStorage<T>& s, int window, int* warp_sums) {
  static_assert(T::kWords <= 8 && T::kQueries <= 256);
  const int share = ceil_div(window, T::kThreads);  // slots of a thread, next to each other
  const int begin = min(static_cast<int>(threadIdx.x) * share, window);
  const int end = min(begin + share, window);
  int sum = 0;
  for (int slot = begin; slot < end; ++slot) {
    const QuerySet<T::kWords> set = s.sets[slot];
    s.local_start[slot] = sum;
    uint64_t before = 0;
    int size = 0;
#pragma unroll
    for (int w = 0; w < T::kWords; ++w) {
      before |= static_cast<uint64_t>(size) << (w * 8);  // at most 224
      size += __popc(set.word[w]);
    }
    s.before[slot] = before;
    sum += size;
  }
  int total;
  const int start = device::cta_exclusive_scan(sum, warp_sums, total);
  for (int slot = begin; slot < end; ++slot) s.local_start[slot] += start;
  return total;
}

// Puts the entries of this thread's picks where their slots and ranks say. Repeats agree on the place,
// and keep the least of their entries.
template <class T>
__device__ __forceinline__ void stage_entries(const Args& a, ScatterStorage<T>& s, int step,
                                              const int (&slot)[T::kPicks], bool has_repeats) {
#pragma unroll
  for (int i = 0; i < T::kPicks; ++i) {
    if (slot[i] < 0) continue;
    const int pick = threadIdx.x + i * T::kThreads;
    const int query = a.topk_div.quotient(pick), word = query / 32;
    const uint32_t lower = s.sets[slot[i]].word[word] & ((1u << (query % 32)) - 1);
    const auto* before = reinterpret_cast<const uint8_t*>(s.before + slot[i]);
    const int rank = before[word] + __popc(lower);
    int2& to = s.staged[s.local_start[slot[i]] + rank];
    const int entry = step * static_cast<int>(a.mask.topk) + pick;
    if (has_repeats) {
      atomicMin(&to.x, entry);
      to.y = s.cursor[slot[i]] + rank;
    } else {
      to = {entry, s.cursor[slot[i]] + rank};
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
__global__ void __launch_bounds__(T::kThreads, 2)
    block_index_scatter_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char smem[];
  __shared__ QueryBlocks blocks[T::kQueries];
  __shared__ int warp_sums[kWarpSize];
  auto& s = *reinterpret_cast<ScatterStorage<T>*>(smem);
  const int head = blockIdx.y, window_begin = blockIdx.z * T::kWindow;
  const int num_slots = static_cast<int>(a.mask.index.num_slots);
  const int window = min(T::kWindow, num_slots - window_begin);
  const int first = blockIdx.x * a.chunk;
  const int last = min(first + a.chunk, static_cast<int>(a.packing.total_q));
  const int32_t* before =
      a.counts + (int64_t{head} * a.num_chunks + blockIdx.x) * num_slots + window_begin;
  const int32_t* start = a.mask.index.start + int64_t{head} * (num_slots + 1) + window_begin;
  int32_t* out = a.mask.index.entry + head * a.packing.total_q * a.mask.topk;
  for (int i = threadIdx.x; i < window; i += T::kThreads) {
    s.cursor[i] = start[i] + before[i];
    s.sets[i] = {};
  }
  if (blockIdx.z == 0) fill_tail(a, head, out);

  for (int step = first; step < last; step += T::kQueries) {
    load_query_blocks<T>(a, blocks, step, last);
    __syncthreads();
    int slot[T::kPicks];
    load_picks<T>(a, blocks, step, last, window_begin, slot);
    const bool has_repeats = __syncthreads_or(mark_picks<T>(a, s.sets, slot));
    const int num_staged = scan_sets<T>(s, window, warp_sums);
    if (has_repeats) {
      for (int i = threadIdx.x; i < num_staged; i += T::kThreads) s.staged[i].x = INT_MAX;
    }
    __syncthreads();
    stage_entries<T>(a, s, step, slot, has_repeats);
    __syncthreads();
    for (int i = threadIdx.x; i < num_staged; i += T::kThreads) out[s.staged[i].y] = s.staged[i].x;
    for (int i = threadIdx.x; i < window; i += T::kThreads) {
      s.cursor[i] += s.sets[i].size();
      s.sets[i] = {};
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
  FSATTN_ASSERT(T::kQueries * mask.topk <= kBlockIndexPicks);
  FSATTN_ASSERT(packing.total_q * mask.topk < INT32_MAX);
  const int64_t chunk = block_index_chunk(packing.total_q);
  const int64_t chunks = ceil_div(packing.total_q, chunk), num_slots = mask.index.num_slots;
  FSATTN_ASSERT(params.scratch.bytes >=
                block_index_workspace(params.num_heads_kv, packing.total_q, num_slots));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto heads = static_cast<unsigned>(params.num_heads_kv);
  if (heads == 0 || num_slots == 0) return;
  if (packing.total_q == 0) {
    const size_t bytes = heads * static_cast<size_t>(num_slots + 1) * sizeof(int32_t);
    FSATTN_CUDA_CHECK(cudaMemsetAsync(mask.index.start, 0, bytes, cuda_stream));
    return;
  }
  const Args args{packing,
                  mask,
                  static_cast<int32_t*>(params.scratch.data),
                  static_cast<int>(chunks),
                  static_cast<int>(chunk),
                  FastDiv(mask.topk)};
  const dim3 grid(static_cast<unsigned>(chunks), heads,
                  static_cast<unsigned>(ceil_div<int64_t>(num_slots, T::kWindow)));
  const int count_bytes = T::kWindow * static_cast<int>(sizeof(QuerySet<T::kWords>) + sizeof(int));
  const int scatter_bytes = static_cast<int>(sizeof(ScatterStorage<T>));
  allow_shared_memory(block_index_count_kernel<T>, count_bytes);
  allow_shared_memory(block_index_scatter_kernel<T>, scatter_bytes);

  block_index_count_kernel<T><<<grid, T::kThreads, count_bytes, cuda_stream>>>(args);
  const dim3 prefix_grid(static_cast<unsigned>(ceil_div<int64_t>(num_slots, kPrefixThreads)),
                         heads);
  block_index_prefix_kernel<kPrefixThreads><<<prefix_grid, kPrefixThreads, 0, cuda_stream>>>(args);
  block_index_start_kernel<kStartThreads><<<heads, kStartThreads, 0, cuda_stream>>>(args);
  block_index_scatter_kernel<T><<<grid, T::kThreads, scatter_bytes, cuda_stream>>>(args);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
