// Native sparse attention as a sequence of steps inside one workspace (plan/nsa_plan.h).
#pragma once
#include "params/nsa.h"
#include "plan/nsa_plan.h"

namespace fsattn {

void run_nsa_fwd(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                 Stream stream);
// Its two halves: what reads compressed keys, and what reads tokens.
void run_nsa_fwd_compressed(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                            Stream stream);
void run_nsa_fwd_tokens(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                        Stream stream);
void run_nsa_bwd(const NsaBwdPlan& plan, const NsaBwdParams& params, void* workspace,
                 Stream stream);

}  // namespace fsattn
