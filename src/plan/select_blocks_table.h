// The compiled kernels of select_blocks and the shared memory they need.
#pragma once
#include <algorithm>
#include <array>

#include "base/dtype.h"
#include "base/math.h"
#include "plan/problem.h"

namespace fsattn {

// A row serves head dims up to its own: smaller ones are padded with zeros in shared memory.
// Rows with 32 queries a CTA are for the 99 KiB of sm_86 and sm_89.
struct SelectBlocksConfig {
  Arch arch;
  DType dtype;
  int head_dim;
  int tile_q;  // queries of a CTA
};

// Columns: arch, dtype, head_dim, tile_q. The first row that fits wins.
inline constexpr std::array kSelectBlocksTable{
    SelectBlocksConfig{Arch::kSm90a, DType::kBFloat16, 128, 64 },
    SelectBlocksConfig{Arch::kSm90a, DType::kBFloat16, 128, 128},
    SelectBlocksConfig{Arch::kSm90a, DType::kFloat16,  128, 64 },
    SelectBlocksConfig{Arch::kSm90a, DType::kFloat16,  128, 128},
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 64,  64 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 128, 64 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 128, 32 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 256, 64 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 192, 32 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  64,  64 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  128, 64 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  128, 32 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  256, 64 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  192, 32 },
};

inline constexpr int kSelectTileKv = 128;  // compressed keys of a step
inline constexpr int kSelectBuffer = 32;   // candidates of a query that wait for the next merge
inline constexpr int kSelectMaxHalo = 64;  // windows before a step that its first block may need
inline constexpr int kSelectScorePitch =
    kSelectTileKv + 4;  // floats; rows start in different banks

inline constexpr int kSelectSetupBytes = 128;  // these offsets and the call's numbers, at offset 0

// Shared memory of a CTA; offsets in bytes. The scores of a step take the place of the queries.
struct SelectBlocksSmem {
  int k, q, score, halo, list, buffer, threshold, state, bytes;
};

inline constexpr int kSelectStaticSmem = 256;  // what the kernel declares itself, at most

constexpr SelectBlocksSmem select_blocks_smem(const SelectBlocksConfig& config, int halo,
                                              int topk) {
  const int q_bytes = config.tile_q * config.head_dim * 2;
  const int score_bytes = config.tile_q * kSelectScorePitch * 4;
  SelectBlocksSmem s{};
  s.k = kSelectSetupBytes;
  s.q = s.k + kSelectTileKv * config.head_dim * 2;
  s.score = s.q;
  s.halo = s.q + std::max(2 * q_bytes, score_bytes);
  s.list = s.halo + config.tile_q * round_up(halo, 2) * 4;
  s.buffer = s.list + config.tile_q * round_up(topk, 32) * 8;
  s.threshold = s.buffer + config.tile_q * kSelectBuffer * 8;
  s.state = s.threshold + config.tile_q * 8;
  s.bytes = s.state + config.tile_q * 16;
  return s;
}

// Of the Hopper rows.
inline constexpr int kSelectSm90QStages = 4, kSelectSm90KStages = 3;  // tiles in shared memory
inline constexpr int kSelectSm90ChunkTiles = 4;   // of 32 blocks, whose scores are kept
inline constexpr int kSelectSm90MaxTopk = 32;     // candidates of a query: one a lane
inline constexpr int kSelectSm90CarryPitch = 17;  // 16 tiles; rows start in different banks
inline constexpr int kSelectSm90WorkBytes = 64;   // what a CTA computes

// Shared memory of a CTA of a Hopper row; offsets in bytes, the queries at 0.
struct SelectSm90Smem {
  int k, score, list, state, barriers, work, room, carry, bytes;
};

constexpr SelectSm90Smem select_sm90_smem(const SelectBlocksConfig& config, int num_heads) {
  const int q_tiles = config.tile_q == 128 ? 2 : std::min(num_heads, kSelectSm90QStages);
  SelectSm90Smem s{};
  s.k = q_tiles * 64 * config.head_dim * 2;
  s.score = s.k + kSelectSm90KStages * kSelectTileKv * config.head_dim * 2;
  s.list = s.score + config.tile_q * kSelectSm90ChunkTiles * 32 * 4;
  s.state = s.list + config.tile_q * kSelectSm90MaxTopk * 8;
  s.barriers = s.state + config.tile_q * 16;
  s.work = s.barriers + 2 * (kSelectSm90QStages + kSelectSm90KStages) * 8;
  s.room = s.work + kSelectSm90WorkBytes;
  s.carry = s.room + config.tile_q * 4;
  s.bytes = s.carry + (config.tile_q == 64 ? 64 * kSelectSm90CarryPitch * 4 : 0);
  return s;
}

static_assert(select_sm90_smem({Arch::kSm90a, DType::kBFloat16, 128, 64}, 4).bytes <= 227 * 1024);
static_assert(select_sm90_smem({Arch::kSm90a, DType::kBFloat16, 128, 128}, 1).bytes <= 227 * 1024);

// Groups of one have rows of their own; smaller head dims lose more to the padding than wgmma wins.
constexpr bool select_sm90_takes(const SelectBlocksConfig& config, const Problem& p) {
  const bool is_usual = p.kernel_size == 2 * p.kernel_stride && p.block_size == 4 * p.kernel_stride;
  const int tile_q = p.num_heads_q == p.num_heads_kv ? 128 : 64;
  return is_usual && config.tile_q == tile_q && p.head_dim > config.head_dim / 2 &&
         p.topk <= kSelectSm90MaxTopk;
}

// Returns the row, or -1 when no kernel fits. `smem_limit`: bytes that one CTA may have; devices with
// Hopper's instructions have what its rows need.
constexpr int find_select_blocks_row(Arch arch, const Problem& p, int64_t smem_limit) {
  const int64_t halo = p.kernel_size / p.kernel_stride - 1;
  if (halo > kSelectMaxHalo || p.block_size / p.kernel_stride > kSelectTileKv) return -1;
  for (std::size_t row = 0; row < kSelectBlocksTable.size(); ++row) {
    const SelectBlocksConfig& config = kSelectBlocksTable[row];
    if (config.dtype != p.dtype || config.head_dim < p.head_dim) continue;
    if (config.arch == Arch::kSm90a) {
      if (arch == Arch::kSm90a && select_sm90_takes(config, p)) return static_cast<int>(row);
      continue;
    }
    const SelectBlocksSmem smem =
        select_blocks_smem(config, static_cast<int>(halo), static_cast<int>(p.topk));
    if (smem.bytes + kSelectStaticSmem <= smem_limit) return static_cast<int>(row);
  }
  return -1;
}

// The kernel keeps everything on chip.
constexpr size_t select_blocks_workspace(const Problem&) { return 0; }

}  // namespace fsattn
