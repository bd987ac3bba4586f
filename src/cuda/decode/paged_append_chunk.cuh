// paged_append for any number of new tokens a sequence: pooling kinds, where no new token takes the place of
// a raw key.
//
// Math     paged_append.cuh; sums in the order of compress_kv.
// Tiles    a unit is d tokens of a sequence and the window that starts with them. One CTA: 8 or 16 units of one
//          (tensor, head), 16 or 32 lanes a unit, 16 bytes a lane. A token is read by the l / d units whose
//          windows have it, from L1 after the first.
// Order    none: windows read new tokens where the caller has them, old ones in rows that nobody writes.
// Bound    HBM: new tokens read and written once.
#pragma once
#include "cuda/decode/paged_append.cuh"

namespace fsattn {

inline constexpr int kChunkThreads = 256;
inline constexpr int kChunkLoads = 8;  // in flight a thread

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

// Eight columns of a unit: the weighted sum of its window; where kStores, its new tokens go to their pages.
template <class Element, bool kStores>
__device__ __forceinline__ Vector8<Element> pool_unit(const PagedWriteParams& w,
                                                      const ChunkUnit& unit, int head,
                                                      bool is_value, const float* weights,
                                                      int column) {
  const PagedSpan s = find_span(w.packing, unit.seq);
  const int size = static_cast<int>(w.kernel_size), stride = static_cast<int>(w.kernel_stride);
  const int first = unit.window * stride;
  const int count = unit.completes_window ? size : (kStores ? min(stride, s.total - first) : 0);
  const Rows& rows = is_value ? w.v : w.k;
  const PagedRows& pages = is_value ? w.cache.v : w.cache.k;
  Vector8<Element> y;
  for (int t0 = 0; t0 < count; t0 += kChunkLoads) {
    uint4 tokens[kChunkLoads];
#pragma unroll
    for (int i = 0; i < kChunkLoads; ++i) {
      const int token = first + t0 + i;
      const Element* from =
          row_pointer<Element>(rows, int64_t{s.first_row} + token - s.before, head);
      if (token < s.before && t0 + i < count) {
        from = window_row<Element>(w, s, unit.seq, head, token, is_value);
      }
      tokens[i] = uint4{};
      if (t0 + i < count && from != nullptr) {
        tokens[i] = *reinterpret_cast<const uint4*>(from + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kChunkLoads; ++i) {
      const int t = t0 + i;
      if (t >= count) break;
      if (kStores && t < stride && first + t >= s.before) {
        const PagePlace place = find_page(w.cache.table, unit.seq, first + t);
        if (place.page >= 0) {
          *reinterpret_cast<uint4*>(page_row<Element>(pages, place.page, place.row, head) +
                                    column) = tokens[i];
        }
      }
      if (unit.completes_window) y.add_scaled(weights[t], Vector8<Element>::unpack(tokens[i]));
    }
  }
  return y;
}

}  // namespace device

// Grid (units, KV heads, K and V). Dynamic shared memory: fp32 weights [l].
template <class Element, bool kStores>
__global__ void __launch_bounds__(kChunkThreads)
    paged_append_chunk_kernel(const __grid_constant__ PagedAppendParams p) {
  using namespace device;
  extern __shared__ __align__(16) float weights[];
  __shared__ __align__(16) Element rounded[kChunkThreads * kVector];
  const PagedWriteParams& w = p.write;
  const int lanes = paged_lanes(w.shape), row = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, column = lane * kVector;
  const int head = blockIdx.y;
  const bool is_value = blockIdx.z == 1;
  load_window_weights<Element>(p.kind, is_value ? p.weight_v : p.weight_k,
                               static_cast<int>(w.kernel_size), head, weights);
  __syncthreads();
  const ChunkUnit unit = find_chunk_unit(p, int64_t{blockIdx.x} * (kChunkThreads / lanes) + row);
  const int dim = static_cast<int>(is_value ? w.shape.head_dim_v : w.shape.head_dim);
  Element* staged = rounded + row * lanes * kVector;
  if (unit.exists && column < dim) {
    auto y = pool_unit<Element, kStores>(w, unit, head, is_value, weights, column);
    if (unit.completes_window && !is_value && p.pos_emb != nullptr) {
      y.add_scaled(1.f, pool_pos_emb<Element>(p, head, weights, column));
    }
    y.store(staged + column);
  }
  __syncwarp();
  if (!unit.exists || !unit.completes_window) return;
  Element* to = compressed_row<Element>(p, unit.seq, head, unit.window, is_value);
  if (!is_value) {
    copy_rotated(staged, to, dim, w.rope, unit.window * static_cast<int>(w.kernel_stride), lane);
  } else if (column < dim) {
    copy_vector(staged, to, column);
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
  const int64_t per_cta = kChunkThreads / paged_lanes(w.shape);
  const dim3 grid(static_cast<unsigned>(ceil_div(units, per_cta)),
                  static_cast<unsigned>(w.shape.num_heads_kv), 2);
  const auto kernel =
      stores ? paged_append_chunk_kernel<Element, true> : paged_append_chunk_kernel<Element, false>;
  const int smem = static_cast<int>(paged_append_chunk_smem(w.kernel_size));
  allow_shared_memory(kernel, smem);
  kernel<<<grid, kChunkThreads, static_cast<size_t>(smem), cuda_stream>>>(p);
  if (!stores) {
    paged_store_kernel<Element>
        <<<paged_ctas(w.packing.total_q, w.shape), kPagedThreads, 0, cuda_stream>>>(w);
  }
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
