// Compiled kernels of the branches whose visible keys form an interval: compressed attention and
// window attention share them. Measurements: docs/kernels/dense_attn.md.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/math.h"
#include "plan/problem.h"

namespace fsattn {

// A row serves head dims up to its own: smaller ones are padded with zeros in shared memory. GPUs
// have 99 (sm_86, sm_89), 163 (sm_80) or 227 KiB (sm_90) of it a CTA; where large tiles need more than
// 99, a second row has smaller ones.
struct DenseAttnConfig {
  Arch arch;
  DType dtype;
  int head_dim;
  int head_dim_v;
  int smem_kib;  // that the device has to have
};

// Columns: arch, dtype, head_dim, head_dim_v, smem_kib. The first row that fits wins.
inline constexpr std::array kDenseAttnFwdTable{
    DenseAttnConfig{Arch::kSm90a, DType::kBFloat16, 128, 128, 227},
    DenseAttnConfig{Arch::kSm90a, DType::kFloat16,  128, 128, 227},
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 64,  64,  99 },
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 128, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 192, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 256, 256, 163},
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 256, 256, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  64,  64,  99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  128, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  192, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  256, 256, 163},
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  256, 256, 99 },
};
inline constexpr std::array kDenseAttnBwdTable{
    DenseAttnConfig{Arch::kSm90a, DType::kBFloat16, 128, 128, 227},
    DenseAttnConfig{Arch::kSm90a, DType::kFloat16,  128, 128, 227},
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 64,  64,  99 },
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 128, 128, 163},
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 128, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 192, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 256, 256, 163},
    DenseAttnConfig{Arch::kSm80,  DType::kBFloat16, 256, 256, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  64,  64,  99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  128, 128, 163},
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  128, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  192, 128, 99 },
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  256, 256, 163},
    DenseAttnConfig{Arch::kSm80,  DType::kFloat16,  256, 256, 99 },
};

// The forward rows of sm_90a read keys in pages whose size is a multiple of this.
inline constexpr int kDensePageKeys = 64;

// Returns the row of a table, or -1 when no kernel fits. The wgmma rows take head dims above 64:
// smaller ones lose more to the padding than wgmma wins.
template <class Table>
constexpr int find_dense_attn_row(const Table& table, Arch arch, int64_t smem_per_cta, DType dtype,
                                  int64_t head_dim, int64_t head_dim_v) {
  for (std::size_t row = 0; row < table.size(); ++row) {
    const DenseAttnConfig& config = table[row];
    if (config.arch == Arch::kSm90a && (arch != Arch::kSm90a || head_dim <= 64)) continue;
    if (config.smem_kib * int64_t{1024} > smem_per_cta) continue;
    if (config.dtype == dtype && config.head_dim >= head_dim && config.head_dim_v >= head_dim_v) {
      return static_cast<int>(row);
    }
  }
  return -1;
}

constexpr int find_dense_attn_row(Pass pass, Arch arch, int64_t smem_per_cta, DType dtype,
                                  int64_t head_dim, int64_t head_dim_v) {
  return pass == Pass::kFwd ? find_dense_attn_row(kDenseAttnFwdTable, arch, smem_per_cta, dtype,
                                                  head_dim, head_dim_v)
                            : find_dense_attn_row(kDenseAttnBwdTable, arch, smem_per_cta, dtype,
                                                  head_dim, head_dim_v);
}

// The wgmma rows compute all gradients in one kernel, whose CTAs take turns in adding to the dQ of so
// many queries.
inline constexpr int kTurnQueries = 64;

constexpr bool has_fused_bwd(Arch arch) { return arch == Arch::kSm90a; }

// The dK, dV loop of compressed attention visits every later query of every head of the group, and
// there are few compressed keys: the heads of a group are shared out over this many CTAs. Those that
// take turns have one head each: with several, they would wait for each other. It depends on the group
// alone, so that a sequence gets the same bits whatever is batched with it.
constexpr int64_t compressed_attn_bwd_splits(Arch arch, int64_t group_size) {
  if (has_fused_bwd(arch)) return group_size;
  return ceil_div(group_size, ceil_div(group_size, int64_t{8}));
}

// Scratch memory of a backward. Offsets count bytes; delta is at 0.
struct DenseAttnBwdScratch {
  int64_t key_rows;    // rows of k that may own a partial result
  int64_t partial_dk;  // fp32 [splits, key_rows, Hkv, D]; absent when there is one split
  int64_t partial_dv;  // fp32 [splits, key_rows, Hkv, Dv]
  int64_t dq_sums;     // fp32 [Hq, total_q, 128]; this and what follows only if one kernel does all
  int64_t turns;       // int32: a ticket, then [tiles of kTurnQueries queries, Hq]
  int64_t num_turns;
  int64_t bytes;
};

// The sums of dQ of such a kernel, in bytes, and its turns.
constexpr int64_t dense_dq_sums_bytes(int64_t total_q, int64_t num_heads_q) {
  return num_heads_q * total_q * 128 * 4;
}
constexpr int64_t dense_num_turns(int64_t batch, int64_t total_q, int64_t num_heads_q) {
  return 1 + (total_q / kTurnQueries + batch + 1) * num_heads_q;
}

// delta is fp32 [Hq, total_q]. `key_rows` is 0 where nothing is split. `shares_dq`: the sums of dQ and the
// turns are not part of it.
constexpr DenseAttnBwdScratch dense_attn_bwd_scratch(Arch arch, bool shares_dq, int64_t batch,
                                                     int64_t total_q, int64_t num_heads_q,
                                                     int64_t num_heads_kv, int64_t key_rows,
                                                     int64_t head_dim, int64_t head_dim_v) {
  const int64_t splits =
      num_heads_kv == 0 ? 1 : compressed_attn_bwd_splits(arch, num_heads_q / num_heads_kv);
  const int64_t rows = splits > 1 ? splits * key_rows * num_heads_kv * 4 : 0;
  DenseAttnBwdScratch s{};
  s.key_rows = key_rows;
  s.partial_dk = round_up(num_heads_q * total_q * 4, int64_t{256});
  s.partial_dv = s.partial_dk + round_up(rows * head_dim, int64_t{256});
  s.dq_sums = s.partial_dv + round_up(rows * head_dim_v, int64_t{256});
  s.turns = s.dq_sums;
  if (has_fused_bwd(arch) && !shares_dq) {
    s.turns += dense_dq_sums_bytes(total_q, num_heads_q);
    s.num_turns = dense_num_turns(batch, total_q, num_heads_q);
  }
  s.bytes = s.turns + round_up(s.num_turns * 4, int64_t{256});
  return s;
}

// Scratch bytes of a call of either operator by a row of `arch`.
constexpr size_t dense_attn_workspace(const Problem& p, Arch arch, bool shares_dq = false) {
  if (p.pass == Pass::kFwd) return 0;
  const int64_t key_rows = p.op == Op::kCompressedAttn ? p.total_k / p.kernel_stride : 0;
  return static_cast<size_t>(dense_attn_bwd_scratch(arch, shares_dq, p.batch, p.total_q,
                                                    p.num_heads_q, p.num_heads_kv, key_rows,
                                                    p.head_dim, p.head_dim_v)
                                 .bytes);
}

// The fused backward: in which order CTAs take the tiles of keys (src/cuda/dense_attn/dense_attn_bwd_order_sm90.cuh).
inline constexpr int kAllHeads = 1 << 30;

// `width` heads at a time, all their tiles one after the other. With a run, as many more that walk on:
// `run` tiles of the ones, then `run` of the others.
struct KeyTileOrder {
  int width;
  int run;  // CTAs that the device holds; 0: one width after the other
};

// Sequences of so many tiles of compressed keys, over all parts, have parts that walk on: fewer start
// together, and those that walk on would wait for the first one. Sequences of more tiles than were measured
// have none: with 512 it was no gain (docs/kernels/dense_attn.md).
inline constexpr int kTwoWayTiles = 384;
inline constexpr int kTwoWayMostTiles = 64;  // of a sequence

FSATTN_HOST_DEVICE constexpr bool walks_both_ways(int64_t num_tiles, int parts) {
  return num_tiles * parts >= kTwoWayTiles && num_tiles <= kTwoWayMostTiles;
}

// `num_tiles`: of a sequence. Narrow runs take less of the L2, but no run should leave much of the
// device to the next one, which starts too early then.
constexpr KeyTileOrder key_tile_order(bool is_compressed, int64_t num_tiles, int parts,
                                      int num_sms) {
  if (!is_compressed) return {kAllHeads, 0};
  if (!walks_both_ways(num_tiles, parts)) return {8, 0};
  const int half = parts > 1 ? parts / 2 : 1;
  KeyTileOrder best{half, num_sms};
  int64_t best_share = 0;
  for (int width = half < 4 ? half : 4; best_share < 90; width *= 2) {
    if (width > half) width = half;
    const int64_t tiles = num_tiles * width;
    const int64_t share = tiles * 100 / (ceil_div(tiles, int64_t{num_sms}) * num_sms);
    if (parts % (2 * width) == 0 && share >= best_share) {
      best.width = width;
      best_share = share;
    }
    if (width == half) break;
  }
  return best;
}

// Of bfloat16, with equal head dims.
constexpr int example_dense_attn_row(Pass pass, Arch arch, int smem_kib, int64_t head_dim) {
  return find_dense_attn_row(pass, arch, smem_kib * int64_t{1024}, DType::kBFloat16, head_dim,
                             head_dim);
}
static_assert(example_dense_attn_row(Pass::kFwd, Arch::kSm90a, 227, 96) == 0);
static_assert(example_dense_attn_row(Pass::kFwd, Arch::kSm90a, 227, 64) == 2);
static_assert(example_dense_attn_row(Pass::kFwd, Arch::kSm80, 163, 192) == 5);
static_assert(example_dense_attn_row(Pass::kFwd, Arch::kSm80, 99, 256) == 6);
static_assert(example_dense_attn_row(Pass::kBwd, Arch::kSm80, 163, 96) == 3);
static_assert(example_dense_attn_row(Pass::kBwd, Arch::kSm80, 99, 96) == 4);
static_assert(find_dense_attn_row(Pass::kBwd, Arch::kSm90a, 227 * 1024, DType::kFloat32, 64, 64) ==
              -1);
static_assert(compressed_attn_bwd_splits(Arch::kSm80, 1) == 1);
static_assert(compressed_attn_bwd_splits(Arch::kSm80, 12) == 6);
static_assert(compressed_attn_bwd_splits(Arch::kSm90a, 12) == 12);

}  // namespace fsattn
