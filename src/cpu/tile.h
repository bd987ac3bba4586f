// What the attention kernels do with tiles of 64 keys, as a table of function pointers: one table per
// (instruction set, storage type). The callers hold loops and indices alone, so that nothing else needs
// to be compiled more than once.
//
// A tile is row-major; its pitch is a multiple of kPitch elements and its padding is readable. Real is
// the compute type: fp64 for fp64 tensors, fp32 for all others.
#pragma once
#include <cstdint>

#include "fsattn/tensor.h"
#include "plan/cpu_workspace.h"

namespace fsattn::cpu {

// Keys in a tile at most; the pitch of tiles of scores and of transposed keys. The smallest size at
// which a score row fills four AVX-512 vectors, so that 6 rows of accumulators hide the FMA latency.
constexpr int64_t kTileKeys = kCpuTileKeys;
// Query rows (queries of a tile times heads of a group) at most.
constexpr int64_t kTileRows = kCpuTileRows;
// Elements in the longest vector of any instruction set.
constexpr int64_t kPitch = kCpuPitch;

// Terms of a product that are summed in registers before they join c. One long fp32 sum loses more: the
// rounding errors of n terms in parts of m grow like sqrt(n m / 2 + n^2 / (2 m)), least at m = sqrt(n);
// 16 is that of n = 256. It costs 2 to 5 % of the time of one long sum.
constexpr int64_t kGemmTerms = 16;

// c (+)= a * b. cols is rounded up to whole vectors; b and c have the room. Row i, column k of a is
// a[i * a_row + k * a_col], so that a transposed a costs nothing. Sums of up to kTileKeys terms that
// start at a visible key are made in one part (terms = kTileKeys): where their parts would begin depends
// on the other rows of the tile.
template <class Real>
struct GemmArgs {
  int64_t rows, cols, depth;
  const Real* a;
  int64_t a_row, a_col;
  const Real* b;
  int64_t b_row;
  Real* c;
  int64_t c_row;
  bool accumulate;
  int64_t terms = kGemmTerms;
};

// The visible keys of a tile. Query i (rows i * group .. i * group + group - 1) sees the columns
// first[i] .. last[i] - 1, at least one of them. begin is the smallest first, end the largest last.
struct VisibleKeys {
  int64_t num_queries;
  int64_t group;
  const int32_t* first;
  const int32_t* last;
  int64_t begin, end;
};

// One step of the online softmax. score [rows, kTileKeys] holds q . k and becomes
// P = exp(scale * (score - row_max)), 0 where a row does not see a key of [begin, end); row_max, row_sum
// and out [rows, out_cols] follow the new maximum.
template <class Real>
struct SoftmaxStepArgs {
  VisibleKeys keys;
  Real scale;
  Real* score;
  Real* row_max;
  Real* row_sum;
  Real* out;
  int64_t out_cols;  // also the pitch
};

// score [rows, kTileKeys] becomes P = exp(scale * score - lse), dscore becomes dS = P (dscore - delta);
// both are 0 where a row does not see a key of [begin, end).
template <class Real>
struct SoftmaxGradArgs {
  VisibleKeys keys;
  Real scale;
  Real* score;
  Real* dscore;
  const Real* lse;
  const Real* delta;
};

// out[i, key] = sum (or maximum) over the group of exp(scale * score - lse) for the keys that query i
// sees, 0 for the others of [begin, end). out has the pitch kTileKeys, one row a query.
template <class Real>
struct GroupScoreArgs {
  VisibleKeys keys;
  Real scale;
  bool take_max;
  const Real* score;
  const Real* lse;
  Real* out;
};

enum class StoreMode : int {
  kWrite,
  kAdd,      // to what is there
  kAverage,  // write; a finite number stays finite, for an average cannot pass the largest value
};

template <class Real>
struct TileOps {
  // to[r, c] = from[r * row_stride + c] * factor, 0 for the columns cols .. pitch - 1.
  void (*load)(const void* from, int64_t row_stride, int64_t rows, int64_t cols, Real factor,
               Real* to, int64_t pitch);
  // to[c, r] = from[r * row_stride + c] * factor with the pitch kTileKeys, 0 for rows <= r < next
  // vector.
  void (*load_transposed)(const void* from, int64_t row_stride, int64_t rows, int64_t cols,
                          Real factor, Real* to);
  // to[r * row_stride + c] = from[r, c] * row_scale[r], rounded once.
  void (*store)(const Real* from, int64_t pitch, const Real* row_scale, int64_t rows, int64_t cols,
                void* to, int64_t row_stride, StoreMode mode);
  void (*gemm)(const GemmArgs<Real>&);
  void (*softmax_step)(const SoftmaxStepArgs<Real>&);
  void (*softmax_grad)(const SoftmaxGradArgs<Real>&);
  void (*group_score)(const GroupScoreArgs<Real>&);
  // out[r] = sum over c < pitch of a[r, c] * b[r, c], added in the order of gemm: the dS of a row that
  // sees one key is dO v - dO o with o = v, and must be 0.
  void (*row_dot)(const Real* a, const Real* b, int64_t pitch, int64_t rows, Real* out);
};

// The tables of one instruction set.
struct TileTable {
  TileOps<double> float64;
  TileOps<float> float32, float16, bfloat16;
};

extern const TileTable kTileTableBaseline;
#ifdef FSATTN_CPU_X86
extern const TileTable kTileTableAvx2;
extern const TileTable kTileTableAvx512;
#endif

// The table for a dtype and active_isa(). Real must be the compute type of dtype.
template <class Real>
const TileOps<Real>& tile_ops(DType dtype);

}  // namespace fsattn::cpu
