// Compiled kernels over a paged cache and the memory that the fused ones share. Measurements:
// docs/kernels/decode.md.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/dtype.h"
#include "base/math.h"
#include "params/paged.h"

namespace fsattn {

// A row serves head dims up to its own: smaller ones are padded with zeros in shared memory.
struct DecodeConfig {
  Arch arch;
  DType dtype;
  int head_dim;
  int head_dim_v;
};

// Columns: arch, dtype, head_dim, head_dim_v. The first row that fits wins.
inline constexpr std::array kDecodeTable{
    DecodeConfig{Arch::kSm80, DType::kBFloat16, 64,  64 },
    DecodeConfig{Arch::kSm80, DType::kBFloat16, 128, 128},
    DecodeConfig{Arch::kSm80, DType::kBFloat16, 192, 128},
    DecodeConfig{Arch::kSm80, DType::kBFloat16, 256, 256},
    DecodeConfig{Arch::kSm80, DType::kFloat16,  64,  64 },
    DecodeConfig{Arch::kSm80, DType::kFloat16,  128, 128},
    DecodeConfig{Arch::kSm80, DType::kFloat16,  192, 128},
    DecodeConfig{Arch::kSm80, DType::kFloat16,  256, 256},
};

constexpr int find_decode_row(DType dtype, int64_t head_dim, int64_t head_dim_v) {
  for (std::size_t row = 0; row < kDecodeTable.size(); ++row) {
    const DecodeConfig& config = kDecodeTable[row];
    if (config.dtype == dtype && config.head_dim >= head_dim && config.head_dim_v >= head_dim_v) {
      return static_cast<int>(row);
    }
  }
  return -1;
}

// New tokens of a sequence that the fused kernels take.
inline constexpr int64_t kDecodeMaxQueries = 8;

// The copies between packed tensors and pages.
struct PagedCopyConfig {
  Arch arch;
  DType dtype;
};

inline constexpr std::array kPagedCopyTable{
    PagedCopyConfig{Arch::kSm80, DType::kBFloat16},
    PagedCopyConfig{Arch::kSm80, DType::kFloat16 },
};

// Shared memory of paged_append: the weights of a window, and the tokens of all windows that a call
// completes (kDecodeMaxQueries - 1 more than a window at the most).
constexpr int64_t paged_append_smem(int64_t kernel_size, int64_t head_dim, int64_t head_dim_v) {
  return round_up(2 * kernel_size, int64_t{4}) * 4 +
         (kernel_size + kDecodeMaxQueries - 1) * (head_dim + head_dim_v) * 2;
}

// paged_append of chunks: the strides that a CTA takes of a sequence, and the tokens of their windows.
constexpr int64_t paged_append_chunk_units(int64_t kernel_stride) {
  return kernel_stride < 64 ? 64 / kernel_stride : 1;
}
constexpr int64_t paged_append_chunk_rows(int64_t kernel_size, int64_t kernel_stride) {
  return (paged_append_chunk_units(kernel_stride) - 1) * kernel_stride + kernel_size;
}

// Its shared memory: the weights of a window; of each token two addresses and its elements.
constexpr int64_t paged_append_chunk_smem(int64_t kernel_size, int64_t kernel_stride,
                                          int64_t head_dim, int64_t head_dim_v) {
  const int64_t row_bytes = 16 + 2 * (head_dim > head_dim_v ? head_dim : head_dim_v);
  return round_up(kernel_size, int64_t{4}) * 4 +
         paged_append_chunk_rows(kernel_size, kernel_stride) * row_bytes;
}

// Shared memory of the linear kind of paged_append: one window in fp32.
constexpr int64_t paged_append_linear_smem(int64_t kernel_size, int64_t head_dim) {
  return kernel_size * head_dim * 4;
}

// A CTA takes 16 rows of queries (tokens x heads of a group) and up to kDecodeSplit keys. Where a
// sequence is split depends on its own length alone.
inline constexpr int64_t kDecodeRows = 16;
inline constexpr int64_t kDecodeSplit = 512;
inline constexpr int64_t kDecodeMaxCmpSplit = 2 * kDecodeSplit;
inline constexpr int64_t kDecodeNeverLong = std::numeric_limits<int32_t>::max();
inline constexpr int64_t kDecodeMaxTopk = 128;
inline constexpr int64_t kDecodeMaxGroup = 64;
inline constexpr int64_t kDecodeMaxParts = 512;  // partial results that are combined at a time
// Of a sequence: their scores lie in shared memory. More than kDecodePooledBlocks of them are
// scored by a kernel of its own.
inline constexpr int64_t kDecodeMaxBlocks = 32768;
inline constexpr int64_t kDecodePooledBlocks = 1024;
// Up to kDecodeRankCtas * kDecodeRankBlocks blocks are ranked by a cluster of CTAs where there are
// clusters (sm_90).
inline constexpr int kDecodeRankCtas = 8;
inline constexpr int kDecodeRankBlocks = 256;  // of a CTA

// CTAs that rank the blocks of a query together; 0: one CTA without a cluster does it. Clusters are faster
// until they fill the SMs, which the window branch shares (measured: docs/kernels/decode.md). The result
// is the same either way.
constexpr int decode_rank_ctas(int64_t max_blocks, int64_t queries, int num_sms) {
  const int64_t least = ceil_div<int64_t>(max_blocks, kDecodeRankBlocks);
  if (least > kDecodeRankCtas || least * queries > 2 * num_sms) return 0;
  int ctas = 1;
  while (ctas < kDecodeRankCtas && 4 * least > ctas &&
         (ctas < least || 2 * ctas * queries <= 4 * num_sms)) {
    ctas *= 2;
  }
  return ctas;
}

inline constexpr int kDecodeRankKeys = 1152;  // windows of a step

// All that follows the compressed branch of a query by one cluster of CTAs: two teams of four warps each.
inline constexpr int kDecodeFinishTopk = 32;  // entries at most

// Wide CTAs have eight warps a role.
constexpr bool can_finish_wide(const DecodeConfig& c) { return c.head_dim <= 128; }

struct DecodeFinishShape {
  int64_t queries;  // of all sequences and KV heads
  int64_t group_size, max_blocks, block_size, topk, window_size, kernel_size, kernel_stride;
};

// Whether the shares of a cluster of `ctas` fit its CTAs.
constexpr bool finish_fits(const DecodeFinishShape& s, int64_t ctas, bool is_wide) {
  const int64_t blocks = ceil_div(s.max_blocks, ctas * (is_wide ? 2 : 1));
  const int64_t windows = (blocks * s.block_size + s.kernel_size) / s.kernel_stride + 3;
  return s.group_size <= kDecodeRows && s.topk <= kDecodeFinishTopk &&
         blocks <= kDecodeRankBlocks && windows <= kDecodeRankKeys &&
         ceil_div(s.topk * s.block_size, ctas) <= kDecodeSplit &&
         ceil_div(s.window_size + 2 * kDecodeRows, ctas) <= kDecodeSplit - kDecodeRows;
}

// CTAs of a cluster: as many as find room beside each other, since the ranking and the copies of a query are
// latency. More queries than that, or more blocks than clusters that find room hold, leave it to several
// kernels (measured: docs/kernels/decode.md).
constexpr DecodeFinish choose_finish(const DecodeFinishShape& s, bool can_be_wide, int num_sms) {
  for (int ctas = kDecodeRankCtas; ctas >= 2; ctas /= 2) {
    if (5 * s.queries * ctas <= 9 * num_sms && finish_fits(s, ctas, false)) return {ctas, false};
  }
  const bool is_wide = can_be_wide && 2 * s.queries <= num_sms && finish_fits(s, 2, true);
  return is_wide ? DecodeFinish{2, true} : DecodeFinish{};
}

// Whether the compressed branch hands on what its windows add to each block instead of their scores, of which
// there are four times as many: for windows of 2 d keys and blocks of 4 d, whose chunks of 16 windows are four
// blocks, and where the heads are summed.
constexpr bool pools_scores(const DecodeFinish& finish, GroupReduce group_reduce,
                            int64_t kernel_size, int64_t kernel_stride, int64_t block_size) {
  return finish.ctas > 0 && group_reduce != GroupReduce::kMax && kernel_size == 2 * kernel_stride &&
         block_size == 4 * kernel_stride;
}

// Sequences of so many compressed keys have splits of twice as many: these are work enough for the CTAs that
// stay, two an SM, and no CTA needs another one.
constexpr int64_t choose_cmp_long(int64_t units, int64_t tiles, int num_sms) {
  if (units * tiles == 0 || num_sms == 0) return kDecodeNeverLong;
  return kDecodeMaxCmpSplit * (ceil_div<int64_t>(9 * num_sms / 5, units * tiles) - 1) + 1;
}

// Shared memory of a CTA: 16 queries, those of the next work item, and for each of four warps a
// ring of chunks of 16 keys.
inline constexpr int kDecodeStages = 2;
constexpr size_t decode_smem(const DecodeConfig& c) {
  return static_cast<size_t>(kDecodeRows * 2 *
                             (2 * c.head_dim + 4 * kDecodeStages * (c.head_dim + c.head_dim_v)));
}

// The cluster behind the compressed branch: 16 queries, the rings of four or eight warps, and one place for
// scores of blocks and then for results; beside these, lists and the pages of the sequence.
inline constexpr int kDecodeFinishPages = 2048;  // more are looked up in the block table itself
constexpr size_t decode_finish_rank_bytes(bool is_wide) {
  return static_cast<size_t>((is_wide ? 2 : 1) * (kDecodeRankKeys + kDecodeRankBlocks) + 4) * 4;
}
constexpr size_t decode_finish_smem(const DecodeConfig& c, bool is_wide) {
  const size_t ring = decode_smem(c) - static_cast<size_t>(2 * 2 * kDecodeRows * c.head_dim);
  const size_t result = static_cast<size_t>(4 * kDecodeRows * c.head_dim_v);
  constexpr size_t kBeside = 8192 + kDecodeFinishPages * 4;
  return static_cast<size_t>(2 * kDecodeRows * c.head_dim) + ring * (is_wide ? 2 : 1) +
         std::max(result, decode_finish_rank_bytes(is_wide)) + kBeside;
}

// The selection keeps the windows of a step and the scores of all blocks in shared memory.
inline constexpr int64_t kDecodeSelectKeys = 4096;
inline constexpr int64_t kDecodePoolKeys = 1024;  // a step where the blocks have their own kernel
constexpr size_t decode_select_smem(int64_t max_blocks) {
  return static_cast<size_t>(kDecodeSelectKeys + round_up(max_blocks, int64_t{32})) * 4;
}

// What a fused call is cut into.
struct DecodeSplits {
  int64_t cmp;          // splits of the compressed keys of the longest sequence
  int64_t sel;          // splits of the selected blocks of a query
  int64_t sel_entries;  // entries of topk_idx in one of them
  int64_t win;          // splits of the window
  int64_t win_keys;     // keys of one of them
};

// About 256 keys a split: fewer cost more partial results than they gain parallelism.
constexpr DecodeSplits decode_splits(int64_t max_cmp, int64_t cmp_split, int64_t block_size,
                                     int64_t topk, int64_t window_size) {
  DecodeSplits s{};
  s.cmp = ceil_div(max_cmp, cmp_split);
  s.sel_entries = block_size >= 256 ? 1 : 256 / block_size;
  s.sel = ceil_div(topk, s.sel_entries);
  // The queries of one call reach over kDecodeMaxQueries - 1 keys more, and a split starts at a
  // multiple of 16.
  const int64_t reach = window_size + kDecodeMaxQueries + 15;
  s.win = ceil_div(reach, int64_t{288});
  s.win_keys = round_up(ceil_div(reach, s.win), int64_t{16});
  return s;
}

// Where a cluster does all that follows the compressed branch: only its window goes through memory.
constexpr DecodeSplits decode_finish_splits(DecodeSplits splits, int64_t ctas) {
  splits.sel = 0;
  splits.win = ctas;
  return splits;
}

// Scratch memory of a fused call. Offsets count bytes. A unit is a (sequence, KV head); its rows
// are max_q * G queries.
struct DecodeScratch {
  int64_t scores;    // fp32 [units, rows, scores_pitch], q k without the softmax scale
  int64_t cmp_o;     // fp32 [units, splits.cmp, rows, Dv]
  int64_t cmp_lse;   // fp32 [units, splits.cmp, rows], natural logarithm
  int64_t part_o;    // fp32 [units, rows, parts, Dv]: compressed, window splits, selected splits
  int64_t part_lse;  // fp32 [units, rows, parts]
  int64_t block_scores;  // uint32 [units, max_q, block_scores_pitch]; none for short sequences
  int64_t counters;      // int32 [units, max_q]: CTAs that have finished
  int64_t scores_pitch;
  int64_t block_scores_pitch;
  int64_t parts;
  int64_t bytes;
};

// Without compression and window (max_cmp and splits.win 0) the selected branch is alone.
constexpr DecodeScratch decode_scratch(int64_t units, int64_t max_q, int64_t group_size,
                                       int64_t head_dim_v, int64_t max_cmp, int64_t max_blocks,
                                       const DecodeSplits& splits, bool is_nsa) {
  const int64_t rows = units * max_q * group_size;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t offset = at;
    at += round_up(bytes, int64_t{256});
    return offset;
  };
  DecodeScratch s{};
  s.scores_pitch = round_up(max_cmp, int64_t{16});
  s.parts = splits.sel + (is_nsa ? 1 + splits.win : 0);
  s.scores = take(is_nsa ? rows * s.scores_pitch * 4 : 0);
  s.cmp_o = take(is_nsa ? rows * splits.cmp * head_dim_v * 4 : 0);
  s.cmp_lse = take(is_nsa ? rows * splits.cmp * 4 : 0);
  s.part_o = take(rows * s.parts * head_dim_v * 4);
  s.part_lse = take(rows * s.parts * 4);
  s.block_scores_pitch = max_blocks > kDecodePooledBlocks ? round_up(max_blocks, int64_t{32}) : 0;
  s.block_scores = take(units * max_q * s.block_scores_pitch * 4);
  s.counters = take(units * max_q * 4);
  s.bytes = at;
  return s;
}

static_assert(find_decode_row(DType::kBFloat16, 96, 96) == 1);
static_assert(find_decode_row(DType::kFloat16, 192, 192) == 7);
static_assert(find_decode_row(DType::kFloat32, 64, 64) == -1);
static_assert(decode_splits(4096, kDecodeSplit, 64, 16, 512).sel == 4);
static_assert(decode_splits(4096, kDecodeSplit, 64, 16, 512).win == 2);

}  // namespace fsattn
