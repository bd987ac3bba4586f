#include "cuda/block_index/block_index.h"

#include <utility>

namespace fsattn {
namespace {

using Launcher = void (*)(const BlockIndexParams&, Stream);

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launcher, sizeof...(kRow)>{&launch_block_index<kBlockIndexTable[kRow]>...};
}
(std::make_index_sequence<kBlockIndexTable.size()>{});

}  // namespace

void launch_block_index(int row, const BlockIndexParams& params, Stream stream) {
  kLaunchers.at(static_cast<std::size_t>(row))(params, stream);
}

}  // namespace fsattn
