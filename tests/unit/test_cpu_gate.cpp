// gate of the CPU backend against o = sum of g[i] * branch[i] and its gradient in fp64.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cpu/gate.h"
#include "cpu/simd.h"
#include "support/test.h"
#include "support/threads.h"

namespace {

using fsattn::DType;
using fsattn::GateActivation;
using fsattn::cpu::BFloat16;
using fsattn::cpu::Compute;
using fsattn::cpu::Float16;

struct Shape {
  int64_t total = 7, heads = 3, dim = 24;
  bool per_head = true;
  GateActivation activation = GateActivation::kSigmoid;
};

// Rows of `dim` elements, kGap apart; gaps hold NaN.
constexpr int64_t kGap = 8;

template <class T>
struct Tensor {
  std::vector<T> values;
  int64_t heads, dim, pitch;

  Tensor(int64_t total, int64_t num_heads, int64_t row_dim, int64_t gap)
      : values(static_cast<size_t>(total * num_heads * (row_dim + gap))),
        heads(num_heads),
        dim(row_dim),
        pitch(row_dim + gap) {
    for (T& value : values) {
      fsattn::cpu::store(value, std::numeric_limits<Compute<T>>::quiet_NaN());
    }
  }
  T& at(int64_t token, int64_t head, int64_t i) {
    return values[static_cast<size_t>((token * heads + head) * pitch + i)];
  }
  double get(int64_t token, int64_t head, int64_t i) {
    return static_cast<double>(fsattn::cpu::load(at(token, head, i)));
  }
  fsattn::Rows rows() { return {values.data(), heads * pitch, heads == 1 ? 0 : pitch}; }
  void fill_random(std::mt19937& rng, double scale) {
    std::uniform_real_distribution<double> pick(-scale, scale);
    for (size_t i = 0; i < values.size(); ++i) {
      if (static_cast<int64_t>(i) % pitch >= dim) continue;
      fsattn::cpu::store(values[i], static_cast<Compute<T>>(pick(rng)));
    }
  }
  bool gaps_are_intact() const {
    for (size_t i = 0; i < values.size(); ++i) {
      const bool is_gap = static_cast<int64_t>(i) % pitch >= dim;
      if (is_gap && !std::isnan(fsattn::cpu::load(values[i]))) return false;
    }
    return true;
  }
};

template <class T>
constexpr DType dtype_of() {
  if (std::is_same_v<T, double>) return DType::kFloat64;
  if (std::is_same_v<T, float>) return DType::kFloat32;
  return std::is_same_v<T, Float16> ? DType::kFloat16 : DType::kBFloat16;
}

template <class T>
struct Run {
  Shape shape;
  std::vector<Tensor<T>> branches, d_branches;
  Tensor<T> gates, dgates, dout, o;

  explicit Run(const Shape& s)
      : shape(s),
        branches(3, Tensor<T>(s.total, s.heads, s.dim, kGap)),
        d_branches(branches),
        gates(s.total, s.per_head ? s.heads : 1, 3, 1),
        dgates(gates),
        dout(branches[0]),
        o(branches[0]) {
    std::mt19937 rng(5);
    for (Tensor<T>& branch : branches) branch.fill_random(rng, 2.0);
    gates.fill_random(rng, 4.0);
    dout.fill_random(rng, 2.0);
  }

  void execute(int threads) {
    const fsattn::GateShape s{dtype_of<T>(), shape.total, shape.heads, shape.dim, shape.activation};
    const fsattn::test::ThreadScope scope(threads);
    fsattn::cpu::gate_fwd(
        0, {s, branches[0].rows(), branches[1].rows(), branches[2].rows(), gates.rows(), o.rows()},
        nullptr);
    fsattn::cpu::gate_bwd(
        0,
        {s, dout.rows(), branches[0].rows(), branches[1].rows(), branches[2].rows(), gates.rows(),
         d_branches[0].rows(), d_branches[1].rows(), d_branches[2].rows(), dgates.rows()},
        nullptr);
  }
};

// Half a unit in the last place of the output, and the rounding of the sum in fp32 (fp64).
template <class T>
double tolerance(double value, double size) {
  const double output_eps = std::is_same_v<T, double>    ? 0x1p-53
                            : std::is_same_v<T, float>   ? 0x1p-24
                            : std::is_same_v<T, Float16> ? 0x1p-11
                                                         : 0x1p-8;
  const double sum_eps = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  const double subnormal = std::is_same_v<T, Float16> ? 0x1p-25 : 0.0;
  return output_eps * std::fabs(value) + 8 * sum_eps * size + subnormal;
}

double gate_value(double raw, GateActivation activation) {
  return activation == GateActivation::kSigmoid ? 1.0 / (1.0 + std::exp(-raw)) : raw;
}

template <class T>
void expect_row(Run<T>& run, int64_t token, int64_t head, double* dot, double* dot_size) {
  const Shape& s = run.shape;
  for (int64_t i = 0; i < s.dim; ++i) {
    const double d = run.dout.get(token, head, i);
    double sum = 0, size = 0;
    for (size_t b = 0; b < 3; ++b) {
      const double raw = run.gates.get(token, s.per_head ? head : 0, static_cast<int64_t>(b));
      const double gate = gate_value(raw, s.activation);
      const double value = run.branches[b].get(token, head, i);
      sum += gate * value;
      size += std::fabs(gate * value);
      dot[b] += d * value;
      dot_size[b] += std::fabs(d * value);
      EXPECT_NEAR(run.d_branches[b].get(token, head, i), gate * d,
                  tolerance<T>(gate * d, std::fabs(gate * d)));
    }
    EXPECT_NEAR(run.o.get(token, head, i), sum, tolerance<T>(sum, size));
  }
}

template <class T>
void expect_gate_grad(Run<T>& run, int64_t token, int64_t head, const double* dot,
                      const double* dot_size) {
  for (int64_t b = 0; b < 3; ++b) {
    const double gate = gate_value(run.gates.get(token, head, b), run.shape.activation);
    const bool is_logit = run.shape.activation == GateActivation::kSigmoid;
    const double slope = is_logit ? gate * (1 - gate) : 1.0;
    // 1 - gate loses digits as the gate comes close to 1.
    const double expected = dot[b] * slope, size = dot_size[b] * (is_logit ? gate : 1.0);
    EXPECT_NEAR(run.dgates.get(token, head, b), expected, tolerance<T>(expected, size));
  }
}

template <class T>
void expect_matches(const Shape& shape) {
  Run<T> run(shape);
  run.execute(2);
  for (int64_t token = 0; token < shape.total; ++token) {
    double dot[3] = {}, dot_size[3] = {};
    for (int64_t head = 0; head < shape.heads; ++head) {
      expect_row(run, token, head, dot, dot_size);
      if (!shape.per_head) continue;
      expect_gate_grad(run, token, head, dot, dot_size);
      for (int b = 0; b < 3; ++b) dot[b] = dot_size[b] = 0;
    }
    if (!shape.per_head) expect_gate_grad(run, token, 0, dot, dot_size);
  }
  for (const Tensor<T>& tensor : run.d_branches) EXPECT_TRUE(tensor.gaps_are_intact());
  EXPECT_TRUE(run.o.gaps_are_intact());
  EXPECT_TRUE(run.dgates.gaps_are_intact());
}

template <class T>
void expect_matches_every_form() {
  for (const bool per_head : {false, true}) {
    for (const GateActivation activation : {GateActivation::kSigmoid, GateActivation::kNone}) {
      expect_matches<T>({.per_head = per_head, .activation = activation});
      expect_matches<T>(
          {.total = 131, .heads = 1, .dim = 8, .per_head = per_head, .activation = activation});
    }
  }
  expect_matches<T>({.total = 0});
}

}  // namespace

TEST(fp64) { expect_matches_every_form<double>(); }
TEST(fp32) { expect_matches_every_form<float>(); }
TEST(bf16) { expect_matches_every_form<BFloat16>(); }
TEST(fp16) { expect_matches_every_form<Float16>(); }

// exp of a large logit of either sign must not overflow into NaN.
TEST(saturated_logits) {
  Run<float> run({.total = 1, .heads = 1, .dim = 8});
  run.gates.at(0, 0, 0) = 1000.0F;
  run.gates.at(0, 0, 1) = -1000.0F;
  run.gates.at(0, 0, 2) = -1000.0F;
  run.execute(1);
  for (int64_t i = 0; i < 8; ++i) {
    EXPECT_EQ(run.o.get(0, 0, i), run.branches[0].get(0, 0, i));
    EXPECT_EQ(run.d_branches[1].get(0, 0, i), 0.0);
  }
  for (int64_t b = 0; b < 3; ++b) EXPECT_EQ(run.dgates.get(0, 0, b), 0.0);
}

TEST(threads_do_not_change_bits) {
  const Shape shape{.total = 300, .per_head = false};
  Run<float> first(shape);
  first.execute(1);
  for (const int threads : {2, 3}) {
    Run<float> run(shape);
    run.execute(threads);
    for (int64_t token = 0; token < shape.total; ++token) {
      for (int64_t b = 0; b < 3; ++b) {
        EXPECT_EQ(run.dgates.get(token, 0, b), first.dgates.get(token, 0, b));
      }
    }
  }
}

FSATTN_TEST_MAIN()
