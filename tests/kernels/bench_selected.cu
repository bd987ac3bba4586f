// Times selected attention by CUDA events: median of 7 after 2 warm-ups, random data and selection.
//     bench_selected PASS TOKENS Hq Hkv [block_size topk dim cap_mib persistence]
// PASS: index, a forward algorithm: query, mma, wgmma, or bwd_mma: the backward with mma.sync; fwd and bwd
// are what the tables take on sm_90a.
#include <cstring>
#include <string>

#include "kernels/selected_problem.cuh"

using namespace fsattn;
using namespace fsattn::test;

namespace {

template <class Launch>
double median_ms(const Launch& launch) {
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    CUDA_OK(cudaEventRecord(begin));
    launch();
    CUDA_OK(cudaEventRecord(end));
    CUDA_OK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return double{times[times.size() / 2]};
}

// The first row of the algorithm that takes the problem; -1 when none does.
int find_row(const std::string& pass, const Problem& problem) {
  if (pass == "fwd") return find_selected_attn_fwd_row(Arch::kSm90a, problem);
  const SelectedAlgorithm wanted = pass == "query" ? SelectedAlgorithm::kQueryMajor
                                   : pass == "mma" ? SelectedAlgorithm::kBlockMajor
                                                   : SelectedAlgorithm::kBlockMajorWgmma;
  for (int row = 0; row < static_cast<int>(kSelectedAttnFwdTable.size()); ++row) {
    const SelectedAttnFwdConfig& config = kSelectedAttnFwdTable[static_cast<size_t>(row)];
    if (config.algorithm == wanted && fits(config, Arch::kSm90a, problem)) return row;
  }
  return -1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return 1;
  const std::string pass = argv[1];
  const auto option = [&](int i, int value) { return argc > i ? std::atoi(argv[i]) : value; };
  Case c{"bench",
         {std::atoi(argv[2])},
         {},
         {},
         std::atoi(argv[3]),
         std::atoi(argv[4]),
         option(7, 128),
         option(7, 128),
         option(5, 64),
         option(6, 16),
         Pattern::kRandom,
         size_t(option(8, 1024)) << 20};
  c.persistence = option(9, 0);
  SelectedProblem<__nv_bfloat16> x(c);
  const bool is_bwd = pass == "bwd" || pass == "bwd_mma";
  double pairs = 0;  // query row times key block
  for (int64_t t = 0; t < x.total_q; ++t)
    pairs += double(std::min<int64_t>(c.topk, t / c.block_size + 1)) * c.heads_q;
  const double flop = pairs * (is_bwd ? 10 : 4) * c.block_size * c.dim;
  const Problem problem = x.problem();
  double ms = 0;
  size_t bytes = 0;
  if (pass == "index") {
    ms = median_ms([&] { x.build_index(); });
  } else if (is_bwd) {
    const int fwd_row = find_row("fwd", problem);
    bytes = selected_attn_bwd_workspace(problem);
    Buffer<char> scratch(
        static_cast<int64_t>(std::max(bytes, selected_attn_fwd_workspace(problem, fwd_row))));
    launch_selected_attn_fwd(fwd_row, x.fwd_params(scratch), nullptr);
    const Strided<__nv_bfloat16> dq(x.total_q, c.heads_q, c.dim, 0, 0);
    const Strided<__nv_bfloat16> dk(x.total_k, c.heads_kv, c.dim, 0, 0),
        dv(x.total_k, c.heads_kv, c.dim, 0, 0);
    const SelectedAttnBwdParams params = x.bwd_params(dq, dk, dv, scratch);
    const int row = find_selected_attn_bwd_row(pass == "bwd" ? Arch::kSm90a : Arch::kSm80, problem);
    ms = median_ms([&] { launch_selected_attn_bwd(row, params, nullptr); });
  } else {
    const int row = find_row(pass, problem);
    if (row < 0) return 1;
    bytes = selected_attn_fwd_workspace(problem, row);
    Buffer<char> scratch(static_cast<int64_t>(bytes));
    const SelectedAttnFwdParams params = x.fwd_params(scratch);
    ms = median_ms([&] { launch_selected_attn_fwd(row, params, nullptr); });
  }
  std::printf(
      "%-7s T %7d H %2d/%2d D %3d S %3d K %3d cap %5d MiB ws %5.2f GiB: %8.3f ms  %6.1f "
      "ps/row-block %6.1f TFLOP/s\n",
      pass.c_str(), int(x.total_q), c.heads_q, c.heads_kv, c.dim, c.block_size, c.topk,
      int(c.cap >> 20), double(bytes) / (1 << 30), ms, ms * 1e9 / pairs, flop / ms * 1e-9);
  return 0;
}
