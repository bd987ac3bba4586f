#include "cuda/decode/decode.h"

#include <utility>

namespace fsattn {
namespace {

using AttnLauncher = void (*)(const PagedAttnParams&, Stream);
using SelectedLauncher = void (*)(const PagedSelectedParams&, Stream);

constexpr auto kAttnLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<AttnLauncher, sizeof...(kRow)>{&launch_paged_attn<kDecodeTable[kRow]>...};
}
(std::make_index_sequence<kDecodeTable.size()>{});

constexpr auto kSelectedLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<SelectedLauncher, sizeof...(kRow)>{
      &launch_paged_selected<kDecodeTable[kRow]>...};
}
(std::make_index_sequence<kDecodeTable.size()>{});

}  // namespace

void launch_paged_attn(int row, const PagedAttnParams& params, Stream stream) {
  kAttnLaunchers.at(static_cast<size_t>(row))(params, stream);
}

void launch_paged_selected(int row, const PagedSelectedParams& params, Stream stream) {
  kSelectedLaunchers.at(static_cast<size_t>(row))(params, stream);
}

}  // namespace fsattn
