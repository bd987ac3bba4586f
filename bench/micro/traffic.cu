// Question  What does the memory system alone allow block-major selected attention?
// Method    No arithmetic. (1) L2 read rate against the size of the buffer: streamed, and in random
//           tiles of 32 KiB (the access pattern of query-major attention). (2) Gather the query
//           rows of every block, write one partial row for each, merge the partial rows of a query;
//           the same with fp32 reduce-adds in place of partial rows. 64K tokens, 16 slots a query,
//           head dim 128, bf16, for several ranges of queries per chunk.
// Read      TB/s of (1); milliseconds of (2), one line a range. "scatter part" leaves the merge
//           out. Nothing is checked here: gather.cu, reduce.cu and overlap.cu check every result.
#include <random>

#include "micro.cuh"

constexpr int kTokens = 65536, kSlots = 16, kBlock = 64, kThreads = 256, kPairsACta = 32;
constexpr int kCtas = 132 * 8, kTileVectors = 2048, kTilesACta = 256;

__device__ __forceinline__ uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ void fold(uint4& sum, uint4 v) {
  sum = {sum.x ^ v.x, sum.y ^ v.y, sum.z ^ v.z, sum.w ^ v.w};
}

// `out` keeps the loads alive; the condition never holds for the bytes that main() writes.
__device__ __forceinline__ void keep(uint4 sum, uint4* out) {
  if (sum.x == 0x12345) *out = sum;
}

__global__ void stream_kernel(const uint4* p, size_t count, int repeats, uint4* out) {
  uint4 sum{};
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (int r = 0; r < repeats; ++r) {
#pragma unroll 8
    for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
      fold(sum, load_l2(p + i));
    }
  }
  keep(sum, out);
}

__global__ void tiles_kernel(const uint4* p, int num_tiles, uint4* out) {
  uint4 sum{};
  uint32_t state = blockIdx.x * 2654435761u + 12345u;
  for (int r = 0; r < kTilesACta; ++r) {
    state = state * 1664525u + 1013904223u;
    const uint4* tile = p + size_t{(state >> 8) % num_tiles} * kTileVectors;
#pragma unroll
    for (int i = 0; i < kTileVectors / kThreads; ++i) {
      fold(sum, load_l2(tile + i * kThreads + threadIdx.x));
    }
  }
  keep(sum, out);
}

static void measure_reads(uint4* out) {
  for (int mb : {8, 16, 24, 32, 40, 48, 64, 128}) {
    const size_t count = size_t(mb) << 16;
    const int repeats = 512 / mb * 4;
    uint4* p;
    CUDA_OK(cudaMalloc(&p, count * 16));
    CUDA_OK(cudaMemset(p, 1, count * 16));
    const float stream =
        median_ms([&] { stream_kernel<<<kCtas, kThreads>>>(p, count, repeats, out); });
    const float tiles =
        median_ms([&] { tiles_kernel<<<kCtas, kThreads>>>(p, int(count / kTileVectors), out); });
    printf("read %3d MB: stream %.2f TB/s, random 32 KiB tiles %.2f TB/s\n", mb,
           double(count) * 16 * repeats / stream / 1e9,
           double(kCtas) * kTilesACta * kTileVectors * 16 / tiles / 1e9);
    CUDA_OK(cudaFree(p));
  }
}

// One KV head of a chunk: pairs (query * kSlots + slot) in block order, rows of row16 16-byte
// vectors, q_stride16 vectors between queries.
struct Chunk {
  const uint4* q;
  const uint32_t* pairs;
  size_t begin, end;
  int q_stride16, row16;
  uint32_t first_token;
};

__global__ void __launch_bounds__(kThreads) scatter_kernel(Chunk c, uint4* partial) {
  const size_t base = c.begin + size_t{blockIdx.x} * kPairsACta;
  for (int i = threadIdx.x; i < kPairsACta * c.row16; i += kThreads) {
    const size_t k = base + i / c.row16;
    if (k >= c.end) continue;
    const uint32_t pair = c.pairs[k];
    uint4 v = __ldg(c.q + size_t{pair / kSlots} * c.q_stride16 + i % c.row16);
    v.x += 1;
    __stcg(partial + (pair - size_t{c.first_token} * kSlots) * c.row16 + i % c.row16, v);
  }
}

__global__ void __launch_bounds__(kThreads) reduce_add_kernel(Chunk c, float* sums) {
  const size_t base = c.begin + size_t{blockIdx.x} * kPairsACta;
  for (int i = threadIdx.x; i < kPairsACta * c.row16; i += kThreads) {
    const size_t k = base + i / c.row16;
    if (k >= c.end) continue;
    const uint32_t token = c.pairs[k] / kSlots;
    const uint4 v = __ldg(c.q + size_t{token} * c.q_stride16 + i % c.row16);
    const float x = __uint_as_float(v.x & 0xffff0000u);
    float* to = sums + (size_t{token - c.first_token} * c.row16 + i % c.row16) * 8;
    for (int half = 0; half < 2; ++half) {
      asm volatile("red.global.add.v4.f32 [%0],{%1,%1,%1,%1};" ::"l"(to + half * 4), "f"(x)
                   : "memory");
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_kernel(const uint4* partial, uint4* out, int tokens, int q_stride16, int row16) {
  const int rows_a_cta = kThreads / row16, row = threadIdx.x / row16;
  const int token = blockIdx.x * rows_a_cta + row;
  if (row >= rows_a_cta || token >= tokens) return;
  uint4 sum{};
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    fold(sum, __ldcg(partial + (size_t(token) * kSlots + slot) * row16 + threadIdx.x % row16));
  }
  out[size_t(token) * q_stride16 + threadIdx.x % row16] = sum;
}

// Random causal selection: first block, own block, the one before, the rest uniform (repeats
// allowed). Pairs in block order within each range; `offsets` holds the first pair of each range.
static std::vector<uint32_t> make_pairs(int range, std::vector<size_t>& offsets) {
  static std::mt19937 random(1);
  std::vector<uint32_t> pairs;
  offsets.assign(1, 0);
  for (int first = 0; first < kTokens; first += range) {
    std::vector<std::vector<uint32_t>> blocks(kTokens / kBlock);
    for (int token = first; token < first + range; ++token) {
      const int own = token / kBlock;
      for (int slot = 0; slot < kSlots; ++slot) {
        const int forced[3] = {0, own, std::max(own - 1, 0)};
        const int block = slot < 3 ? forced[slot] : int(random() % uint32_t(own + 1));
        blocks[size_t(block)].push_back(uint32_t(token * kSlots + slot));
      }
    }
    for (const auto& block : blocks) pairs.insert(pairs.end(), block.begin(), block.end());
    offsets.push_back(pairs.size());
  }
  return pairs;
}

static void measure_shape(int heads_kv, int group) {
  const int row16 = group * 16, q_stride16 = heads_kv * row16;
  const size_t row_bytes = size_t(row16) * 16, q_bytes = size_t(kTokens) * q_stride16 * 16;
  uint4 *q, *out, *partial;
  float* sums;
  CUDA_OK(cudaMalloc(&q, q_bytes));
  CUDA_OK(cudaMalloc(&out, q_bytes));
  CUDA_OK(cudaMalloc(&partial, size_t(kTokens) * kSlots * row_bytes));
  CUDA_OK(cudaMalloc(&sums, size_t(kTokens) * row_bytes * 2));
  CUDA_OK(cudaMemset(q, 1, q_bytes));
  CUDA_OK(cudaMemset(sums, 0, size_t(kTokens) * row_bytes * 2));
  for (int range : {65536, 8192, 4096, 2048, 1024}) {
    std::vector<size_t> offsets;
    const std::vector<uint32_t> host = make_pairs(range, offsets);
    uint32_t* pairs;
    CUDA_OK(cudaMalloc(&pairs, host.size() * 4));
    CUDA_OK(cudaMemcpy(pairs, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
    const auto for_chunks = [&](auto body) {
      for (int head = 0; head < heads_kv; ++head) {
        for (size_t i = 0; i + 1 < offsets.size(); ++i) {
          const Chunk c{q + head * row16,
                        pairs,
                        offsets[i],
                        offsets[i + 1],
                        q_stride16,
                        row16,
                        uint32_t(i) * uint32_t(range)};
          body(c, unsigned((c.end - c.begin + kPairsACta - 1) / kPairsACta), head);
        }
      }
    };
    const auto scatter = [&](const Chunk& c, unsigned ctas, int) {
      scatter_kernel<<<ctas, kThreads>>>(c, partial);
    };
    const auto scatter_merge = [&](const Chunk& c, unsigned ctas, int head) {
      scatter_kernel<<<ctas, kThreads>>>(c, partial);
      const int rows = kThreads / row16;
      merge_kernel<<<(range + rows - 1) / rows, kThreads>>>(
          partial, out + size_t{c.first_token} * q_stride16 + head * row16, range, q_stride16,
          row16);
    };
    const auto reduce_add = [&](const Chunk& c, unsigned ctas, int) {
      reduce_add_kernel<<<ctas, kThreads>>>(c, sums);
    };
    const float both = median_ms([&] { for_chunks(scatter_merge); }, 3);
    const float one = median_ms([&] { for_chunks(scatter); }, 3);
    const float added = median_ms([&] { for_chunks(reduce_add); }, 3);
    printf(
        "tokens %d Hkv %d G %d slots %d range %d (partials %.0f MB a chunk): gather + scatter + "
        "merge "
        "%.2f ms (scatter part %.2f), fp32 reduce-add %.2f ms; %.1f GB of rows one way\n",
        kTokens, heads_kv, group, kSlots, range, double(range) * kSlots * row_bytes / 1e6, both,
        one, added, double(kTokens) * kSlots * heads_kv * row_bytes / 1e9);
    fflush(stdout);
    CUDA_OK(cudaFree(pairs));
  }
  for (void* p : {static_cast<void*>(q), static_cast<void*>(out), static_cast<void*>(partial),
                  static_cast<void*>(sums)}) {
    CUDA_OK(cudaFree(p));
  }
}

int main() {
  uint4* out;
  CUDA_OK(cudaMalloc(&out, 1024));
  measure_reads(out);
  measure_shape(8, 4);
  measure_shape(4, 16);
  measure_shape(32, 1);
}
