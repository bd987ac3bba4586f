// Time of one layer of decoding inside a CUDA graph: bench_decode [config ...] (all without arguments).
// Each graph runs several layers, each with a cache of its own, so that no layer finds its keys in L2. The plan
// decides between the kernels; FINISH=0, 8 or 2w asks for several kernels, clusters of 8 or wide ones of 2.
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "base/device.h"
#include "cuda/decode/decode.h"
#include "kernels/dense_attn_case.h"
#include "kernels/skip.h"
#include "plan/paged_cuda.h"

namespace fsattn::test {
namespace {

struct Config {
  const char* name;
  int batch, context, heads_q, heads_kv, layers;
};

constexpr Config kConfigs[] = {
    {"b16-64k-32/8", 16,  65536,   32, 8, 3 },
    {"b16-64k-64/4", 16,  65536,   64, 4, 4 },
    {"b1-128k-32/8", 1,   131072,  32, 8, 8 },
    {"b16-8k-32/8",  16,  8192,    32, 8, 8 },
    {"b1-8k-32/8",   1,   8192,    32, 8, 16},
    {"b1-1m-32/8",   1,   1 << 20, 32, 8, 2 },
    {"b1-1m-64/4",   1,   1 << 20, 64, 4, 3 },
    {"b128-8k-32/8", 128, 8192,    32, 8, 3 },
    {"b4-64k-32/8",  4,   65536,   32, 8, 6 },
    {"b16-8k-64/4",  16,  8192,    64, 4, 12},
    {"b1-32k-64/4",  1,   32768,   64, 4, 16},
    {"b2-128k-32/8", 2,   131072,  32, 8, 5 },
};
constexpr int kDim = 128, kPage = 64, kSize = 32, kStride = 16, kBlock = 64, kTopk = 16,
              kWindow = 512;

__global__ void fill(__nv_bfloat16* data, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n;
       i += size_t(gridDim.x) * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    // Sum of four bytes: near to normal, variance 1.
    const int sum = int(h & 255) + int(h >> 8 & 255) + int(h >> 16 & 255) + int(h >> 24) - 510;
    data[i] = __float2bfloat16(float(sum) * (1.f / 147.8f));
  }
}

DeviceArray<uint16_t> random_array(size_t n, uint32_t seed) {
  DeviceArray<uint16_t> x(n);
  fill<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(x.data), n, seed);
  return x;
}

struct Store {
  DeviceArray<uint16_t> k, v;
  DeviceArray<int32_t> table;
  PagedKvView view;

  Store(const Config& c, int length, uint32_t seed) {
    const int pages = (length + kPage - 1) / kPage, all = pages * c.batch;
    std::vector<int32_t> order(static_cast<size_t>(all));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    table = DeviceArray<int32_t>(order);
    const int64_t page = int64_t{kPage} * c.heads_kv * kDim;
    k = random_array(size_t(all * page), seed);
    v = random_array(size_t(all * page), seed + 1);
    const auto rows = [&](uint16_t* data) {
      return PagedRows{data, page, c.heads_kv * kDim, kDim};
    };
    view = {
        rows(k.data), rows(v.data), {table.data, pages, pages, all, kPage}
    };
  }
};

PagedTuning choose_tuning(const Config& c, const PagedAttnParams& p) {
  PagedProblem problem;
  problem.op = PagedOp::kAttn;
  problem.device = {DeviceType::kCuda, 0};
  problem.dtype = DType::kBFloat16;
  problem.batch = problem.total_q = c.batch;
  problem.max_q = problem.max_seqlen_q = 1;
  problem.max_k = c.context;
  problem.num_heads_q = c.heads_q;
  problem.num_heads_kv = c.heads_kv;
  problem.head_dim = problem.head_dim_v = kDim;
  problem.page_size = problem.cmp_page_size = kPage;
  problem.kernel_size = p.kernel_size;
  problem.kernel_stride = p.kernel_stride;
  problem.block_size = p.block_size;
  problem.topk = p.topk;
  problem.window_size = p.window_size;
  PagedTuning tuning = choose_paged_fused(problem, query_device(problem.device)).tuning;
  if (const char* finish = std::getenv("FINISH")) {
    tuning.finish = {std::atoi(finish), std::strchr(finish, 'w') != nullptr};
  }
  return tuning;
}

void run(const Config& c) {
  const int64_t max_cmp = num_windows(c.context, kSize, kStride);
  std::vector<Store> caches, cmps;
  for (int i = 0; i < c.layers; ++i) {
    caches.emplace_back(c, c.context, 17 + 10 * i);
    cmps.emplace_back(c, int(max_cmp), 19 + 10 * i);
  }
  std::vector<int32_t> cu(size_t(c.batch + 1)), len(size_t(c.batch), c.context - 1);
  std::iota(cu.begin(), cu.end(), 0);
  const DeviceArray<int32_t> dev_cu(cu), dev_len(len);
  const size_t rows = size_t(c.batch * c.heads_q);
  const auto q = random_array(rows * kDim, 1), gates = random_array(rows * 3, 2);
  const DeviceArray<uint16_t> o(rows * kDim);
  const DeviceArray<int32_t> topk(size_t(c.heads_kv * c.batch * kTopk));
  PagedAttnParams p{};
  p.packing = {c.batch, dev_cu.data, dev_len.data, c.batch, 1, c.context};
  p.shape = {DType::kBFloat16, c.heads_q, c.heads_kv, kDim, kDim, 0.08838834764831845};
  p.q = {q.data, c.heads_q * kDim, kDim};
  p.gates = {gates.data, c.heads_q * 3, 3};
  p.kernel_size = kSize;
  p.kernel_stride = kStride;
  p.block_size = kBlock;
  p.topk = kTopk;
  p.init_blocks = 1;
  p.local_blocks = 2;
  p.window_size = kWindow;
  p.topk_idx = topk.data;
  p.o = {o.data, c.heads_q * kDim, kDim};
  p.tuning = choose_tuning(c, p);
  DecodeSplits splits = decode_splits(max_cmp, p.tuning.cmp_split, kBlock, kTopk, kWindow);
  if (p.tuning.finish.ctas > 0) splits = decode_finish_splits(splits, p.tuning.finish.ctas);
  const DeviceArray<char> scratch(
      size_t(decode_scratch(int64_t{c.batch} * c.heads_kv, 1, c.heads_q / c.heads_kv, kDim, max_cmp,
                            c.context / kBlock, splits, true)
                 .bytes));
  p.scratch = {scratch.data, scratch.size};
  FSATTN_CUDA_CHECK(cudaDeviceSynchronize());

  cudaStream_t stream;
  FSATTN_CUDA_CHECK(cudaStreamCreate(&stream));
  FSATTN_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < c.layers; ++i) {
    p.cache = caches[size_t(i)].view;
    p.cmp = cmps[size_t(i)].view;
    launch_paged_attn(find_decode_row(DType::kBFloat16, kDim, kDim), p, stream);
  }
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  FSATTN_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  FSATTN_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  FSATTN_CUDA_CHECK(cudaEventCreate(&begin));
  FSATTN_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  constexpr int kReplays = 10;
  for (int i = 0; i < 23; ++i) {
    FSATTN_CUDA_CHECK(cudaEventRecord(begin, stream));
    for (int j = 0; j < kReplays; ++j) FSATTN_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    FSATTN_CUDA_CHECK(cudaEventRecord(end, stream));
    FSATTN_CUDA_CHECK(cudaEventSynchronize(end));
    float ms;
    FSATTN_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms * 1e3f / (kReplays * float(c.layers)));
  }
  std::sort(times.begin(), times.end());
  const double bytes =
      double(c.batch) * c.heads_kv * kDim * 4 *
      double(max_cmp + std::min(c.context, kTopk * kBlock) + std::min(c.context, kWindow + 1));
  std::printf("%-14s median %7.1f us, best %7.1f; reads %6.1f MB: %4.2f TB/s\n", c.name,
              times[times.size() / 2], times[0], bytes / 1e6,
              bytes / 1e6 / times[times.size() / 2]);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace fsattn::test

int main(int argc, char** argv) {
  if (fsattn::test::is_skipped(1, argv)) return 0;
  for (const auto& config : fsattn::test::kConfigs) {
    bool is_asked = argc == 1;
    for (int i = 1; i < argc; ++i) is_asked |= std::strcmp(argv[i], config.name) == 0;
    if (is_asked) fsattn::test::run(config);
  }
  return 0;
}
