#include "base/math.h"
#include "run/backends.h"
#include "run/nsa.h"
#include "run/region.h"
#include "run/steps.h"

namespace fsattn {
namespace {

// dout -> dgates, and do_cmp, do_sel, do_win in the workspace.
void run_gate(const NsaBwdPlan& plan, NsaBwdParams& p, void* workspace, Stream stream) {
  p.gate.do_cmp.data = p.compressed.attn.dout.data = data_in(workspace, plan.do_cmp);
  p.gate.do_sel.data = p.selected.attn.dout.data = data_in(workspace, plan.do_sel);
  p.gate.do_win.data = p.window.attn.dout.data = data_in(workspace, plan.do_win);
  run_step(plan.gate, p.gate, scratch_in(workspace, plan.scratch), stream);
}

// A branch whose gate is folded into P reads dout itself. Returns where its statistics go.
BranchStats fold_gate(const GateBwdParams& gate, AttnBwdTensors& attn, void* workspace,
                      const Region& stats, bool is_selected) {
  auto* data = static_cast<float*>(data_in(workspace, stats));
  BranchStats branch{attn.o, attn.lse, nullptr, data};
  attn.dout = gate.dout;
  if (!is_selected) {
    branch.gated_lse = data;
    branch.row_stats = data + gate.shape.total * gate.shape.num_heads;
    attn.lse = {data, gate.shape.total};
  }
  attn.row_stats = branch.row_stats;
  return branch;
}

// dout -> dgates, and the statistics of the branches in the workspace.
void run_folded_gate(const NsaBwdPlan& plan, NsaBwdParams& p, void* workspace, Stream stream) {
  const GateStatsParams params{
      p.gate.shape,
      p.gate.dout,
      fold_gate(p.gate, p.compressed.attn, workspace, plan.stats_cmp, false),
      fold_gate(p.gate, p.selected.attn, workspace, plan.stats_sel, true),
      fold_gate(p.gate, p.window.attn, workspace, plan.stats_win, false),
      p.gate.gates,
      p.gate.dgates};
  run_step(plan.gate, params, scratch_in(workspace, plan.scratch), stream);
}

void run_gate_step(const NsaBwdPlan& plan, NsaBwdParams& p, void* workspace, Stream stream) {
  if (plan.folds_gates) {
    run_folded_gate(plan, p, workspace, stream);
  } else {
    run_gate(plan, p, workspace, stream);
  }
}

// The block index of selected attention, of use to it alone.
void run_index(const NsaBwdPlan& plan, const SelectedAttnBwdParams& selected, void* workspace,
               Stream stream) {
  const BlockIndexParams params{
      selected.attn.packing, selected.attn.shape.num_heads_kv, selected.mask, {}};
  run_step(plan.index, params, scratch_in(workspace, plan.scratch_index), stream);
}

BlockIndexView index_in(void* workspace, const NsaBwdPlan& plan, const SelectedMask& mask,
                        const Packing& packing) {
  return {static_cast<int32_t*>(data_in(workspace, plan.index_start)),
          static_cast<int32_t*>(data_in(workspace, plan.index_entry)),
          first_block_slot(packing.total_k, packing.batch, mask.block_size)};
}

// Window and compressed attention leave their parts of dq in the sums, so compressed and selected
// attention depend on each other only where the latter adds up its own: they share the device. In a
// short sequence the former has few key tiles, of very different work: alone it would leave the GPU half
// empty. The index is built beside the gate, which waits for memory.
void run_sharing_dq(const NsaBwdPlan& plan, NsaBwdParams& p, void* workspace, Stream stream) {
  auto* sums = static_cast<float*>(data_in(workspace, plan.dq_sums));
  auto* turns_win = static_cast<int32_t*>(data_in(workspace, plan.turns_win));
  auto* turns_cmp = static_cast<int32_t*>(data_in(workspace, plan.turns_cmp));
  p.window.attn.shared_dq = {sums, turns_win, nullptr};
  p.window.attn.accumulate_dkv = false;
  p.compressed.attn.shared_dq = p.selected.attn.shared_dq = {sums, turns_cmp, turns_win};
  p.selected.attn.accumulate_dq = false;
  p.selected.attn.accumulate_dkv = true;
  p.selected.mask.index = index_in(workspace, plan, p.selected.mask, p.selected.attn.packing);
  const Backend& backend = backend_of(plan.compressed);
  const Scratch scratch = scratch_in(workspace, plan.scratch);
  const Scratch scratch_cmp = scratch_in(workspace, plan.scratch_cmp);
  Stream side = backend.fork_stream(stream);
  run_index(plan, p.selected, workspace, side);
  run_gate_step(plan, p, workspace, stream);
  backend.join_stream(side, stream);
  run_step(plan.window, p.window, scratch, stream);  // -> sums, dk, dv
  side = backend.fork_stream(stream);
  run_step(plan.compressed, p.compressed, scratch_cmp, side);  // -> sums, dk_cmp, dv_cmp
  p.selected.side = side;
  run_step(plan.selected, p.selected, scratch, stream);  // -> dq from all, dk and dv added
}

void run_in_turn(const NsaBwdPlan& plan, NsaBwdParams& p, void* workspace, Stream stream) {
  run_gate_step(plan, p, workspace, stream);
  const Scratch scratch = scratch_in(workspace, plan.scratch);
  run_step(plan.compressed, p.compressed, scratch, stream);  // -> dq, dk_cmp, dv_cmp
  run_step(plan.selected, p.selected, scratch, stream);      // -> dq added; dk, dv
  run_step(plan.window, p.window, scratch, stream);          // -> dq, dk, dv added
}

}  // namespace

void run_nsa_bwd(const NsaBwdPlan& plan, const NsaBwdParams& params, void* workspace,
                 Stream stream) {
  NsaBwdParams p = params;
  (plan.shares_dq ? run_sharing_dq : run_in_turn)(plan, p, workspace, stream);
}

}  // namespace fsattn
