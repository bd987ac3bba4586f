// What the pooling kinds (compress_kv_pool.cpp) and the linear kind (compress_kv_linear.cpp) share.
#pragma once
#include <cstdint>

#include "cpu/row_kernels.h"
#include "cpu/sequences.h"
#include "params/compress_kv.h"
#include "plan/cpu_compress_kv.h"

namespace fsattn::cpu {

template <class T>
struct CompressKvBuffers {
  using Acc = Compute<T>;
  Acc* weights;   // [heads, l]
  Acc* packed;    // [heads, l * D, D padded]
  Acc* partials;  // [heads, num_chunks, num_sums]
  Acc* totals;    // [heads, num_sums]: D sums of dy, then l of dweight
  int64_t num_chunks;
  int64_t num_sums;
};

inline CpuCompressKvScratch scratch_layout(Pass pass, const CompressKvShape& s) {
  return cpu_compress_kv_scratch(
      pass, {s.dtype, s.kind, s.num_heads, s.head_dim, s.rows_cmp, s.kernel_size});
}

template <class T>
CompressKvBuffers<T> buffers_of(Pass pass, const CompressKvShape& s, const Scratch& scratch) {
  using Acc = Compute<T>;
  const CpuCompressKvScratch layout = scratch_layout(pass, s);
  char* base = static_cast<char*>(scratch.data);
  return {reinterpret_cast<Acc*>(base + layout.weights),
          reinterpret_cast<Acc*>(base + layout.packed),
          reinterpret_cast<Acc*>(base + layout.partials),
          reinterpret_cast<Acc*>(base + layout.totals),
          layout.num_chunks,
          layout.num_sums};
}

template <class T>
T* row_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// Calls visit(row, first token) for every window whose compressed row lies in [begin, end), in order.
template <class Visit>
void for_each_window(const CompressKvShape& s, const int32_t* cu_seqlens,
                     const int32_t* cu_seqlens_cmp, int64_t begin, int64_t end,
                     const Visit& visit) {
  for_each_sequence(cu_seqlens_cmp, s.batch, begin, end,
                    [&](int64_t seq, int64_t piece_begin, int64_t piece_end) {
                      for (int64_t row = piece_begin; row < piece_end; ++row) {
                        visit(row, cu_seqlens[seq] + (row - cu_seqlens_cmp[seq]) * s.kernel_stride);
                      }
                    });
}

template <class T>
void pool_fwd(const CompressKvFwdParams& params, const RowKernels<T>& kernels);
template <class T>
void pool_bwd(const CompressKvBwdParams& params, const RowKernels<T>& kernels);
template <class T>
void linear_fwd(const CompressKvFwdParams& params, const RowKernels<T>& kernels);
template <class T>
void linear_bwd(const CompressKvBwdParams& params, const RowKernels<T>& kernels);

}  // namespace fsattn::cpu
