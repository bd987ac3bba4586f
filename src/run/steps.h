// Step 3 of a call: one short function an operator. Each gives the backend of the plan its scratch
// memory and calls it. Parameters are copied: they belong to one call.
#pragma once
#include "params/backend.h"
#include "plan/plan.h"

namespace fsattn {

void run_step(const Plan& plan, CompressKvFwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, CompressKvBwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, CompressedAttnFwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, CompressedAttnBwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, SelectBlocksParams params, Scratch scratch, Stream stream);
// Both of the two in one kernel: `row` of its table.
void run_compressed_select(const Plan& compressed, int row, const CompressedAttnFwdParams& attn,
                           const SelectBlocksParams& select, Stream stream);
void run_step(const Plan& plan, BlockIndexParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, SelectedAttnFwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, SelectedAttnBwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, WindowAttnFwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, WindowAttnBwdParams params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, const GateFwdParams& params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, const GateBwdParams& params, Scratch scratch, Stream stream);
void run_step(const Plan& plan, const GateStatsParams& params, Scratch scratch, Stream stream);

}  // namespace fsattn
