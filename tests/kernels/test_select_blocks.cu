// select_blocks of every row that takes a problem, against float64 on the device. Arguments: parts of
// test names; "bench" times instead.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "kernels/select_problem.cuh"

namespace fsattn::test {
namespace {

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
    c.keys = Keys::kEqual;
    check_both(c, 3);
  }
}

// Every block a candidate, many of them equal, all of the best from the blocks of one lane.
TEST(hostile_orders) {
  for (Keys keys : {Keys::kRamp, Keys::kOneLane}) {
    for (int group : {1, 4}) {
      for (float scale : {0.1f, 1.f, 4.f}) {
        for (ScoreDType dtype : {ScoreDType::kFloat32, ScoreDType::kBFloat16}) {
          SelectCase c{{300}, {20000}, group, 1};
          c.keys = keys, c.scale = scale, c.score_dtype = dtype;
          check_both(c, 7);
        }
      }
    }
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
      if (arch == Arch::kSm90a) test::bench(131072, 32, 8, arch, 1.f);
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
