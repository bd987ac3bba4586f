// Step 2 of a call: decide. Pure functions of the problem and the device, without any CUDA call, so
// that every choice is tested on a machine without a GPU.
#pragma once
#include <cstddef>
#include <string>

#include "base/device.h"
#include "plan/problem.h"

namespace fsattn {

// The order of the loops of the selected attention; other operators have one algorithm.
enum class Algorithm : int {
  kOnly,
  kQueryMajor,  // outer loop over queries
  kBlockMajor,  // outer loop over blocks of keys
};

struct Plan {
  Op op{};
  Pass pass{};
  Arch arch = Arch::kCpu;
  Algorithm algorithm = Algorithm::kOnly;
  int row = 0;  // index into the operator's kernel table; 0 on the CPU
  size_t workspace_bytes = 0;
  std::string reason;  // why this row

  friend bool operator==(const Plan&, const Plan&) = default;
};

// Throws kUnsupported, with the nearest kernel there is, when no kernel of this build and device
// takes the problem.
Plan make_plan(const Problem& problem, const DeviceInfo& device);

const char* name_of(Op op);
const char* name_of(Pass pass);
const char* name_of(Algorithm algorithm);

// One line each, for explain() and the log.
std::string to_string(const Problem& problem);
std::string to_string(const Plan& plan);

}  // namespace fsattn
