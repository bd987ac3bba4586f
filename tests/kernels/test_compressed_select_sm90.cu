// compressed_select, of every row, against float64 on the device. Arguments: parts of test names; "bench" times
// it and the two kernels that it replaces instead.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cuda/dense_attn/dense_attn.h"
#include "cuda/select_blocks/compressed_select.h"
#include "kernels/select_problem.cuh"

namespace fsattn::test {
namespace {

// o of a sampled row: a CTA a (sample, head), a thread a column.
template <class Element>
__global__ void output_kernel(Rows v, int group, int dim, const Sampled* samples, int max_keys,
                              const double* logits, const double* lse, double* o) {
  const Sampled s = samples[blockIdx.x];
  const int64_t row = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
  const int d = threadIdx.x;
  if (d >= dim) return;
  double sum = 0;
  for (int i = 0; i < s.num_keys; ++i) {
    const double x = logits[row * max_keys + i];
    if (x == -INFINITY) continue;
    const auto* e = static_cast<const Element*>(v.data) + (s.seq_first_key + i) * v.token_stride +
                    blockIdx.y / group * v.head_stride + d;
    sum += exp(x - lse[row]) * static_cast<double>(static_cast<float>(*e));
  }
  o[row * dim + d] = sum;
}

template <class Element>
struct Fused : SelectProblem<Element> {
  using Base = SelectProblem<Element>;
  static constexpr bool kIsBf16 = std::is_same_v<Element, __nv_bfloat16>;
  int row = -1;
  DeviceArray<Element> v, o;
  CompressedAttnFwdParams attn{};
  explicit Fused(const SelectCase& c)
      : Base(c),
        v(static_cast<size_t>(this->total_cmp + 1) * c.heads_kv * c.dim),
        o(static_cast<size_t>(this->total_q) * c.heads_q * c.dim) {
    fill_kernel<<<1024, 256>>>(v.get(), int64_t{this->cu_cmp.back()} * c.heads_kv * c.dim, 5, 1.f);
    attn.attn.packing = this->p.packing;
    attn.attn.shape = this->p.shape;
    attn.attn.q = this->p.q, attn.attn.k = this->p.k_cmp;
    attn.attn.v = {v.get(), this->p.k_cmp.token_stride, this->p.k_cmp.head_stride};
    attn.attn.o = {o.get(), this->p.q.token_stride, this->p.q.head_stride};
    attn.attn.lse = this->p.lse;
    attn.mask = this->p.mask;
    row = find_compressed_select_row(Arch::kSm90a, this->problem, this->problem, false);
    EXPECT_TRUE(row >= 0);
  }
  void launch() { launch_compressed_select(row, attn, this->p, nullptr); }
  std::vector<int32_t> run() {
    const SelectCase& c = this->c;
    const auto rows = static_cast<size_t>(this->total_q) * static_cast<size_t>(c.heads_q);
    cuda_ok(cudaMemset(this->out.get(), 0x55, rows * static_cast<size_t>(c.topk) * 4));
    cuda_ok(cudaMemset(o.get(), 0xff, rows * static_cast<size_t>(c.dim) * 2));
    cuda_ok(cudaMemset(this->lse.get(), 0xff, rows * 4));
    launch();
    finish_kernel();
    return this->out.host();
  }
  // rms error of o and the largest of lse.
  void errors(int every, double* o_error, double* lse_error) {
    const SelectCase& c = this->c;
    std::vector<Sampled> samples;
    for (int t = this->total_q - 1; t >= 0; t -= every) samples.push_back(this->sample(t));
    int max_keys = 1;
    for (const Sampled& s : samples) max_keys = std::max(max_keys, s.num_keys);
    const DeviceArray<Sampled> ds(samples);
    const size_t rows = samples.size() * static_cast<size_t>(c.heads_q);
    const DeviceArray<double> dlogits(rows * static_cast<size_t>(max_keys)), dlse(rows);
    const DeviceArray<double> dout(rows * static_cast<size_t>(c.dim));
    const dim3 grid(static_cast<unsigned>(samples.size()), c.heads_q);
    logits_kernel<<<grid, 256>>>(this->p, ds.get(), max_keys, dlogits.get(), dlse.get());
    output_kernel<Element><<<grid, 256>>>(attn.attn.v, c.heads_q / c.heads_kv, c.dim, ds.get(),
                                          max_keys, dlogits.get(), dlse.get(), dout.get());
    finish_kernel();
    const auto want = dout.host(), want_lse = dlse.host();
    const auto got = o.host();
    const auto got_lse = this->lse.host();
    double sum = 0, norm = 0, worst = 0;
    for (size_t i = 0; i < samples.size(); ++i) {
      for (int h = 0; h < c.heads_q; ++h) {
        const size_t r = i * static_cast<size_t>(c.heads_q) + static_cast<size_t>(h);
        const auto t = static_cast<size_t>(samples[i].token);
        const double l = got_lse[static_cast<size_t>(h) * static_cast<size_t>(this->total_q) + t];
        if (l != want_lse[r]) {
          const double e = std::abs(l - want_lse[r]) / (1 + std::abs(want_lse[r]));
          worst = e <= 1e300 ? std::max(worst, e) : INFINITY;
        }
        for (int d = 0; d < c.dim; ++d) {
          const double x = static_cast<double>(
              static_cast<float>(got[(t * static_cast<size_t>(c.heads_q) + static_cast<size_t>(h)) *
                                         static_cast<size_t>(c.dim) +
                                     static_cast<size_t>(d)]));
          const double y = want[r * static_cast<size_t>(c.dim) + static_cast<size_t>(d)];
          const double e = (x - y) * (x - y);
          sum += e <= 1e300 ? e : 1e300;
          norm += y * y;
        }
      }
    }
    *o_error = norm > 0 ? std::sqrt(sum / norm) : sum;
    *lse_error = worst;
  }
};

template <class Element>
void check(const SelectCase& c, int every = 1) {
  Fused<Element> s(c);
  const std::vector<int32_t> found = s.run();
  EXPECT_EQ(s.count_wrong_rows(found, every, true), 0);
  double o_error, lse_error;
  s.errors(every, &o_error, &lse_error);
  EXPECT_TRUE(o_error < (Fused<Element>::kIsBf16 ? 6e-3 : 8e-4));
  EXPECT_TRUE(lse_error < 1e-5);
  const auto o = s.o.host();
  EXPECT_TRUE(found == s.run());
  const auto again = s.o.host();
  EXPECT_TRUE(std::memcmp(o.data(), again.data(), o.size() * 2) == 0);
}

void check_both(const SelectCase& c, int every = 1) {
  check<__nv_bfloat16>(c, every);
  check<__half>(c, every);
}

TEST(sm90_two_heads) {
  SelectCase c{{700}, {700}, 2, 2};
  c.topk = 6;
  check_both(c);
}

TEST(sm90_lengths) {
  SelectCase c{
      {700, 0, 65, 1, 31, 32, 300 },
      {700, 0, 65, 1, 31, 32, 1000},
      1, 1
  };
  c.topk = 4;
  check_both(c);
  c.offsets = {-20, 0, 0, 5, 0, 0, 700};
  check_both(c);
}

TEST(sm90_long_sequences) {
  SelectCase c{{300}, {70000}, 2, 2};
  check_both(c, 7);
  c.scale = 8;
  check_both(c, 7);
}

TEST(sm90_topk) {
  for (int topk : {1, 2, 3, 8, 13, 16}) {
    SelectCase c{{90}, {20000}, 1, 1};
    c.topk = topk, c.init = topk > 2 ? 1 : 0, c.local = topk > 1 ? 2 : 1;
    check_both(c, 3);
  }
}

TEST(sm90_forced_blocks) {
  for (auto [init, local] : {
           std::pair{0, 0},
           {0, 1},
           {1, 0},
           {8, 0},
           {4, 4},
           {0, 8}
  }) {
    SelectCase c{{900}, {900}, 1, 1};
    c.topk = 8, c.init = init, c.local = local;
    check<__nv_bfloat16>(c);
  }
}

TEST(sm90_equal_scores) {
  SelectCase c{{300}, {30000}, 1, 1};
  c.keys = Keys::kEqual;
  check_both(c, 3);
}

TEST(sm90_hostile_orders) {
  for (Keys keys : {Keys::kRamp, Keys::kOneLane}) {
    for (float scale : {0.1f, 1.f, 4.f}) {
      SelectCase c{{300}, {20000}, 1, 1};
      c.keys = keys, c.scale = scale;
      check_both(c, 7);
    }
  }
}

TEST(sm90_head_dims) {
  for (int dim : {72, 120}) {
    SelectCase c{{200}, {3000}, 2, 2};
    c.dim = dim;
    check_both(c, 3);
  }
}

double time_of(const auto& launch, int repeats = 7) {
  cudaEvent_t start, stop;
  cuda_ok(cudaEventCreate(&start));
  cuda_ok(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < repeats + 1; ++i) {
    cuda_ok(cudaEventRecord(start));
    launch();
    cuda_ok(cudaEventRecord(stop));
    finish_kernel();
    float ms = 0;
    cuda_ok(cudaEventElapsedTime(&ms, start, stop));
    if (i > 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[times.size() / 2]);
}

void bench(int tokens, float scale) {
  SelectCase c{{tokens}, {tokens}, 32, 32};
  c.scale = scale;
  Fused<__nv_bfloat16> s(c);
  const Problem& p = s.problem;
  const int64_t smem = 227 * 1024;
  const int dense =
      find_dense_attn_row(Pass::kFwd, Arch::kSm90a, smem, p.dtype, p.head_dim, p.head_dim_v);
  const int select = find_select_blocks_row(Arch::kSm90a, p, smem);
  const double both = time_of([&] { s.launch(); });
  const double one = time_of([&] { launch_compressed_attn_fwd(dense, s.attn, nullptr); });
  const double two = time_of([&] { launch_select_blocks(select, s.p, nullptr); });
  std::printf("%d tokens 32/32 scale %.0f: %.3f ms; compressed %.3f and select %.3f: %.3f ms\n",
              tokens, static_cast<double>(scale), both, one, two, one + two);
}

}  // namespace
}  // namespace fsattn::test

int main(int argc, char** argv) {
  using namespace fsattn;
  if (test::is_skipped(argc, argv)) return 0;
  if (argc > 1 && std::string(argv[1]) == "bench") {
    for (float scale : {1.f, 4.f}) test::bench(65536, scale);
    test::bench(8192, 1.f);
    return 0;
  }
  return test::run_all(argc, argv);
}
