// Forward of selected attention, and the block index, against float64 on hostile inputs.
//     test_selected_fwd [only this case]
#include <cstring>
#include <string>

#include "kernels/selected_problem.cuh"
#include "kernels/skip.h"

using namespace fsattn;
using namespace fsattn::test;

namespace {

int num_failed = 0;

// Block index against the naive inverse.
template <class Element>
bool check_index(const SelectedProblem<Element>& x) {
  const std::vector<int32_t> start = x.index_start->download(), entry = x.index_entry->download();
  const Case& c = x.c;
  for (int g = 0; g < c.heads_kv; ++g) {
    std::vector<std::vector<int32_t>> want(static_cast<size_t>(x.num_slots));
    for (size_t b = 0; b < static_cast<size_t>(x.batch); ++b) {
      const int len_q = x.cu_q_host[b + 1] - x.cu_q_host[b],
                len_k = x.cu_k_host[b + 1] - x.cu_k_host[b];
      const int offset = c.q_offset.empty() ? len_k - len_q : c.q_offset[b];
      for (int i = 0; i < len_q; ++i) {
        const int token = x.cu_q_host[b] + i;
        const int32_t* ids = x.topk_host.data() + (g * x.total_q + token) * c.topk;
        for (int j = 0; j < c.topk; ++j) {
          const int64_t first_key = int64_t{ids[j]} * c.block_size;
          if (ids[j] < 0 || first_key >= len_k || first_key > int64_t{i} + offset) continue;
          if (std::find(ids, ids + j, ids[j]) != ids + j) continue;
          const size_t slot =
              static_cast<size_t>(x.cu_k_host[b] / c.block_size) + b + static_cast<size_t>(ids[j]);
          want[slot].push_back(token * c.topk + j);
        }
      }
    }
    const int32_t* s = start.data() + g * (x.num_slots + 1);
    const int32_t* e = entry.data() + g * x.total_q * c.topk;
    int32_t at = 0;
    for (size_t slot = 0; slot < want.size(); ++slot) {
      if (s[slot] != at) return false;
      for (const int32_t w : want[slot]) {
        if (e[at++] != w) return false;
      }
    }
    if (s[x.num_slots] != at) return false;
    for (int64_t i = at; i < x.total_q * c.topk; ++i) {
      if (e[i] != -1) return false;
    }
  }
  return true;
}

// What one kernel row makes of a problem.
struct Outcome {
  Difference o;
  double lse = 0;   // largest error
  int bad_lse = 0;  // -inf where it must not be, or the reverse
  int outside = 0;  // values between the rows of o that were written
  bool is_repeatable = true;

  bool ok(double limit) const {
    return o.ok(limit) && bad_lse == 0 && lse < 2e-5 && outside == 0 && is_repeatable;
  }
};

// Columns that are not as close to the reference as bf16 is, each for itself, up to what a partial row may
// lose of values far below the largest of their block.
template <class Get>
int count_bad_columns(int64_t rows, int64_t dim, const std::vector<double>& want, double largest,
                      const Get& get) {
  int bad = 0;
  for (int64_t d = 0; d < dim; ++d) {
    double error = 0, norm = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const double w = want[static_cast<size_t>(r * dim + d)], e = get(r, d) - w;
      error += e * e;
      norm += w * w;
    }
    const double typical = std::sqrt(norm / double(rows));
    bad += !(std::sqrt(error / double(rows)) < 4e-3 * typical + largest * 0x1p-22);
  }
  return bad;
}

// Takes the infinities and NaN that the reference has out of both; returns the number of those that the
// result hides. Values beside them are not looked at: a probability of 0 times NaN is NaN.
template <class Get>
int take_special_values(int64_t rows, int64_t dim, std::vector<double>& want, const Get& get) {
  int hidden = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (const int64_t d : {5, 77}) {
      double& w = want[static_cast<size_t>(r * dim + d)];
      // Partial rows saturate: an infinity may come out as their weight times the largest value, which is
      // still more than any average of the other values.
      hidden += !std::isfinite(w) && std::abs(get(r, d)) < 10;
      w = 0;
    }
  }
  return hidden;
}

template <class Element>
void compare(const SelectedProblem<Element>& x, const ForwardReference& want, Outcome& result) {
  const Case& c = x.c;
  const std::vector<Element> o = x.o.buffer.download();
  const std::vector<float> lse = x.lse.download();
  const int64_t rows = x.samples() * c.heads_q;
  const auto got = [&](int64_t r, int64_t d) {
    const int64_t t = r / c.heads_q * c.stride, h = r % c.heads_q;
    return to_double(o[static_cast<size_t>(t * x.o.token_stride + h * x.o.head_stride + d)]);
  };
  if (c.values == Values::kSpecialV) {
    std::vector<double> finite = want.o;
    const int hidden = take_special_values(rows, c.dim_v, finite, got);
    result.o = compare_rows(rows, c.dim_v, finite, [&](int64_t r, int64_t d) {
      return d == 5 || d == 77 ? 0.0 : got(r, d);
    });
    result.o.bad += hidden;
  } else {
    result.o = compare_rows(rows, c.dim_v, want.o, got);
  }
  if (c.values == Values::kScaledColumns) {
    result.o.bad += count_bad_columns(rows, c.dim_v, want.o, 0x1p22, got);
  }
  for (int64_t r = 0; r < x.samples() * c.heads_q; ++r) {
    const int64_t t = r / c.heads_q * c.stride, h = r % c.heads_q;
    const double got = lse[static_cast<size_t>(h * x.total_q + t)],
                 w = want.lse[static_cast<size_t>(r)];
    if (std::isinf(w) || !std::isfinite(got)) {
      result.bad_lse += !(std::isinf(w) && std::isinf(got) && got < 0);
    } else {
      result.lse = std::max(result.lse, std::abs(got - w) / std::max(1.0, std::abs(w)));
    }
  }
  for (size_t i = 0; c.has_gaps && i < o.size(); ++i) {  // nothing is written between the rows
    const int64_t in_token = static_cast<int64_t>(i) % x.o.token_stride;
    const bool is_gap =
        in_token >= c.heads_q * x.o.head_stride || in_token % x.o.head_stride >= c.dim_v;
    uint16_t bits;
    std::memcpy(&bits, &o[i], 2);
    result.outside += is_gap && bits != 0xffff;
  }
}

template <class Element>
Outcome run_row(const SelectedProblem<Element>& x, const ForwardReference& want, int row) {
  const size_t bytes = selected_attn_fwd_workspace(x.problem(), row);
  Buffer<char> scratch(static_cast<int64_t>(bytes));
  Outcome result;
  uint64_t prints[2];
  for (int round = 0; round < 2; ++round) {
    CUDA_OK(cudaMemset(x.o.buffer.data, 0xff, x.o.buffer.bytes()));
    CUDA_OK(cudaMemset(x.lse.data, 0xff, x.lse.bytes()));
    scratch.poison();
    launch_selected_attn_fwd(row, x.fwd_params(scratch), nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    if (round == 0) compare(x, want, result);
    const std::vector<Element> o = x.o.buffer.download();
    const std::vector<float> lse = x.lse.download();
    prints[round] =
        fingerprint(o.data(), x.o.buffer.bytes()) ^ fingerprint(lse.data(), x.lse.bytes()) * 3;
  }
  result.is_repeatable = prints[0] == prints[1];
  return result;
}

// Every algorithm that takes the problem.
template <class Element>
void check(const Case& c, Arch arch) {
  const SelectedProblem<Element> x(c);
  const ForwardReference want(x);
  const Problem problem = x.problem();
  const char* const names[] = {"query-major", "block-major", "wgmma"};
  bool has_run[3] = {};
  const bool is_bf16 = kDTypeOf<Element> == DType::kBFloat16;
  for (int row = 0; row < static_cast<int>(kSelectedAttnFwdTable.size()); ++row) {
    const SelectedAttnFwdConfig& config = kSelectedAttnFwdTable[static_cast<size_t>(row)];
    const auto algorithm = static_cast<size_t>(config.algorithm);
    if (has_run[algorithm] || !fits(config, arch, problem)) continue;
    has_run[algorithm] = true;
    const Outcome r = run_row(x, want, row);
    const bool index_ok = !c.has_index || check_index(x);
    const bool ok = r.ok(is_bf16 ? 4e-3 : 6e-4) && index_ok;
    num_failed += !ok;
    std::printf(
        "%s %s %-11s row %2d %-18s launches %3d  rel %.2e row %.1e lse %.1e bad %d+%d%s%s%s\n",
        ok ? "ok  " : "FAIL", is_bf16 ? "bf16" : "fp16", names[algorithm], row, c.name,
        int(selected_fwd_layout(selected_shape(problem), config).split.num_launches), r.o.relative,
        r.o.worst_row, r.lse, r.o.bad, r.bad_lse, r.is_repeatable ? "" : " DIFFERENT BITS",
        r.outside ? " WROTE OUTSIDE" : "", index_ok ? "" : " WRONG INDEX");
    std::fflush(stdout);
  }
  if (!has_run[0] || !has_run[1]) {
    std::printf("FAIL no row for %s\n", c.name);
    ++num_failed;
  }
}

constexpr size_t kMiB = size_t{1} << 20;
const auto kHostile = Pattern::kHostile;
const auto kRandom = Pattern::kRandom;

// clang-format off
const Case kCases[] = {
    {"hostile", {1000}, {}, {}, 4, 4, 128, 128, 64, 16, kHostile, 1024 * kMiB, 1.f, false, true},
    {"hostile chunks", {1537}, {}, {}, 8, 2, 128, 128, 64, 16, kHostile, 4 * kMiB, 1.f, true, true},
    {"one token", {1}, {}, {}, 4, 1, 128, 128, 64, 16},
    {"topk 1", {63}, {}, {}, 4, 1, 128, 128, 64, 1, kRandom},
    {"odd topk, group 12", {130}, {}, {}, 24, 2, 128, 128, 64, 17, kHostile, 1024 * kMiB, 1.f, false, true},
    {"mixed lengths", {0, 1, 2, 3, 700, 6, 0, 7, 11, 900, 64, 65, 0}, {}, {}, 6, 2, 128, 128, 64, 5, kHostile, 2 * kMiB, 1.f, true, true},
    {"prefix cache", {5, 64, 1, 130}, {700, 64, 333, 500}, {}, 8, 2, 128, 128, 64, 8, kHostile, 1024 * kMiB, 1.f, false, true},
    {"more q than k", {300, 100}, {100, 40}, {}, 4, 2, 128, 128, 64, 4, kHostile, 1024 * kMiB, 1.f, false, true},
    {"q_offset", {100, 200, 50}, {400, 300, 100}, {17, 120, -20}, 4, 2, 128, 128, 64, 6, kHostile, 1024 * kMiB, 1.f, false, true},
    {"S 16", {500, 77}, {}, {}, 4, 2, 128, 128, 16, 33, kHostile, 8 * kMiB, 1.f, false, true},
    {"S 32", {500, 77}, {}, {}, 4, 2, 128, 128, 32, 12, kHostile, 1024 * kMiB, 1.f, false, true},
    {"S 128", {1100, 300}, {}, {}, 8, 2, 128, 128, 128, 8, kHostile, 16 * kMiB, 1.f, true, true},
    {"S 256", {1900, 300}, {}, {}, 4, 1, 128, 128, 256, 5, kHostile, 16 * kMiB, 1.f, false, true},
    {"S 256 D 256", {900}, {}, {}, 4, 2, 256, 256, 256, 4, kHostile, 16 * kMiB, 1.f, true, true},
    {"D 64 S 64", {800, 3}, {}, {}, 16, 2, 64, 64, 64, 16, kHostile, 16 * kMiB, 1.f, true, true},
    {"D 64 S 128", {800, 3}, {}, {}, 2, 2, 64, 64, 128, 7},
    {"D 192/128", {800, 3}, {}, {}, 8, 1, 192, 128, 64, 16, kHostile, 16 * kMiB, 1.f, true},
    {"D 192/128 S 128", {800, 3}, {}, {}, 4, 1, 192, 128, 128, 4},
    {"D 256", {800, 3}, {}, {}, 24, 2, 256, 256, 64, 32, kHostile, 64 * kMiB, 1.f, true},
    {"D 8", {200}, {}, {}, 4, 2, 8, 8, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 72/40", {300}, {}, {}, 6, 2, 72, 40, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 40/104", {300}, {}, {}, 4, 2, 40, 104, 32, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 200/136", {300}, {}, {}, 4, 2, 200, 136, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"D 136/248", {300}, {}, {}, 4, 2, 136, 248, 64, 4, kHostile, 1024 * kMiB, 1.f, true},
    {"group 64", {400}, {}, {}, 64, 1, 128, 128, 64, 6},
    {"group 7", {400}, {}, {}, 21, 3, 128, 128, 64, 6},
    {"topk 128", {3000}, {}, {}, 2, 1, 64, 64, 16, 128, kHostile, 8 * kMiB, 1.f, false, true},
    {"logits x 16", {1000}, {}, {}, 4, 2, 128, 128, 64, 16, kRandom, 1024 * kMiB, 16.f},
    {"logits x 100", {600}, {}, {}, 4, 2, 64, 64, 128, 4, kHostile, 1024 * kMiB, 100.f},
    {"random chunks", {4096}, {}, {}, 16, 4, 128, 128, 64, 16, kRandom, 64 * kMiB, 1.f, false, true, 3},
    {"tiny cap", {700}, {}, {}, 4, 2, 128, 128, 64, 16, kHostile, 1},
    {"no queries", {0, 0}, {100, 30}, {}, 4, 2, 128, 128, 64, 4, kHostile, 1024 * kMiB, 1.f, false, true},
    {"no keys", {10, 20}, {0, 0}, {}, 4, 2, 128, 128, 64, 4},
    {"no keys, group 5", {10, 200}, {0, 0}, {}, 10, 2, 128, 128, 64, 4},
    {"many short, group 8", {1, 30, 2, 47, 48, 49, 5, 96, 97, 3, 200}, {}, {}, 16, 2, 128, 128, 64, 6, kHostile, 1024 * kMiB, 1.f, true, true},
    {"group 33", {300, 40}, {}, {}, 33, 1, 128, 128, 64, 6},
    {"short tails", {70, 130, 190, 20, 5000}, {}, {}, 4, 2, 128, 128, 64, 8, kHostile, 1024 * kMiB, 1.f, true},
    {"tiny items", {8200}, {}, {}, 3, 3, 128, 128, 64, 4, kHostile, 1024 * kMiB, 1.f, false, false, 7},
    {"many items", {16384}, {}, {}, 8, 8, 128, 128, 64, 8, kRandom, 256 * kMiB, 1.f, false, false, 31},
    {"equal logits", {300}, {}, {}, 4, 2, 128, 128, 64, 5, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kEqualLogits},
    {"equal logits S 128", {500}, {}, {}, 4, 2, 64, 64, 128, 4, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kEqualLogits},
    {"largest v", {300}, {}, {}, 4, 2, 128, 128, 64, 5, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kLargestV},
    {"largest v S 256", {900}, {}, {}, 40, 1, 128, 128, 256, 4, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kLargestV},
    {"correlated", {3000, 70, 900}, {}, {}, 16, 2, 128, 128, 64, 16, kRandom, 16 * kMiB, 1.f, true, true, 3, Values::kNormal, 90},
    {"correlated, group 16", {2500, 33}, {2700, 600}, {}, 32, 2, 128, 128, 64, 16, kRandom, 1024 * kMiB, 1.f, false, false, 3, Values::kNormal, 90},
    {"correlated, group 1", {4000}, {}, {}, 2, 2, 128, 128, 64, 16, kRandom, 1024 * kMiB, 1.f, false, true, 3, Values::kNormal, 97},
    {"correlated, topk 40", {6000}, {}, {}, 8, 2, 128, 128, 64, 40, kRandom, 64 * kMiB, 1.f, false, false, 5, Values::kNormal, 97},
    {"correlated, several windows", {140000}, {}, {}, 4, 1, 128, 128, 64, 6, kRandom, 1024 * kMiB, 1.f, false, false, 997, Values::kNormal, 95},
    {"correlated, large logits", {1500}, {}, {}, 24, 2, 128, 128, 64, 16, kRandom, 1024 * kMiB, 100.f, false, false, 3, Values::kNormal, 90},
    {"zero v", {300}, {}, {}, 8, 2, 128, 128, 64, 5, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kZeroV},
    {"huge v", {700}, {}, {}, 8, 2, 128, 128, 64, 5, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kHugeV},
    {"tiny v", {700}, {}, {}, 8, 2, 128, 128, 64, 5, kHostile, 1024 * kMiB, 1.f, false, false, 1, Values::kTinyV},
    {"scaled columns", {900}, {}, {}, 8, 2, 128, 128, 64, 12, kRandom, 1024 * kMiB, 1.f, false, false, 1, Values::kScaledColumns},
    {"scaled columns, group 1", {900}, {}, {}, 2, 2, 128, 128, 64, 40, kRandom, 1024 * kMiB, 1.f, false, false, 1, Values::kScaledColumns},
    {"scaled blocks", {1500}, {}, {}, 8, 2, 128, 128, 64, 4, kRandom, 1024 * kMiB, 1.f, false, false, 1, Values::kScaledBlocks},
    {"infinities and NaN", {3000}, {}, {}, 8, 2, 128, 128, 64, 6, kRandom, 1024 * kMiB, 1.f, false, false, 1, Values::kSpecialV},
    {"infinities and NaN, group 1", {3000}, {}, {}, 2, 2, 128, 128, 64, 20, kRandom, 1024 * kMiB, 1.f, false, false, 1, Values::kSpecialV},
    {"many slots", {100000}, {}, {}, 1, 1, 64, 64, 16, 4, kRandom, 32 * kMiB, 1.f, false, true, 61},
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
  for (const Case& c : kCases) {
    if (!only.empty() && only != c.name) continue;
    is_known = true;
    check<__nv_bfloat16>(c, arch);
    const bool is_wide = c.values >= Values::kHugeV;
    if (!is_wide) check<__half>(c, arch);
  }
  if (!is_known) {
    std::printf("%s: no such case\n", only.c_str());
    return 1;
  }
  std::printf("%s: %d failed\n", num_failed ? "FAILED" : "passed", num_failed);
  return num_failed != 0;
}
