// The six operators as one call.
#include <algorithm>

#include "execute.h"
#include "operators.h"

namespace fsattn::torch_binding {

namespace {

struct NativeInputs {
  const Tensor &q, &k, &v, &k_cmp, &v_cmp, &gates;
};

template <class Call>
void fill_inputs(Call& call, const NativeInputs& in) {
  call.q = view("q", in.q);
  call.k = view("k", in.k);
  call.v = view("v", in.v);
  call.k_cmp = view("k_cmp", in.k_cmp);
  call.v_cmp = view("v_cmp", in.v_cmp);
  call.gates = view("gates", in.gates);
}

}  // namespace

Tensor8 native_sparse_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& gates,
                                    const OptionalTensor& topk_idx, const Tensor& cu_q,
                                    const Tensor& cu_k, const Tensor& cu_cmp,
                                    const OptionalTensor& q_offset, int64_t max_q, int64_t max_k,
                                    int64_t kernel_size, int64_t kernel_stride, int64_t block_size,
                                    int64_t topk, int64_t init_blocks, int64_t local_blocks,
                                    int64_t window_size, double softmax_scale, int64_t group_reduce,
                                    int64_t score_dtype, int64_t activation, int64_t workspace_cap,
                                    bool keep_o_sel, bool /*adds_means: of its backward*/) {
  NativeSparseAttentionFwd call;
  fill_inputs(call, {q, k, v, k_cmp, v_cmp, gates});
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_cmp);
  call.config = {kernel_size, kernel_stride, block_size,  topk,
                 init_blocks, local_blocks,  window_size, softmax_scale};
  call.group_reduce = static_cast<GroupReduce>(group_reduce);
  call.score_dtype = static_cast<ScoreDType>(score_dtype);
  call.activation = static_cast<GateActivation>(activation);
  call.workspace_cap = static_cast<size_t>(workspace_cap);
  call.select = !topk_idx;

  // An operator may not return its input: a selection that the caller brought comes back empty.
  const int64_t row = std::max<int64_t>(topk, 0);
  Tensor selection = topk_idx ? allocate({0}, DType::kInt32, q)
                              : allocate({size(call.k, 1), size(call.q, 0), row}, DType::kInt32, q);
  call.topk_idx = index_view("topk_idx", topk_idx ? *topk_idx : selection);
  auto [o_cmp, lse_cmp] = allocate_attention(call.q, call.v, q);
  auto [o_sel, lse_sel] = allocate_attention(call.q, call.v, q, keep_o_sel);
  auto [o_win, lse_win] = allocate_attention(call.q, call.v, q);
  Tensor o = allocate_like(o_cmp);
  call.o = view("o", o);
  call.o_cmp = view("o_cmp", o_cmp);
  if (keep_o_sel) call.o_sel = view("o_sel", o_sel);
  call.o_win = view("o_win", o_win);
  call.lse_cmp = view("lse_cmp", lse_cmp);
  call.lse_sel = view("lse_sel", lse_sel);
  call.lse_win = view("lse_win", lse_win);
  execute(call, q);
  return {o, selection, o_cmp, o_sel, o_win, lse_cmp, lse_sel, lse_win};
}

Tensor6 native_sparse_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cmp,
    const Tensor& v_cmp, const Tensor& gates, const Tensor& topk_idx, const Tensor& o_cmp,
    const Tensor& o_sel, const Tensor& o_win, const Tensor& lse_cmp, const Tensor& lse_sel,
    const Tensor& lse_win, const Tensor& cu_q, const Tensor& cu_k, const Tensor& cu_cmp,
    const OptionalTensor& q_offset, int64_t max_q, int64_t max_k, int64_t kernel_size,
    int64_t kernel_stride, int64_t block_size, int64_t topk, int64_t window_size,
    double softmax_scale, int64_t activation, int64_t workspace_cap, bool adds_means) {
  const Tensor dout_rows = readable_rows(dout);
  NativeSparseAttentionBwd call;
  call.dout = view("dout", dout_rows);
  fill_inputs(call, {q, k, v, k_cmp, v_cmp, gates});
  call.topk_idx = index_view("topk_idx", topk_idx);
  call.o_cmp = view("o_cmp", o_cmp);
  call.o_sel = view("o_sel", o_sel);
  call.o_win = view("o_win", o_win);
  call.lse_cmp = view("lse_cmp", lse_cmp);
  call.lse_sel = view("lse_sel", lse_sel);
  call.lse_win = view("lse_win", lse_win);
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_cmp);
  call.config.kernel_size = kernel_size;
  call.config.kernel_stride = kernel_stride;
  call.config.block_size = block_size;
  call.config.topk = topk;
  call.config.window_size = window_size;
  call.config.softmax_scale = softmax_scale;
  call.activation = static_cast<GateActivation>(activation);
  call.workspace_cap = static_cast<size_t>(workspace_cap);
  call.adds_means = adds_means;
  Tensor dq = allocate_like(q);
  Tensor dk = allocate_like(k);
  Tensor dv = allocate_like(v);
  Tensor dk_cmp = allocate_like(k_cmp);
  Tensor dv_cmp = allocate_like(v_cmp);
  Tensor dgates = allocate_like(gates);
  call.dq = view("dq", dq);
  call.dk = view("dk", dk);
  call.dv = view("dv", dv);
  call.dk_cmp = view("dk_cmp", dk_cmp);
  call.dv_cmp = view("dv_cmp", dv_cmp);
  call.dgates = view("dgates", dgates);
  execute(call, q);
  return {dq, dk, dv, dk_cmp, dv_cmp, dgates};
}

}  // namespace fsattn::torch_binding
