#pragma once
#include "base/device.h"
#include "params/backend.h"
#include "plan/plan.h"

namespace fsattn {

// The functions that carry out a plan.
const Backend& backend_of(Arch arch);
inline const Backend& backend_of(const Plan& plan) { return backend_of(plan.arch); }

// The instruction set that the CPU backend uses. Throws when FSATTN_ISA names an impossible one.
const char* cpu_instruction_set();

}  // namespace fsattn
