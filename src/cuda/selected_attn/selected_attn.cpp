#include "cuda/selected_attn/selected_attn.h"

#include <utility>

namespace fsattn {
namespace {

using FwdLauncher = void (*)(const SelectedAttnFwdParams&, Stream);

constexpr auto kFwdLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<FwdLauncher, sizeof...(kRow)>{
      &launch_selected_attn_fwd<kSelectedAttnFwdTable[kRow]>...};
}
(std::make_index_sequence<kSelectedAttnFwdTable.size()>{});

using BwdLauncher = void (*)(const SelectedAttnBwdParams&, Stream);

constexpr auto kBwdLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<BwdLauncher, sizeof...(kRow)>{
      &launch_selected_attn_bwd<kSelectedAttnBwdTable[kRow]>...};
}
(std::make_index_sequence<kSelectedAttnBwdTable.size()>{});

}  // namespace

void launch_selected_attn_fwd(int row, const SelectedAttnFwdParams& params, Stream stream) {
  kFwdLaunchers.at(static_cast<std::size_t>(row))(params, stream);
}

void launch_selected_attn_bwd(int row, const SelectedAttnBwdParams& params, Stream stream) {
  kBwdLaunchers.at(static_cast<std::size_t>(row))(params, stream);
}

}  // namespace fsattn
