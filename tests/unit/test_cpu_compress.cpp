// compress_kv of the CPU backend against its definition in fp64: y[i] = f(x[window i] + pos_emb).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/compress_kv.h"
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "plan/cpu_compress_kv.h"
#include "support/test.h"
#include "support/threads.h"

namespace {

using fsattn::CompressKind;
using fsattn::DType;
using fsattn::cpu::BFloat16;
using fsattn::cpu::Float16;
using Doubles = std::vector<double>;

struct Shape {
  std::vector<int32_t> lengths;
  int64_t heads = 2, dim = 16, l = 32, d = 16;
  CompressKind kind = CompressKind::kMean;
  bool has_pos_emb = true;

  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
  int64_t total() const {
    int64_t sum = 0;
    for (const int32_t length : lengths) sum += length;
    return sum;
  }
  int64_t rows() const { return total() / d; }
  size_t num_weights() const {
    if (kind == CompressKind::kMean) return 0;
    const int64_t per_token = kind == CompressKind::kLinear ? dim * dim : 1;
    return static_cast<size_t>(heads * l * per_token);
  }
  std::vector<int32_t> cu() const {
    std::vector<int32_t> cu{0};
    for (const int32_t length : lengths) cu.push_back(cu.back() + length);
    return cu;
  }
};

template <class T>
struct Tensor {
  std::vector<T> values;
  Doubles exact;  // the values as fp64

  void fill_random(size_t count, std::mt19937& rng, double scale) {
    std::uniform_real_distribution<double> pick(-scale, scale);
    values.resize(count);
    for (T& value : values) {
      fsattn::cpu::store(value, static_cast<fsattn::cpu::Compute<T>>(pick(rng)));
    }
    update_exact();
  }
  void fill_nan(size_t count) {
    values.resize(count);
    for (T& value : values) {
      fsattn::cpu::store(value, static_cast<fsattn::cpu::Compute<T>>(std::nan("")));
    }
  }
  void update_exact() {
    exact.clear();
    for (const T& value : values) exact.push_back(static_cast<double>(fsattn::cpu::load(value)));
  }
};

// Rows lie further apart than they are long: the gaps hold NaN and must neither be read nor written.
constexpr int64_t kGap = 8;

template <class T>
struct Run {
  Shape shape;
  Tensor<T> x, weight, pos_emb, y, dy, dx, dweight, dpos_emb;
  std::vector<int32_t> cu_cmp;

  int64_t token_stride() const { return shape.heads * (shape.dim + kGap); }
  fsattn::Rows rows(Tensor<T>& tensor) const {
    return {tensor.values.data(), token_stride(), shape.dim + kGap};
  }
  double at(const Tensor<T>& tensor, int64_t row, int64_t head, int64_t i) const {
    return tensor.exact[static_cast<size_t>(row * token_stride() + head * (shape.dim + kGap) + i)];
  }
  void poison_gaps(Tensor<T>& tensor) const {
    for (size_t i = 0; i < tensor.values.size(); ++i) {
      const int64_t column = static_cast<int64_t>(i) % (shape.dim + kGap);
      if (column >= shape.dim)
        fsattn::cpu::store(tensor.values[i],
                           std::numeric_limits<fsattn::cpu::Compute<T>>::quiet_NaN());
    }
    tensor.update_exact();
  }
};

template <class T>
constexpr DType dtype_of() {
  if (std::is_same_v<T, double>) return DType::kFloat64;
  if (std::is_same_v<T, float>) return DType::kFloat32;
  return std::is_same_v<T, Float16> ? DType::kFloat16 : DType::kBFloat16;
}

template <class T>
Run<T> make_run(const Shape& shape) {
  Run<T> run{};
  run.shape = shape;
  std::mt19937 rng(11);
  const auto size = [&](int64_t rows) { return static_cast<size_t>(rows * run.token_stride()); };
  run.x.fill_random(size(shape.total()), rng, 1.0);
  run.dy.fill_random(size(shape.rows()), rng, 1.0);
  run.poison_gaps(run.x);
  run.poison_gaps(run.dy);
  run.weight.fill_random(shape.num_weights(), rng, 0.5);
  if (shape.has_pos_emb) {
    run.pos_emb.fill_random(static_cast<size_t>(shape.heads * shape.l * shape.dim), rng, 1.0);
  }
  run.y.fill_nan(size(shape.rows()));
  run.dx.fill_nan(size(shape.total()));
  run.dweight.fill_nan(run.weight.values.size());
  run.dpos_emb.fill_nan(run.pos_emb.values.size());
  run.cu_cmp.resize(shape.lengths.size() + 1, -1);
  return run;
}

template <class T>
T* data_or_null(Tensor<T>& tensor) {
  return tensor.values.empty() ? nullptr : tensor.values.data();
}

template <class T>
void execute(Run<T>& run, int threads) {
  const Shape& s = run.shape;
  const std::vector<int32_t> cu = s.cu();
  const fsattn::CompressKvShape shape{dtype_of<T>(), s.batch(), s.total(), s.rows(), s.total(),
                                      s.heads,       s.dim,     s.l,       s.d,      s.kind};
  const fsattn::CpuCompressKvSizes sizes{dtype_of<T>(), s.kind, s.heads, s.dim, s.rows(), s.l};
  const auto scratch_bytes = [&](fsattn::Pass pass) {
    return fsattn::cpu_compress_kv_scratch(pass, sizes).bytes;
  };
  const size_t bytes =
      std::max(scratch_bytes(fsattn::Pass::kFwd), scratch_bytes(fsattn::Pass::kBwd));
  std::vector<double> scratch(bytes / sizeof(double) + 1, std::nan(""));
  const fsattn::test::ThreadScope scope(threads);
  fsattn::cpu::compress_kv_fwd(0,
                               {
                                   shape,
                                   run.rows(run.x),
                                   data_or_null(run.weight),
                                   data_or_null(run.pos_emb),
                                   cu.data(),
                                   run.rows(run.y),
                                   run.cu_cmp.data(),
                                   {scratch.data(), scratch_bytes(fsattn::Pass::kFwd)}
  },
                               nullptr);
  fsattn::cpu::compress_kv_bwd(0,
                               {
                                   shape,
                                   run.rows(run.dy),
                                   run.rows(run.x),
                                   data_or_null(run.weight),
                                   data_or_null(run.pos_emb),
                                   cu.data(),
                                   run.cu_cmp.data(),
                                   run.rows(run.dx),
                                   data_or_null(run.dweight),
                                   data_or_null(run.dpos_emb),
                                   {scratch.data(), scratch_bytes(fsattn::Pass::kBwd)}
  },
                               nullptr);
  for (Tensor<T>* t : {&run.y, &run.dx, &run.dweight, &run.dpos_emb}) t->update_exact();
}

// The definition, one scalar at a time, and the sum of the magnitudes of its terms.
struct Reference {
  Doubles y, dx, dweight, dpos_emb;
  Doubles y_size, dx_size, dweight_size, dpos_emb_size;
};

Doubles applied_weights(const Shape& s, const Doubles& weight, int64_t head) {
  Doubles w(static_cast<size_t>(s.l), 1.0 / static_cast<double>(s.l));
  if (s.kind == CompressKind::kMean) return w;
  double sum = 0;
  for (int64_t t = 0; t < s.l; ++t) {
    const double raw = weight[static_cast<size_t>(head * s.l + t)];
    w[static_cast<size_t>(t)] = s.kind == CompressKind::kSoftmax ? std::exp(raw) : raw;
    sum += w[static_cast<size_t>(t)];
  }
  if (s.kind == CompressKind::kSoftmax) {
    for (double& value : w) value /= sum;
  }
  return w;
}

// M[t, a, o]: y[o] = sum over t, a of M[t, a, o] (x + pos_emb)[t, a]. Pooling is a diagonal matrix.
template <class T>
double matrix(const Run<T>& run, const Doubles& pool, int64_t head, int64_t t, int64_t a,
              int64_t o) {
  const Shape& s = run.shape;
  if (s.kind != CompressKind::kLinear) return a == o ? pool[static_cast<size_t>(t)] : 0.0;
  return run.weight.exact[static_cast<size_t>(((head * s.l + t) * s.dim + a) * s.dim + o)];
}

void add(Doubles& sums, Doubles& sizes, int64_t at, double term) {
  sums[static_cast<size_t>(at)] += term;
  sizes[static_cast<size_t>(at)] += std::fabs(term);
}

// Adds what one element of one window contributes to everything.
template <class T>
void add_element(const Run<T>& run, const Doubles& pool, int64_t head, int64_t row, int64_t token,
                 int64_t t, int64_t a, Doubles& dpool, Reference& ref) {
  const Shape& s = run.shape;
  const int64_t pos = (head * s.l + t) * s.dim + a;
  const double input = run.at(run.x, token + t, head, a) +
                       (s.has_pos_emb ? run.pos_emb.exact[static_cast<size_t>(pos)] : 0.0);
  const bool is_linear = s.kind == CompressKind::kLinear;
  for (int64_t o = is_linear ? 0 : a; o < (is_linear ? s.dim : a + 1); ++o) {
    const double m = matrix(run, pool, head, t, a, o), dy = run.at(run.dy, row, head, o);
    add(ref.y, ref.y_size, (row * s.heads + head) * s.dim + o, m * input);
    add(ref.dx, ref.dx_size, ((token + t) * s.heads + head) * s.dim + a, m * dy);
    if (s.has_pos_emb) add(ref.dpos_emb, ref.dpos_emb_size, pos, m * dy);
    if (is_linear) add(ref.dweight, ref.dweight_size, pos * s.dim + o, input * dy);
    dpool[static_cast<size_t>(t)] += input * dy;
    dpool[static_cast<size_t>(s.l + t)] += std::fabs(input * dy);
  }
}

void finish_pool(const Shape& s, int64_t head, const Doubles& pool, const Doubles& dpool,
                 Reference& ref) {
  const auto l = static_cast<size_t>(s.l);
  double mean = 0, mean_size = 0;
  for (size_t t = 0; t < l; ++t) {
    mean += pool[t] * dpool[t];
    mean_size += pool[t] * dpool[l + t];
  }
  for (size_t t = 0; t < l; ++t) {
    const size_t at = static_cast<size_t>(head) * l + t;
    const bool is_softmax = s.kind == CompressKind::kSoftmax;
    ref.dweight[at] = is_softmax ? pool[t] * (dpool[t] - mean) : dpool[t];
    ref.dweight_size[at] = is_softmax ? pool[t] * (dpool[l + t] + mean_size) : dpool[l + t];
  }
}

template <class T>
Reference reference(const Run<T>& run) {
  const Shape& s = run.shape;
  const std::vector<int32_t> cu = s.cu();
  const auto zeros = [](int64_t count) { return Doubles(static_cast<size_t>(count)); };
  Reference ref{zeros(s.rows() * s.heads * s.dim),
                zeros(s.total() * s.heads * s.dim),
                Doubles(s.num_weights()),
                Doubles(run.pos_emb.exact.size()),
                {},
                {},
                {},
                {}};
  ref.y_size = ref.y, ref.dx_size = ref.dx;
  ref.dweight_size = ref.dweight, ref.dpos_emb_size = ref.dpos_emb;
  for (int64_t head = 0; head < s.heads; ++head) {
    const bool is_pool = s.kind != CompressKind::kLinear;
    const Doubles pool = is_pool ? applied_weights(s, run.weight.exact, head) : Doubles{};
    Doubles dpool = zeros(2 * s.l);
    int64_t row = 0;
    for (size_t seq = 0; seq < s.lengths.size(); ++seq) {
      for (int64_t begin = 0; begin + s.l <= s.lengths[seq]; begin += s.d, ++row) {
        for (int64_t i = 0; i < s.l * s.dim; ++i) {
          add_element(run, pool, head, row, cu[seq] + begin, i / s.dim, i % s.dim, dpool, ref);
        }
      }
    }
    if (is_pool && s.kind != CompressKind::kMean) finish_pool(s, head, pool, dpool, ref);
  }
  return ref;
}

// One rounding to T, and rounding of a sum whose terms have the magnitude `size`: a sum of fp32 terms
// in slices errs by a small multiple of 2^-24 times it.
template <class T>
double tolerance(double value, double size) {
  const double output_eps = std::is_same_v<T, double>    ? 0x1p-53
                            : std::is_same_v<T, float>   ? 0x1p-24
                            : std::is_same_v<T, Float16> ? 0x1p-11
                                                         : 0x1p-8;
  const double sum_eps = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  const double subnormal = std::is_same_v<T, Float16> ? 0x1p-25 : 0.0;
  return output_eps * std::fabs(value) + 16 * sum_eps * size + subnormal;
}

template <class T>
void expect_all(const char* what, const Doubles& found, const Doubles& expected,
                const Doubles& sizes) {
  EXPECT_EQ(found.size(), expected.size());
  int reported = 0;
  for (size_t i = 0; i < expected.size() && reported < 3; ++i) {
    const double limit = tolerance<T>(expected[i], sizes[i]);
    if (std::fabs(found[i] - expected[i]) <= limit) continue;
    ++reported;
    std::cout << "  " << what << "[" << i << "]\n";
    EXPECT_NEAR(found[i], expected[i], limit);
  }
}

template <class T>
Doubles without_gaps(const Run<T>& run, const Tensor<T>& tensor, int64_t num_rows) {
  Doubles values;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t head = 0; head < run.shape.heads; ++head) {
      for (int64_t i = 0; i < run.shape.dim; ++i) values.push_back(run.at(tensor, row, head, i));
      for (int64_t i = 0; i < kGap; ++i) {
        EXPECT_TRUE(std::isnan(run.at(tensor, row, head, run.shape.dim + i)));
      }
    }
  }
  return values;
}

template <class T>
void expect_matches(const Shape& shape) {
  Run<T> run = make_run<T>(shape);
  execute(run, 2);
  const Reference ref = reference(run);
  expect_all<T>("y", without_gaps(run, run.y, shape.rows()), ref.y, ref.y_size);
  expect_all<T>("dx", without_gaps(run, run.dx, shape.total()), ref.dx, ref.dx_size);
  expect_all<T>("dweight", run.dweight.exact, ref.dweight, ref.dweight_size);
  expect_all<T>("dpos_emb", run.dpos_emb.exact, ref.dpos_emb, ref.dpos_emb_size);
  int64_t rows = 0;
  for (size_t seq = 0; seq < shape.lengths.size(); ++seq) {
    EXPECT_EQ(run.cu_cmp[seq], rows);
    rows += shape.lengths[seq] < shape.l ? 0 : (shape.lengths[seq] - shape.l) / shape.d + 1;
  }
  EXPECT_EQ(run.cu_cmp.back(), rows);
}

template <class T>
void expect_matches_every_kind(Shape shape) {
  for (const CompressKind kind : {CompressKind::kMean, CompressKind::kWeighted,
                                  CompressKind::kSoftmax, CompressKind::kLinear}) {
    shape.kind = kind;
    for (const bool has_pos_emb : {false, true}) {
      shape.has_pos_emb = has_pos_emb;
      expect_matches<T>(shape);
    }
  }
}

// y and every gradient, bit for bit.
template <class T>
std::string bits(const Run<T>& run) {
  std::string all;
  for (const Tensor<T>* t : {&run.y, &run.dx, &run.dweight, &run.dpos_emb}) {
    all.append(reinterpret_cast<const char*>(t->values.data()), t->values.size() * sizeof(T));
  }
  return all;
}

template <class T>
void expect_same_bits_for_all_thread_counts(const Shape& shape) {
  Run<T> first = make_run<T>(shape);
  execute(first, 1);
  for (const int threads : {2, 3, 5}) {
    Run<T> run = make_run<T>(shape);
    execute(run, threads);
    EXPECT_TRUE(bits(run) == bits(first));
  }
}

const std::vector<int32_t> kMixedLengths{0, 1, 31, 32, 47, 48, 63, 64, 65, 0, 130};

}  // namespace

TEST(fp64_every_kind) { expect_matches_every_kind<double>({kMixedLengths}); }
TEST(fp32_every_kind) { expect_matches_every_kind<float>({kMixedLengths}); }
TEST(bf16_every_kind) { expect_matches_every_kind<BFloat16>({kMixedLengths}); }
TEST(fp16_every_kind) { expect_matches_every_kind<Float16>({kMixedLengths}); }

TEST(long_sequence) { expect_matches_every_kind<float>({.lengths = {1000}, .dim = 8}); }

// Several partial sums for dweight, several tiles of windows.
TEST(many_windows) {
  expect_matches_every_kind<float>({
      .lengths = {2500, 2900},
        .heads = 1, .dim = 8, .l = 8, .d = 4
  });
}

// Neither a multiple of the tiles' rows nor of their columns.
TEST(odd_head_dims) {
  for (const int64_t dim : {24, 40, 72}) {
    expect_matches_every_kind<float>({
        .lengths = {100, 33},
          .heads = 1, .dim = dim
    });
    expect_matches_every_kind<double>({
        .lengths = {100, 33},
          .heads = 1, .dim = dim
    });
  }
}

TEST(largest_head_dim) {
  Shape shape{.lengths = {48}, .heads = 1, .dim = 256, .l = 16, .d = 16};
  shape.kind = CompressKind::kLinear;
  expect_matches<float>(shape);
  expect_matches<double>(shape);
}

TEST(stride_equals_size) {
  expect_matches_every_kind<float>({
      .lengths = {100, 16, 15},
        .l = 16, .d = 16
  });
}
TEST(four_windows_overlap) {
  expect_matches_every_kind<float>({
      .lengths = {90, 32},
        .l = 32, .d = 8
  });
}

TEST(no_windows_at_all) {
  expect_matches_every_kind<float>({
      .lengths = {5, 0, 31}
  });
}
TEST(no_tokens) {
  expect_matches_every_kind<float>({
      .lengths = {0, 0}
  });
}

TEST(threads_do_not_change_bits) {
  for (const CompressKind kind :
       {CompressKind::kMean, CompressKind::kSoftmax, CompressKind::kLinear}) {
    expect_same_bits_for_all_thread_counts<float>({
        .lengths = {700, 0, 2100},
          .l = 8, .d = 4, .kind = kind
    });
    expect_same_bits_for_all_thread_counts<BFloat16>({
        .lengths = {700, 0, 2100},
          .l = 8, .d = 4, .kind = kind
    });
  }
}

TEST(every_instruction_set) {
  const char* before = std::getenv("FSATTN_ISA");
  const std::string saved = before == nullptr ? "" : before;
  for (const fsattn::cpu::Isa isa :
       {fsattn::cpu::Isa::kBaseline, fsattn::cpu::Isa::kAvx2, fsattn::cpu::Isa::kAvx512}) {
    if (!fsattn::cpu::is_supported(isa)) continue;
    setenv("FSATTN_ISA", name_of(isa), 1);
    expect_matches_every_kind<float>({
        .lengths = {65, 48},
          .dim = 24
    });
    expect_matches_every_kind<Float16>({
        .lengths = {65, 48},
          .dim = 24
    });
  }
  setenv("FSATTN_ISA", saved.c_str(), 1);
}

FSATTN_TEST_MAIN()
