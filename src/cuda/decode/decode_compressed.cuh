// decode_compressed: compressed attention of a few new tokens a sequence, and its scores.
//
// Math     s = q K_c^T over the visible compressed keys of a split; o = softmax(scale s) V_c, lse.
// Shapes   16 rows (query tokens x heads of a group) x kDecodeSplit compressed keys a work item.
// Order    CTAs that stay: they take items in turn, so that a grid sized for the longest sequence
//          that may come costs nothing while sequences are short, and long ones spread over all
//          SMs. Items of the heads of one split are neighbours: they read the same pages.
// Roles    four warps compute; a fifth finds the next item, its pages and its queries, so that its
//          first chunks are on their way before the results of this one are combined.
// Memory   per item K_c and V_c once (256 KB at head_dim 128); writes 4 bytes a (row, key) of
//          scores and an fp32 output row a split.
// Bound    HBM. Two CTAs an SM keep 64 KB of copies in flight.
// Numbers  scores, statistics, partial outputs fp32. A split's bits depend on its sequence alone.
#pragma once
#include "cuda/decode/decode_attend.cuh"
#include "cuda/device/grid_dependency.cuh"
#include "cuda/device/scan.cuh"

namespace fsattn {
namespace device {

// Which item belongs to which sequence: thread t owns the sequences [t * per_thread, ...).
template <int kThreads>
struct ItemIndex {
  int first[kThreads];  // item of the thread's first sequence
  int warp_sums[kWarpSize];
  int total;
};

__device__ __forceinline__ int num_items(const DecodeArgs& p, const DecodeSequence& s) {
  const int tiles = ceil_div(s.num_q * p.group, static_cast<int>(kDecodeRows));
  return ceil_div(s.num_cmp, p.cmp_split) * tiles * p.heads_kv;
}

template <int kThreads>
__device__ __forceinline__ void build_item_index(const DecodeArgs& p, ItemIndex<kThreads>& index) {
  const int per_thread = ceil_div(p.batch, kThreads), thread = threadIdx.x;
  int count = 0;
  for (int i = 0; i < per_thread; ++i) {
    const int seq = thread * per_thread + i;
    if (seq < p.batch) count += num_items(p, find_sequence(p, seq));
  }
  int total;
  index.first[thread] = cta_exclusive_scan(count, index.warp_sums, total);
  if (thread == 0) index.total = total;
  __syncthreads();
}

struct CompressedItem {
  DecodeSequence seq;
  DecodeTile tile;
  int split;
};

template <int kThreads>
__device__ __forceinline__ CompressedItem find_item(const DecodeArgs& p,
                                                    const ItemIndex<kThreads>& index, int item) {
  int low = 0, high = kThreads;  // first[low] <= item < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (index.first[middle] <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  int seq = low * ceil_div(p.batch, kThreads), rest = item - index.first[low];
  CompressedItem found;
  for (;; ++seq) {
    found.seq = find_sequence(p, seq);
    const int count = num_items(p, found.seq);
    if (rest < count) break;
    rest -= count;
  }
  const int rows = found.seq.num_q * p.group;
  const int tiles = ceil_div(rows, static_cast<int>(kDecodeRows));
  const int tile = rest % tiles;
  rest /= tiles;
  found.split = rest / p.heads_kv;
  const int head = rest - found.split * p.heads_kv;
  const int row = tile * static_cast<int>(kDecodeRows);
  found.tile = {seq, head, seq * p.heads_kv + head, row,
                min(rows - row, static_cast<int>(kDecodeRows))};
  return found;
}

// Beside the dynamic shared memory. Two of everything that a work item needs: the next one is
// prepared while this one runs.
template <int kThreads>
struct CompressedShared {
  ItemIndex<kThreads> index;
  CompressedItem work[2];
  KeyChunk chunks[2][kDecodeMaxChunks];
  int num_chunks[2];
  WarpResults results;
};

// What one warp prepares: the item and where its keys lie; then its queries.
template <int kThreads>
__device__ __forceinline__ void prepare_item(const DecodeArgs& p,
                                             CompressedShared<kThreads>& shared, int item,
                                             int buffer) {
  const int lane = threadIdx.x % kWarpSize;
  const CompressedItem work = find_item(p, shared.index, item);
  const int first_key = work.split * p.cmp_split;
  const int keys = min(work.seq.num_cmp - first_key, p.cmp_split);
  if (lane * kDecodeChunk < keys) {
    shared.chunks[buffer][lane] =
        find_chunk(p.cmp.table, work.tile.seq, first_key + lane * kDecodeChunk);
  }
  if (lane == 0) {
    shared.work[buffer] = work;
    shared.num_chunks[buffer] = ceil_div(keys, kDecodeChunk);
  }
  __syncwarp();
}

template <class Traits, int kThreads>
__device__ __forceinline__ void prepare_queries(const DecodeArgs& p,
                                                const CompressedShared<kThreads>& shared,
                                                int buffer, uint32_t q_tile) {
  const CompressedItem& work = shared.work[buffer];
  load_queries<Traits, kWarpSize>(p, work.tile, work.seq.token, q_tile, threadIdx.x % kWarpSize);
  cp_async_commit();
  cp_async_wait<0>();
}

// Attends to one item and leaves the warp's result in shared memory.
template <class Traits, int kThreads>
__device__ __forceinline__ void attend_item(const DecodeArgs& p, CompressedShared<kThreads>& shared,
                                            int buffer, uint32_t q_tile, ChunkRing<Traits>& ring,
                                            uint64_t policy) {
  const int lane = threadIdx.x % kWarpSize;
  const CompressedItem& work = shared.work[buffer];
  const DecodeTile& tile = work.tile;
  KeyInterval seen[2];
  float* scores[2];
  const int64_t unit_row = static_cast<int64_t>(tile.unit) * unit_rows(p) + tile.row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const int query = (tile.row + row) / p.group;
    seen[i] = {0, min(p.cmp_band.last_key(work.seq.position + query), work.seq.num_cmp - 1)};
    scores[i] = row < tile.num_rows ? p.scores + (unit_row + row) * p.scores_pitch : nullptr;
  }
  const auto keep_scores = [&](int key, const float(&s)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (scores[i] == nullptr) continue;
        *reinterpret_cast<float2*>(scores[i] + key + n * 8 + lane % 4 * 2) = {s[n][2 * i],
                                                                              s[n][2 * i + 1]};
      }
    }
  };
  DecodeResult<Traits> result;
  const auto head = paged_head<typename Traits::Element>(p, p.cmp, tile.kv_head, work.seq.num_cmp);
  attend(result, head, shared.chunks[buffer], shared.num_chunks[buffer], seen,
         p.softmax_scale * kLog2E, q_tile, ring, policy, keep_scores);
  leave_result(result, ring, shared.results);
}

template <class Traits, int kThreads>
__device__ __forceinline__ void start_item(const DecodeArgs& p,
                                           const CompressedShared<kThreads>& shared, int buffer,
                                           const ChunkRing<Traits>& ring, uint64_t policy) {
  const CompressedItem& work = shared.work[buffer];
  start_chunks(paged_head<typename Traits::Element>(p, p.cmp, work.tile.kv_head, work.seq.num_cmp),
               shared.chunks[buffer], shared.num_chunks[buffer], ring, policy);
}

template <class Traits, int kThreads>
__device__ __forceinline__ void write_item(const DecodeArgs& p,
                                           const CompressedShared<kThreads>& shared, int buffer) {
  const CompressedItem& work = shared.work[buffer];
  const DecodeTile& tile = work.tile;
  const int64_t first_row =
      (static_cast<int64_t>(tile.unit) * p.cmp_splits + work.split) * unit_rows(p) + tile.row;
  combine_results<Traits>(
      shared.results,
      PartialRows{p.cmp_o + first_row * p.head_dim_v, p.cmp_lse + first_row, p.head_dim_v, 1},
      tile.num_rows, p.head_dim_v);
}

}  // namespace device

// Four warps that compute and one that prepares the next item.
template <class Traits>
inline constexpr int kCompressedThreads = Traits::kThreads + device::kWarpSize;

template <class Traits>
__global__ void __launch_bounds__(kCompressedThreads<Traits>, Traits::kMinCtas)
    decode_compressed_kernel(const __grid_constant__ DecodeArgs p) {
  using namespace device;
  constexpr int kThreads = kCompressedThreads<Traits>;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ CompressedShared<kThreads> shared;
  wait_for_previous_kernel();
  // Not before: what the next kernels read early, lengths and queries, is then complete.
  allow_next_kernel();
  const int thread = threadIdx.x, warp = thread / kWarpSize;
  for (int i = blockIdx.x * kThreads + thread; i < p.batch * p.heads_kv * p.max_q;
       i += gridDim.x * kThreads) {
    p.counters[i] = 0;
  }
  build_item_index(p, shared.index);
  const int total = shared.index.total, first = blockIdx.x, step = gridDim.x;
  if (first >= total) return;

  const bool prepares = warp == Traits::kWarps;
  const uint32_t q_tile = smem_address(smem);
  const uint64_t policy = l2_evict_first();
  ChunkRing<Traits> ring{q_tile + 2 * Traits::kQBytes + warp * Traits::kWarpBytes};
  if (prepares) prepare_item(p, shared, first, 0);
  __syncthreads();
  // The first copies start while the queries are still on their way.
  if (prepares) {
    prepare_queries<Traits>(p, shared, 0, q_tile);
  } else {
    start_item(p, shared, 0, ring, policy);
  }
  __syncthreads();
  for (int item = first, buffer = 0; item < total; item += step, buffer ^= 1) {
    const bool has_more = item + step < total;
    if (!prepares) {
      attend_item(p, shared, buffer, q_tile + buffer * Traits::kQBytes, ring, policy);
    } else if (has_more) {
      prepare_item(p, shared, item + step, buffer ^ 1);
      prepare_queries<Traits>(p, shared, buffer ^ 1, q_tile + (buffer ^ 1) * Traits::kQBytes);
    }
    __syncthreads();  // the results and the next item are there
    if (!prepares) {
      // Copies for the next item run while this one's results are combined.
      if (has_more) start_item(p, shared, buffer ^ 1, ring, policy);
      write_item<Traits>(p, shared, buffer);
    }
    __syncthreads();  // the stages that held the results are free
  }
}

}  // namespace fsattn
