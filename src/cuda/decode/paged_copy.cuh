// paged_write, paged_scatter, paged_gather: between packed tensors and pages.
//
// Shapes   params/paged.h.
// Tiles    write, scatter: 16 or 32 threads a (token, head), 16 bytes each; gather: one CTA 16 tokens.
// Order    paged_write reads the old tokens that open windows need before it overwrites raw keys: two
//          kernels, unless raw keys keep their rows. Prefix sums of the lengths first, one CTA.
// Bound    HBM: every byte read and written once.
#pragma once
#include "cuda/decode/paged_cache.cuh"
#include "cuda/decode/paged_copy.h"

namespace fsattn {

inline constexpr int kPagedThreads = 256;
// Small tiles fill the machine at short contexts too; four loads in flight a thread hide the latency of
// what is left. With 64 tokens and one load the copies of 8 chunks up to 64 Ki tokens took 1.1 ms, half of
// the bandwidth (32/8 heads, D 128, H200).
inline constexpr int kGatherTokens = 16, kGatherLoads = 4;

// Threads that copy a row, 8 elements each.
FSATTN_HOST_DEVICE constexpr int paged_lanes(const PagedShape& shape) {
  return shape.head_dim <= 128 && shape.head_dim_v <= 128 ? 16 : 32;
}

namespace device {

// cu[b + 1] - cu[b] = length(b), for several lists at a time. One CTA.
template <int kLists, class Length>
__device__ __forceinline__ void write_prefix_sums(int batch, int32_t* const (&cu)[kLists],
                                                  const Length& length) {
  __shared__ int warp_sums[kWarpSize];
  const int per_thread = ceil_div(batch, static_cast<int>(blockDim.x));
  const int first = min(static_cast<int>(threadIdx.x) * per_thread, batch);
  const int last = min(first + per_thread, batch);
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    if (cu[i] == nullptr) continue;
    int sum = 0, total;
    for (int b = first; b < last; ++b) sum += length(b, i);
    int next = cta_exclusive_scan(sum, warp_sums, total);
    for (int b = first; b < last; ++b) {
      cu[i][b] = next;
      next += length(b, i);
    }
    if (threadIdx.x == 0) cu[i][batch] = total;
  }
}

__device__ __forceinline__ int first_open_token(int before, int64_t size, int64_t stride) {
  return count_windows(before, size, stride) * static_cast<int>(stride);
}

}  // namespace device

// A template, so that the rows that launch it share one.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    paged_open_tokens_kernel(const __grid_constant__ PagedWriteParams p) {
  using namespace device;
  int32_t* const cu[] = {p.cu_x};
  write_prefix_sums(static_cast<int>(p.packing.batch), cu, [&](int b, int) {
    const PagedSpan s = find_span(p.packing, b);
    return s.num_new() == 0 ? 0
                            : s.total - first_open_token(s.before, p.kernel_size, p.kernel_stride);
  });
}

// The input of the compression; new tokens, which are all among it, are stored too where kStores.
template <class Element, bool kStores>
__global__ void __launch_bounds__(kPagedThreads)
    paged_gather_open_kernel(const __grid_constant__ PagedWriteParams p, int64_t rows) {
  using namespace device;
  const int lanes = paged_lanes(p.shape), heads = static_cast<int>(p.shape.num_heads_kv);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t item = int64_t{blockIdx.x} * (kPagedThreads / lanes) + threadIdx.x / lanes;
  const int64_t row = item / heads;
  const int head = static_cast<int>(item - row * heads), batch = static_cast<int>(p.packing.batch);
  if (row >= rows) return;
  const int seq = find_sequence(p.cu_x, batch, static_cast<int>(row));
  if (seq >= batch) return;
  const PagedSpan s = find_span(p.packing, seq);
  const int token = first_open_token(s.before, p.kernel_size, p.kernel_stride) +
                    static_cast<int>(row - p.cu_x[seq]);
  const Element *key, *value;
  if (token >= s.before) {
    key = row_pointer<Element>(p.k, s.first_row + token - s.before, head);
    value = row_pointer<Element>(p.v, s.first_row + token - s.before, head);
  } else {
    const PagePlace place = find_page(p.cache.table, seq, token);
    key = stored_raw_key<Element>(p, place, head);
    value = place.page < 0 ? nullptr : page_row<Element>(p.cache.v, place.page, place.row, head);
  }
  if (lane < p.shape.head_dim / 8) {
    copy_vector(key, row_pointer<Element>(p.x_k, row, head), lane * 8);
  }
  if (lane < p.shape.head_dim_v / 8) {
    copy_vector(value, row_pointer<Element>(p.x_v, row, head), lane * 8);
  }
  if (kStores && token >= s.before) {
    store_token<Element>(p, seq, token, s.total, s.first_row + token - s.before, head, lane);
  }
}

template <class Element>
__global__ void __launch_bounds__(kPagedThreads)
    paged_store_kernel(const __grid_constant__ PagedWriteParams p) {
  using namespace device;
  const int lanes = paged_lanes(p.shape), heads = static_cast<int>(p.shape.num_heads_kv);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t item = int64_t{blockIdx.x} * (kPagedThreads / lanes) + threadIdx.x / lanes;
  const int64_t row = item / heads;
  const int batch = static_cast<int>(p.packing.batch);
  if (row >= p.packing.total_q) return;
  const int seq = find_sequence(p.packing.cu_q, batch, static_cast<int>(row));
  if (seq >= batch) return;
  const PagedSpan s = find_span(p.packing, seq);
  const int64_t token = s.before + (row - s.first_row);
  if (row < s.first_row || token >= s.total) return;
  store_token<Element>(p, seq, static_cast<int>(token), s.total, row,
                       static_cast<int>(item - row * heads), lane);
}

template <class Element>
__global__ void __launch_bounds__(kPagedThreads)
    paged_scatter_kernel(const __grid_constant__ PagedScatterParams p, int64_t rows) {
  using namespace device;
  const int lanes = paged_lanes(p.shape), heads = static_cast<int>(p.shape.num_heads_kv);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t item = int64_t{blockIdx.x} * (kPagedThreads / lanes) + threadIdx.x / lanes;
  const int64_t row = item / heads;
  const int head = static_cast<int>(item - row * heads), batch = static_cast<int>(p.packing.batch);
  if (row >= rows) return;
  const int seq = find_sequence(p.cu_cmp, batch, static_cast<int>(row));
  if (seq >= batch) return;
  const PagedSpan s = find_span(p.packing, seq);
  const int window = static_cast<int>(count_windows(s.before, p.kernel_size, p.kernel_stride) +
                                      row - __ldg(p.cu_cmp + seq));
  const PagePlace place = find_page(p.cmp.table, seq, window);
  if (place.page < 0) return;
  copy_rotated(row_pointer<Element>(p.k_cmp, row, head),
               page_row<Element>(p.cmp.k, place.page, place.row, head),
               static_cast<int>(p.shape.head_dim), p.rope,
               static_cast<int>(window * p.kernel_stride), lane);
  if (lane < p.shape.head_dim_v / 8) {
    copy_vector(row_pointer<Element>(p.v_cmp, row, head),
                page_row<Element>(p.cmp.v, place.page, place.row, head), lane * 8);
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    paged_lengths_kernel(const __grid_constant__ PagedGatherParams p) {
  using namespace device;
  const int batch = static_cast<int>(p.packing.batch);
  int32_t* const cu[] = {p.cu_k, p.cmp.k.data == nullptr ? nullptr : p.cu_cmp};
  write_prefix_sums(batch, cu, [&](int b, int list) {
    const PagedSpan s = find_span(p.packing, b);
    return list == 0 ? s.total : count_windows(s.total, p.kernel_size, p.kernel_stride);
  });
  for (int b = threadIdx.x; b < batch; b += kThreads) {
    p.q_offset[b] = max(__ldg(p.packing.cache_seqlens + b), 0);
  }
}

// Pages of `view` -> rows of k and v. One CTA: kGatherTokens rows of one sequence, all heads.
template <class Element>
__global__ void __launch_bounds__(kPagedThreads)
    paged_gather_kernel(const __grid_constant__ PagedKvView view,
                        const __grid_constant__ PagedShape shape, const __grid_constant__ Rows k,
                        const __grid_constant__ Rows v, const int32_t* cu, int tiles) {
  using namespace device;
  const int seq = blockIdx.x / tiles;
  const int first = (blockIdx.x - seq * tiles) * kGatherTokens;
  const int begin = cu[seq], num = min(cu[seq + 1] - begin - first, kGatherTokens);
  if (num <= 0) return;
  __shared__ PagePlace places[kGatherTokens];
  if (threadIdx.x < num) {
    places[threadIdx.x] = find_page(view.table, seq, first + static_cast<int>(threadIdx.x));
  }
  __syncthreads();
  const int heads = static_cast<int>(shape.num_heads_kv), items = num * heads;
  // A thread keeps its column; the last threads have none where the row does not divide the CTA.
  const auto copy_all = [&](const PagedRows& pages, const Rows& rows, int vectors) {
    const int step = kPagedThreads / vectors, own = static_cast<int>(threadIdx.x) / vectors;
    const int column = (static_cast<int>(threadIdx.x) - own * vectors) * kVector;
    if (own >= step) return;
    for (int item = own; item < items; item += kGatherLoads * step) {
      uint4 data[kGatherLoads];
#pragma unroll
      for (int i = 0; i < kGatherLoads; ++i) {
        const int token = (item + i * step) / heads, head = item + i * step - token * heads;
        data[i] = uint4{};
        if (item + i * step >= items || places[token].page < 0) continue;
        data[i] = *reinterpret_cast<const uint4*>(
            page_row<Element>(pages, places[token].page, places[token].row, head) + column);
      }
#pragma unroll
      for (int i = 0; i < kGatherLoads; ++i) {
        const int token = (item + i * step) / heads, head = item + i * step - token * heads;
        if (item + i * step >= items) continue;
        *reinterpret_cast<uint4*>(row_pointer<Element>(rows, begin + first + token, head) +
                                  column) = data[i];
      }
    }
  };
  copy_all(view.k, k, static_cast<int>(shape.head_dim) / kVector);
  copy_all(view.v, v, static_cast<int>(shape.head_dim_v) / kVector);
}

// CTAs of a kernel that gives every (row, head) paged_lanes() threads.
inline unsigned paged_ctas(int64_t rows, const PagedShape& shape) {
  const int64_t per_cta = kPagedThreads / paged_lanes(shape);
  return static_cast<unsigned>(ceil_div(rows * shape.num_heads_kv, per_cta));
}

template <PagedCopyConfig kConfig>
void launch_paged_write(const PagedWriteParams& p, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t heads = p.shape.num_heads_kv;
  // No new token takes the place of a raw key.
  const bool keeps_raw = p.raw.rows.data == nullptr || p.raw.size == p.cache.table.page_size;
  const bool stores_open = p.cu_x != nullptr && keeps_raw;
  if (p.cu_x != nullptr) {
    paged_open_tokens_kernel<kPagedThreads><<<1, kPagedThreads, 0, cuda_stream>>>(p);
    const int64_t rows = p.packing.total_q + p.packing.batch * (p.kernel_size - 1);
    if (rows * heads > 0) {
      const auto kernel = stores_open ? paged_gather_open_kernel<Element, true>
                                      : paged_gather_open_kernel<Element, false>;
      kernel<<<paged_ctas(rows, p.shape), kPagedThreads, 0, cuda_stream>>>(p, rows);
    }
  }
  if (p.packing.total_q * heads > 0 && !stores_open) {
    paged_store_kernel<Element>
        <<<paged_ctas(p.packing.total_q, p.shape), kPagedThreads, 0, cuda_stream>>>(p);
  }
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <PagedCopyConfig kConfig>
void launch_paged_scatter(const PagedScatterParams& p, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const int64_t rows =
      (p.packing.total_q + p.packing.batch * (p.kernel_size - 1)) / p.kernel_stride;
  if (rows * p.shape.num_heads_kv == 0) return;
  paged_scatter_kernel<Element>
      <<<paged_ctas(rows, p.shape), kPagedThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, rows);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <PagedCopyConfig kConfig>
void launch_paged_gather(const PagedGatherParams& p, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  paged_lengths_kernel<kPagedThreads><<<1, kPagedThreads, 0, cuda_stream>>>(p);
  const auto gather = [&](const PagedKvView& view, const int32_t* cu, int64_t max_rows,
                          const Rows& k, const Rows& v) {
    const auto tiles = static_cast<int>(ceil_div(max_rows, int64_t{kGatherTokens}));
    const int64_t ctas = tiles * p.packing.batch;
    if (k.data == nullptr || ctas * p.shape.num_heads_kv == 0) return;
    paged_gather_kernel<Element><<<static_cast<unsigned>(ctas), kPagedThreads, 0, cuda_stream>>>(
        view, p.shape, k, v, cu, tiles);
  };
  gather(p.cache, p.cu_k, p.packing.max_k, p.k, p.v);
  if (p.cmp.k.data != nullptr) {
    gather(p.cmp, p.cu_cmp, num_windows(p.packing.max_k, p.kernel_size, p.kernel_stride), p.k_cmp,
           p.v_cmp);
  }
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
