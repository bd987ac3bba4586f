// Attention of 16 query rows over keys in pages: what a CTA of the decoding kernels does.
//
// Keys come in chunks of 16, all in one page. A warp takes every fourth chunk of the CTA's list and
// runs on its own: it copies K and V of its chunks through a ring of its own, one chunk ahead, and
// keeps a softmax and an output of its own. No warp waits for another until the four results are
// combined at the end.
#pragma once
#include "cuda/decode/decode_args.cuh"
#include "cuda/device/cache_hint_sm80.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

inline constexpr int kDecodeChunk = 16;
inline constexpr int kDecodeMaxChunks = static_cast<int>(kDecodeSplit) / kDecodeChunk;
static_assert(kDecodeMaxChunks == device::kWarpSize);  // one lane builds one chunk

template <DecodeConfig kConfig>
struct DecodeTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kDimV = kConfig.head_dim_v;
  static constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;
  static constexpr int kStages = kDecodeStages;
  static constexpr int kQBytes = device::tile_bytes<kDim>(static_cast<int>(kDecodeRows));
  static constexpr int kKBytes = device::tile_bytes<kDim>(kDecodeChunk);
  static constexpr int kVBytes = device::tile_bytes<kDimV>(kDecodeChunk);
  static constexpr int kStageBytes = kKBytes + kVBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kSmemBytes = 2 * kQBytes + kWarps * kWarpBytes;
  static_assert(kSmemBytes == static_cast<int>(decode_smem(kConfig)));
  // A warp leaves its fp32 result in one stage of its ring.
  static_assert(kDecodeRows * kDimV * 4 <= kStageBytes);
  static constexpr bool kIsNarrow = false;
  static constexpr int kFragments =
      kDimV <= 128 ? 4 : 1;  // brought at a time: what the registers hold
  static constexpr int kMinCtas = kSmemBytes <= 112 * 1024 ? 2 : 1;
};

namespace device {

// 16 neighbouring keys of a sequence.
struct KeyChunk {
  int page;  // -1: not in the cache; they read as zeros
  int row;   // of the first key in its page
  int key;   // the first key's place in its sequence
};

// The chunk that starts at `key`, a multiple of 16, so that it lies in one page.
__device__ __forceinline__ KeyChunk find_chunk(const PageTable& table, int seq, int key) {
  const int page_size = static_cast<int>(table.page_size);
  const int slot = key / page_size;
  int page = -1;
  if (slot < table.max_pages) page = __ldg(table.pages + seq * table.seq_stride + slot);
  if (page >= table.num_pages) page = -1;
  return {max(page, -1), key - slot * page_size, key};
}

// One head of the keys and values in pages.
template <class Element>
struct PagedHead {
  const Element *k, *v;
  int64_t k_page, v_page, k_token, v_token;  // strides
  int dim, dim_v;
  int num_keys;  // keys at or behind it read as zeros
};

template <class Element>
__device__ __forceinline__ PagedHead<Element> paged_head(const DecodeArgs& p,
                                                         const PagedKvView& view, int kv_head,
                                                         int num_keys) {
  return {static_cast<const Element*>(view.k.data) + kv_head * view.k.head_stride,
          static_cast<const Element*>(view.v.data) + kv_head * view.v.head_stride,
          view.k.page_stride,
          view.v.page_stride,
          view.k.token_stride,
          view.v.token_stride,
          p.head_dim,
          p.head_dim_v,
          num_keys};
}

// Starts a warp's copy of 16 rows, of which `rows` exist.
template <int kCols, class Element>
__device__ __forceinline__ void copy_chunk(uint32_t tile, const Element* from, int64_t stride,
                                           int rows, int cols, int lane, uint64_t policy) {
  const int row = lane / 8, col = lane % 8 * 8;
  const Element* src = from + row * stride + col;
#pragma unroll
  for (int i = 0; i < kDecodeChunk / 4; ++i) {
#pragma unroll
    for (int j = 0; j < kCols / 64; ++j) {
      const bool is_valid = row + 4 * i < rows && j * 64 + col < cols;
      cp_async_16_zero_fill(tile + tile_offset<kCols>(row + 4 * i, lane % 8) + j * 128,
                            src + j * 64, is_valid ? 16 : 0, policy);
    }
    src += 4 * stride;
  }
}

template <class Traits>
__device__ __forceinline__ void load_chunk(const PagedHead<typename Traits::Element>& head,
                                           const KeyChunk& chunk, uint32_t stage, int lane,
                                           uint64_t policy) {
  const int rows = chunk.page < 0 ? 0 : head.num_keys - chunk.key;
  const int64_t page = max(chunk.page, 0);
  copy_chunk<Traits::kDim>(stage, head.k + page * head.k_page + chunk.row * head.k_token,
                           head.k_token, rows, head.dim, lane, policy);
  copy_chunk<Traits::kDimV>(stage + Traits::kKBytes,
                            head.v + page * head.v_page + chunk.row * head.v_token, head.v_token,
                            rows, head.dim_v, lane, policy);
}

// Starts the copy of the tile's queries by kThreads threads; rows that do not exist read as zero.
template <class Traits, int kThreads>
__device__ __forceinline__ void load_queries(const DecodeArgs& p, const DecodeTile& tile, int token,
                                             uint32_t q_tile, int thread) {
  using Element = typename Traits::Element;
  const int col = thread % 8 * 8;
#pragma unroll
  for (int row = thread / 8; row < static_cast<int>(kDecodeRows); row += kThreads / 8) {
    const int at = tile.row + row, query = at / p.group, head = at - query * p.group;
    const bool is_row = row < tile.num_rows;
    const Element* from = static_cast<const Element*>(p.q.data) + col;
    if (is_row) {
      from += static_cast<int64_t>(token + query) * p.q.token_stride +
              static_cast<int64_t>(tile.kv_head * p.group + head) * p.q.head_stride;
    }
#pragma unroll
    for (int j = 0; j < Traits::kDim / 64; ++j) {
      cp_async_16(q_tile + tile_offset<Traits::kDim>(row, thread % 8) + j * 128, from + j * 64,
                  is_row && j * 64 + col < p.head_dim);
    }
  }
}

// A warp's ring of chunks.
template <class Traits>
struct ChunkRing {
  uint32_t base;
  int slot = 0;                    // of the next chunk
  int next = Traits::kStages - 1;  // the free one: the chunk behind those that are on their way

  __device__ uint32_t stage(int i) const { return base + i * Traits::kStageBytes; }
  __device__ void advance() {
    slot = slot + 1 == Traits::kStages ? 0 : slot + 1;
    next = next + 1 == Traits::kStages ? 0 : next + 1;
  }
};

// Starts the copies of the warp's first chunks of a list: all but one stage of its ring.
template <class Traits>
__device__ __forceinline__ void start_chunks(const PagedHead<typename Traits::Element>& head,
                                             const KeyChunk* chunks, int num_chunks,
                                             const ChunkRing<Traits>& ring, uint64_t policy) {
  const int thread = reread_thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
#pragma unroll
  for (int i = 0; i < Traits::kStages - 1; ++i) {
    const int c = warp + i * Traits::kWarps, at = ring.slot + i;
    if (c < num_chunks) {
      load_chunk<Traits>(head, chunks[c],
                         ring.stage(at < Traits::kStages ? at : at - Traits::kStages), lane,
                         policy);
    }
    cp_async_commit();
  }
}

// A lane's share of what its warp computed: rows lane / 4 and lane / 4 + 8.
template <class Traits>
struct DecodeResult {
  float o[1][Traits::kDimV / 8][4];
  float lse[2];
};

// The products of a chunk. A warp has little else to do while it waits for a fragment, so several
// are brought before the first is used, and S is summed in two halves.
template <class Traits>
__device__ __forceinline__ void multiply_queries(float (&s)[2][4], uint32_t q_tile, uint32_t k_tile,
                                                 int lane) {
  constexpr int kGroup = Traits::kFragments, kSteps = Traits::kDim / 16;
  static_assert(kSteps % kGroup == 0);
  const uint32_t q = lane_rows16<Traits::kDim>(q_tile, lane);
  const uint32_t k = lane_rows8x2<Traits::kDim>(k_tile, lane);
  float half[2][2][4] = {};
#pragma unroll
  for (int first = 0; first < kSteps; first += kGroup) {
    uint32_t a[kGroup][4], b[kGroup][4];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      ldmatrix_x4(a[i], chunk_pair(q, first + i));
      ldmatrix_x4(b[i], chunk_pair(k, first + i));
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      mma_m16n8k16<typename Traits::Element>(half[i % 2][0], a[i], b[i][0], b[i][1]);
      mma_m16n8k16<typename Traits::Element>(half[i % 2][1], a[i], b[i][2], b[i][3]);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = half[0][n][e] + half[1][n][e];
  }
}

template <class Traits>
__device__ __forceinline__ void multiply_values(float (&o)[Traits::kDimV / 8][4],
                                                const uint32_t (&p)[2][2], uint32_t v_tile,
                                                int lane) {
  constexpr int kGroup = Traits::kFragments, kPairs = Traits::kDimV / 16;
  static_assert(kPairs % kGroup == 0);
  const uint32_t v = lane_rows16<Traits::kDimV>(v_tile, lane);
  const uint32_t a[4] = {p[0][0], p[0][1], p[1][0], p[1][1]};
#pragma unroll
  for (int first = 0; first < kPairs; first += kGroup) {
    uint32_t b[kGroup][4];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) ldmatrix_x4_trans(b[i], chunk_pair(v, first + i));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      mma_m16n8k16<typename Traits::Element>(o[2 * (first + i)], a, b[i][0], b[i][1]);
      mma_m16n8k16<typename Traits::Element>(o[2 * (first + i) + 1], a, b[i][2], b[i][3]);
    }
  }
}

// Attends to a list of chunks after start_chunks(). The queries are in q_tile. `seen`: what the
// lane's two rows see. `on_scores(key, s)` is told the products q k of 16 keys,
// `on_probabilities(key, s, reference)` 2^(scaled product - reference of the row).
template <class Traits, class OnScores, class OnProbabilities>
__device__ __forceinline__ void attend(DecodeResult<Traits>& result,
                                       const PagedHead<typename Traits::Element>& head,
                                       const KeyChunk* chunks, int num_chunks,
                                       const KeyInterval (&seen)[2], float scale_log2,
                                       uint32_t q_tile, ChunkRing<Traits>& ring, uint64_t policy,
                                       const OnScores& on_scores,
                                       const OnProbabilities& on_probabilities) {
  using Element = typename Traits::Element;
  constexpr int kStages = Traits::kStages;
  const int thread = reread_thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
  OnlineSoftmax<Element, 1> softmax;
  softmax.init();
#pragma unroll
  for (int n = 0; n < Traits::kDimV / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) result.o[0][n][e] = 0.f;
  }
  // The stage that start_chunks() left to the results of the list before.
  constexpr int kLast = (kStages - 1) * Traits::kWarps;
  if (warp + kLast < num_chunks) {
    load_chunk<Traits>(head, chunks[warp + kLast], ring.stage(ring.next), lane, policy);
  }
  cp_async_commit();
  for (int c = warp; c < num_chunks; c += Traits::kWarps) {
    cp_async_wait<kStages - 1>();
    __syncwarp();  // the chunk has landed
    const uint32_t k_tile = ring.stage(ring.slot);
    float s[1][2][4] = {};
    multiply_queries<Traits>(s[0], q_tile, k_tile, lane);
    const int key = chunks[c].key;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int k = key + n * 8 + lane % 4 * 2 + e % 2;
        if (k < seen[e / 2].first || k > seen[e / 2].last) s[0][n][e] = -INFINITY;
      }
    }
    on_scores(key, s[0]);
    uint32_t prob[1][2][2];
    softmax.step(s, prob, result.o, scale_log2);
    on_probabilities(key, s[0], softmax.max);
    multiply_values<Traits>(result.o[0], prob[0], k_tile + Traits::kKBytes, lane);
    __syncwarp();  // no lane reads the chunk any more
    const int ahead = c + kStages * Traits::kWarps;
    if (ahead < num_chunks) {
      // Where registers are short, addresses are made anew.
      load_chunk<Traits>(head, chunks[ahead], k_tile,
                         Traits::kIsNarrow ? reread_thread_index() % kWarpSize : lane, policy);
    }
    cp_async_commit();
    ring.advance();
  }
  softmax.finish(result.o, result.lse);
}

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& x) {
  sum.x = fmaf(scale, x.x, sum.x);
  sum.y = fmaf(scale, x.y, sum.y);
  sum.z = fmaf(scale, x.z, sum.z);
  sum.w = fmaf(scale, x.w, sum.w);
}

// Where a CTA leaves a partial result: fp32 rows.
struct PartialRows {
  float *o, *lse;
  int64_t o_stride, lse_stride;
};

// Where up to eight warps leave their results for each other.
struct WarpResults {
  float lse[8][kDecodeRows];
  uint32_t o[8];  // addresses in shared memory
};

// Element (row, col) of a result; rows are swizzled over the banks.
template <class Traits>
__device__ __forceinline__ uint32_t result_offset(int row, int col) {
  return static_cast<uint32_t>(row * Traits::kDimV + (col ^ (row & 7) << 3)) * 4;
}

// Puts the warp's result into the free stage of its ring.
template <class Traits>
__device__ __forceinline__ void leave_result(const DecodeResult<Traits>& result,
                                             const ChunkRing<Traits>& ring, WarpResults& results) {
  const int thread = reread_thread_index();  // addresses are not kept over the loop
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const uint32_t stage = ring.stage(ring.next);
  __syncwarp();  // the lanes have read their last chunk
#pragma unroll
  for (int n = 0; n < Traits::kDimV / 8; ++n) {
    const float(&x)[4] = result.o[0][n];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_shared_f32x2(stage + result_offset<Traits>(lane / 4 + 8 * half, n * 8 + lane % 4 * 2),
                         x[2 * half], x[2 * half + 1]);
    }
  }
  if (lane % 4 == 0) {
    results.lse[warp][lane / 4] = result.lse[0];
    results.lse[warp][lane / 4 + 8] = result.lse[1];
  }
  if (lane == 0) results.o[warp] = stage;
}

// Adds up what the warps left: write(row, quad, sum, lse) of all rows and columns. The threads of
// these warps call it after a barrier. kItems sums at a time: each is a chain of short steps.
template <class Traits, int kItems, class Write>
__device__ __forceinline__ void add_results_of(const WarpResults& results, int num_rows,
                                               const Write& write) {
  constexpr int kQuads = Traits::kDimV / 4, kApart = Traits::kThreads / kQuads;
  constexpr int kWarps = Traits::kWarps;
  static_assert(Traits::kThreads % kQuads == 0);
  const int first = threadIdx.x / kQuads, quad = threadIdx.x % kQuads;
#pragma unroll 1
  for (int row = first; row < num_rows; row += kItems * kApart) {
    uint4 x[kItems][kWarps];
    float weight[kItems][kWarps], lse[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int at = min(row + k * kApart, static_cast<int>(kDecodeRows) - 1);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weight[k][w] = results.lse[w][at];
        x[k][w] = load_shared_u128(results.o[w] + result_offset<Traits>(at, quad * 4));
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      float top = weight[k][0], total = 0.f;
#pragma unroll
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, weight[k][w]);
      const float shift = top == -INFINITY ? 0.f : top * kLog2E;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weight[k][w] = exp2_approx(fmaf(weight[k][w], kLog2E, -shift));
        total += weight[k][w];
      }
      lse[k] = top == -INFINITY ? top : top + log2_approx(total) * kLn2;
      // Normalised before the sum, which then cannot leave the range of its terms.
      const float inverse = total == 0.f ? 0.f : __fdividef(1.f, total);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) weight[k][w] *= inverse;
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (row + k * kApart >= num_rows) break;
      float4 sum{};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        add_scaled(sum, weight[k][w],
                   {__uint_as_float(x[k][w].x), __uint_as_float(x[k][w].y),
                    __uint_as_float(x[k][w].z), __uint_as_float(x[k][w].w)});
      }
      write(row + k * kApart, quad, sum, lse[k]);
    }
  }
}

template <class Traits, class Write>
__device__ __forceinline__ void add_results(const WarpResults& results, int num_rows,
                                            const Write& write) {
  if (num_rows <= Traits::kThreads * 4 / Traits::kDimV) {
    add_results_of<Traits, 1>(results, num_rows, write);
  } else {
    add_results_of<Traits, 16 / Traits::kWarps>(results, num_rows, write);
  }
}

// Leaves the sum in memory.
template <class Traits>
__device__ __forceinline__ void combine_results(const WarpResults& results, const PartialRows& out,
                                                int num_rows, int dim_v) {
  add_results<Traits>(results, num_rows, [&](int row, int quad, const float4& sum, float lse) {
    if (quad * 4 < dim_v) {
      *reinterpret_cast<float4*>(out.o + row * out.o_stride + quad * 4) = sum;
    }
    if (quad == 0) out.lse[row * out.lse_stride] = lse;
  });
}

}  // namespace device
}  // namespace fsattn
