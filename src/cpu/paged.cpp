#include "cpu/paged.h"

#include <algorithm>
#include <cstring>

#include "base/math.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"
#include "cpu/simd.h"

namespace fsattn::cpu {
namespace {

// Rows of one task: a few hundred kilobytes, far above the cost of handing out a task.
constexpr int64_t kTaskRows = 64;

// Calls f(seq, i) for every row cu[seq] + i, on all threads.
template <class F>
void for_each_row(const int32_t* cu, int64_t batch, const F& f) {
  const int64_t total = cu[batch];
  parallel_for(ceil_div(total, kTaskRows), Schedule::kStatic, [&](int64_t task) {
    const int64_t begin = task * kTaskRows, end = std::min(begin + kTaskRows, total);
    for_each_sequence(cu, batch, begin, end, [&](int64_t seq, int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) f(seq, row - cu[seq]);
    });
  });
}

template <class T>
T* row_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// Row `row` of the page that holds `token`.
template <class T>
T* page_row(const PagedRows& rows, const PageTable& table, int64_t seq, int64_t token, int64_t row,
            int64_t head) {
  const int64_t page = table.pages[seq * table.seq_stride + token / table.page_size];
  return static_cast<T*>(rows.data) + page * rows.page_stride + row * rows.token_stride +
         head * rows.head_stride;
}

template <class T>
T* token_row(const PagedRows& rows, const PageTable& table, int64_t seq, int64_t token,
             int64_t head) {
  return page_row<T>(rows, table, seq, token, token % table.page_size, head);
}

template <class T>
void copy(const T* from, T* to, int64_t dim) {
  std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(T));
}

// to = from, rotated by its position and rounded once.
template <class T>
void copy_rotated(const T* from, T* to, int64_t dim, const RopeTables& rope, int64_t position) {
  if (rope.cos == nullptr) return copy(from, to, dim);
  const int64_t half = dim / 2;
  const T* cos = static_cast<const T*>(rope.cos) + position * half;
  const T* sin = static_cast<const T*>(rope.sin) + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const Compute<T> x0 = load(from[i]), x1 = load(from[half + i]);
    const Compute<T> c = load(cos[i]), s = load(sin[i]);
    store(to[i], x0 * c - x1 * s);
    store(to[half + i], x1 * c + x0 * s);
  }
}

// The first token that windows still to be completed read, when `before` tokens are stored.
int64_t first_open_token(int64_t before, int64_t kernel_size, int64_t kernel_stride) {
  return num_windows(before, kernel_size, kernel_stride) * kernel_stride;
}

void write_cu_x(const PagedWriteParams& p) {
  int64_t next = 0;
  for (int64_t seq = 0; seq < p.packing.batch; ++seq) {
    p.cu_x[seq] = static_cast<int32_t>(next);
    const int64_t num_new = p.packing.cu_q[seq + 1] - p.packing.cu_q[seq];
    if (num_new == 0) continue;
    const int64_t before = p.packing.cache_seqlens[seq];
    next += before + num_new - first_open_token(before, p.kernel_size, p.kernel_stride);
  }
  p.cu_x[p.packing.batch] = static_cast<int32_t>(next);
}

// Key `token`, stored by an earlier call, as it was before its rotation.
template <class T>
const T* raw_key(const PagedWriteParams& p, int64_t seq, int64_t token, int64_t head) {
  if (p.raw.rows.data == nullptr) {
    return token_row<const T>(p.cache.k, p.cache.table, seq, token, head);
  }
  return page_row<const T>(p.raw.rows, p.cache.table, seq, token, token % p.raw.size, head);
}

template <class T>
void gather_windows(const PagedWriteParams& p) {
  const PagedShape& s = p.shape;
  for_each_row(p.cu_x, p.packing.batch, [&](int64_t seq, int64_t i) {
    const int64_t before = p.packing.cache_seqlens[seq], to = p.cu_x[seq] + i;
    const int64_t token = first_open_token(before, p.kernel_size, p.kernel_stride) + i;
    const int64_t new_row = p.packing.cu_q[seq] + token - before;
    for (int64_t head = 0; head < s.num_heads_kv; ++head) {
      const bool is_new = token >= before;
      const T* key = is_new ? row_of<const T>(p.k, new_row, head) : raw_key<T>(p, seq, token, head);
      const T* value = is_new ? row_of<const T>(p.v, new_row, head)
                              : token_row<const T>(p.cache.v, p.cache.table, seq, token, head);
      copy(key, row_of<T>(p.x_k, to, head), s.head_dim);
      copy(value, row_of<T>(p.x_v, to, head), s.head_dim_v);
    }
  });
}

template <class T>
void write_tokens(const PagedWriteParams& p) {
  const PagedShape& s = p.shape;
  const PageTable& table = p.cache.table;
  for_each_row(p.packing.cu_q, p.packing.batch, [&](int64_t seq, int64_t i) {
    const int64_t row = p.packing.cu_q[seq] + i, token = p.packing.cache_seqlens[seq] + i;
    const int64_t last =
        p.packing.cache_seqlens[seq] + p.packing.cu_q[seq + 1] - p.packing.cu_q[seq] - 1;
    // Of new tokens that share a row of the raw keys, the last one stays.
    const int64_t next = token + p.raw.size;
    const bool is_overwritten = next <= last && next / table.page_size == token / table.page_size;
    for (int64_t head = 0; head < s.num_heads_kv; ++head) {
      const T* key = row_of<const T>(p.k, row, head);
      copy_rotated(key, token_row<T>(p.cache.k, table, seq, token, head), s.head_dim, p.rope,
                   token);
      copy(row_of<const T>(p.v, row, head), token_row<T>(p.cache.v, table, seq, token, head),
           s.head_dim_v);
      if (p.raw.rows.data == nullptr || is_overwritten) continue;
      copy(key, page_row<T>(p.raw.rows, table, seq, token, token % p.raw.size, head), s.head_dim);
    }
  });
}

// Fills the prefix sums of the lengths of all tokens and of their windows.
void write_lengths(const PagedGatherParams& p) {
  const bool has_cmp = p.cmp.k.data != nullptr;
  int64_t tokens = 0, windows = 0;
  for (int64_t seq = 0; seq <= p.packing.batch; ++seq) {
    p.cu_k[seq] = static_cast<int32_t>(tokens);
    if (has_cmp) p.cu_cmp[seq] = static_cast<int32_t>(windows);
    if (seq == p.packing.batch) return;
    const int64_t before = p.packing.cache_seqlens[seq];
    const int64_t total = before + p.packing.cu_q[seq + 1] - p.packing.cu_q[seq];
    p.q_offset[seq] = static_cast<int32_t>(before);
    tokens += total;
    windows += num_windows(total, p.kernel_size, p.kernel_stride);
  }
}

template <class T>
void gather_pages(const PagedKvView& cache, const PagedShape& s, const int32_t* cu, int64_t batch,
                  const Rows& k, const Rows& v) {
  for_each_row(cu, batch, [&](int64_t seq, int64_t token) {
    const int64_t row = cu[seq] + token;
    for (int64_t head = 0; head < s.num_heads_kv; ++head) {
      copy(token_row<const T>(cache.k, cache.table, seq, token, head), row_of<T>(k, row, head),
           s.head_dim);
      copy(token_row<const T>(cache.v, cache.table, seq, token, head), row_of<T>(v, row, head),
           s.head_dim_v);
    }
  });
}

}  // namespace

void paged_write(int /*row*/, const PagedWriteParams& params, Stream /*stream*/) {
  const bool has_windows = params.cu_x != nullptr;
  if (has_windows) write_cu_x(params);
  with_storage_type(params.shape.dtype, [&]<class T>() {
    if (has_windows) gather_windows<T>(params);  // before write_tokens overwrites raw keys
    write_tokens<T>(params);
  });
}

void paged_scatter(int /*row*/, const PagedScatterParams& p, Stream /*stream*/) {
  with_storage_type(p.shape.dtype, [&]<class T>() {
    for_each_row(p.cu_cmp, p.packing.batch, [&](int64_t seq, int64_t i) {
      const int64_t row = p.cu_cmp[seq] + i;
      const int64_t window =
          num_windows(p.packing.cache_seqlens[seq], p.kernel_size, p.kernel_stride) + i;
      for (int64_t head = 0; head < p.shape.num_heads_kv; ++head) {
        copy_rotated(row_of<const T>(p.k_cmp, row, head),
                     token_row<T>(p.cmp.k, p.cmp.table, seq, window, head), p.shape.head_dim,
                     p.rope, window * p.kernel_stride);
        copy(row_of<const T>(p.v_cmp, row, head),
             token_row<T>(p.cmp.v, p.cmp.table, seq, window, head), p.shape.head_dim_v);
      }
    });
  });
}

void paged_gather(int /*row*/, const PagedGatherParams& p, Stream /*stream*/) {
  write_lengths(p);
  with_storage_type(p.shape.dtype, [&]<class T>() {
    gather_pages<T>(p.cache, p.shape, p.cu_k, p.packing.batch, p.k, p.v);
    if (p.cmp.k.data != nullptr) {
      gather_pages<T>(p.cmp, p.shape, p.cu_cmp, p.packing.batch, p.k_cmp, p.v_cmp);
    }
  });
}

}  // namespace fsattn::cpu
