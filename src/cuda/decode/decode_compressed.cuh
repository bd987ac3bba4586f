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

__device__ __forceinline__ int num_items(const DecodeArgs& p, const DecodeSequence& s) {
  const int tiles = ceil_div(s.num_q * p.group, static_cast<int>(kDecodeRows));
  return num_cmp_splits(p, s.num_cmp) * tiles * p.heads_kv;
}

struct CompressedItem {
  DecodeSequence seq;
  DecodeTile tile;
  int split;
};

// Finds the items of ascending numbers: a warp that looks at 32 sequences at a time, a lane each.
struct ItemFinder {
  DecodeSequence seq;       // the lane's
  int base = -kWarpSize;    // sequence of the first lane
  int before = 0, end = 0;  // items before those of the 32 sequences, and with these
  int last = 0;             // items up to the lane's sequence

  __device__ __forceinline__ bool advance(const DecodeArgs& p, int lane) {
    base += kWarpSize;
    if (base >= p.batch) return false;
    int count = 0;
    if (base + lane < p.batch) {
      seq = find_sequence(p, base + lane);
      count = num_items(p, seq);
    }
    before = end;
    last = before + warp_inclusive_scan(count, lane);
    end = __shfl_sync(kFullMask, last, kWarpSize - 1);
    return true;
  }

  __device__ __forceinline__ bool find(const DecodeArgs& p, int item, CompressedItem& found) {
    const int lane = threadIdx.x % kWarpSize;
    while (item >= end) {
      if (!advance(p, lane)) return false;
    }
    const int owner = __ffs(__ballot_sync(kFullMask, item < last)) - 1;
    const auto of_owner = [&](int x) { return __shfl_sync(kFullMask, x, owner); };
    found.seq = {of_owner(seq.token), of_owner(seq.num_q), of_owner(seq.position),
                 of_owner(seq.num_keys), of_owner(seq.num_cmp)};
    int rest = item - (owner == 0 ? before : __shfl_sync(kFullMask, last, max(owner - 1, 0)));
    const int rows = found.seq.num_q * p.group;
    const int tiles = ceil_div(rows, static_cast<int>(kDecodeRows));
    const int tile = rest % tiles;
    rest /= tiles;
    found.split = rest / p.heads_kv;
    const int head = rest - found.split * p.heads_kv;
    const int row = tile * static_cast<int>(kDecodeRows);
    found.tile = {base + owner, head, (base + owner) * p.heads_kv + head, row,
                  min(rows - row, static_cast<int>(kDecodeRows))};
    return true;
  }
};

// Beside the dynamic shared memory. Two of everything that a work item needs: the next one is
// prepared while this one runs.
struct CompressedShared {
  CompressedItem work[2];
  KeyChunk chunks[2][kDecodeMaxCmpSplit / kDecodeChunk];
  int num_chunks[2];
  bool has_more;
  WarpResults results;
};

__device__ __forceinline__ int num_chunks(const DecodeArgs& p, const CompressedItem& work) {
  const int size = cmp_split(p, work.seq.num_cmp);
  return ceil_div(min(work.seq.num_cmp - work.split * size, size), kDecodeChunk);
}

// Finds the chunks first, first + step, ... of an item. A warp does.
__device__ __forceinline__ void list_chunks(const DecodeArgs& p, const CompressedItem& work,
                                            KeyChunk* chunks, int first, int step) {
  const int count = num_chunks(p, work), first_key = work.split * cmp_split(p, work.seq.num_cmp);
  for (int i = first + static_cast<int>(threadIdx.x) % kWarpSize * step; i < count;
       i += kWarpSize * step) {
    chunks[i] = find_chunk(p.cmp.table, work.tile.seq, first_key + i * kDecodeChunk);
  }
  __syncwarp();
}

__device__ __forceinline__ void keep_item(const DecodeArgs& p, CompressedShared& shared, int buffer,
                                          const CompressedItem& work) {
  if (threadIdx.x % kWarpSize == 0) {
    shared.work[buffer] = work;
    shared.num_chunks[buffer] = num_chunks(p, work);
  }
  __syncwarp();
}

template <class Traits>
__device__ __forceinline__ void prepare_queries(const DecodeArgs& p, const CompressedShared& shared,
                                                int buffer, uint32_t q_tile) {
  const CompressedItem& work = shared.work[buffer];
  load_queries<Traits, kWarpSize>(p, work.tile, work.seq.token, q_tile, threadIdx.x % kWarpSize);
  cp_async_commit();
  cp_async_wait<0>();
}

// Keeps what 16 windows add to four blocks of four, instead of their scores: the four lanes of a row hold
// windows 8 n + 2 c and the next. The last window counts for the first block of the next chunk, too.
__device__ __forceinline__ void keep_blocks(const DecodeArgs& p, float* scores, int chunk,
                                            const float (&x)[2][2], float reference, int lane) {
  const int c = lane % 4;
  float block[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float part = c % 2 == 0 ? 2.f * x[n][0] + 2.f * x[n][1] : 2.f * x[n][0] + x[n][1];
    block[n] = part + __shfl_xor_sync(kFullMask, part, 1);
    // The window in front: of the pair of lanes in front, or of the other half.
    const float front = __shfl_sync(kFullMask, x[n][1], lane & ~3 | 1);
    if (c == 2) block[n] += front;
  }
  const float middle = __shfl_sync(kFullMask, x[0][1], lane | 3);
  if (c == 0) block[1] += middle;
  if (scores == nullptr) return;
  if (c % 2 == 0) {
    float* const to = pooled_blocks(scores) + chunk * 4 + c / 2;
    to[0] = block[0];
    to[2] = block[1];
  }
  if (c == 3) *pooled_sides(p, scores, chunk) = {x[1][1], reference};
}

// Attends to one item and leaves the warp's result in shared memory.
template <class Traits>
__device__ __forceinline__ void attend_item(const DecodeArgs& p, CompressedShared& shared,
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
        if (scores[i] == nullptr || p.has_pooled) continue;
        *reinterpret_cast<float2*>(scores[i] + key + n * 8 + lane % 4 * 2) = {s[n][2 * i],
                                                                              s[n][2 * i + 1]};
      }
    }
  };
  const auto keep_pooled = [&](int key, const float(&s)[2][4], const float(&reference)[2]) {
    if (!p.has_pooled) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x[2][2] = {
          {s[0][2 * i], s[0][2 * i + 1]},
          {s[1][2 * i], s[1][2 * i + 1]}
      };
      keep_blocks(p, scores[i], key / kDecodeChunk, x, reference[i], lane);
    }
  };
  DecodeResult<Traits> result;
  const auto head = paged_head<typename Traits::Element>(p, p.cmp, tile.kv_head, work.seq.num_cmp);
  attend(result, head, shared.chunks[buffer], shared.num_chunks[buffer], seen,
         p.softmax_scale * kLog2E, q_tile, ring, policy, keep_scores, keep_pooled);
  leave_result(result, ring, shared.results);
}

template <class Traits>
__device__ __forceinline__ void start_item(const DecodeArgs& p, const CompressedItem& work,
                                           const KeyChunk* chunks, const ChunkRing<Traits>& ring,
                                           uint64_t policy) {
  start_chunks(paged_head<typename Traits::Element>(p, p.cmp, work.tile.kv_head, work.seq.num_cmp),
               chunks, num_chunks(p, work), ring, policy);
}

template <class Traits>
__device__ __forceinline__ void write_item(const DecodeArgs& p, const CompressedShared& shared,
                                           int buffer) {
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
  __shared__ CompressedShared shared;
  wait_for_previous_kernel();
  // Not before: what the next kernels read early, lengths and queries, is then complete.
  allow_next_kernel();
  const int thread = threadIdx.x, warp = thread / kWarpSize;
  for (int i = blockIdx.x * kThreads + thread; i < p.batch * p.heads_kv * p.max_q;
       i += gridDim.x * kThreads) {
    p.counters[i] = 0;
  }
  ItemFinder finder;
  CompressedItem work;
  int item = blockIdx.x;
  if (!finder.find(p, item, work)) return;  // every warp looks: no barrier on this path

  const bool prepares = warp == Traits::kWarps;
  const uint32_t q_tile = smem_address(smem);
  const uint64_t policy = l2_evict_first();
  ChunkRing<Traits> ring{q_tile + 2 * Traits::kQBytes + warp * Traits::kWarpBytes};
  if (!prepares) {
    // The first copies start while the queries are still on their way.
    list_chunks(p, work, shared.chunks[0], warp, Traits::kWarps);
    start_item(p, work, shared.chunks[0], ring, policy);
  } else {
    keep_item(p, shared, 0, work);
    prepare_queries<Traits>(p, shared, 0, q_tile);
  }
  __syncthreads();
  for (int buffer = 0;; buffer ^= 1) {
    if (!prepares) {
      attend_item(p, shared, buffer, q_tile + buffer * Traits::kQBytes, ring, policy);
    } else {
      item += gridDim.x;
      const bool has_more = finder.find(p, item, work);
      if (has_more) {
        list_chunks(p, work, shared.chunks[buffer ^ 1], 0, 1);
        keep_item(p, shared, buffer ^ 1, work);
        prepare_queries<Traits>(p, shared, buffer ^ 1, q_tile + (buffer ^ 1) * Traits::kQBytes);
      }
      if (thread % kWarpSize == 0) shared.has_more = has_more;
    }
    __syncthreads();  // the results and the next item are there
    const bool has_more = shared.has_more;
    if (!prepares) {
      // Copies for the next item run while this one's results are combined.
      if (has_more) {
        start_item(p, shared.work[buffer ^ 1], shared.chunks[buffer ^ 1], ring, policy);
      }
      write_item<Traits>(p, shared, buffer);
    }
    if (!has_more) return;
    __syncthreads();  // the stages that held the results are free
  }
}

}  // namespace fsattn
