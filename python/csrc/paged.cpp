// Inference over a paged cache. Outputs are the caller's: a serving engine owns its memory.
#include "paged.h"

#include "execute.h"

namespace fsattn::torch_binding {

namespace {

PagedSequences paged_sequences(const Tensor& cu_q, const Tensor& cache_seqlens, int64_t max_q,
                               int64_t max_k) {
  return {index_view("cu_seqlens_q", cu_q), index_view("cache_seqlens", cache_seqlens), max_q,
          max_k};
}

PagedKv pages(const Tensor& k, const Tensor& v, const Tensor& table) {
  return {view("k_cache", k), view("v_cache", v), index_view("block_table", table)};
}

PagedKv compressed_pages(const OptionalTensor& k, const OptionalTensor& v,
                         const OptionalTensor& table) {
  return {view("k_cmp_cache", k), view("v_cmp_cache", v), index_view("cmp_block_table", table)};
}

}  // namespace

void append_kv(const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cache_seqlens,
               const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
               const OptionalTensor& k_cmp_cache, const OptionalTensor& v_cmp_cache,
               const OptionalTensor& cmp_block_table, const OptionalTensor& k_raw_cache,
               const OptionalTensor& rope_cos, const OptionalTensor& rope_sin,
               const OptionalTensor& weight_k, const OptionalTensor& weight_v,
               const OptionalTensor& pos_emb, int64_t max_q, int64_t max_k, int64_t layout,
               int64_t kernel_size, int64_t kernel_stride, int64_t kind) {
  AppendKv call;
  call.k = view("k", k);
  call.v = view("v", v);
  call.seq = paged_sequences(cu_q, cache_seqlens, max_q, max_k);
  call.cache = pages(k_cache, v_cache, block_table);
  call.cmp = compressed_pages(k_cmp_cache, v_cmp_cache, cmp_block_table);
  call.layout = static_cast<CacheLayout>(layout);
  call.k_raw = view("k_raw_cache", k_raw_cache);
  call.rope_cos = view("rope_cos", rope_cos);
  call.rope_sin = view("rope_sin", rope_sin);
  call.kernel_size = kernel_size;
  call.kernel_stride = kernel_stride;
  call.kind = static_cast<CompressKind>(kind);
  call.weight_k = view("weight_k", weight_k);
  call.weight_v = view("weight_v", weight_v);
  call.pos_emb = view("pos_emb", pos_emb);
  execute(call, k);
}

void paged_native_sparse_attention_out(
    const Tensor& q, const Tensor& gates, const Tensor& cu_q, const Tensor& cache_seqlens,
    const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
    const Tensor& k_cmp_cache, const Tensor& v_cmp_cache, const Tensor& cmp_block_table,
    int64_t max_q, int64_t max_k, int64_t layout, int64_t kernel_size, int64_t kernel_stride,
    int64_t block_size, int64_t topk, int64_t init_blocks, int64_t local_blocks,
    int64_t window_size, double softmax_scale, int64_t group_reduce, int64_t score_dtype,
    int64_t activation, bool batch_invariant, int64_t workspace_cap, const Tensor& out,
    const OptionalTensor& topk_idx) {
  PagedNativeSparseAttention call;
  call.q = view("q", q);
  call.gates = view("gates", gates);
  call.seq = paged_sequences(cu_q, cache_seqlens, max_q, max_k);
  call.cache = pages(k_cache, v_cache, block_table);
  call.cmp = compressed_pages(k_cmp_cache, v_cmp_cache, cmp_block_table);
  call.layout = static_cast<CacheLayout>(layout);
  call.config = {kernel_size, kernel_stride, block_size,  topk,
                 init_blocks, local_blocks,  window_size, softmax_scale};
  call.group_reduce = static_cast<GroupReduce>(group_reduce);
  call.score_dtype = static_cast<ScoreDType>(score_dtype);
  call.activation = static_cast<GateActivation>(activation);
  call.batch_invariant = batch_invariant;
  call.workspace_cap = static_cast<size_t>(workspace_cap);
  call.o = view("out", out);
  call.topk_idx = index_view("topk_idx", topk_idx);
  execute_into_out(call, q);
}

void paged_selected_attention_out(const Tensor& q, const Tensor& topk_idx, const Tensor& cu_q,
                                  const Tensor& cache_seqlens, const Tensor& k_cache,
                                  const Tensor& v_cache, const Tensor& block_table, int64_t max_q,
                                  int64_t max_k, int64_t layout, int64_t block_size,
                                  double softmax_scale, bool batch_invariant, int64_t workspace_cap,
                                  const Tensor& out, const Tensor& lse) {
  PagedSelectedAttention call;
  call.q = view("q", q);
  call.topk_idx = index_view("topk_idx", topk_idx);
  call.seq = paged_sequences(cu_q, cache_seqlens, max_q, max_k);
  call.cache = pages(k_cache, v_cache, block_table);
  call.layout = static_cast<CacheLayout>(layout);
  call.block_size = block_size;
  call.softmax_scale = softmax_scale;
  call.batch_invariant = batch_invariant;
  call.workspace_cap = static_cast<size_t>(workspace_cap);
  call.o = view("out", out);
  call.lse = view("lse", lse);
  execute_into_out(call, q);
}

void define_paged(torch::stable::detail::StableLibrary& m) {
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor cu_q, Tensor cache_seqlens, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor block_table, Tensor(c!)? k_cmp_cache, Tensor(d!)? v_cmp_cache, "
      "Tensor? cmp_block_table, Tensor(e!)? k_raw_cache, Tensor? rope_cos, Tensor? rope_sin, "
      "Tensor? weight_k, Tensor? weight_v, Tensor? pos_emb, int max_q, int max_k, int layout, "
      "int kernel_size, int kernel_stride, int kind) -> ()");
  m.def(
      "paged_native_sparse_attention_out(Tensor q, Tensor gates, Tensor cu_q, "
      "Tensor cache_seqlens, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "Tensor k_cmp_cache, Tensor v_cmp_cache, Tensor cmp_block_table, int max_q, int max_k, "
      "int layout, int kernel_size, int kernel_stride, int block_size, int topk, "
      "int init_blocks, int local_blocks, int window_size, float softmax_scale, "
      "int group_reduce, int score_dtype, int activation, bool batch_invariant, "
      "int workspace_cap, Tensor(a!) out, Tensor(b!)? topk_idx) -> ()");
  m.def(
      "paged_selected_attention_out(Tensor q, Tensor topk_idx, Tensor cu_q, "
      "Tensor cache_seqlens, Tensor k_cache, Tensor v_cache, Tensor block_table, int max_q, "
      "int max_k, int layout, int block_size, float softmax_scale, bool batch_invariant, "
      "int workspace_cap, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

void implement_paged(torch::stable::detail::StableLibrary& m) {
  m.impl("append_kv", &boxed<&append_kv>);
  m.impl("paged_native_sparse_attention_out", &boxed<&paged_native_sparse_attention_out>);
  m.impl("paged_selected_attention_out", &boxed<&paged_selected_attention_out>);
}

}  // namespace fsattn::torch_binding
