// Compression, selection, block index and gate.
#include <algorithm>

#include "execute.h"
#include "operators.h"

namespace fsattn::torch_binding {

Tensor2 compress_kv_fwd(const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& weight,
                        const OptionalTensor& pos_emb, int64_t max_seqlen, int64_t kernel_size,
                        int64_t kernel_stride, int64_t kind) {
  CompressKvFwd call;
  call.x = view("x", x);
  call.weight = view("weight", weight);
  call.pos_emb = view("pos_emb", pos_emb);
  call.cu_seqlens = index_view("cu_seqlens", cu_seqlens);
  call.max_seqlen = max_seqlen;
  call.kernel_size = kernel_size;
  call.kernel_stride = kernel_stride;
  call.kind = static_cast<CompressKind>(kind);
  const int64_t rows = kernel_stride > 0 ? size(call.x, 0) / kernel_stride : 0;
  Tensor x_cmp = allocate({rows, size(call.x, 1), size(call.x, 2)}, call.x.dtype, x);
  Tensor cu_seqlens_cmp = allocate({size(call.cu_seqlens, 0)}, DType::kInt32, x);
  call.x_cmp = view("x_cmp", x_cmp);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_seqlens_cmp);
  execute(call, x);
  return {x_cmp, cu_seqlens_cmp};
}

Tensor3 compress_kv_bwd(const Tensor& dx_cmp, const Tensor& x, const Tensor& cu_seqlens,
                        const Tensor& cu_seqlens_cmp, const OptionalTensor& weight,
                        const OptionalTensor& pos_emb, int64_t max_seqlen, int64_t kernel_size,
                        int64_t kernel_stride, int64_t kind) {
  const Tensor dx_cmp_rows = readable_rows(dx_cmp);
  CompressKvBwd call;
  call.dx_cmp = view("dx_cmp", dx_cmp_rows);
  call.x = view("x", x);
  call.weight = view("weight", weight);
  call.pos_emb = view("pos_emb", pos_emb);
  call.cu_seqlens = index_view("cu_seqlens", cu_seqlens);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_seqlens_cmp);
  call.max_seqlen = max_seqlen;
  call.kernel_size = kernel_size;
  call.kernel_stride = kernel_stride;
  call.kind = static_cast<CompressKind>(kind);
  Tensor dx = allocate_like(x);
  Tensor dweight = allocate_like(weight, x);
  Tensor dpos_emb = allocate_like(pos_emb, x);
  call.dx = view("dx", dx);
  if (weight) call.dweight = view("dweight", dweight);
  if (pos_emb) call.dpos_emb = view("dpos_emb", dpos_emb);
  execute(call, x);
  return {dx, dweight, dpos_emb};
}

Tensor select_blocks(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const Tensor& cu_q,
                     const Tensor& cu_k, const Tensor& cu_cmp, const OptionalTensor& q_offset,
                     int64_t max_q, int64_t max_k, int64_t kernel_size, int64_t kernel_stride,
                     int64_t block_size, int64_t topk, int64_t init_blocks, int64_t local_blocks,
                     double softmax_scale, int64_t group_reduce, int64_t score_dtype) {
  SelectBlocks call;
  call.q = view("q", q);
  call.k_cmp = view("k_cmp", k_cmp);
  call.lse = view("lse", lse);
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.cu_seqlens_cmp = index_view("cu_seqlens_cmp", cu_cmp);
  call.kernel_size = kernel_size;
  call.kernel_stride = kernel_stride;
  call.block_size = block_size;
  call.topk = topk;
  call.init_blocks = init_blocks;
  call.local_blocks = local_blocks;
  call.softmax_scale = softmax_scale;
  call.group_reduce = static_cast<GroupReduce>(group_reduce);
  call.score_dtype = static_cast<ScoreDType>(score_dtype);
  const int64_t row = std::max<int64_t>(topk, 0);
  Tensor topk_idx = allocate({size(call.k_cmp, 1), size(call.q, 0), row}, DType::kInt32, q);
  call.topk_idx = index_view("topk_idx", topk_idx);
  execute(call, q);
  return topk_idx;
}

Tensor2 build_block_index(const Tensor& topk_idx, const Tensor& cu_q, const Tensor& cu_k,
                          const OptionalTensor& q_offset, int64_t max_q, int64_t max_k,
                          int64_t total_k, int64_t block_size) {
  BuildBlockIndex call;
  call.topk_idx = index_view("topk_idx", topk_idx);
  call.seq = sequences(cu_q, cu_k, q_offset, max_q, max_k);
  call.block_size = block_size;
  const int64_t heads = size(call.topk_idx, 0);
  const int64_t batch = size(call.seq.cu_seqlens_k, 0) - 1;
  const int64_t num_slots = (block_size > 0 ? total_k / block_size : 0) + batch;
  const int64_t num_entries = size(call.topk_idx, 1) * size(call.topk_idx, 2);
  Tensor start = allocate({heads, std::max<int64_t>(num_slots + 1, 0)}, DType::kInt32, topk_idx);
  Tensor entry = allocate({heads, num_entries}, DType::kInt32, topk_idx);
  call.block_start = index_view("block_start", start);
  call.block_entry = index_view("block_entry", entry);
  execute(call, topk_idx);
  return {start, entry};
}

Tensor gate_fwd(const Tensor& o_cmp, const Tensor& o_sel, const Tensor& o_win, const Tensor& gates,
                int64_t activation) {
  GateFwd call;
  call.o_cmp = view("o_cmp", o_cmp);
  call.o_sel = view("o_sel", o_sel);
  call.o_win = view("o_win", o_win);
  call.gates = view("gates", gates);
  call.activation = static_cast<GateActivation>(activation);
  Tensor o = allocate_like(o_cmp);
  call.o = view("o", o);
  execute(call, o_cmp);
  return o;
}

Tensor4 gate_bwd(const Tensor& dout, const Tensor& o_cmp, const Tensor& o_sel, const Tensor& o_win,
                 const Tensor& gates, int64_t activation) {
  const Tensor dout_rows = readable_rows(dout);
  GateBwd call;
  call.dout = view("dout", dout_rows);
  call.o_cmp = view("o_cmp", o_cmp);
  call.o_sel = view("o_sel", o_sel);
  call.o_win = view("o_win", o_win);
  call.gates = view("gates", gates);
  call.activation = static_cast<GateActivation>(activation);
  Tensor do_cmp = allocate_like(o_cmp);
  Tensor do_sel = allocate_like(o_sel);
  Tensor do_win = allocate_like(o_win);
  Tensor dgates = allocate_like(gates);
  call.do_cmp = view("do_cmp", do_cmp);
  call.do_sel = view("do_sel", do_sel);
  call.do_win = view("do_win", do_win);
  call.dgates = view("dgates", dgates);
  execute(call, o_cmp);
  return {do_cmp, do_sel, do_win, dgates};
}

}  // namespace fsattn::torch_binding
