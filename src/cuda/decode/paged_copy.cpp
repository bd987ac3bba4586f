#include "cuda/decode/paged_copy.h"

#include <utility>

namespace fsattn {
namespace {

struct Launchers {
  void (*write)(const PagedWriteParams&, Stream);
  void (*scatter)(const PagedScatterParams&, Stream);
  void (*gather)(const PagedGatherParams&, Stream);
};

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launchers, sizeof...(kRow)>{
      Launchers{&launch_paged_write<kPagedCopyTable[kRow]>,
                &launch_paged_scatter<kPagedCopyTable[kRow]>,
                &launch_paged_gather<kPagedCopyTable[kRow]>}
      ...
  };
}
(std::make_index_sequence<kPagedCopyTable.size()>{});

}  // namespace

void launch_paged_write(int row, const PagedWriteParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).write(params, stream);
}

void launch_paged_scatter(int row, const PagedScatterParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).scatter(params, stream);
}

void launch_paged_gather(int row, const PagedGatherParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).gather(params, stream);
}

}  // namespace fsattn
