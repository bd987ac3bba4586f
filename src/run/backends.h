#pragma once
#include "base/device.h"
#include "params/backend.h"
#include "plan/plan.h"

namespace fsattn {

// The functions that carry out a plan.
const Backend& backend_of(const Plan& plan);

// The CPU backend's name, which says the instruction set in use.
const char* cpu_backend_name();

}  // namespace fsattn
