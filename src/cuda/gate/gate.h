#pragma once
#include "params/gate.h"
#include "plan/gate_table.h"

namespace fsattn {

void launch_gate_fwd(int row, const GateFwdParams& params, Stream stream);
void launch_gate_bwd(int row, const GateBwdParams& params, Stream stream);
void launch_gate_bwd_stats(int row, const GateStatsParams& params, Stream stream);

template <GateConfig kConfig>
void launch_gate_fwd(const GateFwdParams& params, Stream stream);
template <GateConfig kConfig>
void launch_gate_bwd(const GateBwdParams& params, Stream stream);
template <GateConfig kConfig>
void launch_gate_bwd_stats(const GateStatsParams& params, Stream stream);

}  // namespace fsattn
