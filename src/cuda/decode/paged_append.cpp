#include "cuda/decode/paged_append.h"

#include <utility>

namespace fsattn {
namespace {

using Launcher = void (*)(const PagedAppendParams&, Stream);

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launcher, sizeof...(kRow)>{&launch_paged_append<kPagedCopyTable[kRow]>...};
}
(std::make_index_sequence<kPagedCopyTable.size()>{});

}  // namespace

void launch_paged_append(int row, const PagedAppendParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row))(params, stream);
}

}  // namespace fsattn
