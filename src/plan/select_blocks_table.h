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
  int topk;    // blocks that a Hopper row can pick; the others: 0, any number
};

// Columns: arch, dtype, head_dim, tile_q, topk. The first row that fits wins.
inline constexpr std::array kSelectBlocksTable{
    SelectBlocksConfig{Arch::kSm90a, DType::kBFloat16, 128, 96,  16},
    SelectBlocksConfig{Arch::kSm90a, DType::kBFloat16, 128, 192, 16},
    SelectBlocksConfig{Arch::kSm90a, DType::kBFloat16, 128, 64,  32},
    SelectBlocksConfig{Arch::kSm90a, DType::kBFloat16, 128, 128, 32},
    SelectBlocksConfig{Arch::kSm90a, DType::kFloat16,  128, 96,  16},
    SelectBlocksConfig{Arch::kSm90a, DType::kFloat16,  128, 192, 16},
    SelectBlocksConfig{Arch::kSm90a, DType::kFloat16,  128, 64,  32},
    SelectBlocksConfig{Arch::kSm90a, DType::kFloat16,  128, 128, 32},
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 64,  64,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 128, 64,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 128, 32,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 256, 64,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kBFloat16, 192, 32,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  64,  64,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  128, 64,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  128, 32,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  256, 64,  0 },
    SelectBlocksConfig{Arch::kSm80,  DType::kFloat16,  192, 32,  0 },
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
inline constexpr int kSelectSm90WorkRing = 4;    // work items that are known ahead
inline constexpr int kSelectSm90WorkBytes = 64;  // of one

// A warpgroup has 64 queries of one head, or 32 of two heads at a time.
constexpr bool select_sm90_pairs(const SelectBlocksConfig& config) { return config.tile_q < 128; }
constexpr int select_sm90_groups(const SelectBlocksConfig& config) {
  return config.tile_q / (select_sm90_pairs(config) ? 32 : 64);
}
constexpr int select_sm90_q_stages(const SelectBlocksConfig& config) {
  return select_sm90_pairs(config) ? 2 : 1;  // of a warpgroup
}
constexpr int select_sm90_k_stages(const SelectBlocksConfig& config) {
  return select_sm90_groups(config) == 3 && select_sm90_pairs(config) ? 2 : 3;
}

// Shared memory of a CTA of a Hopper row; offsets in bytes, the queries at 0.
struct SelectSm90Smem {
  int k, lists, work, barriers, bytes;
};

constexpr SelectSm90Smem select_sm90_smem(const SelectBlocksConfig& config) {
  const int q_stages = select_sm90_groups(config) * select_sm90_q_stages(config);
  const int k_stages = select_sm90_k_stages(config);
  SelectSm90Smem s{};
  s.k = q_stages * 64 * config.head_dim * 2;
  s.lists = s.k + k_stages * kSelectTileKv * config.head_dim * 2;
  s.work = s.lists + config.tile_q * 4 * config.topk * (select_sm90_pairs(config) ? 8 : 6);
  s.barriers = s.work + kSelectSm90WorkRing * kSelectSm90WorkBytes;
  s.bytes = s.barriers + 2 * (q_stages + k_stages + kSelectSm90WorkRing) * 8;
  return s;
}

static_assert(std::ranges::all_of(kSelectBlocksTable, [](const SelectBlocksConfig& config) {
  return config.arch != Arch::kSm90a || select_sm90_smem(config).bytes <= 227 * 1024;
}));

// Groups of one have rows of their own; smaller head dims lose more to the padding than wgmma wins.
constexpr bool select_sm90_takes(const SelectBlocksConfig& config, const Problem& p) {
  const bool is_usual = p.kernel_size == 2 * p.kernel_stride && p.block_size == 4 * p.kernel_stride;
  const bool pairs_heads = p.num_heads_q != p.num_heads_kv;
  // Lists number blocks with 16 bits.
  const bool is_numbered = p.total_k / p.block_size < int64_t{1} << 16;
  return is_usual && select_sm90_pairs(config) == pairs_heads && is_numbered &&
         p.head_dim > config.head_dim / 2 && p.topk <= config.topk;
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
