// The compiled kernels of gate.
#pragma once
#include <array>

#include "base/dtype.h"

namespace fsattn {

// A row is one compiled pair of kernels, forward and backward, and their template argument.
struct GateConfig {
  Arch arch;
  DType dtype;
};

// The first row whose dtype fits wins; the kernels run on every GPU from Ampere on.
inline constexpr std::array kGateTable{
    GateConfig{Arch::kSm80, DType::kBFloat16},
    GateConfig{Arch::kSm80, DType::kFloat16 },
};

// Returns the row, or -1 when no kernel fits.
constexpr int find_gate_row(DType dtype) {
  for (int row = 0; row < static_cast<int>(kGateTable.size()); ++row) {
    if (kGateTable[static_cast<size_t>(row)].dtype == dtype) return row;
  }
  return -1;
}

static_assert(find_gate_row(DType::kFloat16) == 1 && find_gate_row(DType::kFloat32) == -1);

}  // namespace fsattn
