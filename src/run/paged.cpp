#include "run/paged.h"

#include <algorithm>

#include "base/check.h"
#include "base/math.h"
#include "run/backends.h"
#include "run/nsa.h"
#include "run/region.h"
#include "run/steps.h"

namespace fsattn {
namespace {

// A packed tensor [tokens, heads, dim] in the workspace.
Rows rows_in(void* workspace, const Region& region, int64_t heads, int64_t dim) {
  return {data_in(workspace, region), heads * dim, dim};
}

int32_t* index_in(void* workspace, const Region& region) {
  return static_cast<int32_t*>(data_in(workspace, region));
}

CompressKvFwdParams compress_params(const PagedAppendParams& params, int64_t head_dim) {
  const PagedWriteParams& write = params.write;
  const int64_t total = write.packing.total_q + write.packing.batch * (write.kernel_size - 1);
  CompressKvFwdParams compress{};
  compress.shape = {write.shape.dtype,
                    write.packing.batch,
                    total,
                    total / write.kernel_stride,
                    std::min(write.packing.max_q + write.kernel_size - 1, total),
                    write.shape.num_heads_kv,
                    head_dim,
                    write.kernel_size,
                    write.kernel_stride,
                    params.kind};
  return compress;
}

void run_compress(const PagedAppendPlan& plan, const PagedAppendParams& params,
                  const PagedWriteParams& write, void* workspace, Stream stream) {
  const int64_t heads = write.shape.num_heads_kv;
  PagedScatterParams scatter{};
  scatter.packing = write.packing;
  scatter.shape = write.shape;
  scatter.k_cmp = rows_in(workspace, plan.k_cmp, heads, write.shape.head_dim);
  scatter.v_cmp = rows_in(workspace, plan.v_cmp, heads, write.shape.head_dim_v);
  scatter.cu_cmp = index_in(workspace, plan.cu_cmp);
  scatter.cmp = params.cmp;
  scatter.rope = write.rope;
  scatter.kernel_size = write.kernel_size;
  scatter.kernel_stride = write.kernel_stride;

  const Scratch scratch = scratch_in(workspace, plan.scratch);
  CompressKvFwdParams keys = compress_params(params, write.shape.head_dim);
  keys.x = write.x_k;
  keys.weight = params.weight_k;
  keys.pos_emb = params.pos_emb;
  keys.cu_seqlens = write.cu_x;
  keys.x_cmp = scatter.k_cmp;
  keys.cu_seqlens_cmp = index_in(workspace, plan.cu_cmp);
  run_step(plan.compress_k, keys, scratch, stream);  // x_k -> k_cmp, cu_cmp
  CompressKvFwdParams values = compress_params(params, write.shape.head_dim_v);
  values.x = write.x_v;
  values.weight = params.weight_v;
  values.cu_seqlens = write.cu_x;
  values.x_cmp = scatter.v_cmp;
  values.cu_seqlens_cmp = index_in(workspace, plan.cu_cmp);
  run_step(plan.compress_v, values, scratch, stream);  // x_v -> v_cmp, the same cu_cmp
  backend_of(plan.kernel.arch).paged_scatter(plan.kernel.row, scatter, stream);
}

PagedGatherParams gather_params(const PagedCopies& copies, const PagedPacking& packing,
                                const AttnShape& shape, const PagedKvView& cache, void* workspace) {
  const int64_t heads = shape.num_heads_kv;
  PagedGatherParams gather{};
  gather.packing = packing;
  gather.shape = {shape.dtype, heads, shape.head_dim, shape.head_dim_v};
  gather.cache = cache;
  gather.kernel_size = gather.kernel_stride = 1;
  gather.k = rows_in(workspace, copies.k, heads, shape.head_dim);
  gather.v = rows_in(workspace, copies.v, heads, shape.head_dim_v);
  gather.k_cmp = rows_in(workspace, copies.k_cmp, heads, shape.head_dim);
  gather.v_cmp = rows_in(workspace, copies.v_cmp, heads, shape.head_dim_v);
  gather.cu_k = index_in(workspace, copies.cu_k);
  gather.cu_cmp = index_in(workspace, copies.cu_cmp);
  gather.q_offset = index_in(workspace, copies.q_offset);
  return gather;
}

// An attention that reads pages.
template <class Params>
void set_pages(Params& params, const PagedKvView& cache) {
  const int64_t heads = params.attn.shape.num_heads_kv;
  params.pages = keys_in_pages(cache, heads);
  const bool has_one_head =
      heads == 1 || params.pages.head_rows > 0;  // a row; its stride is unused
  const auto rows_of = [&](const PagedRows& rows) -> Rows {
    return {rows.data, rows.token_stride, has_one_head ? rows.token_stride : rows.head_stride};
  };
  params.attn.k = rows_of(cache.k);
  params.attn.v = rows_of(cache.v);
}

void set_pages(SelectBlocksParams& select, const PagedKvView& cache) {
  select.pages = keys_in_pages(cache, select.shape.num_heads_kv);
  select.k_cmp = {cache.k.data, cache.k.token_stride,
                  select.pages.head_rows > 0 ? 0 : cache.k.head_stride};
}

// The packed sequences that a gather makes.
Packing packing_of(const PagedGatherParams& gather) {
  const PagedPacking& paged = gather.packing;
  return {paged.batch,     paged.cu_q,    gather.cu_k,
          gather.q_offset, paged.total_q, paged.batch * paged.max_k,
          paged.max_q,     paged.max_k};
}

AttnFwdTensors branch_tensors(const PagedAttnParams& params, const Packing& packing, const Rows& k,
                              const Rows& v, const Rows& o, void* lse) {
  return {
      packing, params.shape, params.q, k, v, o, {lse, packing.total_q}
  };
}

SelectBlocksParams select_params(const PagedAttnParams& params, const AttnFwdTensors& compressed,
                                 const CompressedMask& mask, int32_t* topk_idx) {
  SelectBlocksParams select{};
  select.packing = compressed.packing;
  select.shape = params.shape;
  select.q = params.q;
  select.k_cmp = compressed.k;
  select.lse = compressed.lse;
  select.mask = mask;
  select.block_size = params.block_size;
  select.topk = params.topk;
  select.init_blocks = params.init_blocks;
  select.local_blocks = params.local_blocks;
  select.group_reduce = params.group_reduce;
  select.score_dtype = params.score_dtype;
  select.topk_idx = topk_idx;
  return select;
}

NsaFwdParams step_params(const PagedAttnPlan& plan, const PagedAttnParams& params,
                         const PagedGatherParams& gather, void* workspace) {
  const Packing packing = packing_of(gather);
  const int64_t rows_cmp =
      packing.batch * num_windows(packing.max_k, params.kernel_size, params.kernel_stride);
  Packing packing_cmp = packing;
  packing_cmp.total_k = rows_cmp * params.kernel_stride;
  const AttnShape& shape = params.shape;
  const auto out = [&](const Region& region) {
    return rows_in(workspace, region, shape.num_heads_q, shape.head_dim_v);
  };
  NsaFwdParams steps{};
  steps.compressed.attn = branch_tensors(params, packing_cmp, gather.k_cmp, gather.v_cmp,
                                         out(plan.o_cmp), data_in(workspace, plan.lse_cmp));
  steps.compressed.mask = {gather.cu_cmp, rows_cmp, params.kernel_size, params.kernel_stride};
  steps.select =
      select_params(params, steps.compressed.attn, steps.compressed.mask, params.topk_idx);
  // Every element of o is written by who has read that of selected attention.
  steps.selected.attn = branch_tensors(params, packing, gather.k, gather.v, params.o,
                                       data_in(workspace, plan.lse_sel));
  steps.selected.mask = {params.topk_idx,   packing.total_q * params.topk,
                         params.topk,       params.topk,
                         params.block_size, BlockIndexView{}};
  steps.selected.workspace_cap = plan.workspace_cap;
  steps.window.attn = branch_tensors(params, packing, gather.k, gather.v, out(plan.o_win),
                                     data_in(workspace, plan.lse_win));
  steps.window.mask = {params.window_size};
  if (plan.reads_pages) {
    set_pages(steps.selected, params.cache);
    set_pages(steps.window, params.cache);
  }
  if (plan.reads_cmp_pages) {
    set_pages(steps.compressed, params.cmp);
    set_pages(steps.select, params.cmp);
  }
  steps.gate = {
      {shape.dtype, packing.total_q, shape.num_heads_q, shape.head_dim_v, params.activation},
      steps.compressed.attn.o,
      steps.selected.attn.o,
      steps.window.attn.o,
      params.gates,
      params.o
  };
  return steps;
}

}  // namespace

void run_append(const PagedAppendPlan& plan, const PagedAppendParams& params, void* workspace,
                Stream stream) {
  const Backend& backend = backend_of(plan.kernel.arch);
  if (plan.kernel.is_fused) {
    PagedAppendParams fused = params;
    fused.tuning = plan.kernel.tuning;
    fused.scratch = scratch_in(workspace, plan.scratch);
    backend.paged_append(plan.kernel.row, fused, stream);
    return;
  }
  PagedWriteParams write = params.write;
  if (plan.has_cmp) {
    const PagedShape& shape = write.shape;
    write.x_k = rows_in(workspace, plan.x_k, shape.num_heads_kv, shape.head_dim);
    write.x_v = rows_in(workspace, plan.x_v, shape.num_heads_kv, shape.head_dim_v);
    write.cu_x = index_in(workspace, plan.cu_x);
  }
  backend.paged_write(plan.kernel.row, write, stream);
  if (plan.has_cmp) run_compress(plan, params, write, workspace, stream);
}

void run_paged_attn(const PagedAttnPlan& plan, const PagedAttnParams& params, void* workspace,
                    Stream stream) {
  const Backend& backend = backend_of(plan.kernel.arch);
  PagedAttnParams p = params;
  if (p.topk_idx == nullptr) p.topk_idx = index_in(workspace, plan.topk_idx);
  if (plan.kernel.is_fused) {
    p.tuning = plan.kernel.tuning;
    p.scratch = scratch_in(workspace, plan.scratch);
    backend.paged_attn(plan.kernel.row, p, stream);
    return;
  }
  PagedGatherParams gather = gather_params(plan.copies, p.packing, p.shape, p.cache, workspace);
  gather.cmp = p.cmp;
  gather.kernel_size = p.kernel_size;
  gather.kernel_stride = p.kernel_stride;
  const NsaFwdParams steps = step_params(plan, p, gather, workspace);
  void* const scratch = data_in(workspace, plan.scratch);
  backend.paged_gather(plan.kernel.row, gather, stream);
  if (backend.fork_stream == nullptr) {
    run_nsa_fwd(plan.steps, steps, scratch, stream);
    return;
  }
  // The tiles of the window fill the SMs that run out of those of compressed attention. It needs no scratch memory.
  FSATTN_ASSERT(plan.steps.window.workspace_bytes == 0);
  const Stream side = backend.fork_stream(stream);
  run_nsa_fwd_compressed(plan.steps, steps, scratch, stream);
  run_nsa_fwd_window(plan.steps, steps, scratch, side);
  backend.join_stream(side, stream);
  run_nsa_fwd_selected(plan.steps, steps, scratch, stream);
}

void run_paged_selected(const PagedSelectedPlan& plan, const PagedSelectedParams& params,
                        void* workspace, Stream stream) {
  const Backend& backend = backend_of(plan.kernel.arch);
  if (plan.kernel.is_fused) {
    PagedSelectedParams fused = params;
    fused.tuning = plan.kernel.tuning;
    fused.scratch = scratch_in(workspace, plan.scratch);
    backend.paged_selected(plan.kernel.row, fused, stream);
    return;
  }
  const PagedGatherParams gather =
      gather_params(plan.copies, params.packing, params.shape, params.cache, workspace);
  backend.paged_gather(plan.kernel.row, gather, stream);
  SelectedAttnFwdParams selected{};
  selected.attn = {packing_of(gather), params.shape, params.q,  gather.k,
                   gather.v,           params.o,     params.lse};
  selected.mask = params.mask;
  selected.workspace_cap = plan.workspace_cap;
  if (plan.reads_pages) set_pages(selected, params.cache);
  run_step(plan.selected, selected, scratch_in(workspace, plan.scratch), stream);
}

}  // namespace fsattn
