// The operators over a paged cache; see operators.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include "fsattn/paged.h"
#include "operators.h"

namespace fsattn::torch_binding {

void append_kv(const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cache_seqlens,
               const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
               const OptionalTensor& k_cmp_cache, const OptionalTensor& v_cmp_cache,
               const OptionalTensor& cmp_block_table, const OptionalTensor& k_raw_cache,
               const OptionalTensor& rope_cos, const OptionalTensor& rope_sin,
               const OptionalTensor& weight_k, const OptionalTensor& weight_v,
               const OptionalTensor& pos_emb, int64_t max_q, int64_t max_k, int64_t layout,
               int64_t kernel_size, int64_t kernel_stride, int64_t kind);

void paged_native_sparse_attention_out(
    const Tensor& q, const Tensor& gates, const Tensor& cu_q, const Tensor& cache_seqlens,
    const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
    const Tensor& k_cmp_cache, const Tensor& v_cmp_cache, const Tensor& cmp_block_table,
    int64_t max_q, int64_t max_k, int64_t layout, int64_t kernel_size, int64_t kernel_stride,
    int64_t block_size, int64_t topk, int64_t init_blocks, int64_t local_blocks,
    int64_t window_size, double softmax_scale, int64_t group_reduce, int64_t score_dtype,
    int64_t activation, bool batch_invariant, int64_t workspace_cap, const Tensor& out,
    const OptionalTensor& topk_idx);

void paged_selected_attention_out(const Tensor& q, const Tensor& topk_idx, const Tensor& cu_q,
                                  const Tensor& cache_seqlens, const Tensor& k_cache,
                                  const Tensor& v_cache, const Tensor& block_table, int64_t max_q,
                                  int64_t max_k, int64_t layout, int64_t block_size,
                                  double softmax_scale, bool batch_invariant, int64_t workspace_cap,
                                  const Tensor& out, const Tensor& lse);

// Schemas and registration.
void define_paged(torch::stable::detail::StableLibrary& m);
void implement_paged(torch::stable::detail::StableLibrary& m);

}  // namespace fsattn::torch_binding
