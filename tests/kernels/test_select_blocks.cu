// select_blocks of every row that takes a problem, against float64 on the device. Arguments: parts of
// test names; "bench" times instead.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "cuda/select_blocks/select_blocks.h"
#include "kernels/kernel_test.cuh"

namespace fsattn::test {
namespace {

struct SelectCase {
  std::vector<int> lens_q, lens_k;
  int heads_q, heads_kv, dim = 128;
  int topk = 16, init = 1, local = 2;
  GroupReduce reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
  float scale = 1.f;  // of the queries: large ones make peaky probabilities
  std::vector<int> offsets = {};
  int kernel_size = 32, stride = 16, block = 64;
  bool equal_keys = false;
};

// Uniform in [-1.7, 1.7], variance 1, times `scale`.
template <class Element>
__global__ void fill_kernel(Element* x, int64_t count, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h =
        (static_cast<uint64_t>(i) + (static_cast<uint64_t>(seed) << 40)) * 0x9e3779b97f4a7c15u;
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9u;
    h ^= h >> 32;
    x[i] = Element((static_cast<float>(h & 0xffffff) / 8388608.f - 1.f) * 1.7320508f * scale);
  }
}

__device__ double dot(const void* a, const void* b, int dim, bool is_bf16) {
  double sum = 0;
  for (int i = 0; i < dim; ++i) {
    sum += is_bf16
               ? static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(a)[i])) *
                     static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(b)[i]))
               : static_cast<double>(__half2float(static_cast<const __half*>(a)[i])) *
                     static_cast<double>(__half2float(static_cast<const __half*>(b)[i]));
  }
  return sum;
}

struct Sampled {
  int token, seq_first_key, num_keys, position;
};

// A CTA a (sample, query head): logits of the windows and lse of the visible ones.
__global__ void logits_kernel(SelectBlocksParams p, const Sampled* samples, int max_keys,
                              double* logits, double* lse) {
  __shared__ double part[256];
  const Sampled s = samples[blockIdx.x];
  const int head = blockIdx.y, kv = head / static_cast<int>(p.shape.group_size());
  const int dim = static_cast<int>(p.shape.head_dim);
  const char* q = static_cast<const char*>(p.q.data) +
                  2 * (s.token * p.q.token_stride + head * p.q.head_stride);
  double* row = logits + (int64_t{blockIdx.x} * gridDim.y + head) * max_keys;
  double largest = -INFINITY;
  for (int i = threadIdx.x; i < s.num_keys; i += blockDim.x) {
    const char* k = static_cast<const char*>(p.k_cmp.data) +
                    2 * ((s.seq_first_key + i) * p.k_cmp.token_stride + kv * p.k_cmp.head_stride);
    const bool is_seen = s.position >= i * p.mask.kernel_stride + p.mask.kernel_size - 1;
    row[i] = is_seen ? dot(q, k, dim, p.shape.dtype == DType::kBFloat16) * p.shape.softmax_scale
                     : -INFINITY;
    largest = fmax(largest, row[i]);
  }
  part[threadIdx.x] = largest;
  __syncthreads();
  for (int i = 0; i < 256; ++i) largest = fmax(largest, part[i]);
  __syncthreads();
  double sum = 0;
  for (int i = threadIdx.x; i < s.num_keys; i += blockDim.x)
    if (row[i] > -INFINITY) sum += exp(row[i] - largest);
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int i = 0; i < 256; ++i) sum += part[i];
    lse[int64_t{blockIdx.x} * gridDim.y + head] = sum > 0 ? largest + log(sum) : -INFINITY;
  }
}

// lse of every row in fp32 arithmetic that is far from what is tested: one CTA a (token, head).
__global__ void lse_kernel(SelectBlocksParams p, const Sampled* all, float* lse) {
  const Sampled s = all[blockIdx.x];
  const int head = blockIdx.y, kv = head / static_cast<int>(p.shape.group_size());
  const int dim = static_cast<int>(p.shape.head_dim);
  const char* q = static_cast<const char*>(p.q.data) +
                  2 * (s.token * p.q.token_stride + head * p.q.head_stride);
  double largest = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < s.num_keys; i += blockDim.x) {
    if (s.position < i * p.mask.kernel_stride + p.mask.kernel_size - 1) break;
    const char* k = static_cast<const char*>(p.k_cmp.data) +
                    2 * ((s.seq_first_key + i) * p.k_cmp.token_stride + kv * p.k_cmp.head_stride);
    const double x = dot(q, k, dim, p.shape.dtype == DType::kBFloat16) * p.shape.softmax_scale;
    if (x > largest) sum *= exp(largest - x), largest = x;
    sum += exp(x - largest);
  }
  __shared__ double sums[128], tops[128];
  sums[threadIdx.x] = sum, tops[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 128; ++i) largest = fmax(largest, tops[i]);
    sum = 0;
    for (int i = 0; i < 128; ++i)
      if (sums[i] > 0) sum += sums[i] * exp(tops[i] - largest);
    lse[head * p.packing.total_q + s.token] =
        sum > 0 ? static_cast<float>(largest + log(sum)) : -INFINITY;
  }
}

std::vector<int32_t> prefix(const std::vector<int>& lens) {
  std::vector<int32_t> cu{0};
  for (int n : lens) cu.push_back(cu.back() + n);
  return cu;
}

template <class Element>
struct SelectProblem {
  SelectCase c;
  std::vector<int32_t> cu_q, cu_k, cu_cmp;
  DeviceArray<int32_t> dcu_q, dcu_k, dcu_cmp, doffset;
  int total_q, total_cmp;
  DeviceArray<Element> q, k;
  DeviceArray<float> lse;
  DeviceArray<int32_t> out;
  SelectBlocksParams p{};
  Problem problem{};

  static std::vector<int32_t> compressed(const SelectCase& c) {
    std::vector<int> lens;
    for (int n : c.lens_k)
      lens.push_back(static_cast<int>(num_windows(n, c.kernel_size, c.stride)));
    return prefix(lens);
  }

  explicit SelectProblem(const SelectCase& c_)
      : c(c_),
        cu_q(prefix(c.lens_q)),
        cu_k(prefix(c.lens_k)),
        cu_cmp(compressed(c)),
        dcu_q(cu_q),
        dcu_k(cu_k),
        dcu_cmp(cu_cmp),
        doffset(c.offsets.empty() ? std::vector<int32_t>{0} : std::vector<int32_t>(c.offsets)),
        total_q(cu_q.back()),
        total_cmp(std::max(cu_cmp.back(), cu_k.back() / c.stride)),
        q(static_cast<size_t>(total_q) * c.heads_q * c.dim),
        k(static_cast<size_t>(total_cmp + 1) * c.heads_kv * c.dim),
        lse(static_cast<size_t>(total_q) * c.heads_q),
        out(static_cast<size_t>(total_q) * c.heads_kv * c.topk) {
    fill_kernel<<<1024, 256>>>(q.get(), int64_t{total_q} * c.heads_q * c.dim, 1, c.scale);
    fill_kernel<<<1024, 256>>>(k.get(), int64_t{cu_cmp.back()} * c.heads_kv * c.dim, 2,
                               c.equal_keys ? 0.f : 1.f);
    p.packing = {static_cast<int64_t>(c.lens_q.size()),
                 dcu_q.get(),
                 dcu_k.get(),
                 c.offsets.empty() ? nullptr : doffset.get(),
                 total_q,
                 int64_t{total_cmp} * c.stride,
                 *std::max_element(c.lens_q.begin(), c.lens_q.end()),
                 *std::max_element(c.lens_k.begin(), c.lens_k.end())};
    const DType dtype = kIs<Element> ? DType::kBFloat16 : DType::kFloat16;
    p.shape = {dtype, c.heads_q, c.heads_kv, c.dim, c.dim, 1 / std::sqrt(double(c.dim))};
    p.q = {q.get(), int64_t{c.heads_q} * c.dim, c.dim};
    p.k_cmp = {k.get(), int64_t{c.heads_kv} * c.dim, c.dim};
    p.lse = {lse.get(), total_q};
    p.mask = {dcu_cmp.get(), total_cmp, c.kernel_size, c.stride};
    p.block_size = c.block, p.topk = c.topk, p.init_blocks = c.init, p.local_blocks = c.local;
    p.group_reduce = c.reduce, p.score_dtype = c.score_dtype;
    p.topk_idx = out.get();
    problem.dtype = dtype, problem.head_dim = problem.head_dim_v = c.dim;
    problem.num_heads_q = c.heads_q, problem.num_heads_kv = c.heads_kv;
    problem.kernel_size = c.kernel_size, problem.kernel_stride = c.stride;
    problem.block_size = c.block, problem.topk = c.topk;
  }

  template <class T>
  static constexpr bool kIs = std::is_same_v<T, __nv_bfloat16>;

  Sampled sample(int token) const {
    const auto seq =
        static_cast<size_t>(std::upper_bound(cu_q.begin(), cu_q.end(), token) - cu_q.begin() - 1);
    const int in_seq = token - cu_q[seq];
    const int offset = c.offsets.empty() ? c.lens_k[seq] - c.lens_q[seq] : c.offsets[seq];
    return {token, cu_cmp[seq], cu_cmp[seq + 1] - cu_cmp[seq], offset + in_seq};
  }

  void make_lse() {
    std::vector<Sampled> all;
    for (int t = 0; t < total_q; ++t) all.push_back(sample(t));
    const DeviceArray<Sampled> dall(all);
    lse_kernel<<<dim3(total_q, c.heads_q), 128>>>(p, dall.get(), lse.get());
    finish_kernel();
  }

  std::vector<int32_t> run(int row) {
    cuda_ok(cudaMemset(out.get(), 0x55, static_cast<size_t>(total_q) * c.heads_kv * c.topk * 4));
    launch_select_blocks(row, p, nullptr);
    finish_kernel();
    return out.host();
  }

  // What is wrong with a row, given its scores; empty when nothing is.
  std::string wrong(const int32_t* found, const std::vector<double>& score, int position) const {
    const int blocks = static_cast<int>(score.size());
    const int own = position < 0 ? -1 : position / c.block, end = std::min(own + 1, blocks);
    const int init = std::min(c.init, end), local = std::clamp(own + 1 - c.local, init, end);
    const int room = c.topk - init - (end - local);
    std::vector<int> order(static_cast<size_t>(local - init));
    std::iota(order.begin(), order.end(), init);
    const auto key = [&](int b) {
      const double x = score[static_cast<size_t>(b)];
      return c.score_dtype == ScoreDType::kBFloat16
                 ? static_cast<double>(__bfloat162float(__float2bfloat16_rn(static_cast<float>(x))))
                 : x;
    };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) > key(b); });
    const size_t taken = std::min(order.size(), static_cast<size_t>(room));
    std::vector<int> want(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(taken));
    for (int b = 0; b < init; ++b) want.push_back(b);
    for (int b = local; b < end; ++b) want.push_back(b);
    std::sort(want.begin(), want.end());
    std::vector<int> got;
    for (int i = 0; i < c.topk; ++i) {
      const bool is_valid = i < static_cast<int>(want.size());
      if (is_valid != (found[i] >= 0) || found[i] >= end || found[i] < -1) return "form";
      if (is_valid && i > 0 && found[i] <= found[i - 1]) return "order";
      if (is_valid) got.push_back(found[i]);
    }
    const double close = c.score_dtype == ScoreDType::kBFloat16 ? std::exp2(-7) : 2e-5;
    for (int a : got) {
      if (std::find(want.begin(), want.end(), a) != want.end()) continue;
      for (int b : want) {
        if (std::find(got.begin(), got.end(), b) != got.end()) continue;
        const double x = score[static_cast<size_t>(a)], y = score[static_cast<size_t>(b)];
        if (std::abs(x - y) > close * std::max(x, y)) {
          return "took " + std::to_string(a) + " (" + std::to_string(x) + ") not " +
                 std::to_string(b) + " (" + std::to_string(y) + ")";
        }
      }
    }
    return "";
  }

  // Number of wrong rows among every `every`-th token.
  int count_wrong_rows(const std::vector<int32_t>& found, int every, bool prints) {
    std::vector<Sampled> samples;
    for (int t = total_q - 1; t >= 0; t -= every) samples.push_back(sample(t));
    int max_keys = 1;
    for (const Sampled& s : samples) max_keys = std::max(max_keys, s.num_keys);
    const DeviceArray<Sampled> dsamples(samples);
    const size_t rows = samples.size() * static_cast<size_t>(c.heads_q);
    const DeviceArray<double> dlogits(rows * static_cast<size_t>(max_keys)), dlse(rows);
    logits_kernel<<<dim3(static_cast<unsigned>(samples.size()), c.heads_q), 256>>>(
        p, dsamples.get(), max_keys, dlogits.get(), dlse.get());
    finish_kernel();
    const std::vector<double> logits = dlogits.host(), lses = dlse.host();
    int wrong_rows = 0;
    const int group = c.heads_q / c.heads_kv;
    const int heads = c.reduce == GroupReduce::kFirstHead ? 1 : group;
    for (size_t i = 0; i < samples.size(); ++i) {
      const Sampled& s = samples[i];
      const auto seq = static_cast<size_t>(std::upper_bound(cu_q.begin(), cu_q.end(), s.token) -
                                           cu_q.begin() - 1);
      for (int kv = 0; kv < c.heads_kv; ++kv) {
        std::vector<double> score(static_cast<size_t>(ceil_div(c.lens_k[seq], c.block)));
        for (int w = 0; w < s.num_keys; ++w) {
          double sum = 0;
          for (int h = 0; h < heads; ++h) {
            const size_t r =
                i * static_cast<size_t>(c.heads_q) + static_cast<size_t>(kv * group + h);
            const double x = logits[r * static_cast<size_t>(max_keys) + static_cast<size_t>(w)];
            const double e = x > -INFINITY ? std::exp(x - lses[r]) : 0;
            sum = c.reduce == GroupReduce::kMax ? std::max(sum, e) : sum + e;
          }
          for (int piece = 0; piece < c.kernel_size / c.stride; ++piece) {
            score.at(static_cast<size_t>((w + piece) * c.stride / c.block)) += sum;
          }
        }
        const std::string what =
            wrong(found.data() + (int64_t{kv} * total_q + s.token) * c.topk, score, s.position);
        if (what.empty()) continue;
        if (prints && wrong_rows < 5) {
          std::printf("  head %d token %d: %s\n", kv, s.token, what.c_str());
        }
        ++wrong_rows;
      }
    }
    return wrong_rows;
  }
};

int64_t shared_memory_limit() {
  int bytes = 0;
  cuda_ok(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  return bytes;
}

bool is_hopper() {
  int major = 0;
  cuda_ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major == 9;
}

template <class Element>
void check(const SelectCase& c, int every = 1) {
  SelectProblem<Element> s(c);
  s.make_lse();
  for (const Arch arch : {Arch::kSm90a, Arch::kSm80}) {
    if (arch == Arch::kSm90a && !is_hopper()) continue;
    const int row = find_select_blocks_row(arch, s.problem, shared_memory_limit());
    EXPECT_TRUE(row >= 0);
    const std::vector<int32_t> found = s.run(row);
    EXPECT_EQ(s.count_wrong_rows(found, every, true), 0);
    EXPECT_TRUE(found == s.run(row));
  }
}

void check_both(const SelectCase& c, int every = 1) {
  check<__nv_bfloat16>(c, every);
  check<__half>(c, every);
}

TEST(groups) {
  for (int group : {1, 2, 3, 4, 5, 16}) {
    SelectCase c{{700}, {700}, 2 * group, 2};
    c.topk = 6;
    check_both(c);
  }
}

TEST(lengths) {
  for (int group : {1, 4}) {
    SelectCase c{
        {700, 0, 65, 1, 31, 32, 300 },
        {700, 0, 65, 1, 31, 32, 1000},
        group, 1
    };
    c.topk = 4;
    check_both(c);
    c.offsets = {-20, 0, 0, 5, 0, 0, 700};
    check_both(c);
  }
}

TEST(long_sequences) {
  for (int group : {1, 2, 4, 16}) {
    SelectCase c{{100}, {70000}, 2 * group, 2};
    check_both(c, 7);
    c.scale = 8;
    check_both(c, 7);
  }
}

TEST(topk) {
  for (int group : {1, 4}) {
    for (int topk : {1, 2, 3, 8, 17, 31, 32, 33, 128}) {
      SelectCase c{{90}, {20000}, group, 1};
      c.topk = topk, c.init = topk > 2 ? 1 : 0, c.local = topk > 1 ? 2 : 1;
      check_both(c, 3);
    }
  }
}

TEST(forced_blocks) {
  for (auto [init, local] : {
           std::pair{0,  0},
           {0,  1},
           {1,  0},
           {8,  0},
           {4,  4},
           {0,  8},
           {40, 3}
  }) {
    for (int group : {1, 4}) {
      SelectCase c{{900}, {900}, group, 1};
      c.topk = std::max(8, init + local > 8 ? 43 : 8), c.init = init, c.local = local;
      check<__nv_bfloat16>(c);
    }
  }
}

TEST(reductions_and_rounding) {
  for (GroupReduce reduce : {GroupReduce::kSum, GroupReduce::kMax, GroupReduce::kFirstHead}) {
    for (ScoreDType dtype : {ScoreDType::kFloat32, ScoreDType::kBFloat16}) {
      for (int group : {1, 4, 6}) {
        SelectCase c{{200}, {9000}, group, 1};
        c.reduce = reduce, c.score_dtype = dtype;
        check_both(c, 3);
      }
    }
  }
}

TEST(equal_scores) {
  for (int group : {1, 4}) {
    SelectCase c{{300}, {30000}, group, 1};
    c.equal_keys = true;
    check_both(c, 3);
  }
}

TEST(head_dims_and_geometries) {
  for (int dim : {8, 64, 72, 120, 128, 192}) {
    SelectCase c{{200}, {3000}, 4, 2};
    c.dim = dim;
    check_both(c, 3);
  }
  for (auto [size, stride, block] : {
           std::tuple{32, 16, 128},
           {64, 16, 64 },
           {16, 16, 64 },
           {64, 32, 128},
           {32, 32, 32 }
  }) {
    for (int group : {1, 3}) {
      SelectCase c{{200}, {5000}, group, 1};
      c.kernel_size = size, c.stride = stride, c.block = block;
      check_both(c, 3);
    }
  }
}

// Milliseconds of a row on random inputs.
void bench(int tokens, int heads_q, int heads_kv, Arch arch, float scale) {
  SelectCase c{{tokens}, {tokens}, heads_q, heads_kv};
  c.scale = scale;
  SelectProblem<__nv_bfloat16> s(c);
  fill_kernel<<<1024, 256>>>(s.lse.get(), int64_t{tokens} * heads_q, 3, 0.f);
  // lse of the middle of the sequence: log of its windows plus half the variance of the logits.
  std::vector<float> lse(static_cast<size_t>(tokens) * static_cast<size_t>(heads_q));
  for (size_t i = 0; i < lse.size(); ++i) {
    const double windows = static_cast<double>(i % static_cast<size_t>(tokens)) / c.stride;
    lse[i] = windows < 2 ? -std::numeric_limits<float>::infinity()
                         : static_cast<float>(std::log(windows) + 0.5 * scale * scale);
  }
  cuda_ok(cudaMemcpy(s.lse.get(), lse.data(), lse.size() * 4, cudaMemcpyHostToDevice));
  const int row = find_select_blocks_row(arch, s.problem, shared_memory_limit());
  std::vector<float> times;
  cudaEvent_t start, stop;
  cuda_ok(cudaEventCreate(&start));
  cuda_ok(cudaEventCreate(&stop));
  const int repeats = tokens > 200000 ? 2 : 7;
  for (int i = 0; i < repeats + 1; ++i) {
    cuda_ok(cudaEventRecord(start));
    launch_select_blocks(row, s.p, nullptr);
    cuda_ok(cudaEventRecord(stop));
    finish_kernel();
    float ms = 0;
    cuda_ok(cudaEventElapsedTime(&ms, start, stop));
    if (i > 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  std::printf("%7d tokens %d/%d row %2d scale %.1f: %.3f ms (min %.3f)\n", tokens, heads_q,
              heads_kv, row, static_cast<double>(scale),
              static_cast<double>(times[times.size() / 2]), static_cast<double>(times[0]));
}

}  // namespace
}  // namespace fsattn::test

int main(int argc, char** argv) {
  using namespace fsattn;
  if (test::is_skipped(argc, argv)) return 0;
  if (argc > 1 && std::string(argv[1]) == "bench") {
    for (const Arch arch : {Arch::kSm90a, Arch::kSm80}) {
      if (arch == Arch::kSm80 && argc > 2) break;
      for (float scale : argc > 2 ? std::vector{1.f} : std::vector{1.f, 4.f}) {
        for (auto [q, kv] : {
                 std::pair{32, 8 },
                 {32, 32},
                 {64, 4 },
                 {16, 8 }
        })
          test::bench(65536, q, kv, arch, scale);
      }
      if (arch == Arch::kSm90a && argc == 2) {
        test::bench(8192, 32, 8, arch, 1.f);
        test::bench(8192, 32, 32, arch, 1.f);
        test::bench(262144, 32, 8, arch, 1.f);
      }
    }
    return 0;
  }
  return test::run_all(argc, argv);
}
