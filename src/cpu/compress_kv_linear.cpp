// The linear kind: y[i] = sum_t W[t]^T (x[i d + t] + pos_emb[t]), W [l, D, D] a head.
//
// Three products, each on tiles of gemm_tile. Windows overlap in memory, so a tile of the left operand
// is packed slice by slice from the rows themselves and no im2col matrix exists:
//     y      windows x (t, a)      times W                           tile: kTileRows windows
//     dx     tokens of one residue modulo d: token n d + r lies in the windows n - m as their token
//            t = r + m d, so dx[n d + r] = sum_m W[r + m d] dy[n - m]: a row of l / d rows of dy
//     dW[t]  (x[i d + t] + pos_emb[t])^T times dy, summed over the windows in ascending order
// Packed weights: for every head (and residue) panels of GemmTile::kColumns columns, each panel
// [inner dimension, kColumns], zeros behind column D.
#include <algorithm>

#include "cpu/compress_kv_detail.h"
#include "cpu/parallel.h"

namespace fsattn::cpu {
namespace {

constexpr int64_t kTileRows =
    48;  // a multiple of GemmTile::kRows: the weight is read once for 48 rows
constexpr int64_t kSliceDepth =
    256;  // sums of so many terms are added up: less rounding than one long sum
constexpr int64_t kGradWindows = 64;  // windows of a slice of dW
constexpr int64_t kGradColumns = 64;  // columns of dW that one task owns
static_assert(kTileRows % GemmTile<float>::kRows == 0 && kSliceDepth >= kMaxHeadDim);
static_assert(kGradColumns % GemmTile<float>::kColumns == 0);

// The left operand as rows of segments of D elements; a segment may be absent, which means zeros.
template <class T>
struct Segment {
  const T* values = nullptr;
  const T* addend = nullptr;
};

// sums[r, :] += sum over segments of segment_at(r, segment) times the packed weight, r < num_rows.
template <class T, class SegmentAt>
void multiply_rows(const RowKernels<T>& kernels, int64_t num_rows, int64_t num_segments,
                   int64_t dim, const SegmentAt& segment_at, const Compute<T>* packed,
                   Compute<T>* sums) {
  using Acc = Compute<T>;
  using Tile = GemmTile<Acc>;
  alignas(64) Acc slice[kTileRows * kSliceDepth];
  const int64_t padded_rows = round_up(num_rows, Tile::kRows);
  const int64_t padded_dim = round_up(dim, Tile::kColumns);
  const int64_t slice_segments = kSliceDepth / dim;
  for (int64_t first = 0; first < num_segments; first += slice_segments) {
    const int64_t count = std::min(slice_segments, num_segments - first);
    const int64_t depth = count * dim;
    for (int64_t i = 0; i < padded_rows * count; ++i) {
      const int64_t row = i / count, segment = i % count;
      Acc* to = slice + row * depth + segment * dim;
      const Segment<T> from = row < num_rows ? segment_at(row, first + segment) : Segment<T>{};
      if (from.values == nullptr) {
        std::fill_n(to, dim, Acc{0});
      } else if (from.addend == nullptr) {
        kernels.load(from.values, to, dim);
      } else {
        kernels.load_sum(from.values, from.addend, to, dim);
      }
    }
    for (int64_t column = 0; column < padded_dim; column += Tile::kColumns) {
      const Acc* panel = packed + column * num_segments * dim + first * dim * Tile::kColumns;
      for (int64_t row = 0; row < padded_rows; row += Tile::kRows) {
        kernels.gemm_tile(depth, slice + row * depth, depth, 1, panel, Tile::kColumns,
                          sums + row * padded_dim + column, padded_dim);
      }
    }
  }
}

// W of a head: [l * D, D], rows token-major.
template <class T>
const T* weight_rows(const CompressKvShape& s, const void* weight, int64_t head, int64_t t) {
  return static_cast<const T*>(weight) + (head * s.kernel_size + t) * s.head_dim * s.head_dim;
}

template <class T>
int64_t packed_head_size(const CompressKvShape& s) {
  return s.kernel_size * s.head_dim * round_up(s.head_dim, GemmTile<Compute<T>>::kColumns);
}

// packed[head][panel of o][(t, a)][o]
template <class T>
void pack_for_fwd(const CompressKvShape& s, const RowKernels<T>& kernels, const void* weight,
                  int64_t head, int64_t t, Compute<T>* packed) {
  using Acc = Compute<T>;
  constexpr int64_t kColumns = GemmTile<Acc>::kColumns;
  const int64_t dim = s.head_dim, depth = s.kernel_size * dim;
  Acc row[kMaxHeadDim] = {};
  for (int64_t a = 0; a < dim; ++a) {
    kernels.load(weight_rows<T>(s, weight, head, t) + a * dim, row, dim);
    for (int64_t column = 0; column < dim; column += kColumns) {
      std::copy_n(
          row + column, kColumns,
          packed + head * packed_head_size<T>(s) + column * depth + (t * dim + a) * kColumns);
    }
  }
}

// packed[head][residue][panel of a][(m', o)][a], token t = residue + (l / d - 1 - m') d: the rows of
// dy ascend with m'.
template <class T>
void pack_for_dx(const CompressKvShape& s, const RowKernels<T>& kernels, const void* weight,
                 int64_t head, int64_t t, Compute<T>* packed) {
  using Acc = Compute<T>;
  constexpr int64_t kColumns = GemmTile<Acc>::kColumns;
  const int64_t dim = s.head_dim, overlap = s.kernel_size / s.kernel_stride;
  const int64_t residue = t % s.kernel_stride, segment = overlap - 1 - t / s.kernel_stride;
  Acc* to =
      packed + head * packed_head_size<T>(s) + residue * overlap * dim * round_up(dim, kColumns);
  Acc row[kMaxHeadDim];
  for (int64_t a = 0; a < round_up(dim, kColumns); ++a) {
    std::fill_n(row, dim, Acc{0});
    if (a < dim) kernels.load(weight_rows<T>(s, weight, head, t) + a * dim, row, dim);
    const int64_t panel = a / kColumns * kColumns;
    Acc* column = to + panel * overlap * dim + segment * dim * kColumns + a - panel;
    for (int64_t o = 0; o < dim; ++o) column[o * kColumns] = row[o];
  }
}

template <class T>
void linear_windows(const CompressKvFwdParams& p, const RowKernels<T>& kernels,
                    const Compute<T>* packed, int64_t head, int64_t begin, int64_t end) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  const int64_t padded_dim = round_up(s.head_dim, GemmTile<Acc>::kColumns);
  int64_t first_tokens[kTileRows];
  for_each_window(s, p.cu_seqlens, p.cu_seqlens_cmp, begin, end,
                  [&](int64_t row, int64_t token) { first_tokens[row - begin] = token; });
  const T* pos_emb = static_cast<const T*>(p.pos_emb);
  const auto segment_at = [&](int64_t row, int64_t t) -> Segment<T> {
    const T* values = row_of<const T>(p.x, first_tokens[row] + t, head);
    if (pos_emb == nullptr) return {values, nullptr};
    return {values, pos_emb + (head * s.kernel_size + t) * s.head_dim};
  };
  alignas(64) Acc sums[kTileRows * kMaxHeadDim];
  std::fill_n(sums, kTileRows * padded_dim, Acc{0});
  multiply_rows(kernels, end - begin, s.kernel_size, s.head_dim, segment_at,
                packed + head * packed_head_size<T>(s), sums);
  for (int64_t row = begin; row < end; ++row) {
    kernels.store(sums + (row - begin) * padded_dim, row_of<T>(p.x_cmp, row, head), s.head_dim);
  }
}

// Tokens that share a residue, and the rows of dy that may reach each of them.
struct TokenTile {
  int64_t count = 0;
  int64_t tokens[kTileRows];
  int64_t first_rows[kTileRows];  // row of dy of segment 0; may lie in front of the sequence
  int64_t begin_rows[kTileRows], end_rows[kTileRows];  // rows of the sequence
};

template <class T>
void flush_dx(const CompressKvBwdParams& p, const RowKernels<T>& kernels, int64_t head,
              const Compute<T>* packed, TokenTile& tile) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  const int64_t padded_dim = round_up(s.head_dim, GemmTile<Acc>::kColumns);
  const auto segment_at = [&](int64_t i, int64_t segment) -> Segment<T> {
    const int64_t row = tile.first_rows[i] + segment;
    if (row < tile.begin_rows[i] || row >= tile.end_rows[i]) return {};
    return {row_of<const T>(p.dx_cmp, row, head), nullptr};
  };
  alignas(64) Acc sums[kTileRows * kMaxHeadDim];
  std::fill_n(sums, kTileRows * padded_dim, Acc{0});
  multiply_rows(kernels, tile.count, s.kernel_size / s.kernel_stride, s.head_dim, segment_at,
                packed, sums);
  for (int64_t i = 0; i < tile.count; ++i) {
    kernels.store(sums + i * padded_dim, row_of<T>(p.dx, tile.tokens[i], head), s.head_dim);
  }
  tile.count = 0;
}

// dx of the tokens in [begin, end) whose position is `residue` modulo d.
template <class T>
void linear_dx(const CompressKvBwdParams& p, const RowKernels<T>& kernels, const Compute<T>* packed,
               int64_t head, int64_t residue, int64_t begin, int64_t end) {
  const CompressKvShape& s = p.shape;
  const int64_t d = s.kernel_stride, overlap = s.kernel_size / d;
  const Compute<T>* weights =
      packed + head * packed_head_size<T>(s) + residue * (packed_head_size<T>(s) / d);
  TokenTile tile;
  const auto visit_piece = [&](int64_t seq, int64_t piece_begin, int64_t piece_end) {
    const int64_t seq_begin = p.cu_seqlens[seq];
    const int64_t skipped = (piece_begin - seq_begin - residue + d - 1) / d;  // residue < d
    for (int64_t n = skipped; seq_begin + n * d + residue < piece_end; ++n) {
      const int64_t i = tile.count++;
      tile.tokens[i] = seq_begin + n * d + residue;
      tile.begin_rows[i] = p.cu_seqlens_cmp[seq];
      tile.end_rows[i] = p.cu_seqlens_cmp[seq + 1];
      tile.first_rows[i] = tile.begin_rows[i] + n - overlap + 1;
      if (tile.count == kTileRows) flush_dx(p, kernels, head, weights, tile);
    }
  };
  for_each_sequence(p.cu_seqlens, s.batch, begin, end, visit_piece);
  if (tile.count > 0) flush_dx(p, kernels, head, weights, tile);
}

// One slice of windows: sums[a, o] += sum over windows of (x + pos_emb)[a] dy[o].
template <class T>
struct GradTile {
  using Acc = Compute<T>;
  static constexpr int64_t kMaxRows = round_up<int64_t>(kMaxHeadDim, GemmTile<Acc>::kRows);

  int64_t head, t, column, num_columns;
  int64_t count = 0;  // windows in the slice
  alignas(64) Acc x[kGradWindows * kMaxRows];
  alignas(64) Acc dy[kGradWindows * kGradColumns];
  alignas(64) Acc sums[kMaxRows * kGradColumns];
};

template <class T>
void flush_dweight(const RowKernels<T>& kernels, int64_t dim, GradTile<T>& tile) {
  using Acc = Compute<T>;
  using Tile = GemmTile<Acc>;
  const int64_t padded_rows = round_up(dim, Tile::kRows);
  for (int64_t column = 0; column < tile.num_columns; column += Tile::kColumns) {
    for (int64_t row = 0; row < padded_rows; row += Tile::kRows) {
      kernels.gemm_tile(tile.count, tile.x + row, 1, padded_rows, tile.dy + column, kGradColumns,
                        tile.sums + row * kGradColumns + column, kGradColumns);
    }
  }
  tile.count = 0;
}

// dW[t], columns [column, column + kGradColumns).
template <class T>
void linear_dweight(const CompressKvBwdParams& p, const RowKernels<T>& kernels, int64_t head,
                    int64_t t, int64_t column) {
  const CompressKvShape& s = p.shape;
  const int64_t dim = s.head_dim, padded_rows = round_up(dim, GemmTile<Compute<T>>::kRows);
  GradTile<T> tile{};  // zeros: the padding of x and dy is never written
  tile.num_columns = std::min(kGradColumns, dim - column);
  const T* pos_emb = static_cast<const T*>(p.pos_emb);
  if (pos_emb != nullptr) pos_emb += (head * s.kernel_size + t) * dim;
  const auto visit_window = [&](int64_t row, int64_t token) {
    const T* x = row_of<const T>(p.x, token + t, head);
    Compute<T>* to = tile.x + tile.count * padded_rows;
    pos_emb == nullptr ? kernels.load(x, to, dim) : kernels.load_sum(x, pos_emb, to, dim);
    kernels.load(row_of<const T>(p.dx_cmp, row, head) + column, tile.dy + tile.count * kGradColumns,
                 tile.num_columns);
    if (++tile.count == kGradWindows) flush_dweight(kernels, dim, tile);
  };
  for_each_window(s, p.cu_seqlens, p.cu_seqlens_cmp, 0, p.cu_seqlens_cmp[s.batch], visit_window);
  flush_dweight(kernels, dim, tile);
  T* dweight = static_cast<T*>(p.dweight) + (head * s.kernel_size + t) * dim * dim + column;
  for (int64_t a = 0; a < dim; ++a) {
    kernels.store(tile.sums + a * kGradColumns, dweight + a * dim, tile.num_columns);
  }
}

// dpos_emb[t, a] = sum_o W[t, a, o] (sum_i dy[i, o])
template <class T>
void linear_dpos_emb(const CompressKvBwdParams& p, const RowKernels<T>& kernels) {
  using Acc = Compute<T>;
  const CompressKvShape& s = p.shape;
  const CompressKvBuffers<T> scratch = buffers_of<T>(Pass::kBwd, s, p.scratch);
  const int64_t num_rows = p.cu_seqlens_cmp[s.batch], dim = s.head_dim;
  const Acc one = 1;
  parallel_for(s.num_heads * scratch.num_chunks, Schedule::kStatic, [&](int64_t task) {
    const int64_t head = task / scratch.num_chunks;
    const int64_t begin = task % scratch.num_chunks * kCompressKvChunk;
    const int64_t count = std::clamp<int64_t>(num_rows - begin, 0, kCompressKvChunk);
    Acc* sums = scratch.partials + task * dim;
    std::fill_n(sums, dim, Acc{0});
    kernels.weighted_sum(row_of<const T>(p.dx_cmp, begin, head), p.dx_cmp.token_stride, &one, 0,
                         count, sums, dim);
  });
  parallel_for(s.num_heads * s.kernel_size, Schedule::kStatic, [&](int64_t task) {
    const int64_t head = task / s.kernel_size, t = task % s.kernel_size;
    Acc dy_sum[kMaxHeadDim] = {};
    for (int64_t chunk = 0; chunk < scratch.num_chunks; ++chunk) {
      const Acc* sums = scratch.partials + (head * scratch.num_chunks + chunk) * dim;
      for (int64_t o = 0; o < dim; ++o) dy_sum[o] += sums[o];
    }
    Acc row[kMaxHeadDim] = {};
    kernels.dots(weight_rows<T>(s, p.weight, head, t), dim, dim, dy_sum, row, dim);
    kernels.store(row, static_cast<T*>(p.dpos_emb) + task * dim, dim);
  });
}

}  // namespace

template <class T>
void linear_fwd(const CompressKvFwdParams& p, const RowKernels<T>& kernels) {
  const CompressKvShape& s = p.shape;
  const int64_t num_rows = p.cu_seqlens_cmp[s.batch];
  if (num_rows == 0) return;
  Compute<T>* packed = buffers_of<T>(Pass::kFwd, s, p.scratch).packed;
  parallel_for(s.num_heads * s.kernel_size, Schedule::kStatic, [&](int64_t task) {
    pack_for_fwd(s, kernels, p.weight, task / s.kernel_size, task % s.kernel_size, packed);
  });
  const int64_t num_tiles = ceil_div(num_rows, kTileRows);
  parallel_for(s.num_heads * num_tiles, Schedule::kDynamic, [&](int64_t task) {
    const int64_t begin = task % num_tiles * kTileRows;
    linear_windows(p, kernels, packed, task / num_tiles, begin,
                   std::min(begin + kTileRows, num_rows));
  });
}

template <class T>
void linear_bwd(const CompressKvBwdParams& p, const RowKernels<T>& kernels) {
  const CompressKvShape& s = p.shape;
  Compute<T>* packed = buffers_of<T>(Pass::kBwd, s, p.scratch).packed;
  parallel_for(s.num_heads * s.kernel_size, Schedule::kStatic, [&](int64_t task) {
    pack_for_dx(s, kernels, p.weight, task / s.kernel_size, task % s.kernel_size, packed);
  });
  const int64_t tile_tokens = kTileRows * s.kernel_stride;
  const int64_t num_tiles = ceil_div(s.total, tile_tokens);
  parallel_for(s.num_heads * s.kernel_stride * num_tiles, Schedule::kDynamic, [&](int64_t task) {
    // Tiles vary fastest: a residue's share of the weight stays in the cache.
    const int64_t begin = task % num_tiles * tile_tokens, rest = task / num_tiles;
    linear_dx(p, kernels, packed, rest / s.kernel_stride, rest % s.kernel_stride, begin,
              std::min(begin + tile_tokens, s.total));
  });
  if (p.dweight != nullptr) {
    const int64_t num_parts = ceil_div(s.head_dim, kGradColumns);
    parallel_for(s.num_heads * s.kernel_size * num_parts, Schedule::kDynamic, [&](int64_t task) {
      const int64_t rest = task / num_parts;
      linear_dweight(p, kernels, rest / s.kernel_size, rest % s.kernel_size,
                     task % num_parts * kGradColumns);
    });
  }
  if (p.dpos_emb != nullptr) linear_dpos_emb(p, kernels);
}

#define FSATTN_INSTANTIATE(T)                                                    \
  template void linear_fwd<T>(const CompressKvFwdParams&, const RowKernels<T>&); \
  template void linear_bwd<T>(const CompressKvBwdParams&, const RowKernels<T>&)
FSATTN_INSTANTIATE(double);
FSATTN_INSTANTIATE(float);
FSATTN_INSTANTIATE(Float16);
FSATTN_INSTANTIATE(BFloat16);
#undef FSATTN_INSTANTIATE

}  // namespace fsattn::cpu
