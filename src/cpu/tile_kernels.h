// The tile kernels for one instruction set. Included by tile_<isa>.cpp alone, which define
//     FSATTN_VECTOR_BYTES  16, 32 or 64
//     FSATTN_GEMM_VECTORS  vectors in a row of the accumulator block
//     FSATTN_TILE_TABLE    name of the table
// Everything but the table has internal linkage, and nothing of std:: is used: see exp.h.
//
// Vectorised with GCC's vector extensions. Contraction to FMA is on, so that instruction sets differ
// in the last bits; for one of them, the same row gives the same bits in every tile.
#pragma once
#include "cpu/exp.h"
#include "cpu/tile.h"

namespace fsattn::cpu {
namespace {

// Rows in the accumulator block: 6 x 4 vectors of 32 registers (AVX-512) or 6 x 2 of 16 leave room for
// a row of b and a broadcast element of a.
constexpr int kGemmRows = 6;
constexpr int kGemmVectors = FSATTN_GEMM_VECTORS;

// ---------------------------------------------------------------------------------------- load, store

template <class T>
void load_tile(const void* from, int64_t row_stride, int64_t rows, int64_t cols, Compute<T> factor,
               Compute<T>* to, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict source = static_cast<const T*>(from) + r * row_stride;
    Compute<T>* __restrict row = to + r * pitch;
    for (int64_t c = 0; c < cols; ++c) row[c] = load(source[c]) * factor;
    for (int64_t c = cols; c < pitch; ++c) row[c] = 0;
  }
}

template <class T>
void load_transposed_tile(const void* from, int64_t row_stride, int64_t rows, int64_t cols,
                          Compute<T> factor, Compute<T>* to) {
  // One vector of keys at a time: each cache line of `to` is filled by consecutive stores.
  constexpr int64_t kKeys = Simd<Compute<T>>::kLanes;
  for (int64_t begin = 0; begin < rows; begin += kKeys) {
    const int64_t count = rows - begin < kKeys ? rows - begin : kKeys;
    const T* source = static_cast<const T*>(from) + begin * row_stride;
    for (int64_t c = 0; c < cols; ++c) {
      Compute<T>* row = to + c * kTileKeys + begin;
      for (int64_t r = 0; r < count; ++r) row[r] = load(source[r * row_stride + c]) * factor;
      for (int64_t r = count; r < kKeys; ++r) row[r] = 0;
    }
  }
}

// x, or the largest number of its sign if x is infinite although what it was made from is finite.
template <class Real>
FSATTN_FORCE_INLINE Real keep_finite(Real x, Real source) {
  constexpr Real kLargest = static_cast<Real>(sizeof(Real) == 4 ? __FLT_MAX__ : __DBL_MAX__);
  const Real high = x > kLargest && source <= kLargest ? kLargest : x;
  return high < -kLargest && source >= -kLargest ? -kLargest : high;
}

template <class T>
void store_tile(const Compute<T>* from, int64_t pitch, const Compute<T>* row_scale, int64_t rows,
                int64_t cols, void* to, int64_t row_stride, StoreMode mode) {
  for (int64_t r = 0; r < rows; ++r) {
    const Compute<T>* __restrict source = from + r * pitch;
    T* __restrict row = static_cast<T*>(to) + r * row_stride;
    const Compute<T> scale = row_scale[r];
    if (mode == StoreMode::kAdd) {
      for (int64_t c = 0; c < cols; ++c) store(row[c], load(row[c]) + source[c] * scale);
    } else if (mode == StoreMode::kAverage) {
      for (int64_t c = 0; c < cols; ++c) store(row[c], keep_finite(source[c] * scale, source[c]));
    } else {
      for (int64_t c = 0; c < cols; ++c) store(row[c], source[c] * scale);
    }
  }
}

// ----------------------------------------------------------------------------------------------- gemm

// kRows rows times kVectors vectors of c; `depth` terms are summed in registers.
template <class Real, int kRows, int kVectors>
FSATTN_FORCE_INLINE void gemm_part(const GemmArgs<Real>& g, const Real* a, const Real* b, Real* c,
                                   int64_t depth, bool accumulate) {
  using S = Simd<Real>;
  typename S::V sum[kRows][kVectors] = {};
  const int64_t a_row = g.a_row, a_col = g.a_col, b_row = g.b_row;
  for (int64_t k = 0; k < depth; ++k, a += a_col, b += b_row) {
    typename S::V b_k[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) b_k[j] = S::load(b + j * S::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename S::V a_ik = S::broadcast(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] += a_ik * b_k[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    Real* row = c + i * g.c_row;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      if (accumulate) sum[i][j] += S::load(row + j * S::kLanes);
      S::store(row + j * S::kLanes, sum[i][j]);
    }
  }
}

template <class Real, int kRows, int kVectors>
void gemm_block(const GemmArgs<Real>& g, const Real* a, const Real* b, Real* c) {
  for (int64_t k = 0; k < g.depth; k += g.terms) {
    const int64_t depth = g.depth - k < g.terms ? g.depth - k : g.terms;
    gemm_part<Real, kRows, kVectors>(g, a + k * g.a_col, b + k * g.b_row, c, depth,
                                     g.accumulate || k > 0);
  }
}

template <class Real>
using GemmBlock = void (*)(const GemmArgs<Real>&, const Real*, const Real*, Real*);

template <class Real, int kVectors>
constexpr GemmBlock<Real> kGemmBlockOfRows[kGemmRows + 1] = {nullptr,
                                                             gemm_block<Real, 1, kVectors>,
                                                             gemm_block<Real, 2, kVectors>,
                                                             gemm_block<Real, 3, kVectors>,
                                                             gemm_block<Real, 4, kVectors>,
                                                             gemm_block<Real, 5, kVectors>,
                                                             gemm_block<Real, 6, kVectors>};

// One column of blocks: its part of b stays in the L1 cache. Blocks share the rows evenly, so that 8
// rows run as 4 + 4 and not as 6 + 2.
template <class Real, int kVectors>
void gemm_column(const GemmArgs<Real>& g, int64_t col) {
  const int32_t rows = static_cast<int32_t>(g.rows);
  int32_t begin = 0;
  for (int32_t blocks_left = (rows + kGemmRows - 1) / kGemmRows; blocks_left > 0; --blocks_left) {
    const int32_t count = (rows - begin + blocks_left - 1) / blocks_left;
    kGemmBlockOfRows<Real, kVectors>[count](g, g.a + begin * g.a_row, g.b + col,
                                            g.c + begin * g.c_row + col);
    begin += count;
  }
}

template <class Real>
void gemm(const GemmArgs<Real>& g) {
  constexpr int64_t kLanes = Simd<Real>::kLanes;
  int64_t col = 0;
  for (; col + kGemmVectors * kLanes <= g.cols; col += kGemmVectors * kLanes) {
    gemm_column<Real, kGemmVectors>(g, col);
  }
  for (; col < g.cols; col += kLanes) gemm_column<Real, 1>(g, col);
}

// -------------------------------------------------------------------------------------------- softmax

// Lanes of the vector at column `col` that lie in [first, last).
template <class Real>
FSATTN_FORCE_INLINE typename Simd<Real>::I is_visible(int64_t col, int64_t first, int64_t last) {
  using I = typename Simd<Real>::I;
  using Int = typename Simd<Real>::Int;
  const I lane = Simd<Real>::iota() + static_cast<Int>(col);
  return (lane >= static_cast<Int>(first)) & (lane < static_cast<Int>(last));
}

// The columns of a row that are worked on: the union of its tile widened to whole vectors, of which it
// sees [first, last).
template <class Real>
struct Columns {
  int64_t begin, end;
  int64_t first = 0, last = 0;

  explicit FSATTN_FORCE_INLINE Columns(const VisibleKeys& keys)
      : begin(keys.begin / Simd<Real>::kLanes * Simd<Real>::kLanes),
        end((keys.end + Simd<Real>::kLanes - 1) / Simd<Real>::kLanes * Simd<Real>::kLanes) {}

  FSATTN_FORCE_INLINE bool all_visible() const { return first <= begin && last >= end; }

  // x where the row sees the key, `other` elsewhere. Rows that see all of a tile skip the comparison.
  template <bool kMasked, class V>
  FSATTN_FORCE_INLINE V choose(int64_t col, V x, V other) const {
    if constexpr (!kMasked) return x;
    return is_visible<Real>(col, first, last) ? x : other;
  }
};

// The largest score of a row, before it is scaled.
template <bool kMasked, class Real>
FSATTN_FORCE_INLINE Real max_of_row(const Real* score, const Columns<Real>& cols) {
  using S = Simd<Real>;
  const typename S::V nothing = S::broadcast(-static_cast<Real>(__builtin_inf()));
  typename S::V largest = nothing;
  for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) {
    largest = S::max(cols.template choose<kMasked>(c, S::load(score + c), nothing), largest);
  }
  return S::max_of_lanes(largest);
}

// score becomes exp(scale * (score - shift)), 0 where invisible; returns the sum of the row. The
// difference comes first: it is exact near the maximum, whose probability is exactly 1.
template <bool kMasked, class Real>
FSATTN_FORCE_INLINE Real exp_of_row(Real* score, const Columns<Real>& cols, Real scale,
                                    Real shift) {
  using S = Simd<Real>;
  typename S::V sum{};
  for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) {
    const typename S::V p = exp_of((S::load(score + c) - shift) * scale);
    const typename S::V visible = cols.template choose<kMasked>(c, p, typename S::V{});
    S::store(score + c, visible);
    sum += visible;
  }
  return S::sum_of_lanes(sum);
}

template <class Real>
FSATTN_FORCE_INLINE void scale_row(Real* row, int64_t cols, Real factor) {
  using S = Simd<Real>;
  for (int64_t c = 0; c < cols; c += S::kLanes) S::store(row + c, S::load(row + c) * factor);
}

template <class Real>
FSATTN_FORCE_INLINE Real exp_of_scalar(Real x) {
  return exp_of(Simd<Real>::broadcast(x))[0];
}

template <bool kMasked, class Real>
FSATTN_FORCE_INLINE void softmax_step_row(const SoftmaxStepArgs<Real>& args,
                                          const Columns<Real>& cols, int64_t r) {
  Real* score = args.score + r * kTileKeys;
  const Real lowest = -static_cast<Real>(__builtin_inf());
  const Real old_max = args.row_max[r];
  const Real tile_max = max_of_row<kMasked>(score, cols);
  const Real new_max = tile_max > old_max ? tile_max : old_max;
  // Scores that are all -inf: shift by 0, so that exp gives 0 and not NaN.
  const Real shift = new_max == lowest ? 0 : new_max;
  const Real sum = exp_of_row<kMasked>(score, cols, args.scale, shift);
  if (new_max == old_max) {
    args.row_sum[r] += sum;
    return;
  }
  const Real decay = old_max == lowest ? 0 : exp_of_scalar<Real>((old_max - shift) * args.scale);
  args.row_max[r] = new_max;
  args.row_sum[r] = args.row_sum[r] * decay + sum;
  scale_row<Real>(args.out + r * args.out_cols, args.out_cols, decay);
}

template <class Real>
void softmax_step(const SoftmaxStepArgs<Real>& args) {
  Columns<Real> cols(args.keys);
  for (int64_t query = 0; query < args.keys.num_queries; ++query) {
    cols.first = args.keys.first[query];
    cols.last = args.keys.last[query];
    const bool all_visible = cols.all_visible();
    for (int64_t r = query * args.keys.group; r < (query + 1) * args.keys.group; ++r) {
      if (all_visible) {
        softmax_step_row<false>(args, cols, r);
      } else {
        softmax_step_row<true>(args, cols, r);
      }
    }
  }
}

// It is at most 1, but where a unit in the last place of a logit is worth 64, as at 1e9, a sum in another
// order than that of the lse may leave much more.
template <class V>
FSATTN_FORCE_INLINE V probability(V exponent) {
  return exp_of(exponent > V{} ? V{} : exponent);
}

template <bool kMasked, class Real>
FSATTN_FORCE_INLINE void softmax_grad_row(const SoftmaxGradArgs<Real>& args,
                                          const Columns<Real>& cols, int64_t r) {
  using S = Simd<Real>;
  Real* score = args.score + r * kTileKeys;
  Real* dscore = args.dscore + r * kTileKeys;
  const Real scale = args.scale, lse = args.lse[r], delta = args.delta[r];
  for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) {
    const typename S::V p = probability(S::load(score + c) * scale - lse);
    const typename S::V ds = p * (S::load(dscore + c) - delta);
    S::store(score + c, cols.template choose<kMasked>(c, p, typename S::V{}));
    S::store(dscore + c, cols.template choose<kMasked>(c, ds, typename S::V{}));
  }
}

template <class Real>
void softmax_grad(const SoftmaxGradArgs<Real>& args) {
  Columns<Real> cols(args.keys);
  for (int64_t query = 0; query < args.keys.num_queries; ++query) {
    cols.first = args.keys.first[query];
    cols.last = args.keys.last[query];
    const bool all_visible = cols.all_visible();
    for (int64_t r = query * args.keys.group; r < (query + 1) * args.keys.group; ++r) {
      if (all_visible) {
        softmax_grad_row<false>(args, cols, r);
      } else {
        softmax_grad_row<true>(args, cols, r);
      }
    }
  }
}

template <class Real>
void group_score(const GroupScoreArgs<Real>& args) {
  using S = Simd<Real>;
  Columns<Real> cols(args.keys);
  const int64_t group = args.keys.group;
  for (int64_t query = 0; query < args.keys.num_queries; ++query) {
    cols.first = args.keys.first[query];
    cols.last = args.keys.last[query];
    for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) {
      typename S::V joint{};  // probabilities are not negative: 0 starts the maximum, too
      for (int64_t r = query * group; r < (query + 1) * group; ++r) {
        const typename S::V x = S::load(args.score + r * kTileKeys + c) * args.scale;
        const typename S::V p = probability(x - args.lse[r]);
        joint = args.take_max ? S::max(p, joint) : joint + p;
      }
      S::store(args.out + query * kTileKeys + c,
               cols.template choose<true>(c, joint, typename S::V{}));
    }
  }
}

// What contraction makes of a * b + c in gemm_part; here the vectoriser may add products of its own.
template <class Real>
FSATTN_FORCE_INLINE Real multiply_add(Real a, Real b, Real c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(Real) == 4) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
#else
  return a * b + c;
#endif
}

// kRows rows at once hide the latency of sums that are serial, as those of gemm_part are.
template <int kRows, class Real>
FSATTN_FORCE_INLINE void row_dot_block(const Real* a, const Real* b, int64_t pitch, Real* out) {
  Real total[kRows] = {};
  for (int64_t begin = 0; begin < pitch; begin += kGemmTerms) {
    const int64_t end = pitch - begin < kGemmTerms ? pitch : begin + kGemmTerms;
    Real sum[kRows] = {};
    for (int64_t c = begin; c < end; ++c) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r] = multiply_add(a[r * pitch + c], b[r * pitch + c], sum[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) total[r] += sum[r];
  }
  for (int r = 0; r < kRows; ++r) out[r] = total[r];
}

template <class Real>
void row_dot(const Real* a, const Real* b, int64_t pitch, int64_t rows, Real* out) {
  constexpr int kBlock = 8;
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    row_dot_block<kBlock>(a + r * pitch, b + r * pitch, pitch, out + r);
  }
  for (; r < rows; ++r) row_dot_block<1>(a + r * pitch, b + r * pitch, pitch, out + r);
}

template <class T>
constexpr TileOps<Compute<T>> make_tile_ops() {
  using Real = Compute<T>;
  return {load_tile<T>,       load_transposed_tile<T>, store_tile<T>,     gemm<Real>,
          softmax_step<Real>, softmax_grad<Real>,      group_score<Real>, row_dot<Real>};
}

}  // namespace

extern const TileTable FSATTN_TILE_TABLE;
constexpr TileTable FSATTN_TILE_TABLE = {make_tile_ops<double>(), make_tile_ops<float>(),
                                         make_tile_ops<Float16>(), make_tile_ops<BFloat16>()};

}  // namespace fsattn::cpu
