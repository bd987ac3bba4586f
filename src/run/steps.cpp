#include "run/steps.h"

#include "run/backends.h"

namespace fsattn {

void run_step(const Plan& plan, CompressKvFwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).compress_kv_fwd(plan.row, params, stream);
}

void run_step(const Plan& plan, CompressKvBwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).compress_kv_bwd(plan.row, params, stream);
}

void run_step(const Plan& plan, CompressedAttnFwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).compressed_attn_fwd(plan.row, params, stream);
}

void run_step(const Plan& plan, CompressedAttnBwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).compressed_attn_bwd(plan.row, params, stream);
}

void run_step(const Plan& plan, SelectBlocksParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).select_blocks(plan.row, params, stream);
}

void run_compressed_select(const Plan& compressed, int row, const CompressedAttnFwdParams& attn,
                           const SelectBlocksParams& select, Stream stream) {
  backend_of(compressed).compressed_select(row, attn, select, stream);
}

void run_step(const Plan& plan, BlockIndexParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).block_index(plan.row, params, stream);
}

void run_step(const Plan& plan, SelectedAttnFwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).selected_attn_fwd(plan.row, params, stream);
}

void run_step(const Plan& plan, SelectedAttnBwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).selected_attn_bwd(plan.row, params, stream);
}

void run_step(const Plan& plan, WindowAttnFwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).window_attn_fwd(plan.row, params, stream);
}

void run_step(const Plan& plan, WindowAttnBwdParams params, Scratch scratch, Stream stream) {
  params.scratch = scratch;
  backend_of(plan).window_attn_bwd(plan.row, params, stream);
}

void run_step(const Plan& plan, const GateFwdParams& params, Scratch, Stream stream) {
  backend_of(plan).gate_fwd(plan.row, params, stream);
}

void run_step(const Plan& plan, const GateBwdParams& params, Scratch, Stream stream) {
  backend_of(plan).gate_bwd(plan.row, params, stream);
}

void run_step(const Plan& plan, const GateStatsParams& params, Scratch, Stream stream) {
  backend_of(plan).gate_bwd_stats(plan.row, params, stream);
}

}  // namespace fsattn
