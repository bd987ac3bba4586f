#include "cpu/tile.h"

#include "base/check.h"
#include "cpu/isa.h"

namespace fsattn::cpu {
namespace {

const TileTable& tile_table(Isa isa) {
#ifdef FSATTN_CPU_X86
  if (isa == Isa::kAvx512) return kTileTableAvx512;
  if (isa == Isa::kAvx2) return kTileTableAvx2;
#endif
  FSATTN_ASSERT(isa == Isa::kBaseline);
  return kTileTableBaseline;
}

}  // namespace

template <>
const TileOps<double>& tile_ops<double>(DType dtype) {
  FSATTN_ASSERT(dtype == DType::kFloat64);
  return tile_table(active_isa()).float64;
}

template <>
const TileOps<float>& tile_ops<float>(DType dtype) {
  const TileTable& table = tile_table(active_isa());
  if (dtype == DType::kFloat16) return table.float16;
  if (dtype == DType::kBFloat16) return table.bfloat16;
  FSATTN_ASSERT(dtype == DType::kFloat32);
  return table.float32;
}

}  // namespace fsattn::cpu
