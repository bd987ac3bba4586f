// What every public function does around validation, plan and run.
#pragma once
#include <cstddef>

#include "base/device.h"
#include "fsattn/ops.h"

namespace fsattn {

// The device of a call as plans see it.
DeviceInfo describe_device(const Device& device);

// Throws unless the execution has the workspace that a plan wants.
void check_workspace(const Execution& execution, size_t wanted);

}  // namespace fsattn
