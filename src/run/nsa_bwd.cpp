#include "run/nsa.h"
#include "run/region.h"
#include "run/steps.h"

namespace fsattn {

void run_nsa_bwd(const NsaBwdPlan& plan, const NsaBwdParams& params, void* workspace,
                 Stream stream) {
  NsaBwdParams p = params;
  p.gate.do_cmp.data = p.compressed.attn.dout.data = data_in(workspace, plan.do_cmp);
  p.gate.do_sel.data = p.selected.attn.dout.data = data_in(workspace, plan.do_sel);
  p.gate.do_win.data = p.window.attn.dout.data = data_in(workspace, plan.do_win);
  const Scratch scratch = scratch_in(workspace, plan.scratch);
  run_step(plan.gate, p.gate, scratch, stream);  // dout -> do_cmp, do_sel, do_win, dgates
  run_step(plan.compressed, p.compressed, scratch, stream);  // -> dq, dk_cmp, dv_cmp
  run_step(plan.selected, p.selected, scratch, stream);      // -> dq added; dk, dv
  run_step(plan.window, p.window, scratch, stream);          // -> dq, dk, dv added
}

}  // namespace fsattn
