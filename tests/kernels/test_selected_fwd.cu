// Forward of selected attention, and the block index, against float64 on hostile inputs.
//     test_selected_fwd [sm90a] [only this case]
#include <cstring>
#include <string>

#include "kernels/selected_problem.cuh"

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
      const int len_q = x.cu_q_host[b + 1] - x.cu_q_host[b], len_k = x.cu_k_host[b + 1] - x.cu_k_host[b];
      const int offset = c.q_offset.empty() ? len_k - len_q : c.q_offset[b];
      for (int i = 0; i < len_q; ++i) {
        const int token = x.cu_q_host[b] + i;
        const int32_t* ids = x.topk_host.data() + (g * x.total_q + token) * c.topk;
        for (int j = 0; j < c.topk; ++j) {
          const int64_t first_key = int64_t{ids[j]} * c.block_size;
          if (ids[j] < 0 || first_key >= len_k || first_key > int64_t{i} + offset) continue;
          if (std::find(ids, ids + j, ids[j]) != ids + j) continue;
          const size_t slot = static_cast<size_t>(x.cu_k_host[b] / c.block_size) + b + static_cast<size_t>(ids[j]);
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

template <class Element>
void check(const Case& c, Arch arch) {
  SelectedProblem<Element> x(c);
  const ForwardReference want(x);
  const Problem problem = x.problem();
  const int row = find_selected_attn_fwd_row(arch, problem);
  if (row < 0) {
    std::printf("FAIL no row   %s\n", c.name);
    ++num_failed;
    return;
  }
  Buffer<char> scratch(static_cast<int64_t>(selected_attn_fwd_workspace(problem)));
  uint64_t prints[2];
  Difference o_error, lse_error;
  int outside = 0;
  for (int round = 0; round < 2; ++round) {
    x.o.buffer.poison();
    x.lse.poison();
    scratch.poison();
    launch_selected_attn_fwd(row, x.fwd_params(scratch), nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<Element> o = x.o.buffer.download();
    const std::vector<float> lse = x.lse.download();
    prints[round] = fingerprint(o.data(), x.o.buffer.bytes()) ^ fingerprint(lse.data(), x.lse.bytes()) * 3;
    if (round > 0) continue;
    o_error = compare_rows(x.samples() * c.heads_q, c.dim_v, want.o, [&](int64_t r, int64_t d) {
      const int64_t t = r / c.heads_q * c.stride, h = r % c.heads_q;
      return to_double(o[static_cast<size_t>(t * x.o.token_stride + h * x.o.head_stride + d)]);
    });
    for (int64_t r = 0; r < x.samples() * c.heads_q; ++r) {
      const int64_t t = r / c.heads_q * c.stride, h = r % c.heads_q;
      const double got = lse[static_cast<size_t>(h * x.total_q + t)], w = want.lse[static_cast<size_t>(r)];
      if (std::isinf(w) || !std::isfinite(got)) {
        lse_error.bad += !(std::isinf(w) && std::isinf(got) && got < 0);
      } else {
        lse_error.relative = std::max(lse_error.relative, std::abs(got - w) / std::max(1.0, std::abs(w)));
      }
    }
    for (size_t i = 0; c.has_gaps && i < o.size(); ++i) {  // nothing is written between the rows
      const int64_t in_token = static_cast<int64_t>(i) % x.o.token_stride;
      const bool is_gap = in_token >= c.heads_q * x.o.head_stride || in_token % x.o.head_stride >= c.dim_v;
      uint16_t bits;
      std::memcpy(&bits, &o[i], 2);
      outside += is_gap && bits != 0xffff;
    }
  }
  const double limit = kDTypeOf<Element> == DType::kBFloat16 ? 4e-3 : 6e-4;
  bool index_ok = true;
  if (c.has_index) index_ok = check_index(x);
  const bool ok = o_error.ok(limit) && lse_error.bad == 0 && lse_error.relative < 2e-5 &&
                  prints[0] == prints[1] && outside == 0 && index_ok;
  num_failed += !ok;
  const SelectedShape shape = selected_shape(problem);
  std::printf("%s %s row %2d %-18s T %6d/%6d B %2d H %2d/%2d D %3d/%3d S %3d K %3d launches %3d  rel %.2e row %.1e lse %.1e bad %d+%d%s%s%s\n",
              ok ? "ok  " : "FAIL", kDTypeOf<Element> == DType::kBFloat16 ? "bf16" : "fp16", row, c.name,
              int(x.total_q), int(x.total_k), int(x.batch), c.heads_q, c.heads_kv, c.dim, c.dim_v, c.block_size,
              c.topk, int(selected_fwd_layout(shape).split.num_launches), o_error.relative, o_error.worst_row,
              lse_error.relative, o_error.bad, lse_error.bad, prints[0] == prints[1] ? "" : " DIFFERENT BITS",
              outside ? " WROTE OUTSIDE" : "", index_ok ? "" : " WRONG INDEX");
  std::fflush(stdout);
}

constexpr size_t kMiB = size_t{1} << 20;
const auto kHostile = Pattern::kHostile;
const auto kRandom = Pattern::kRandom;

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
    {"many slots", {100000}, {}, {}, 1, 1, 64, 64, 16, 4, kRandom, 32 * kMiB, 1.f, false, true, 61},
};

}  // namespace

int main(int argc, char** argv) {
  Arch arch = Arch::kSm80;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "sm90a") == 0) {
      arch = Arch::kSm90a;
    } else {
      only = argv[i];
    }
  }
  for (const Case& c : kCases) {
    if (!only.empty() && only != c.name) continue;
    check<__nv_bfloat16>(c, arch);
    check<__half>(c, arch);
  }
  std::printf("%s: %d failed\n", num_failed ? "FAILED" : "passed", num_failed);
  return num_failed != 0;
}
