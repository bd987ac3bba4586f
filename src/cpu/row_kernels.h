// The inner loops of compress_kv and gate, over rows of `dim` contiguous elements (dim a multiple of
// 8), and the tile product of the linear compression. Compiled once per instruction set; a caller
// takes the table once, above its loops.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace fsattn::cpu {

constexpr int64_t kMaxHeadDim = 256;

// The shape of gemm_tile's tile of sums.
template <class Acc>
struct GemmTile {
  // A row is one 64-byte vector: six sums, one vector of the right operand and one broadcast value fit
  // the 16 registers of AVX2, where a vector takes two, and the 32 of AVX-512.
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kColumns = 64 / static_cast<int64_t>(sizeof(Acc));
};

template <class T>
struct RowKernels {
  using Acc = Compute<T>;

  // to = from (any dim), or from + addend.
  void (*load)(const T* from, Acc* to, int64_t dim);
  void (*load_sum)(const T* from, const T* addend, Acc* to, int64_t dim);
  // to = from, rounded once; any dim.
  void (*store)(const Acc* from, T* to, int64_t dim);
  // sum += x, sum of `count` rows that lie x_stride apart, row i times weight[i * weight_stride].
  void (*weighted_sum)(const T* x, int64_t x_stride, const Acc* weight, int64_t weight_stride,
                       int64_t count, Acc* sum, int64_t dim);
  // sums[i] += dot(x + i * x_stride, y).
  void (*dots)(const T* x, int64_t x_stride, int64_t count, const Acc* y, Acc* sums, int64_t dim);
  // sums[r, c] += sum over k < depth of a[r * a_row + k * a_depth] * b[k * b_depth + c], for one tile.
  void (*gemm_tile)(int64_t depth, const Acc* a, int64_t a_row, int64_t a_depth, const Acc* b,
                    int64_t b_depth, Acc* sums, int64_t sums_row);
  // o = sum of gates[i] * branches[i], rounded once.
  void (*gate)(const Acc* gates, const T* const* branches, T* o, int64_t dim);
  // d_branches[i] = gates[i] * dout;  dots[i] = dot(dout, branches[i]).
  void (*gate_grad)(const Acc* gates, const T* dout, const T* const* branches, T* const* d_branches,
                    Acc* dots, int64_t dim);
};

namespace baseline {
template <class T>
RowKernels<T> row_kernels();
}
namespace avx2 {
template <class T>
RowKernels<T> row_kernels();
}
namespace avx512 {
template <class T>
RowKernels<T> row_kernels();
}

template <class T>
RowKernels<T> row_kernels(Isa isa) {
#ifdef FSATTN_CPU_X86
  if (isa == Isa::kAvx512) return avx512::row_kernels<T>();
  if (isa == Isa::kAvx2) return avx2::row_kernels<T>();
#endif
  (void)isa;
  return baseline::row_kernels<T>();
}

}  // namespace fsattn::cpu
