// Mean, weighted and softmax pooling: y[i] = sum_t w[t] (x[i d + t] + pos_emb[t]).
//
//     dx[j]      = sum over windows i that cover j of w[j - i d] dy[i]
//     dpos_emb[t] = w[t] sum_i dy[i]
//     dw[t]      = sum_i dot(x[i d + t], dy[i]) + dot(pos_emb[t], sum_i dy[i])
//     softmax w of s:  ds[t] = w[t] (dw[t] - sum_u w[u] dw[u])
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/compress_kv_detail.h"
#include "cpu/parallel.h"

namespace fsattn::cpu {
namespace {

constexpr int64_t kTaskRows = 64;  // windows or tokens of one task

template <class T>
void softmax_weights(const T* logits, int64_t count, Compute<T>* weights) {
  using Acc = Compute<T>;
  Acc largest = -std::numeric_limits<Acc>::infinity();
  for (int64_t t = 0; t < count; ++t) largest = std::max(largest, load(logits[t]));
  Acc sum = 0;
  for (int64_t t = 0; t < count; ++t) sum += weights[t] = std::exp(load(logits[t]) - largest);
  for (int64_t t = 0; t < count; ++t) weights[t] /= sum;
}

// The weights as they are applied, [heads, l].
template <class T>
void write_weights(const CompressKvShape& s, const void* weight, Compute<T>* weights) {
  for (int64_t head = 0; head < s.num_heads; ++head) {
    Compute<T>* row = weights + head * s.kernel_size;
    const T* given = static_cast<const T*>(weight) + head * s.kernel_size;
    if (s.kind == CompressKind::kMean) {
      std::fill_n(row, s.kernel_size, Compute<T>{1} / static_cast<Compute<T>>(s.kernel_size));
    } else if (s.kind == CompressKind::kSoftmax) {
      softmax_weights(given, s.kernel_size, row);
    } else {
      for (int64_t t = 0; t < s.kernel_size; ++t) row[t] = load(given[t]);
    }
  }
}

template <class T>
void pool_windows(const CompressKvFwdParams& p, const RowKernels<T>& kernels,
                  const Compute<T>* weights, int64_t head, int64_t begin, int64_t end) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  const int64_t dim = s.head_dim;
  Acc bias[kMaxHeadDim] = {};
  if (p.pos_emb != nullptr) {
    const T* pos_emb = static_cast<const T*>(p.pos_emb) + head * s.kernel_size * dim;
    kernels.weighted_sum(pos_emb, dim, weights, 1, s.kernel_size, bias, dim);
  }
  for_each_window(s, p.cu_seqlens, p.cu_seqlens_cmp, begin, end, [&](int64_t row, int64_t token) {
    Acc sum[kMaxHeadDim];
    std::copy_n(bias, dim, sum);
    kernels.weighted_sum(row_of<const T>(p.x, token, head), p.x.token_stride, weights, 1,
                         s.kernel_size, sum, dim);
    kernels.store(sum, row_of<T>(p.x_cmp, row, head), dim);
  });
}

template <class T>
void pool_dx(const CompressKvBwdParams& p, const RowKernels<T>& kernels, const Compute<T>* weights,
             int64_t head, int64_t begin, int64_t end) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  const int64_t l = s.kernel_size, d = s.kernel_stride;
  const auto visit_piece = [&](int64_t seq, int64_t piece_begin, int64_t piece_end) {
    const int64_t first_row = p.cu_seqlens_cmp[seq];
    const int64_t last_window = p.cu_seqlens_cmp[seq + 1] - first_row - 1;
    for (int64_t token = piece_begin; token < piece_end; ++token) {
      const int64_t position = token - p.cu_seqlens[seq];
      const int64_t from = position < l ? 0 : (position - l) / d + 1;
      const int64_t count = std::max<int64_t>(std::min(last_window, position / d) - from + 1, 0);
      Acc sum[kMaxHeadDim] = {};
      // Window by window, the token stands d places further to the front.
      if (count > 0) {
        kernels.weighted_sum(row_of<const T>(p.dx_cmp, first_row + from, head),
                             p.dx_cmp.token_stride, weights + (position - from * d), -d, count, sum,
                             s.head_dim);
      }
      kernels.store(sum, row_of<T>(p.dx, token, head), s.head_dim);
    }
  };
  for_each_sequence(p.cu_seqlens, s.batch, begin, end, visit_piece);
}

template <class T>
void sum_chunk(const CompressKvBwdParams& p, const RowKernels<T>& kernels, int64_t head,
               int64_t chunk, int64_t num_sums, Compute<T>* sums) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  const Acc one = 1;
  std::fill_n(sums, num_sums, Acc{0});
  const int64_t begin = chunk * kCompressKvChunk;
  for_each_window(s, p.cu_seqlens, p.cu_seqlens_cmp, begin, begin + kCompressKvChunk,
                  [&](int64_t row, int64_t token) {
                    const T* dy = row_of<const T>(p.dx_cmp, row, head);
                    kernels.weighted_sum(dy, 0, &one, 0, 1, sums, s.head_dim);
                    if (p.dweight == nullptr) return;
                    Acc dy_values[kMaxHeadDim];
                    kernels.load(dy, dy_values, s.head_dim);
                    kernels.dots(row_of<const T>(p.x, token, head), p.x.token_stride, s.kernel_size,
                                 dy_values, sums + s.head_dim, s.head_dim);
                  });
}

// In ascending order of the chunks.
template <class T>
void add_chunks(const CompressKvBuffers<T>& scratch, int64_t head) {
  Compute<T>* totals = scratch.totals + head * scratch.num_sums;
  std::fill_n(totals, scratch.num_sums, Compute<T>{0});
  for (int64_t chunk = 0; chunk < scratch.num_chunks; ++chunk) {
    const Compute<T>* sums =
        scratch.partials + (head * scratch.num_chunks + chunk) * scratch.num_sums;
    for (int64_t i = 0; i < scratch.num_sums; ++i) totals[i] += sums[i];
  }
}

template <class T>
void write_dweight(const CompressKvBwdParams& p, const RowKernels<T>& kernels, int64_t head,
                   const Compute<T>* weights, const Compute<T>* dy_sum, Compute<T>* dweight) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  if (p.pos_emb != nullptr) {
    const T* pos_emb = static_cast<const T*>(p.pos_emb) + head * s.kernel_size * s.head_dim;
    kernels.dots(pos_emb, s.head_dim, s.kernel_size, dy_sum, dweight, s.head_dim);
  }
  if (s.kind == CompressKind::kSoftmax) {
    Acc mean = 0;
    for (int64_t t = 0; t < s.kernel_size; ++t) mean += weights[t] * dweight[t];
    for (int64_t t = 0; t < s.kernel_size; ++t) dweight[t] = weights[t] * (dweight[t] - mean);
  }
  kernels.store(dweight, static_cast<T*>(p.dweight) + head * s.kernel_size, s.kernel_size);
}

template <class T>
void write_dpos_emb(const CompressKvBwdParams& p, const RowKernels<T>& kernels, int64_t head,
                    const Compute<T>* weights, const Compute<T>* dy_sum) {
  const CompressKvShape& s = p.shape;
  for (int64_t t = 0; t < s.kernel_size; ++t) {
    Compute<T> row[kMaxHeadDim];
    for (int64_t i = 0; i < s.head_dim; ++i) row[i] = weights[t] * dy_sum[i];
    T* to = static_cast<T*>(p.dpos_emb) + (head * s.kernel_size + t) * s.head_dim;
    kernels.store(row, to, s.head_dim);
  }
}

}  // namespace

template <class T>
void pool_fwd(const CompressKvFwdParams& p, const RowKernels<T>& kernels) {
  const CompressKvShape& s = p.shape;
  const CompressKvBuffers<T> scratch = buffers_of<T>(Pass::kFwd, s, p.scratch);
  write_weights<T>(s, p.weight, scratch.weights);
  const int64_t num_rows = p.cu_seqlens_cmp[s.batch];
  parallel_for(ceil_div(num_rows, kTaskRows) * s.num_heads, Schedule::kStatic, [&](int64_t task) {
    const int64_t head = task % s.num_heads, begin = task / s.num_heads * kTaskRows;
    pool_windows(p, kernels, scratch.weights + head * s.kernel_size, head, begin,
                 std::min(begin + kTaskRows, num_rows));
  });
}

template <class T>
void pool_bwd(const CompressKvBwdParams& p, const RowKernels<T>& kernels) {
  const CompressKvShape& s = p.shape;
  const CompressKvBuffers<T> scratch = buffers_of<T>(Pass::kBwd, s, p.scratch);
  write_weights<T>(s, p.weight, scratch.weights);
  parallel_for(ceil_div(s.total, kTaskRows) * s.num_heads, Schedule::kStatic, [&](int64_t task) {
    const int64_t head = task % s.num_heads, begin = task / s.num_heads * kTaskRows;
    pool_dx(p, kernels, scratch.weights + head * s.kernel_size, head, begin,
            std::min(begin + kTaskRows, s.total));
  });
  if (p.dweight == nullptr && p.dpos_emb == nullptr) return;
  parallel_for(s.num_heads * scratch.num_chunks, Schedule::kStatic, [&](int64_t task) {
    sum_chunk(p, kernels, task / scratch.num_chunks, task % scratch.num_chunks, scratch.num_sums,
              scratch.partials + task * scratch.num_sums);
  });
  parallel_for(s.num_heads, Schedule::kStatic, [&](int64_t head) {
    add_chunks(scratch, head);
    const Compute<T>* weights = scratch.weights + head * s.kernel_size;
    Compute<T>* dy_sum = scratch.totals + head * scratch.num_sums;
    if (p.dpos_emb != nullptr) write_dpos_emb(p, kernels, head, weights, dy_sum);
    if (p.dweight != nullptr) {
      write_dweight(p, kernels, head, weights, dy_sum, dy_sum + s.head_dim);
    }
  });
}

#define FSATTN_INSTANTIATE(T)                                                  \
  template void pool_fwd<T>(const CompressKvFwdParams&, const RowKernels<T>&); \
  template void pool_bwd<T>(const CompressKvBwdParams&, const RowKernels<T>&)
FSATTN_INSTANTIATE(double);
FSATTN_INSTANTIATE(float);
FSATTN_INSTANTIATE(Float16);
FSATTN_INSTANTIATE(BFloat16);
#undef FSATTN_INSTANTIATE

}  // namespace fsattn::cpu
