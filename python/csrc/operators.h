// The operators of torch.ops.fsattn. Each fills a call of fsattn/ops.h from its tensors, allocates
// the outputs and executes it; shapes, dtypes and options are documented there. Nothing is decided
// or checked here.
#pragma once
#include <cstdint>
#include <tuple>

#include "fsattn/ops.h"
#include "tensors.h"

namespace fsattn::torch_binding {

using Tensor2 = std::tuple<Tensor, Tensor>;
using Tensor3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensor4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensor6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensor8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Size of a dimension, 0 where there is none: outputs are allocated before the library has checked
// the number of dimensions.
inline int64_t size(const TensorView& view, int dim) {
  return dim < view.ndim ? view.shape[static_cast<size_t>(dim)] : 0;
}

inline DType stats_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

inline Sequences sequences(const Tensor& cu_q, const Tensor& cu_k, const OptionalTensor& q_offset,
                           int64_t max_q, int64_t max_k) {
  return {index_view("cu_seqlens_q", cu_q), index_view("cu_seqlens_k", cu_k),
          index_view("q_offset", q_offset), max_q, max_k};
}

// o [total_q, Hq, Dv], or nothing, and lse [Hq, total_q] of an attention branch.
inline Tensor2 allocate_attention(const TensorView& q, const TensorView& v, const Tensor& like,
                                  bool has_o = true) {
  return {has_o ? allocate({size(q, 0), size(q, 1), size(v, 2)}, q.dtype, like)
                : allocate({0}, q.dtype, like),
          allocate({size(q, 1), size(q, 0)}, stats_dtype(q.dtype), like)};
}

Tensor2 compress_kv_fwd(const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& weight,
                        const OptionalTensor& pos_emb, int64_t max_seqlen, int64_t kernel_size,
                        int64_t kernel_stride, int64_t kind);
Tensor3 compress_kv_bwd(const Tensor& dx_cmp, const Tensor& x, const Tensor& cu_seqlens,
                        const Tensor& cu_seqlens_cmp, const OptionalTensor& weight,
                        const OptionalTensor& pos_emb, int64_t max_seqlen, int64_t kernel_size,
                        int64_t kernel_stride, int64_t kind);

Tensor2 compressed_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cu_q, const Tensor& cu_k, const Tensor& cu_cmp,
                                 const OptionalTensor& q_offset, int64_t max_q, int64_t max_k,
                                 int64_t kernel_size, int64_t kernel_stride, double softmax_scale);
Tensor3 compressed_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                 const Tensor& k, const Tensor& v, const Tensor& o,
                                 const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                                 const Tensor& cu_cmp, const OptionalTensor& q_offset,
                                 int64_t max_q, int64_t max_k, int64_t kernel_size,
                                 int64_t kernel_stride, double softmax_scale);

Tensor select_blocks(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const Tensor& cu_q,
                     const Tensor& cu_k, const Tensor& cu_cmp, const OptionalTensor& q_offset,
                     int64_t max_q, int64_t max_k, int64_t kernel_size, int64_t kernel_stride,
                     int64_t block_size, int64_t topk, int64_t init_blocks, int64_t local_blocks,
                     double softmax_scale, int64_t group_reduce, int64_t score_dtype);
Tensor2 build_block_index(const Tensor& topk_idx, const Tensor& cu_q, const Tensor& cu_k,
                          const OptionalTensor& q_offset, int64_t max_q, int64_t max_k,
                          int64_t total_k, int64_t block_size);

Tensor2 selected_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& topk_idx, const OptionalTensor& block_start,
                               const OptionalTensor& block_entry, const Tensor& cu_q,
                               const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                               int64_t max_k, int64_t block_size, double softmax_scale,
                               int64_t workspace_cap);
void selected_attention_fwd_out(const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& topk_idx, const OptionalTensor& block_start,
                                const OptionalTensor& block_entry, const Tensor& cu_q,
                                const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                                int64_t max_k, int64_t block_size, double softmax_scale,
                                int64_t workspace_cap, const Tensor& out, const Tensor& lse);
Tensor3 selected_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                               const Tensor& topk_idx, const OptionalTensor& block_start,
                               const OptionalTensor& block_entry, const Tensor& cu_q,
                               const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                               int64_t max_k, int64_t block_size, double softmax_scale,
                               int64_t workspace_cap);

Tensor2 window_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                             const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                             int64_t max_k, int64_t window_size, double softmax_scale);
Tensor3 window_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                             const Tensor& cu_q, const Tensor& cu_k, const OptionalTensor& q_offset,
                             int64_t max_q, int64_t max_k, int64_t window_size,
                             double softmax_scale);

Tensor gate_fwd(const Tensor& o_cmp, const Tensor& o_sel, const Tensor& o_win, const Tensor& gates,
                int64_t activation);
Tensor4 gate_bwd(const Tensor& dout, const Tensor& o_cmp, const Tensor& o_sel, const Tensor& o_win,
                 const Tensor& gates, int64_t activation);

Tensor8 native_sparse_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& gates,
                                    const OptionalTensor& topk_idx, const Tensor& cu_q,
                                    const Tensor& cu_k, const Tensor& cu_cmp,
                                    const OptionalTensor& q_offset, int64_t max_q, int64_t max_k,
                                    int64_t kernel_size, int64_t kernel_stride, int64_t block_size,
                                    int64_t topk, int64_t init_blocks, int64_t local_blocks,
                                    int64_t window_size, double softmax_scale, int64_t group_reduce,
                                    int64_t score_dtype, int64_t activation, int64_t workspace_cap,
                                    bool keep_o_sel, bool adds_means);
Tensor6 native_sparse_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cmp,
    const Tensor& v_cmp, const Tensor& gates, const Tensor& topk_idx, const Tensor& o_cmp,
    const Tensor& o_sel, const Tensor& o_win, const Tensor& lse_cmp, const Tensor& lse_sel,
    const Tensor& lse_win, const Tensor& cu_q, const Tensor& cu_k, const Tensor& cu_cmp,
    const OptionalTensor& q_offset, int64_t max_q, int64_t max_k, int64_t kernel_size,
    int64_t kernel_stride, int64_t block_size, int64_t topk, int64_t window_size,
    double softmax_scale, int64_t activation, int64_t workspace_cap, bool adds_means);

}  // namespace fsattn::torch_binding
