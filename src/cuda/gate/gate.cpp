#include "cuda/gate/gate.h"

#include <utility>

namespace fsattn {
namespace {

struct Launchers {
  void (*fwd)(const GateFwdParams&, Stream);
  void (*bwd)(const GateBwdParams&, Stream);
};

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launchers, sizeof...(kRow)>{
      Launchers{&launch_gate_fwd<kGateTable[kRow]>, &launch_gate_bwd<kGateTable[kRow]>}
      ...
  };
}
(std::make_index_sequence<kGateTable.size()>{});

}  // namespace

void launch_gate_fwd(int row, const GateFwdParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).fwd(params, stream);
}

void launch_gate_bwd(int row, const GateBwdParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).bwd(params, stream);
}

}  // namespace fsattn
