// The CPU attention branches against plain fp64 loops (support/attn_case.h), for every mask, and what
// they promise beside the numbers: determinism, untouched neighbours, bad ids, scratch memory.
#include <algorithm>
#include <climits>
#include <cstdlib>
#include <string>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "fsattn/error.h"
#include "support/attn_case.h"
#include "support/test.h"
#include "support/threads.h"

using namespace fsattn;
using namespace fsattn::test;

namespace {

constexpr int kThreads = 3;

// One mask of a case: how to call the operator and what a query sees.
struct Branch {
  virtual ~Branch() = default;
  virtual Op op() const = 0;
  virtual void add_to(Problem& problem) const = 0;
  virtual void fwd(const AttnFwdTensors& attn, const Scratch& scratch) const = 0;
  virtual void bwd(const AttnBwdTensors& attn, const Scratch& scratch) const = 0;
  virtual Visible visible(const AttnCase& c) const = 0;

  void run_fwd(AttnCase& c, int threads = kThreads) const {
    Problem problem = c.problem(op(), Pass::kFwd);
    add_to(problem);
    Workspace workspace(problem, threads);
    fwd(c.fwd(), workspace.scratch());
    EXPECT_TRUE(workspace.guard_intact());
  }
  void run_bwd(AttnCase& c, bool accumulate = false, int threads = kThreads) const {
    Problem problem = c.problem(op(), Pass::kBwd);
    add_to(problem);
    Workspace workspace(problem, threads);
    AttnBwdTensors attn = c.bwd();
    attn.accumulate_dq = attn.accumulate_dkv = accumulate;
    bwd(attn, workspace.scratch());
    EXPECT_TRUE(workspace.guard_intact());
  }
};

struct Window : Branch {
  int64_t size;
  explicit Window(int64_t size_) : size(size_) {}
  Op op() const override { return Op::kWindowAttn; }
  void add_to(Problem& problem) const override { problem.window_size = size; }
  void fwd(const AttnFwdTensors& attn, const Scratch& scratch) const override {
    cpu::window_attn_fwd(0, {attn, {size}, 0, scratch}, nullptr);
  }
  void bwd(const AttnBwdTensors& attn, const Scratch& scratch) const override {
    cpu::window_attn_bwd(0, {attn, {size}, 0, scratch}, nullptr);
  }
  Visible visible(const AttnCase&) const override {
    return [w = size](int64_t, int64_t, int64_t, int64_t t, int64_t j) {
      return j <= t && t - j <= w;
    };
  }
};

int64_t windows_in(int64_t length, int64_t l, int64_t d) {
  int64_t count = 0;
  while (count * d + l <= length) ++count;
  return count;
}

struct Compressed : Branch {
  int64_t l, d;
  const int32_t* cu_cmp;
  int64_t rows;
  Compressed(const AttnCase& c, int64_t l_, int64_t d_)
      : l(l_), d(d_), cu_cmp(c.cu_keys.data()), rows(c.k.tokens) {}
  Op op() const override { return Op::kCompressedAttn; }
  void add_to(Problem& problem) const override {
    problem.kernel_size = l;
    problem.kernel_stride = d;
  }
  void fwd(const AttnFwdTensors& attn, const Scratch& scratch) const override {
    cpu::compressed_attn_fwd(0,
                             {
                                 attn, {cu_cmp, rows, l, d},
                                  0, scratch
    },
                             nullptr);
  }
  void bwd(const AttnBwdTensors& attn, const Scratch& scratch) const override {
    cpu::compressed_attn_bwd(0,
                             {
                                 attn, {cu_cmp, rows, l, d},
                                  0, scratch
    },
                             nullptr);
  }
  Visible visible(const AttnCase&) const override {
    return [this](int64_t, int64_t, int64_t, int64_t t, int64_t i) { return t >= i * d + l - 1; };
  }
};

struct Selected : Branch {
  int64_t block_size, topk, total_q;
  std::vector<int32_t> idx;  // [Hkv, total_q, topk]

  // Random rows with repeated, negative, far and future ids in random order.
  Selected(const AttnCase& c, int64_t block_size_, int64_t topk_)
      : block_size(block_size_), topk(topk_), total_q(c.packing.total_q) {
    std::mt19937 rng(11);
    const auto most = static_cast<int32_t>(c.packing.max_k / block_size + 2);
    std::uniform_int_distribution<int32_t> id(-2, most);
    idx.resize(static_cast<size_t>(c.shape.num_heads_kv * total_q * topk));
    for (int32_t& x : idx) x = id(rng);
    if (idx.size() > 3) idx[1] = INT_MIN, idx[2] = INT_MAX, idx[3] = idx[0];
  }
  const int32_t* row(int64_t head, int64_t token) const {
    return idx.data() + (head * total_q + token) * topk;
  }
  SelectedMask mask() const {
    return {
        idx.data(), total_q * topk, topk, topk, block_size, {nullptr, nullptr, 0}
    };
  }
  Op op() const override { return Op::kSelectedAttn; }
  void add_to(Problem& problem) const override {
    problem.block_size = block_size;
    problem.topk = topk;
  }
  void fwd(const AttnFwdTensors& attn, const Scratch& scratch) const override {
    cpu::selected_attn_fwd(0, {attn, mask(), 0, scratch}, nullptr);
  }
  void bwd(const AttnBwdTensors& attn, const Scratch& scratch) const override {
    cpu::selected_attn_bwd(0, {attn, mask(), 0, scratch}, nullptr);
  }
  Visible visible(const AttnCase&) const override {
    return [this](int64_t, int64_t head, int64_t token, int64_t t, int64_t j) {
      const int32_t* ids = row(head, token);
      return j <= t && std::find(ids, ids + topk, j / block_size) != ids + topk;
    };
  }
};

int64_t same(int64_t length) { return length; }

void check_case(AttnCase& c, const Branch& branch, const std::string& name) {
  const Visible visible = branch.visible(c);
  const auto check = [&](const char* what, const std::vector<double>& found,
                         const std::vector<double>& exact, const std::vector<double>& plain,
                         DType dtype) {
    const double ratio = error_ratio(found, exact, plain, dtype);
    if (ratio <= 2) return;
    report(name.c_str(), 0, std::string(what) + ": error ratio " + std::to_string(ratio));
  };
  const auto check_tensor = [&](const char* what, const Tensor& found,
                                const std::vector<double>& exact,
                                const std::vector<double>& plain) {
    check(what, flat(found), exact, plain, found.dtype);
    if (!found.gaps_intact()) report(name.c_str(), 0, std::string(what) + ": gap overwritten");
  };
  branch.run_fwd(c);
  const bool is_fp64 = c.sizes.dtype == DType::kFloat64;
  const Expected fwd = is_fp64 ? expected_fwd<long double>(c, visible) : expected_fwd(c, visible);
  const Expected plain_fwd = is_fp64 ? expected_fwd(c, visible) : expected_fwd<float>(c, visible);
  check_tensor("o", c.o, fwd.o, plain_fwd.o);
  std::vector<double> lse;
  for (int64_t i = 0; i < c.shape.num_heads_q * c.packing.total_q; ++i) {
    lse.push_back(read(c.lse.data(), c.stat_dtype(), i));
    const bool is_empty = std::isinf(fwd.lse[static_cast<size_t>(i)]);
    EXPECT_EQ(std::isinf(lse.back()) && lse.back() < 0, is_empty);
  }
  EXPECT_TRUE(distance(lse, fwd.lse) <= (is_fp64 ? 1e-14 : 4e-6));
  branch.run_bwd(c);
  const Expected bwd = is_fp64 ? expected_bwd<long double>(c, visible) : expected_bwd(c, visible);
  const Expected plain_bwd = is_fp64 ? expected_bwd(c, visible) : expected_bwd<float>(c, visible);
  check_tensor("dq", c.dq, bwd.dq, plain_bwd.dq);
  check_tensor("dk", c.dk, bwd.dk, plain_bwd.dk);
  check_tensor("dv", c.dv, bwd.dv, plain_bwd.dv);
}

std::string label(const char* branch, const Sizes& s) {
  return std::string(branch) + " dtype " + std::to_string(int(s.dtype)) + " heads " +
         std::to_string(s.num_heads_q) + "/" + std::to_string(s.num_heads_kv) + " dims " +
         std::to_string(s.head_dim) + "/" + std::to_string(s.head_dim_v);
}

void check_all_masks(const Sizes& s) {
  {
    AttnCase c(s, same);
    check_case(c, Window(37), label("window", s));
  }
  {
    AttnCase c(
        s, [](int64_t length) { return windows_in(length, 8, 4); }, 5);
    check_case(c, Compressed(c, 8, 4), label("compressed", s));
  }
  {
    AttnCase c(s, same);
    check_case(c, Selected(c, 32, 5), label("selected", s));
  }
}

const std::vector<int64_t> kLengthsQ{0, 1, 77, 5, 140}, kLengthsK{3, 1, 77, 40, 140};

}  // namespace

TEST(every_dtype_and_mask) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    check_all_masks({dtype, 4, 2, 64, 64, kLengthsQ, kLengthsK, {}});
  }
}

TEST(head_dims_and_groups) {
  const std::vector<int64_t> q{30, 90}, k{30, 90};
  const int64_t shapes[][4] = {
      {1,  1, 8,   8  },
      {3,  1, 24,  40 },
      {7,  7, 40,  24 },
      {24, 2, 16,  72 },
      {64, 1, 32,  16 },
      {2,  1, 256, 136}
  };
  for (const auto& s : shapes) {
    check_all_masks({DType::kFloat32, s[0], s[1], s[2], s[3], q, k, {}});
    check_all_masks({DType::kFloat64, s[0], s[1], s[2], s[3], q, k, {}});
  }
}

TEST(offsets_beyond_the_keys_and_before_the_first) {
  for (const int32_t offset : {-500, -20, 0, 30, 1000}) {
    check_all_masks({
        DType::kFloat32, 2, 1, 16, 16, {40,     9,      20    },
             {33,     50,     0     },
             {offset, offset, offset}
    });
  }
}

TEST(block_sizes) {
  for (const int64_t block_size : {16, 32, 64, 128, 256}) {
    AttnCase c(
        {
            DType::kFloat32, 2, 1, 32, 32, {600,  20},
                 {600,    300},
                 {      }
    },
        same);
    check_case(c, Selected(c, block_size, 3), "block size " + std::to_string(block_size));
  }
}

TEST(window_sizes_and_strides) {
  const Sizes s{DType::kFloat64, 2, 1, 16, 16, {150}, {150}, {}};
  for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{64}, int64_t{149}, INT64_MAX}) {
    AttnCase c(s, same);
    check_case(c, Window(size), "window " + std::to_string(size));
  }
  const int64_t strides[][2] = {
      {32, 16},
      {16, 16},
      {64, 16},
      {1,  1 },
      {4,  4 }
  };
  for (const auto& [l, d] : strides) {
    AttnCase c(
        s, [l = l, d = d](int64_t length) { return windows_in(length, l, d); }, 2);
    check_case(c, Compressed(c, l, d), "stride " + std::to_string(d));
  }
}

TEST(backward_adds_onto_what_is_there) {
  const Sizes s{
      DType::kFloat64, 4, 2, 24, 16, {50,  3},
           {50,   20},
           {    }
  };
  AttnCase c(
      s, [](int64_t length) { return windows_in(length, 8, 4); }, 5);
  const Compressed branch(c, 8, 4);
  branch.run_fwd(c);
  c.dq.fill(1), c.dk.fill(2), c.dv.fill(3);
  branch.run_bwd(c, true);
  Expected want = expected_bwd(c, branch.visible(c));
  for (double& x : want.dq) x += 1;
  for (double& x : want.dk) x += 2;
  for (double& x : want.dv) x += 3;
  EXPECT_TRUE(distance(flat(c.dq), want.dq) < 1e-13);
  EXPECT_TRUE(distance(flat(c.dk), want.dk) < 1e-13);
  EXPECT_TRUE(distance(flat(c.dv), want.dv) < 1e-13);
}

TEST(large_logits_stay_finite) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    AttnCase c({dtype, 2, 1, 64, 64, {100}, {100}, {}}, same, 0, 1e4);
    const Window branch(50);
    branch.run_fwd(c);
    branch.run_bwd(c);
    const Expected want = expected_fwd(c, branch.visible(c));
    for_each_row(c, [&](int64_t, int64_t token, int64_t head) {
      const double lse = c.stat(c.lse, head, token);
      EXPECT_NEAR(lse, want.lse[static_cast<size_t>(head * 100 + token)], 1e-5 * std::fabs(lse));
      for (int64_t i = 0; i < 64; ++i) {
        EXPECT_TRUE(std::isfinite(c.o.get(token, head, i)));
        EXPECT_TRUE(std::isfinite(c.dq.get(token, head, i)));
      }
    });
  }
}

double largest(DType dtype) {
  if (dtype == DType::kFloat64) return std::numeric_limits<double>::max();
  if (dtype == DType::kFloat16) return 65504;
  return dtype == DType::kFloat32 ? 0x1.fffffep127 : 0x1.fep127;
}

bool is_finite(const Tensor& tensor) {
  const std::vector<double> values = flat(tensor);
  return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
}

// The average of equal values is that value, although their sum is out of range.
TEST(largest_values_stay_finite) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    AttnCase c({dtype, 2, 1, 64, 64, {100}, {100}, {}}, same);
    const double top = largest(dtype);
    c.v.fill(top);
    const Window branch(80);
    branch.run_fwd(c);
    branch.run_bwd(c);
    const double allowed = dtype == DType::kFloat64 ? 1e-14 : dtype == DType::kFloat32 ? 1e-6 : 0;
    for (const double o : flat(c.o)) EXPECT_NEAR(o / top, 1, allowed);
    EXPECT_TRUE(is_finite(c.dv));
    // Their exact gradients are those of lse alone; rounding errors of the size of v are not for fp16.
    if (dtype != DType::kFloat16) EXPECT_TRUE(is_finite(c.dq) && is_finite(c.dk));
  }
}

// P is 1 whatever the score: the two sums whose difference is dS must round alike.
TEST(one_visible_key_has_no_gradient_of_its_score) {
  for (const int64_t head_dim : {8, 40, 64, 136, 256}) {
    AttnCase c({DType::kFloat32, 3, 1, 64, head_dim, {50}, {50}, {}}, same);
    std::fill(c.dlse.begin(), c.dlse.end(), char{0});
    const Window branch(0);
    branch.run_fwd(c);
    branch.run_bwd(c);
    for (const double x : flat(c.dq)) EXPECT_EQ(x, 0.0);
    for (const double x : flat(c.dk)) EXPECT_EQ(x, 0.0);
  }
}

TEST(any_number_of_threads_gives_the_same_bits) {
  const Sizes s{DType::kFloat32, 4, 2, 32, 32, kLengthsQ, kLengthsK, {}};
  const auto run = [&](auto make_branch, const auto& num_keys, int threads) {
    const ThreadScope scope(threads);
    AttnCase c(s, num_keys);
    const auto branch = make_branch(c);
    branch.run_fwd(c, threads);
    branch.run_bwd(c, false, threads);
    std::vector<char> all = c.o.bytes;
    for (const std::vector<char>* part : {&c.lse, &c.dq.bytes, &c.dk.bytes, &c.dv.bytes}) {
      all.insert(all.end(), part->begin(), part->end());
    }
    return all;
  };
  const auto windows = [](int64_t length) { return windows_in(length, 8, 4); };
  const auto window = [](AttnCase&) { return Window(37); };
  const auto compressed = [](AttnCase& c) { return Compressed(c, 8, 4); };
  const auto selected = [](AttnCase& c) { return Selected(c, 32, 5); };
  for (const int threads : {2, 5}) {
    EXPECT_TRUE(run(window, same, 1) == run(window, same, threads));
    EXPECT_TRUE(run(compressed, windows, 1) == run(compressed, windows, threads));
    EXPECT_TRUE(run(selected, same, 1) == run(selected, same, threads));
  }
}

// The last queries alone (keys converted tile by tile) and inside a batch with a neighbour.
TEST(a_query_gets_the_same_bits_in_any_company) {
  AttnCase full({DType::kBFloat16, 6, 2, 40, 24, {300}, {300}, {}}, same);
  const Selected full_rows(full, 64, 4);
  full_rows.run_fwd(full);
  for (const int64_t num_queries : {1, 2, 33, 170}) {
    AttnCase part(
        {
            DType::kBFloat16, 6, 2, 40, 24, {7,    num_queries},
                 {64,    300},
                 {      }
    },
        same);
    Selected rows(part, 64, 4);
    for (int64_t j = 0; j < 300; ++j) {
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < 40; ++i) part.k.set(64 + j, h, i, full.k.get(j, h, i));
        for (int64_t i = 0; i < 24; ++i) part.v.set(64 + j, h, i, full.v.get(j, h, i));
      }
    }
    const int64_t skip = 300 - num_queries;
    for (int64_t n = 0; n < num_queries; ++n) {
      for (int64_t h = 0; h < 6; ++h) {
        for (int64_t i = 0; i < 40; ++i) part.q.set(7 + n, h, i, full.q.get(skip + n, h, i));
      }
      for (int64_t h = 0; h < 2; ++h) {
        const int32_t* from = full_rows.row(h, skip + n);
        std::copy(from, from + 4, rows.idx.begin() + (h * rows.total_q + 7 + n) * 4);
      }
    }
    rows.run_fwd(part);
    for (int64_t n = 0; n < num_queries; ++n) {
      for (int64_t h = 0; h < 6; ++h) {
        EXPECT_EQ(part.stat(part.lse, h, 7 + n), full.stat(full.lse, h, skip + n));
        for (int64_t i = 0; i < 24; ++i) {
          EXPECT_EQ(part.o.get(7 + n, h, i), full.o.get(skip + n, h, i));
        }
      }
    }
  }
}

TEST(order_and_repetition_of_ids_do_not_matter) {
  AttnCase a({DType::kFloat32, 2, 1, 16, 16, {200}, {200}, {}}, same);
  AttnCase b(a.sizes, same);
  const Selected messy(a, 32, 6);
  Selected clean(b, 32, 6);
  for (int64_t token = 0; token < 200; ++token) {
    const int32_t* from = messy.row(0, token);
    std::vector<int32_t> ids(from, from + 6);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    std::erase_if(ids, [&](int32_t x) { return x < 0 || x * int64_t{32} > token; });
    ids.resize(6, -1);
    std::copy(ids.begin(), ids.end(), clean.idx.begin() + token * 6);
  }
  messy.run_fwd(a), messy.run_bwd(a);
  clean.run_fwd(b), clean.run_bwd(b);
  EXPECT_TRUE(a.o.bytes == b.o.bytes);
  EXPECT_TRUE(a.dq.bytes == b.dq.bytes);
  EXPECT_TRUE(a.dk.bytes == b.dk.bytes);
  EXPECT_TRUE(a.dv.bytes == b.dv.bytes);
}

TEST(every_instruction_set_agrees) {
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (!cpu::is_supported(isa)) {
      EXPECT_TRUE(isa != cpu::Isa::kBaseline);
      continue;
    }
    setenv("FSATTN_ISA", cpu::name_of(isa), 1);
    EXPECT_TRUE(cpu::active_isa() == isa);
    for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16}) {
      check_all_masks({
          dtype, 6, 2, 24, 40, {70,  20},
               {70,   90},
               {    }
      });
    }
  }
  unsetenv("FSATTN_ISA");
}

TEST(an_unknown_instruction_set_is_refused) {
  setenv("FSATTN_ISA", "sse9", 1);
  EXPECT_THROWS(cpu::active_isa(), Error, "FSATTN_ISA: must be baseline, avx2 or avx512");
  unsetenv("FSATTN_ISA");
}

FSATTN_TEST_MAIN()
