// Native sparse attention as a sequence of steps inside one workspace (plan/nsa_plan.h).
#pragma once
#include "params/nsa.h"
#include "plan/nsa_plan.h"

namespace fsattn {

void run_nsa_fwd(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                 Stream stream);
// Its parts: what reads compressed keys, what reads tokens near the queries, and the rest.
void run_nsa_fwd_compressed(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                            Stream stream);
void run_nsa_fwd_window(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                        Stream stream);
void run_nsa_fwd_selected(const NsaFwdPlan& plan, const NsaFwdParams& params, void* workspace,
                          Stream stream);
void run_nsa_bwd(const NsaBwdPlan& plan, const NsaBwdParams& params, void* workspace,
                 Stream stream);

}  // namespace fsattn
