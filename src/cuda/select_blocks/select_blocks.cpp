#include "cuda/select_blocks/select_blocks.h"

#include <utility>

namespace fsattn {
namespace {

using Launcher = void (*)(const SelectBlocksParams&, Stream);

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launcher, sizeof...(kRow)>{&launch_select_blocks<kSelectBlocksTable[kRow]>...};
}
(std::make_index_sequence<kSelectBlocksTable.size()>{});

}  // namespace

void launch_select_blocks(int row, const SelectBlocksParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row))(params, stream);
}

}  // namespace fsattn
