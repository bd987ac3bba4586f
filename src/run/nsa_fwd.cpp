#include "run/nsa.h"
#include "run/region.h"
#include "run/steps.h"

namespace fsattn {

void run_nsa_fwd(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                 Stream stream) {
  run_nsa_fwd_compressed(plan, params, workspace, stream);
  run_nsa_fwd_window(plan, params, workspace, stream);
  run_nsa_fwd_selected(plan, params, workspace, stream);
}

void run_nsa_fwd_compressed(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                            Stream stream) {
  if (plan.compressed_select_row >= 0) {  // q, k_cmp, v_cmp -> o_cmp, lse, topk_idx
    run_compressed_select(plan.compressed, plan.compressed_select_row, params.compressed,
                          params.select, stream);
    return;
  }
  const Scratch scratch = scratch_in(workspace, plan.scratch);
  run_step(plan.compressed, params.compressed, scratch, stream);  // q, k_cmp, v_cmp -> o_cmp, lse
  if (plan.has_select) {
    run_step(plan.select, params.select, scratch, stream);  // q, k_cmp, lse -> topk_idx
  }
}

void run_nsa_fwd_window(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                        Stream stream) {
  run_step(plan.window, params.window, scratch_in(workspace, plan.scratch), stream);  // -> o_win
}

void run_nsa_fwd_selected(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                          Stream stream) {
  const Scratch scratch = scratch_in(workspace, plan.scratch);
  SelectedAttnFwdParams selected = params.selected;
  if (plan.merges_gate) selected.gate = params.gate;
  run_step(plan.selected, selected, scratch, stream);  // q, k, v, topk_idx -> o_sel, and o
  if (!plan.merges_gate) {
    run_step(plan.gate, params.gate, scratch, stream);  // o_cmp, o_sel, o_win, gates -> o
  }
}

}  // namespace fsattn
