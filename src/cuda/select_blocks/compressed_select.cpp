#include "cuda/select_blocks/compressed_select.h"

#include <utility>

namespace fsattn {
namespace {

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array{&launch_compressed_select<kCompressedSelectTable[kRow]>...};
}
(std::make_index_sequence<kCompressedSelectTable.size()>{});

}  // namespace

void launch_compressed_select(int row, const CompressedAttnFwdParams& attn,
                              const SelectBlocksParams& select, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row))(attn, select, stream);
}

}  // namespace fsattn
