#include "api/call.h"

#include <cstdint>

#include "base/check.h"
#include "plan/workspace.h"
#include "run/backends.h"

namespace fsattn {

DeviceInfo describe_device(const Device& device) {
  DeviceInfo info = query_device(device);
  if (info.type == DeviceType::kCpu) info.name = cpu_instruction_set();
  return info;
}

void check_workspace(const Execution& execution, size_t wanted) {
  if (wanted == 0) return;
  FSATTN_CHECK(execution.workspace != nullptr, kInvalidArgument, "workspace: must have ", wanted,
               " bytes, found none");
  FSATTN_CHECK(execution.workspace_bytes >= wanted, kInvalidArgument, "workspace: must have ",
               wanted, " bytes, found ", execution.workspace_bytes);
  const uintptr_t past = reinterpret_cast<uintptr_t>(execution.workspace) % kWorkspaceAlignment;
  FSATTN_CHECK(past == 0, kInvalidArgument, "workspace: must be ", kWorkspaceAlignment,
               "-byte aligned, found an address ", past, " bytes past a multiple");
}

}  // namespace fsattn
