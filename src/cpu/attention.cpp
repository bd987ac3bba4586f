#include "cpu/attention.h"

#include "cpu/attention_bwd.h"
#include "cpu/attention_fwd.h"
#include "cpu/block_index.h"

namespace fsattn::cpu {
namespace {

template <class Mask>
void run_fwd(const AttnFwdParams<Mask>& params) {
  if (params.attn.shape.dtype == DType::kFloat64) {
    attn_fwd<Mask, double>(params);
  } else {
    attn_fwd<Mask, float>(params);
  }
}

// The index that the dK, dV pass walks over: none for the masks whose queries are an interval.
template <class Mask>
BlockIndexView find_index(const Packing&, const AttnShape&, const Mask&, const CpuAttnLayout&,
                          ScratchArena&) {
  return {};
}

BlockIndexView find_index(const Packing& packing, const AttnShape& shape, const SelectedMask& mask,
                          const CpuAttnLayout& layout, ScratchArena& arena) {
  if (mask.index.start != nullptr) return mask.index;
  const auto count = [](size_t bytes) { return static_cast<int64_t>(bytes / sizeof(int32_t)); };
  BlockIndexParams build{packing, shape.num_heads_kv, mask, {}};
  build.mask.index.num_slots = packing.total_k / mask.block_size + packing.batch;
  build.mask.index.start = arena.take<int32_t>(count(layout.index_start));
  build.mask.index.entry = arena.take<int32_t>(count(layout.index_entry));
  build.scratch = {arena.take<int32_t>(count(layout.index_counts)), layout.index_counts};
  block_index(0, build, nullptr);
  return build.mask.index;
}

inline void add_index(CpuAttnDims& dims, const Packing& packing, const SelectedMask& mask) {
  if (mask.index.start == nullptr) {
    dims.num_slots = packing.total_k / mask.block_size + packing.batch;
  }
}
template <class Mask>
void add_index(CpuAttnDims&, const Packing&, const Mask&) {}

template <class Mask, class Real>
void attn_bwd(const AttnBwdParams<Mask>& params) {
  const AttnBwdTensors& attn = params.attn;
  const Packing& packing = attn.packing;
  CpuAttnDims dims = attn_dims<Real>(kOpOf<Mask>, Pass::kBwd, packing, attn.shape);
  add_mask(dims, params.mask);
  add_index(dims, packing, params.mask);
  const CpuAttnLayout layout = make_cpu_attn_layout(dims);
  AttnJob<Mask, Real> job(
      packing, params.mask,
      {&tile_ops<Real>(attn.shape.dtype), attn.shape, attn.k, attn.v, PanelKind::kBwd}, layout,
      params.scratch);
  Real* delta = job.arena().template take<Real>(attn.shape.num_heads_q * packing.total_q);
  const TaskTable key_tiles = make_task_table(job.arena(), packing.batch, [&](int64_t seq) {
    return ceil_div(job.sequence(seq).num_keys, tile_keys(params.mask));
  });
  const BlockIndexView index = find_index(packing, attn.shape, params.mask, layout, job.arena());
  const BwdJob<Mask, Real> bwd{attn, job, delta, key_tiles};
  run_dq_pass(bwd);
  run_dkv_pass(bwd, index);
}

template <class Mask>
void run_bwd(const AttnBwdParams<Mask>& params) {
  if (params.attn.shape.dtype == DType::kFloat64) {
    attn_bwd<Mask, double>(params);
  } else {
    attn_bwd<Mask, float>(params);
  }
}

}  // namespace

void compressed_attn_fwd(int /*row*/, const CompressedAttnFwdParams& params, Stream /*stream*/) {
  run_fwd(params);
}
void compressed_attn_bwd(int /*row*/, const CompressedAttnBwdParams& params, Stream /*stream*/) {
  run_bwd(params);
}
void selected_attn_fwd(int /*row*/, const SelectedAttnFwdParams& params, Stream /*stream*/) {
  run_fwd(params);
}
void selected_attn_bwd(int /*row*/, const SelectedAttnBwdParams& params, Stream /*stream*/) {
  run_bwd(params);
}
void window_attn_fwd(int /*row*/, const WindowAttnFwdParams& params, Stream /*stream*/) {
  run_fwd(params);
}
void window_attn_bwd(int /*row*/, const WindowAttnBwdParams& params, Stream /*stream*/) {
  run_bwd(params);
}

}  // namespace fsattn::cpu
