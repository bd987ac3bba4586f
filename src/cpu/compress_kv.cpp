#include "cpu/compress_kv.h"

#include <cstring>

#include "base/check.h"
#include "cpu/compress_kv_detail.h"

namespace fsattn::cpu {
namespace {

void write_cu_seqlens_cmp(const CompressKvFwdParams& p) {
  int64_t next = 0;
  for (int64_t seq = 0; seq < p.shape.batch; ++seq) {
    p.cu_seqlens_cmp[seq] = static_cast<int32_t>(next);
    next += num_windows(p.cu_seqlens[seq + 1] - p.cu_seqlens[seq], p.shape.kernel_size,
                        p.shape.kernel_stride);
  }
  p.cu_seqlens_cmp[p.shape.batch] = static_cast<int32_t>(next);
}

// Rows of no sequence. All bits zero is zero in every dtype.
void clear_rows(const Rows& rows, const CompressKvShape& s, int64_t begin, int64_t end) {
  const int64_t bytes = static_cast<int64_t>(size_of(s.dtype));
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      char* row = static_cast<char*>(rows.data) +
                  (token * rows.token_stride + head * rows.head_stride) * bytes;
      std::memset(row, 0, static_cast<size_t>(s.head_dim * bytes));
    }
  }
}

}  // namespace

void compress_kv_fwd(int, const CompressKvFwdParams& params, Stream) {
  const CompressKvShape& s = params.shape;
  FSATTN_ASSERT(params.scratch.bytes >= scratch_layout(Pass::kFwd, s).bytes);
  write_cu_seqlens_cmp(params);
  clear_rows(params.x_cmp, s, params.cu_seqlens_cmp[s.batch], s.rows_cmp);
  const Isa isa = active_isa();
  with_storage_type(s.dtype, [&]<class T>() {
    const RowKernels<T> kernels = row_kernels<T>(isa);
    s.kind == CompressKind::kLinear ? linear_fwd<T>(params, kernels) : pool_fwd<T>(params, kernels);
  });
}

void compress_kv_bwd(int, const CompressKvBwdParams& params, Stream) {
  const CompressKvShape& s = params.shape;
  FSATTN_ASSERT(params.scratch.bytes >= scratch_layout(Pass::kBwd, s).bytes);
  clear_rows(params.dx, s, params.cu_seqlens[s.batch], s.total);
  const Isa isa = active_isa();
  with_storage_type(s.dtype, [&]<class T>() {
    const RowKernels<T> kernels = row_kernels<T>(isa);
    s.kind == CompressKind::kLinear ? linear_bwd<T>(params, kernels) : pool_bwd<T>(params, kernels);
  });
}

}  // namespace fsattn::cpu
