// Schemas and registration of torch.ops.fsattn.
#include <torch/csrc/stable/library.h>

#include <string>

#include "execute.h"
#include "operators.h"
#include "paged.h"

namespace fsattn::torch_binding {

namespace {

// Argument lists that a forward and its backward share.
const std::string kSeq = "Tensor cu_q, Tensor cu_k, Tensor? q_offset, int max_q, int max_k";
const std::string kCompressedTail =
    "Tensor cu_q, Tensor cu_k, Tensor cu_cmp, Tensor? q_offset, int max_q, int max_k, "
    "int kernel_size, int kernel_stride";
const std::string kSelectedTail = "Tensor? block_start, Tensor? block_entry, " + kSeq +
                                  ", int block_size, float softmax_scale, int workspace_cap";
const std::string kGradient =
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, ";
const std::string kBranchOut = " -> (Tensor o, Tensor lse)";
const std::string kBranchGradientOut = " -> (Tensor dq, Tensor dk, Tensor dv)";
const std::string kCompressOptions =
    "Tensor? weight, Tensor? pos_emb, int max_seqlen, int kernel_size, int kernel_stride, int kind";

void define_blocks(torch::stable::detail::StableLibrary& m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  define("compress_kv_fwd(Tensor x, Tensor cu_seqlens, " + kCompressOptions +
         ") -> (Tensor x_cmp, Tensor cu_seqlens_cmp)");
  define("compress_kv_bwd(Tensor dx_cmp, Tensor x, Tensor cu_seqlens, Tensor cu_seqlens_cmp, " +
         kCompressOptions + ") -> (Tensor dx, Tensor dweight, Tensor dpos_emb)");
  define("select_blocks(Tensor q, Tensor k_cmp, Tensor lse, " + kCompressedTail +
         ", int block_size, int topk, int init_blocks, int local_blocks, float softmax_scale, "
         "int group_reduce, int score_dtype) -> Tensor");
  define("build_block_index(Tensor topk_idx, " + kSeq +
         ", int total_k, int block_size) -> (Tensor block_start, Tensor block_entry)");
  define(
      "gate_fwd(Tensor o_cmp, Tensor o_sel, Tensor o_win, Tensor gates, int activation) -> Tensor");
  define(
      "gate_bwd(Tensor dout, Tensor o_cmp, Tensor o_sel, Tensor o_win, Tensor gates, "
      "int activation) -> (Tensor do_cmp, Tensor do_sel, Tensor do_win, Tensor dgates)");
}

void define_attention(torch::stable::detail::StableLibrary& m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  const std::string qkv = "Tensor q, Tensor k, Tensor v, ";
  define("compressed_attention_fwd(" + qkv + kCompressedTail + ", float softmax_scale)" +
         kBranchOut);
  define("compressed_attention_bwd(" + kGradient + kCompressedTail + ", float softmax_scale)" +
         kBranchGradientOut);
  define("selected_attention_fwd(" + qkv + "Tensor topk_idx, " + kSelectedTail + ")" + kBranchOut);
  define("selected_attention_fwd_out(" + qkv + "Tensor topk_idx, " + kSelectedTail +
         ", Tensor(a!) out, Tensor(b!) lse) -> ()");
  define("selected_attention_bwd(" + kGradient + "Tensor topk_idx, " + kSelectedTail + ")" +
         kBranchGradientOut);
  define("window_attention_fwd(" + qkv + kSeq + ", int window_size, float softmax_scale)" +
         kBranchOut);
  define("window_attention_bwd(" + kGradient + kSeq + ", int window_size, float softmax_scale)" +
         kBranchGradientOut);
  define("native_sparse_attention_fwd(" + qkv +
         "Tensor k_cmp, Tensor v_cmp, Tensor gates, Tensor? topk_idx, " + kCompressedTail +
         ", int block_size, int topk, int init_blocks, int local_blocks, int window_size, "
         "float softmax_scale, int group_reduce, int score_dtype, int activation, "
         "int workspace_cap, bool keep_o_sel=True, bool adds_means=False) -> (Tensor o, Tensor "
         "topk_idx, Tensor o_cmp, "
         "Tensor o_sel, Tensor o_win, Tensor lse_cmp, Tensor lse_sel, Tensor lse_win)");
  define("native_sparse_attention_bwd(Tensor dout, " + qkv +
         "Tensor k_cmp, Tensor v_cmp, Tensor gates, Tensor topk_idx, Tensor o_cmp, Tensor o_sel, "
         "Tensor o_win, Tensor lse_cmp, Tensor lse_sel, Tensor lse_win, " +
         kCompressedTail +
         ", int block_size, int topk, int window_size, float softmax_scale, int activation, "
         "int workspace_cap, bool adds_means=False) -> (Tensor dq, Tensor dk, Tensor dv, "
         "Tensor dk_cmp, Tensor dv_cmp, "
         "Tensor dgates)");
}

// One implementation serves both devices: the library finds the backend from the tensors.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("compress_kv_fwd", &boxed<&compress_kv_fwd>);
  m.impl("compress_kv_bwd", &boxed<&compress_kv_bwd>);
  m.impl("compressed_attention_fwd", &boxed<&compressed_attention_fwd>);
  m.impl("compressed_attention_bwd", &boxed<&compressed_attention_bwd>);
  m.impl("select_blocks", &boxed<&select_blocks>);
  m.impl("build_block_index", &boxed<&build_block_index>);
  m.impl("selected_attention_fwd", &boxed<&selected_attention_fwd>);
  m.impl("selected_attention_fwd_out", &boxed<&selected_attention_fwd_out>);
  m.impl("selected_attention_bwd", &boxed<&selected_attention_bwd>);
  m.impl("window_attention_fwd", &boxed<&window_attention_fwd>);
  m.impl("window_attention_bwd", &boxed<&window_attention_bwd>);
  m.impl("gate_fwd", &boxed<&gate_fwd>);
  m.impl("gate_bwd", &boxed<&gate_bwd>);
  m.impl("native_sparse_attention_fwd", &boxed<&native_sparse_attention_fwd>);
  m.impl("native_sparse_attention_bwd", &boxed<&native_sparse_attention_bwd>);
  implement_paged(m);
}

}  // namespace

STABLE_TORCH_LIBRARY(fsattn, m) {
  define_blocks(m);
  define_attention(m);
  define_paged(m);
}

STABLE_TORCH_LIBRARY_IMPL(fsattn, CPU, m) { implement(m); }

STABLE_TORCH_LIBRARY_IMPL(fsattn, CUDA, m) { implement(m); }

}  // namespace fsattn::torch_binding
