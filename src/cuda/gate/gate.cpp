#include "cuda/gate/gate.h"

#include <utility>

namespace fsattn {
namespace {

struct Launchers {
  void (*fwd)(const GateFwdParams&, Stream);
  void (*bwd)(const GateBwdParams&, Stream);
  void (*bwd_stats)(const GateStatsParams&, Stream);
};

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launchers, sizeof...(kRow)>{
      Launchers{&launch_gate_fwd<kGateTable[kRow]>, &launch_gate_bwd<kGateTable[kRow]>,
                &launch_gate_bwd_stats<kGateTable[kRow]>}
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

void launch_gate_bwd_stats(int row, const GateStatsParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).bwd_stats(params, stream);
}

}  // namespace fsattn
