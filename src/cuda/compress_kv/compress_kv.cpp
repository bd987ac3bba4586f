#include "cuda/compress_kv/compress_kv.h"

#include <utility>

namespace fsattn {
namespace {

struct Launchers {
  void (*fwd)(const CompressKvFwdParams&, Stream);
  void (*bwd)(const CompressKvBwdParams&, Stream);
};

constexpr auto kLaunchers = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<Launchers, sizeof...(kRow)>{
      Launchers{&launch_compress_kv_fwd<kCompressKvTable[kRow]>,
                &launch_compress_kv_bwd<kCompressKvTable[kRow]>}
      ...
  };
}
(std::make_index_sequence<kCompressKvTable.size()>{});

}  // namespace

void launch_compress_kv_fwd(int row, const CompressKvFwdParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).fwd(params, stream);
}

void launch_compress_kv_bwd(int row, const CompressKvBwdParams& params, Stream stream) {
  kLaunchers.at(static_cast<size_t>(row)).bwd(params, stream);
}

}  // namespace fsattn
