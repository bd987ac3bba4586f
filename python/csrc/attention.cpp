// The three attention branches.
#include "execute.h"
#include "operators.h"

namespace fsattn::torch_binding {

namespace {

// Fills what every branch's forward has, executes the call and returns (o, lse).
template <class Call>
Tensor2 execute_forward(Call& call, const Tensor& q, const Tensor& k, const Tensor& v) {
  call.q = view("q", q);
  call.k = view("k", k);
  call.v = view("v", v);
  auto [o, lse] = allocate_attention(call.q, call.v, q);
  call.o = view("o", o);
  call.lse = view("lse", lse);
  execute(call, q);
  return {o, lse};
}

// The inputs of every branch's backward.
struct BranchGradient {
  const Tensor& dout;
  const OptionalTensor& dlse;
  const Tensor &q, &k, &v, &o, &lse;
};

// Fills them, executes the call and returns (dq, dk, dv).
template <class Call>
Tensor3 execute_backward(Call& call, const BranchGradient& in) {
  const Tensor dout = readable_rows(in.dout);
  OptionalTensor dlse = in.dlse;
  if (dlse) dlse = readable_rows(*dlse);
  call.dout = view("dout", dout);
  call.dlse = view("dlse", dlse);
  call.q = view("q", in.q);
  call.k = view("k", in.k);
  call.v = view("v", in.v);
  call.o = view("o", in.o);
  call.lse = view("lse", in.lse);
  Tensor dq = allocate_like(in.q);
  Tensor dk = allocate_like(in.k);
  Tensor dv = allocate_like(in.v);
  call.dq = view("dq", dq);
  call.dk = view("dk", dk);
  call.dv = view("dv", dv);
  execute(call, in.q);
  return {dq, dk, dv};
}

}  // namespace

Tensor2 compressed_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cu_q, const Tensor& cu_k, const Tensor& cu_cmp,
                                 const OptionalTensor& q_offset, int64_t max_q, int64_t max_k,
                                 int64_t kernel_size, int64_t kernel_stride, double softmax_scale) {
  CompressedAttentionFwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_cmp);
  call.kernel_size = kernel_size;
  call.kernel_stride = kernel_stride;
  call.softmax_scale = softmax_scale;
  return execute_forward(call, q, k, v);
}

Tensor3 compressed_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                 const Tensor& k, const Tensor& v, const Tensor& o,
                                 const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                                 const Tensor& cu_cmp, const OptionalTensor& q_offset,
                                 int64_t max_q, int64_t max_k, int64_t kernel_size,
                                 int64_t kernel_stride, double softmax_scale) {
  CompressedAttentionBwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_cmp);
  call.kernel_size = kernel_size;
  call.kernel_stride = kernel_stride;
  call.softmax_scale = softmax_scale;
  return execute_backward(call, {dout, dlse, q, k, v, o, lse});
}

namespace {

void fill_selected_fwd(SelectedAttentionFwd& call, const Tensor& topk_idx,
                       const OptionalTensor& block_start, const OptionalTensor& block_entry,
                       int64_t block_size, double softmax_scale, int64_t workspace_cap) {
  call.topk_idx = index_view("topk_idx", topk_idx);
  call.block_start = index_view("block_start", block_start);
  call.block_entry = index_view("block_entry", block_entry);
  call.block_size = block_size;
  call.softmax_scale = softmax_scale;
  call.workspace_cap = static_cast<size_t>(workspace_cap);
}

}  // namespace

Tensor2 selected_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& topk_idx, const OptionalTensor& block_start,
                               const OptionalTensor& block_entry, const Tensor& cu_q,
                               const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                               int64_t max_k, int64_t block_size, double softmax_scale,
                               int64_t workspace_cap) {
  SelectedAttentionFwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  fill_selected_fwd(call, topk_idx, block_start, block_entry, block_size, softmax_scale,
                    workspace_cap);
  return execute_forward(call, q, k, v);
}

void selected_attention_fwd_out(const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& topk_idx, const OptionalTensor& block_start,
                                const OptionalTensor& block_entry, const Tensor& cu_q,
                                const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                                int64_t max_k, int64_t block_size, double softmax_scale,
                                int64_t workspace_cap, const Tensor& out, const Tensor& lse) {
  SelectedAttentionFwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  fill_selected_fwd(call, topk_idx, block_start, block_entry, block_size, softmax_scale,
                    workspace_cap);
  call.q = view("q", q);
  call.k = view("k", k);
  call.v = view("v", v);
  call.o = view("out", out);
  call.lse = view("lse", lse);
  execute_into_out(call, q);
}

Tensor3 selected_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                               const Tensor& topk_idx, const OptionalTensor& block_start,
                               const OptionalTensor& block_entry, const Tensor& cu_q,
                               const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                               int64_t max_k, int64_t block_size, double softmax_scale,
                               int64_t workspace_cap) {
  SelectedAttentionBwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.topk_idx = index_view("topk_idx", topk_idx);
  call.block_start = index_view("block_start", block_start);
  call.block_entry = index_view("block_entry", block_entry);
  call.block_size = block_size;
  call.softmax_scale = softmax_scale;
  call.workspace_cap = static_cast<size_t>(workspace_cap);
  return execute_backward(call, {dout, dlse, q, k, v, o, lse});
}

Tensor2 window_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                             const Tensor& cu_k, const OptionalTensor& q_offset, int64_t max_q,
                             int64_t max_k, int64_t window_size, double softmax_scale) {
  WindowAttentionFwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.window_size = window_size;
  call.softmax_scale = softmax_scale;
  return execute_forward(call, q, k, v);
}

Tensor3 window_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                             const Tensor& cu_q, const Tensor& cu_k, const OptionalTensor& q_offset,
                             int64_t max_q, int64_t max_k, int64_t window_size,
                             double softmax_scale) {
  WindowAttentionBwd call;
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.window_size = window_size;
  call.softmax_scale = softmax_scale;
  return execute_backward(call, {dout, dlse, q, k, v, o, lse});
}

}  // namespace fsattn::torch_binding
