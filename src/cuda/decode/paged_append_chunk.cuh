// paged_append for any number of new tokens a sequence: pooling kinds, where no new token takes the place of
// a raw key.
//
// Math     paged_append.cuh; sums in the order of compress_kv.
// Tiles    a unit is d tokens of a sequence and the window that starts with them. One CTA: 64 tokens (their
//          units) of one (tensor, head), with the l - d tokens behind them, in shared memory; 16 or 32
//          lanes a token or a unit, 16 bytes a lane.
// Order    none: windows read new tokens where the caller has them, old ones in rows that nobody writes.
// Bound    HBM: new tokens read and written once. All copies of a CTA are under way at once.
#pragma once
#include "cuda/decode/paged_append.cuh"

namespace fsattn {

inline constexpr int kChunkThreads = 128;

// Where the units of sequence `seq` begin among those of a call, of which a sequence of n tokens has at most
// n / d + kernel_size / d + 1.
FSATTN_HOST_DEVICE constexpr int64_t first_chunk_unit(int64_t first_row, int64_t seq,
                                                      int64_t kernel_size, int64_t kernel_stride) {
  return first_row / kernel_stride + seq * (kernel_size / kernel_stride + 1);
}

namespace device {

struct ChunkUnit {
  int seq, window;  // the window that starts with the unit's tokens
  bool exists, completes_window;
};

__device__ __forceinline__ ChunkUnit find_chunk_unit(const PagedAppendParams& p, int64_t slot) {
  const PagedWriteParams& w = p.write;
  const auto begin_of = [&](int seq) {
    return first_chunk_unit(__ldg(w.packing.cu_q + seq), seq, w.kernel_size, w.kernel_stride);
  };
  int low = 0, high = static_cast<int>(w.packing.batch);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (begin_of(middle) <= slot ? low : high) = middle;
  }
  const PagedSpan s = find_span(w.packing, low);
  const WindowSpan windows = completed_windows(p, s);
  const int window = windows.first + static_cast<int>(max(slot - begin_of(low), int64_t{0}));
  return {low, window, window * w.kernel_stride < s.total && s.num_new() > 0, window < windows.end};
}

// The bias that position embeddings give every window of a head.
template <class Element>
__device__ __forceinline__ Vector8<Element> pool_pos_emb(const PagedAppendParams& p, int head,
                                                         const float* weights, int column) {
  const int size = static_cast<int>(p.write.kernel_size);
  const int64_t dim = p.write.shape.head_dim;
  const Element* from = static_cast<const Element*>(p.pos_emb) + head * size * dim + column;
  Vector8<Element> bias;
#pragma unroll 1
  for (int t = 0; t < size; ++t) {
    bias.add_scaled(weights[t], Vector8<Element>::load(from + t * dim));
  }
  return bias;
}

// A token of a CTA: where it is (null: zeros) and the page row that it goes to (null: none).
template <class Element>
struct ChunkRow {
  const Element* from;
  Element* to;
};

// Token `t` of unit `slot`.
template <class Element, bool kStores>
__device__ __forceinline__ ChunkRow<Element> find_chunk_row(const PagedAppendParams& p,
                                                            int64_t slot, int t, int head,
                                                            bool is_value) {
  const PagedWriteParams& w = p.write;
  const ChunkUnit unit = find_chunk_unit(p, slot);
  const PagedSpan s = find_span(w.packing, unit.seq);
  const int token = unit.window * static_cast<int>(w.kernel_stride) + t;
  ChunkRow<Element> row{};
  if (!unit.exists || token >= s.total) return row;
  row.from = window_row<Element>(w, s, unit.seq, head, token, is_value);
  if (!kStores || token < s.before) return row;
  const PagePlace place = find_page(w.cache.table, unit.seq, token);
  if (place.page < 0) return row;
  const PagedRows& pages = is_value ? w.cache.v : w.cache.k;
  row.to = page_row<Element>(pages, place.page, place.row, head);
  return row;
}

// What a CTA has in dynamic shared memory.
template <class Element>
struct ChunkMemory {
  float* weights;          // [l]
  ChunkRow<Element>* row;  // [rows]
  Element* tokens;         // [rows, dim]

  __device__ __forceinline__ ChunkMemory(float* memory, int size, int rows)
      : weights(memory),
        row(reinterpret_cast<ChunkRow<Element>*>(memory + round_up(size, 4))),
        tokens(reinterpret_cast<Element*>(row + rows)) {}
};

// The window of a unit whose first token is `tokens`, by the lanes of a row; `staged` is theirs.
template <class Element>
__device__ __forceinline__ void store_chunk_window(const PagedAppendParams& p,
                                                   const ChunkUnit& unit, int head, bool is_value,
                                                   const Element* tokens, const float* weights,
                                                   Element* staged, int dim, int lane) {
  const PagedWriteParams& w = p.write;
  const int column = lane * kVector;
  if (column < dim) {
    Vector8<Element> y;
#pragma unroll 4
    for (int t = 0; t < static_cast<int>(w.kernel_size); ++t) {
      y.add_scaled(weights[t], Vector8<Element>::load(tokens + t * dim + column));
    }
    if (!is_value && p.pos_emb != nullptr) {
      y.add_scaled(1.f, pool_pos_emb<Element>(p, head, weights, column));
    }
    y.store(staged + column);
  }
  const int lanes = paged_lanes(w.shape);
  __syncwarp(lanes == kWarpSize ? kFullMask : 0xffffu << (threadIdx.x % kWarpSize & 16));
  Element* to = compressed_row<Element>(p, unit.seq, head, unit.window, is_value);
  if (!is_value) {
    copy_rotated(staged, to, dim, w.rope, unit.window * static_cast<int>(w.kernel_stride), lane);
  } else if (column < dim) {
    copy_vector(staged, to, column);
  }
  __syncwarp(lanes == kWarpSize ? kFullMask : 0xffffu << (threadIdx.x % kWarpSize & 16));
}

}  // namespace device

// Grid (groups of units, heads fastest; K and V). kStores: new tokens go to their pages. The limit of
// registers lets nine CTAs fit an SM.
template <class Element, bool kStores>
__global__ void __launch_bounds__(kChunkThreads, kStores ? 9 : 1)
    paged_append_chunk_kernel(const __grid_constant__ PagedAppendParams p, int units) {
  using namespace device;
  extern __shared__ __align__(16) float chunk_memory[];
  __shared__ __align__(16) Element rounded[kChunkThreads * kVector];
  const PagedWriteParams& w = p.write;
  const int heads = static_cast<int>(w.shape.num_heads_kv);
  const int tile = static_cast<int>(blockIdx.x) / heads;
  const int head = static_cast<int>(blockIdx.x) - tile * heads;
  const bool is_value = blockIdx.y == 1;
  const int size = static_cast<int>(w.kernel_size), stride = static_cast<int>(w.kernel_stride);
  const int own = units * stride, rows = own + size - stride;
  const int dim = static_cast<int>(is_value ? w.shape.head_dim_v : w.shape.head_dim);
  const int64_t first_slot = int64_t{tile} * units;
  const ChunkMemory<Element> memory(chunk_memory, size, rows);
  for (int r = threadIdx.x; r < rows; r += kChunkThreads) {
    const int unit = r / stride;
    memory.row[r] =
        find_chunk_row<Element, kStores>(p, first_slot + unit, r - unit * stride, head, is_value);
  }
  load_window_weights<Element>(p.kind, is_value ? p.weight_v : p.weight_k, size, head,
                               memory.weights);
  __syncthreads();
  const int lanes = paged_lanes(w.shape), groups = kChunkThreads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) - group * lanes, column = lane * kVector;
  if (column < dim) {
#pragma unroll 4
    for (int r = group; r < rows; r += groups) {
      const Element* from = memory.row[r].from;
      const bool is_there = from != nullptr;
      cp_async_16(smem_address(memory.tokens + r * dim + column),
                  is_there ? from + column : w.k.data, is_there);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (kStores && column < dim) {
#pragma unroll 4
    for (int r = group; r < own; r += groups) {
      Element* to = memory.row[r].to;
      if (to != nullptr) copy_vector(memory.tokens + r * dim, to, column);
    }
  }
  for (int u = group; u < units; u += groups) {
    const ChunkUnit unit = find_chunk_unit(p, first_slot + u);
    if (!unit.exists || !unit.completes_window) continue;
    store_chunk_window<Element>(p, unit, head, is_value, memory.tokens + u * stride * dim,
                                memory.weights, rounded + group * lanes * kVector, dim, lane);
  }
}

template <PagedCopyConfig kConfig>
void launch_paged_append_chunk(const PagedAppendParams& p, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const PagedWriteParams& w = p.write;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (w.packing.total_q == 0) return;
  // Rotations need the other half of a row.
  const bool stores = w.rope.cos == nullptr;
  const int64_t units =
      first_chunk_unit(w.packing.total_q, w.packing.batch, w.kernel_size, w.kernel_stride);
  const int64_t per_cta = paged_append_chunk_units(w.kernel_stride);
  const dim3 grid(static_cast<unsigned>(ceil_div(units, per_cta) * w.shape.num_heads_kv), 2);
  const auto kernel =
      stores ? paged_append_chunk_kernel<Element, true> : paged_append_chunk_kernel<Element, false>;
  const int smem = static_cast<int>(paged_append_chunk_smem(w.kernel_size, w.kernel_stride,
                                                            w.shape.head_dim, w.shape.head_dim_v));
  allow_shared_memory(kernel, smem);
  kernel<<<grid, kChunkThreads, static_cast<size_t>(smem), cuda_stream>>>(
      p, static_cast<int>(per_cta));
  if (!stores) {
    paged_store_kernel<Element>
        <<<paged_ctas(w.packing.total_q, w.shape), kPagedThreads, 0, cuda_stream>>>(w);
  }
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
