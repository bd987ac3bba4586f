// The gated sum of the three branches on the CPU. Contract: GateFwd and GateBwd in fsattn/ops.h.
// Signatures as in params/backend.h; row and stream have no meaning here.
#pragma once
#include "params/gate.h"

namespace fsattn::cpu {

// o = g0 * o_cmp + g1 * o_sel + g2 * o_win in fp32 (fp64 for fp64), rounded once.
void gate_fwd(int row, const GateFwdParams& params, Stream stream);

// do_i = g_i * dout. dgates_i = dot(dout, o_i), times g_i (1 - g_i) when the sigmoid is fused; gates
// per token sum over their heads, in ascending order: any number of threads gives the same bits.
void gate_bwd(int row, const GateBwdParams& params, Stream stream);

}  // namespace fsattn::cpu
