// Calls over a paged cache, fused or as a sequence of steps inside one workspace (plan/paged_plan.h).
#pragma once
#include "params/paged.h"
#include "plan/paged_plan.h"

namespace fsattn {

void run_append(const PagedAppendPlan& plan, const PagedAppendParams& params, void* workspace,
                Stream stream);
void run_paged_attn(const PagedAttnPlan& plan, const PagedAttnParams& params, void* workspace,
                    Stream stream);
void run_paged_selected(const PagedSelectedPlan& plan, const PagedSelectedParams& params,
                        void* workspace, Stream stream);

}  // namespace fsattn
