// compress_kv, kind linear: every window of l tokens is one row of a matrix product with W.
//
// Math    y[i] = sum_{t, a} x[i*d + t, a] * W[t*D + a, :] + bias,  bias = sum_{t, a} pos_emb[t, a] * W[t*D + a, :]
//         dx[j, a] = sum over windows i that cover j, o of dy[i, o] * W[(j - i*d) * D + a, o]
//         dW[t*D + a, o] = sum_i x[i*d + t, a] * dy[i, o] + pos_emb[t, a] * sum_i dy[i, o]
//         dpos_emb[t, a] = sum_o W[t*D + a, o] * sum_i dy[i, o]
// Shapes  params/compress_kv.h; D a multiple of 8, tiles are padded with zeros.
// Tiles   64 x 128 outputs a CTA, 4 warps of 16 rows, K in steps of 64. The three products are one loop;
//         they differ in where a 16-byte piece of each operand lies, so no window is ever copied out.
//         dx: a CTA owns 64 tokens of one phase r = j % d, so each token is written once, without
//         atomics. dW: a CTA owns 64 rows of W and runs over all windows.
// Memory  3 stages x (A 8 KB + B 16 KB) = 72 KB.
// Bound   MMA: 2 * C * l * D * D FLOP a head, three times as much in both passes together. At 64K tokens,
//         8 heads, 128: 34 GFLOP, 0.1 ms at 350 TFLOP/s of mma.sync.
// Numbers fp32 accumulation in a fixed order, one rounding.
#pragma once
#include "cuda/compress_kv/compress_kv_pool.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn::device {

struct LinearTile {
  static constexpr int kM = 64, kN = 128, kK = 64;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kStages = 3;
  static constexpr int kABytes = kM * kK * 2, kBBytes = kK * kN * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kSmemBytes = kStages * kStageBytes;
  using Accumulator = float[kN / 8][4];
};

// kTransposed: the operand lies in memory as [k][m] (A) or [n][k] (B) instead of [m][k] and [k][n].
// `pieces(row, column)` returns the address of 8 elements of the tile as it lies in memory, or null
// for zeros.
template <int kRows, int kCols, class Element, class Pieces>
__device__ __forceinline__ void load_pieces(uint32_t tile, const Element* anywhere,
                                            const Pieces& pieces) {
  constexpr int kChunks = kCols / 8, kEach = kRows * kChunks / LinearTile::kThreads;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int c = static_cast<int>(threadIdx.x) + i * LinearTile::kThreads;
    const int row = c / kChunks, chunk = c % kChunks;
    const Element* from = pieces(row, chunk * 8);
    cp_async_16(tile + tile_offset<kCols>(row, chunk), from == nullptr ? anywhere : from,
                from != nullptr);
  }
}

template <class Element, bool kATransposed, bool kBTransposed>
__device__ __forceinline__ void multiply_stage(LinearTile::Accumulator& acc, uint32_t a,
                                               uint32_t b) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int kk = 0; kk < LinearTile::kK / 16; ++kk) {
    uint32_t af[4];
    if constexpr (kATransposed) {
      const int row = kk * 16 + lane % 8 + lane / 16 * 8;
      ldmatrix_x4_trans(af, a + tile_offset<LinearTile::kM>(row, warp * 2 + lane / 8 % 2));
    } else {
      const int row = warp * 16 + lane % 16;
      ldmatrix_x4(af, a + tile_offset<LinearTile::kK>(row, kk * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < LinearTile::kN / 16; ++n) {
      uint32_t bf[4];
      if constexpr (kBTransposed) {
        const int row = n * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(bf, b + tile_offset<LinearTile::kK>(row, kk * 2 + lane / 8 % 2));
      } else {
        const int row = kk * 16 + lane % 16;
        ldmatrix_x4_trans(bf, b + tile_offset<LinearTile::kN>(row, n * 2 + lane / 16));
      }
      mma_m16n8k16<Element>(acc[2 * n], af, bf[0], bf[1]);
      mma_m16n8k16<Element>(acc[2 * n + 1], af, bf[2], bf[3]);
    }
  }
}

// acc = A B over `depth`. a_piece(m or k, k or m) and b_piece(k or n, n or k) take positions inside
// the tile's rows and absolute positions along k.
template <class Element, bool kATransposed, bool kBTransposed, class APiece, class BPiece>
__device__ void multiply(LinearTile::Accumulator& acc, const Element* anywhere, int64_t depth,
                         const APiece& a_piece, const BPiece& b_piece) {
  using Tile = LinearTile;
  extern __shared__ __align__(128) unsigned char smem[];
  const uint32_t base = smem_address(smem);
  const int steps = static_cast<int>(ceil_div<int64_t>(depth, Tile::kK));
  const auto load = [&](int step) {
    const uint32_t stage = base + step % Tile::kStages * Tile::kStageBytes;
    const int64_t k0 = int64_t{step} * Tile::kK;
    const auto a = [&](int row, int col) {
      return kATransposed ? a_piece(k0 + row, col) : a_piece(row, k0 + col);
    };
    const auto b = [&](int row, int col) {
      return kBTransposed ? b_piece(row, k0 + col) : b_piece(k0 + row, col);
    };
    load_pieces<Tile::kM, Tile::kK>(stage, anywhere, a);  // 64 x 64 either way
    if constexpr (kBTransposed) {
      load_pieces<Tile::kN, Tile::kK>(stage + Tile::kABytes, anywhere, b);
    } else {
      load_pieces<Tile::kK, Tile::kN>(stage + Tile::kABytes, anywhere, b);
    }
  };
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    if (i < steps) load(i);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the stage has landed for everyone, and everyone has left the one refilled next
    const int ahead = step + Tile::kStages - 1;
    if (ahead < steps) load(ahead);
    cp_async_commit();
    const uint32_t stage = base + step % Tile::kStages * Tile::kStageBytes;
    multiply_stage<Element, kATransposed, kBTransposed>(acc, stage, stage + Tile::kABytes);
  }
}

// Calls store(row, column, x0, x1) for each pair of neighbouring accumulators.
template <class Store>
__device__ __forceinline__ void for_each_pair(const LinearTile::Accumulator& acc,
                                              const Store& store) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row = warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < LinearTile::kN / 8; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    store(row, column, acc[n][0], acc[n][1]);
    store(row + 8, column, acc[n][2], acc[n][3]);
  }
}

// Grid (row tiles, heads, column tiles).
template <class Element>
__global__ void __launch_bounds__(LinearTile::kThreads)
    linear_fwd_kernel(const __grid_constant__ CompressKvFwdParams p, const float* bias) {
  using Tile = LinearTile;
  __shared__ int first_token[Tile::kM];  // of each row's window; -1: none
  const CompressKvShape& shape = p.shape;
  const int64_t row0 = int64_t{blockIdx.x} * Tile::kM, head = blockIdx.y;
  const int64_t n0 = int64_t{blockIdx.z} * Tile::kN, dim = shape.head_dim;
  if (threadIdx.x < Tile::kM) {
    const WindowSource source =
        find_window(shape, p.cu_seqlens, p.cu_seqlens_cmp, row0 + threadIdx.x);
    first_token[threadIdx.x] = source.is_window ? source.first_token : -1;
  }
  __syncthreads();
  const int64_t depth = shape.kernel_size * dim;
  const auto* weight = static_cast<const Element*>(p.weight) + head * depth * dim;
  const Element* x = row_pointer<Element>(p.x, 0, head);
  const auto a = [&](int row, int64_t k) -> const Element* {
    if (k >= depth || first_token[row] < 0) return nullptr;
    return x + (first_token[row] + k / dim) * p.x.token_stride + k % dim;
  };
  const auto b = [&](int64_t k, int n) -> const Element* {
    return k < depth && n0 + n < dim ? weight + k * dim + n0 + n : nullptr;
  };
  Tile::Accumulator acc = {};
  multiply<Element, false, false>(acc, weight, depth, a, b);
  for_each_pair(acc, [&](int row, int column, float y0, float y1) {
    const int64_t n = n0 + column;
    if (row0 + row >= shape.rows_cmp || n >= dim) return;
    if (bias != nullptr && first_token[row] >= 0) {
      y0 += bias[head * dim + n];
      y1 += bias[head * dim + n + 1];
    }
    *reinterpret_cast<uint32_t*>(row_pointer<Element>(p.x_cmp, row0 + row, head, n)) =
        pack_pair<Element>(y0, y1);
  });
}

// Tokens of one phase: slot c of a sequence stands for its token c * d + phase.
struct PhaseRow {
  int token;       // -1: none
  int window;      // row of dx_cmp whose window starts at token c * d
  int first, end;  // rows of dx_cmp of the sequence
};

__device__ __forceinline__ PhaseRow find_phase_row(const CompressKvBwdParams& p, int64_t slot,
                                                   int phase) {
  const int batch = static_cast<int>(p.shape.batch), d = static_cast<int>(p.shape.kernel_stride);
  // Index `batch` stands for the tokens behind the last sequence, which no window covers.
  const int seq = find_slot_sequence(p.cu_seqlens, batch + 1, static_cast<int>(slot), d);
  const int start = __ldg(p.cu_seqlens + seq);
  const int end = seq == batch ? static_cast<int>(p.shape.total) : __ldg(p.cu_seqlens + seq + 1);
  const int c = static_cast<int>(slot) - (start / d + seq);
  const int token = start + c * d + phase;
  const int first = __ldg(p.cu_seqlens_cmp + seq);
  const int last = seq == batch ? first : __ldg(p.cu_seqlens_cmp + seq + 1);
  const bool is_inside = token >= 0 && token < end && token < p.shape.total;
  return {is_inside ? token : -1, first + c, first, last};
}

// Grid (slot tiles, heads, column tiles * d).
template <class Element>
__global__ void __launch_bounds__(LinearTile::kThreads)
    linear_dx_kernel(const __grid_constant__ CompressKvBwdParams p) {
  using Tile = LinearTile;
  __shared__ PhaseRow rows[Tile::kM];
  const CompressKvShape& shape = p.shape;
  const int64_t dim = shape.head_dim, d = shape.kernel_stride, head = blockIdx.y;
  const int phase = static_cast<int>(blockIdx.z % d);
  const int64_t n0 = blockIdx.z / d * Tile::kN;
  if (threadIdx.x < Tile::kM) {
    rows[threadIdx.x] = find_phase_row(p, int64_t{blockIdx.x} * Tile::kM + threadIdx.x, phase);
  }
  __syncthreads();
  const int64_t depth = shape.kernel_size / d * dim;  // k = (windows back) * dim + o
  const auto* weight = static_cast<const Element*>(p.weight) + head * shape.kernel_size * dim * dim;
  const Element* dy = row_pointer<Element>(p.dx_cmp, 0, head);
  const auto a = [&](int row, int64_t k) -> const Element* {
    const PhaseRow& r = rows[row];
    const int64_t window = r.window - k / dim;
    if (k >= depth || r.token < 0 || window < r.first || window >= r.end) return nullptr;
    return dy + window * p.dx_cmp.token_stride + k % dim;
  };
  const auto b = [&](int n, int64_t k) -> const Element* {
    if (k >= depth || n0 + n >= dim) return nullptr;
    return weight + ((phase + k / dim * d) * dim + n0 + n) * dim + k % dim;
  };
  Tile::Accumulator acc = {};
  multiply<Element, false, true>(acc, weight, depth, a, b);
  for_each_pair(acc, [&](int row, int column, float x0, float x1) {
    if (rows[row].token < 0 || n0 + column >= dim) return;
    Element* to = row_pointer<Element>(p.dx, rows[row].token, head, n0 + column);
    *reinterpret_cast<uint32_t*>(to) = pack_pair<Element>(x0, x1);
  });
}

// Grid (l, heads, tiles of a * tiles of o).
template <class Element>
__global__ void __launch_bounds__(LinearTile::kThreads)
    linear_dw_kernel(const __grid_constant__ CompressKvBwdParams p, const float* dy_sum) {
  using Tile = LinearTile;
  const CompressKvShape& shape = p.shape;
  const int64_t dim = shape.head_dim, t = blockIdx.x, head = blockIdx.y;
  const int64_t n_tiles = ceil_div<int64_t>(dim, Tile::kN);
  const int64_t n0 = blockIdx.z % n_tiles * Tile::kN, m0 = blockIdx.z / n_tiles * Tile::kM;
  const int64_t windows = min(int64_t{__ldg(p.cu_seqlens_cmp + shape.batch)}, shape.rows_cmp);
  const Element* x = row_pointer<Element>(p.x, t, head);
  const Element* dy = row_pointer<Element>(p.dx_cmp, 0, head);
  const auto a = [&](int64_t k, int m) -> const Element* {
    if (k >= windows || m0 + m >= dim) return nullptr;
    const WindowSource source = find_window(shape, p.cu_seqlens, p.cu_seqlens_cmp, k);
    return source.is_window ? x + source.first_token * p.x.token_stride + m0 + m : nullptr;
  };
  const auto b = [&](int64_t k, int n) -> const Element* {
    return k < windows && n0 + n < dim ? dy + k * p.dx_cmp.token_stride + n0 + n : nullptr;
  };
  Tile::Accumulator acc = {};
  multiply<Element, true, false>(acc, static_cast<const Element*>(p.weight), windows, a, b);
  const auto* pe = static_cast<const Element*>(p.pos_emb);
  for_each_pair(acc, [&](int row, int column, float w0, float w1) {
    const int64_t m = m0 + row, n = n0 + column;
    if (m >= dim || n >= dim) return;
    const int64_t k = (head * shape.kernel_size + t) * dim + m;  // row of [Hkv * l * D]
    if (pe != nullptr) {
      w0 += static_cast<float>(pe[k]) * dy_sum[head * dim + n];
      w1 += static_cast<float>(pe[k]) * dy_sum[head * dim + n + 1];
    }
    *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.dweight) + k * dim + n) =
        pack_pair<Element>(w0, w1);
  });
}

// partial[t, head, o] = sum_a pos_emb[head, t, a] * W[head, t*D + a, o]. Grid (l, heads).
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    linear_bias_kernel(const __grid_constant__ CompressKvShape shape, const void* weight,
                       const void* pos_emb, float* partial) {
  const int64_t dim = shape.head_dim, t = blockIdx.x, head = blockIdx.y;
  const int64_t k0 = (head * shape.kernel_size + t) * dim;
  const auto* w = static_cast<const Element*>(weight);
  const auto* pe = static_cast<const Element*>(pos_emb);
  for (int64_t o = threadIdx.x; o < dim; o += kCompressThreads) {
    float sum = 0.f;
    for (int64_t a = 0; a < dim; ++a) {
      sum += static_cast<float>(pe[k0 + a]) * static_cast<float>(w[(k0 + a) * dim + o]);
    }
    partial[(t * shape.num_heads + head) * dim + o] = sum;
  }
}

// dpos_emb[k] = sum_o W[k, o] * dy_sum[head, o]: a warp a row k of [Hkv * l * D].
template <class Element>
__global__ void __launch_bounds__(kCompressThreads)
    linear_dpos_kernel(const __grid_constant__ CompressKvShape shape, const void* weight,
                       const float* dy_sum, void* dpos) {
  const int64_t dim = shape.head_dim;
  const int64_t k = (int64_t{blockIdx.x} * kCompressThreads + threadIdx.x) / kWarpSize;
  if (k >= shape.num_heads * shape.kernel_size * dim) return;
  const int64_t head = k / (shape.kernel_size * dim);
  const auto* w = static_cast<const Element*>(weight) + k * dim;
  float sum = 0.f;
  for (int64_t o = threadIdx.x % kWarpSize; o < dim; o += kWarpSize) {
    sum += static_cast<float>(w[o]) * dy_sum[head * dim + o];
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, offset);
  }
  if (threadIdx.x % kWarpSize == 0) static_cast<Element*>(dpos)[k] = Element(sum);
}

}  // namespace fsattn::device
