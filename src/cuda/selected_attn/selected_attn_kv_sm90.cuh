// K and V of a block in shared memory as wgmma reads them: 64 keys, head dims 128, K first; panels of 64
// columns, 128-byte swizzle.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/copy_sm80.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"

namespace fsattn::selected {

inline constexpr int kPartKeys = 64, kPartPanelBytes = kPartKeys * 128;
inline constexpr int kPartTileBytes = 2 * kPartPanelBytes;  // of K, and of V

// One thread starts the copies; `full` expects their bytes.
__device__ __forceinline__ void load_part(uint32_t at, const CUtensorMap* k_map,
                                          const CUtensorMap* v_map, int key_row, int head,
                                          uint32_t full, uint64_t policy) {
  for (int panel = 0; panel < 2; ++panel) {
    const uint32_t k_at = at + panel * kPartPanelBytes;
    const int column = panel * device::kTmaColumns;
    device::tma_load_3d(k_at, k_map, column, head, key_row, full, policy);
    device::tma_load_3d(k_at + kPartTileBytes, v_map, column, head, key_row, full, policy);
  }
}

// K or V of a part with fewer than 64 keys: what follows them in memory may belong to another sequence, so
// its rows are zeroed. The whole warp starts the copies, and waits for those of both.
__device__ __forceinline__ void copy_short_part(const Rows& rows, uint32_t tile, int panel_bytes,
                                                int key_row, int num_keys, int head, int lane) {
  constexpr int kChunks = 16;
  const char* first = static_cast<const char*>(rows.data) +
                      (key_row * rows.token_stride + head * rows.head_stride) * 2;
  for (int c = lane; c < kPartKeys * kChunks; c += kWarpSize) {
    const int row = c / kChunks, chunk = c % kChunks;
    const bool is_inside = row < num_keys && key_row >= 0;
    const uint32_t to = tile + chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) & 7) * 16;
    device::cp_async_16(to, first + (is_inside ? row * rows.token_stride * 2 + chunk * 16 : 0),
                        is_inside);
  }
}
__device__ __forceinline__ void wait_short_part() {
  device::cp_async_commit();
  device::cp_async_wait<0>();
  device::fence_async_proxy();
  __syncwarp();
}

// Both, with one arrival on `full`.
__device__ __forceinline__ void load_short_part(const FwdArgs& a, uint32_t at, uint32_t full,
                                                int key_row, int num_keys, int head, int lane) {
  copy_short_part(a.k, at, kPartPanelBytes, key_row, num_keys, head, lane);
  copy_short_part(a.v, at + kPartTileBytes, kPartPanelBytes, key_row, num_keys, head, lane);
  wait_short_part();
  if (lane == 0) device::mbarrier_arrive(full);
}

}  // namespace fsattn::selected
