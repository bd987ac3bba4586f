// Backward of selected attention against float64 on hostile inputs, with every architecture's row that
// the device runs.
//     test_selected_bwd [only this case]
#include <string>

#include "kernels/selected_problem.cuh"
#include "kernels/skip.h"

using namespace fsattn;
using namespace fsattn::test;

namespace {

int num_failed = 0;

template <class Element>
struct Gradients {
  explicit Gradients(const SelectedProblem<Element>& x)
      : dq(x.total_q, x.c.heads_q, x.c.dim, x.gap(16), x.gap(8)),
        dk(x.total_k, x.c.heads_kv, x.c.dim, x.gap(8), x.gap(8)),
        dv(x.total_k, x.c.heads_kv, x.c.dim_v, x.gap(24), x.gap(16)) {}
  Strided<Element> dq, dk, dv;

  // Gaps stay NaN.
  void reset(bool accumulates) {
    for (Strided<Element>* g : {&dq, &dk, &dv}) {
      g->buffer.poison();
      if (accumulates) fill(*g, 21, 1.f);
    }
  }
};

// `got` minus what it held before against `want`.
template <class Element>
Difference compare(const Strided<Element>& got, const std::vector<Element>& before,
                   bool accumulates, const std::vector<double>& want) {
  const std::vector<Element> x = got.buffer.download();
  std::vector<double> total = want;
  const auto at = [&](int64_t r, int64_t d) {
    return static_cast<size_t>(r / got.heads * got.token_stride + r % got.heads * got.head_stride +
                               d);
  };
  for (int64_t r = 0; accumulates && r < got.tokens * got.heads; ++r) {
    for (int64_t d = 0; d < got.dim; ++d)
      total[static_cast<size_t>(r * got.dim + d)] += to_double(before[at(r, d)]);
  }
  return compare_rows(got.tokens * got.heads, got.dim, total,
                      [&](int64_t r, int64_t d) { return to_double(x[at(r, d)]); });
}

template <class Element>
void run(const SelectedProblem<Element>& x, int row, size_t workspace_cap, bool has_dlse,
         bool accumulates, const Gradients<Element>& grads) {
  Problem problem = x.problem();
  problem.workspace_cap = workspace_cap;
  Buffer<char> scratch(static_cast<int64_t>(selected_attn_bwd_workspace(problem)));
  scratch.poison();
  SelectedAttnBwdParams params = x.bwd_params(grads.dq, grads.dk, grads.dv, scratch);
  params.workspace_cap = workspace_cap;
  if (!has_dlse) params.attn.dlse.data = nullptr;
  params.attn.accumulate_dq = params.attn.accumulate_dkv = accumulates;
  launch_selected_attn_bwd(row, params, nullptr);
  CUDA_OK(cudaDeviceSynchronize());
}

template <class Element>
uint64_t fingerprint_of(const Strided<Element>& x) {
  const std::vector<Element> values = x.buffer.download();
  return fingerprint(values.data(), x.buffer.bytes());
}

// What differs where nothing may: all bits between two runs, and those of dq under another cap.
template <class Element>
const char* compare_bits(const SelectedProblem<Element>& x, int row, bool has_dlse,
                         bool accumulates, Gradients<Element>& grads) {
  const uint64_t dq = fingerprint_of(grads.dq), dk = fingerprint_of(grads.dk),
                 dv = fingerprint_of(grads.dv);
  grads.reset(accumulates);
  run(x, row, x.c.cap, has_dlse, accumulates, grads);
  if (fingerprint_of(grads.dq) != dq || fingerprint_of(grads.dk) != dk ||
      fingerprint_of(grads.dv) != dv) {
    return " DIFFERENT BITS";
  }
  grads.reset(accumulates);
  run(x, row, std::min(x.c.cap / 3, size_t{1} << 20), has_dlse, accumulates, grads);
  return fingerprint_of(grads.dq) == dq ? nullptr : " OTHER BITS UNDER ANOTHER CAP";
}

template <class Element>
void check_row(const SelectedProblem<Element>& x, const BackwardReference& want, int row,
               bool has_dlse, bool accumulates) {
  const Case& c = x.c;
  Gradients<Element> grads(x);
  grads.reset(accumulates);
  const std::vector<Element> q0 = grads.dq.buffer.download(), k0 = grads.dk.buffer.download(),
                             v0 = grads.dv.buffer.download();
  run(x, row, c.cap, has_dlse, accumulates, grads);
  const Difference dq = compare(grads.dq, q0, accumulates, want.dq),
                   dk = compare(grads.dk, k0, accumulates, want.dk),
                   dv = compare(grads.dv, v0, accumulates, want.dv);
  const char* bits = compare_bits(x, row, has_dlse, accumulates, grads);
  const double limit = kDTypeOf<Element> == DType::kBFloat16 ? 8e-3 : 1.2e-3;
  const bool ok = dq.ok(limit) && dk.ok(limit) && dv.ok(limit) && bits == nullptr;
  num_failed += !ok;
  const SelectedBwdLayout layout = selected_bwd_layout(selected_shape(x.problem()));
  std::printf(
      "%s %s row %d %-18s T %6d/%6d B %2d H %2d/%2d D %3d/%3d S %3d K %3d launches %3d x %2d%s%s  "
      "rel dq %.1e dk %.1e dv %.1e row %.1e %.1e %.1e bad %d %d %d%s\n",
      ok ? "ok  " : "FAIL", kDTypeOf<Element> == DType::kBFloat16 ? "bf16" : "fp16", row, c.name,
      int(x.total_q), int(x.total_k), int(x.batch), c.heads_q, c.heads_kv, c.dim, c.dim_v,
      c.block_size, c.topk, int(layout.num_launches(c.heads_kv)), int(layout.launches_per_head),
      has_dlse ? " dlse" : "", accumulates ? " acc" : "", dq.relative, dk.relative, dv.relative,
      dq.worst_row, dk.worst_row, dv.worst_row, dq.bad, dk.bad, dv.bad,
      bits == nullptr ? "" : bits);
  std::fflush(stdout);
}

template <class Element>
void check(const Case& c, Arch arch, bool has_dlse, bool accumulates) {
  SelectedProblem<Element> x(c);
  const BackwardReference want(x, has_dlse);
  const Problem problem = x.problem();
  {
    const int row = find_selected_attn_fwd_row(Arch::kSm80, problem);
    Buffer<char> scratch(static_cast<int64_t>(selected_attn_fwd_workspace(problem, row)));
    launch_selected_attn_fwd(row, x.fwd_params(scratch), nullptr);
    CUDA_OK(cudaDeviceSynchronize());
  }
  const int best = find_selected_attn_bwd_row(arch, problem);
  const int common = find_selected_attn_bwd_row(Arch::kSm80, problem);
  check_row(x, want, best, has_dlse, accumulates);
  if (common != best) check_row(x, want, common, has_dlse, accumulates);
}

constexpr size_t kMiB = size_t{1} << 20;
const auto kHostile = Pattern::kHostile;
const auto kRandom = Pattern::kRandom;

// clang-format off
const Case kCases[] = {
    {"hostile", {1000}, {}, {}, 4, 4, 128, 128, 64, 16},
    {"hostile chunks", {1537}, {}, {}, 8, 2, 128, 128, 64, 16, kHostile, 4 * kMiB, 1.f, true},
    {"one token", {1}, {}, {}, 4, 1, 128, 128, 64, 16},
    {"topk 1", {63}, {}, {}, 4, 1, 128, 128, 64, 1, kRandom},
    {"odd topk, group 12", {130}, {}, {}, 24, 2, 128, 128, 64, 17},
    {"mixed lengths", {0, 1, 2, 3, 700, 6, 0, 7, 11, 900, 64, 65, 0}, {}, {},
     6, 2, 128, 128, 64, 5, kHostile, 2 * kMiB, 1.f, true},
    {"prefix cache", {5, 64, 1, 130}, {700, 64, 333, 500}, {},
     8, 2, 128, 128, 64, 8, kHostile, 1024 * kMiB, 1.f, false, true},
    {"more q than k", {300, 100}, {100, 40}, {}, 4, 2, 128, 128, 64, 4},
    {"q_offset", {100, 200, 50}, {400, 300, 100}, {17, 120, -20}, 4, 2, 128, 128, 64, 6},
    {"S 16", {500, 77}, {}, {}, 4, 2, 128, 128, 16, 33, kHostile, 8 * kMiB, 1.f, true},
    {"S 32", {500, 77}, {}, {}, 4, 2, 128, 128, 32, 12},
    {"S 128", {1100, 300}, {}, {}, 8, 2, 128, 128, 128, 8, kHostile, 16 * kMiB, 1.f, true},
    {"S 256", {1900, 300}, {}, {}, 4, 1, 128, 128, 256, 5, kHostile, 16 * kMiB},
    {"S 256 D 256", {900}, {}, {}, 4, 2, 256, 256, 256, 4, kHostile, 16 * kMiB, 1.f, true},
    {"D 64", {800, 3}, {}, {}, 16, 2, 64, 64, 64, 16, kHostile, 16 * kMiB, 1.f, true},
    {"D 192/128", {800, 3}, {}, {}, 8, 1, 192, 128, 64, 16, kHostile, 16 * kMiB, 1.f, true},
    {"D 256", {800, 3}, {}, {}, 24, 2, 256, 256, 64, 32, kHostile, 64 * kMiB, 1.f, true},
    {"D 8", {200}, {}, {}, 4, 2, 8, 8, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 72/40", {300}, {}, {}, 6, 2, 72, 40, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 40/104", {300}, {}, {}, 4, 2, 40, 104, 32, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 136/248", {300}, {}, {}, 4, 2, 136, 248, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"group 64", {400}, {}, {}, 64, 1, 128, 128, 64, 6},
    {"group 7", {400}, {}, {}, 21, 3, 128, 128, 64, 6},
    {"topk 128", {2000}, {}, {}, 2, 1, 64, 64, 16, 128, kHostile, 8 * kMiB},
    {"logits x 8", {1000}, {}, {}, 4, 2, 128, 128, 64, 16, kRandom, 1024 * kMiB, 8.f},
    {"random chunks", {4096}, {}, {}, 8, 4, 128, 128, 64, 16, kRandom, 64 * kMiB},
    {"tiny cap", {700}, {}, {}, 4, 2, 128, 128, 64, 16, kHostile, 1},
};
// clang-format on

}  // namespace

int main(int argc, char** argv) {
  if (is_skipped(argc, argv)) return 0;
  int major = 0;
  CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  const Arch arch = major == 9 ? Arch::kSm90a : Arch::kSm80;
  const std::string only = argc > 1 ? argv[1] : "";
  bool is_known = false;
  int i = 0;
  for (const Case& c : kCases) {
    ++i;
    if (!only.empty() && only != c.name) continue;
    is_known = true;
    check<__nv_bfloat16>(c, arch, i % 2 == 0, i % 3 == 0);
    check<__half>(c, arch, i % 3 == 1, i % 4 == 1);
  }
  if (!is_known) {
    std::printf("%s: no such case\n", only.c_str());
    return 1;
  }
  std::printf("%s: %d failed\n", num_failed ? "FAILED" : "passed", num_failed);
  return num_failed != 0;
}
