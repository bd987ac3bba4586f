// Step 1 of a call over a paged cache; see api/validate.h. On the CPU block tables and lengths are
// checked too; on CUDA they are never trusted.
#pragma once
#include "api/validate.h"
#include "fsattn/paged.h"
#include "params/paged.h"
#include "plan/paged_problem.h"

namespace fsattn {

Checked<PagedProblem, PagedAppendParams> validate(const AppendKv& call, Purpose purpose);
Checked<PagedProblem, PagedAttnParams> validate(const PagedNativeSparseAttention& call,
                                                Purpose purpose);
Checked<PagedProblem, PagedSelectedParams> validate(const PagedSelectedAttention& call,
                                                    Purpose purpose);

}  // namespace fsattn
