// Random attention problems for the CPU backend's tests, and what they shall give: plain loops in fp64
// over every (query, key) pair. Nothing of src/ decides here what a query sees.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "cpu/simd.h"
#include "params/attention.h"
#include "plan/cpu_workspace.h"

namespace fsattn::test {

inline double read(const void* data, DType dtype, int64_t i) {
  double value = 0;
  cpu::with_storage_type(dtype, [&]<class T>() {
    value = static_cast<double>(cpu::load(static_cast<const T*>(data)[i]));
  });
  return value;
}

inline void write(void* data, DType dtype, int64_t i, double value) {
  cpu::with_storage_type(dtype, [&]<class T>() {
    cpu::store(static_cast<T*>(data)[i], static_cast<cpu::Compute<T>>(value));
  });
}

// A [tokens, heads, dim] tensor with gaps between its rows, filled with a pattern that no result has.
struct Tensor {
  DType dtype{};
  int64_t tokens = 0, heads = 0, dim = 0, head_stride = 0, token_stride = 0;
  std::vector<char> bytes;

  Tensor() = default;
  Tensor(DType dtype_, int64_t tokens_, int64_t heads_, int64_t dim_, int64_t gap = 8)
      : dtype(dtype_), tokens(tokens_), heads(heads_), dim(dim_), head_stride(dim_ + gap) {
    token_stride = head_stride * heads + gap;
    bytes.assign(static_cast<size_t>(tokens * token_stride + gap) * size_of(dtype), kGap);
  }
  static constexpr char kGap = 0x7b;

  int64_t at(int64_t token, int64_t head, int64_t i) const {
    return token * token_stride + head * head_stride + i;
  }
  double get(int64_t token, int64_t head, int64_t i) const {
    return read(bytes.data(), dtype, at(token, head, i));
  }
  void set(int64_t token, int64_t head, int64_t i, double value) {
    write(bytes.data(), dtype, at(token, head, i), value);
  }
  Rows rows() { return {bytes.data(), token_stride, head_stride}; }

  template <class Rng>
  void randomize(Rng& rng, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < dim; ++i) set(t, h, i, normal(rng));
      }
    }
  }
  void fill(double value) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < dim; ++i) set(t, h, i, value);
      }
    }
  }
  // Whether everything between the rows is as it was.
  bool gaps_intact() const {
    std::vector<char> is_row(bytes.size(), 0);
    const size_t size = size_of(dtype);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        std::memset(is_row.data() + static_cast<size_t>(at(t, h, 0)) * size, 1,
                    static_cast<size_t>(dim) * size);
      }
    }
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (is_row[i] == 0 && bytes[i] != kGap) return false;
    }
    return true;
  }
};

// Scratch memory of exactly the planned size, with a guard behind it.
struct Workspace {
  std::vector<char> bytes;
  size_t size, offset = 0;

  Workspace(const Problem& problem, int threads)
      : bytes(cpu_workspace_bytes(problem, threads) + 512, 0x55),
        size(cpu_workspace_bytes(problem, threads)) {
    offset = 256 - reinterpret_cast<uintptr_t>(bytes.data()) % 256;
    // A NaN wherever nothing was written.
    std::memset(bytes.data() + offset, 0xff, size);
  }
  Scratch scratch() { return {bytes.data() + offset, size}; }
  bool guard_intact() const {
    for (size_t i = offset + size; i < bytes.size(); ++i) {
      if (bytes[i] != 0x55) return false;
    }
    return true;
  }
};

struct Sizes {
  DType dtype = DType::kFloat32;
  int64_t num_heads_q = 4, num_heads_kv = 2, head_dim = 64, head_dim_v = 64;
  std::vector<int64_t> seqlens_q{70}, seqlens_k{70};
  std::vector<int32_t> q_offset{};  // empty: bottom-right
};

// A packed batch. visible(sequence, position, key) is the mask; head is for the selected branch.
struct AttnCase {
  Sizes sizes;
  std::vector<int32_t> cu_q{0}, cu_k{0}, cu_keys{0};  // cu_keys: rows of k and v
  Packing packing{};
  AttnShape shape{};
  Tensor q, k, v, o, dout, dq, dk, dv;
  std::vector<char> lse, dlse;
  std::mt19937 rng{7};

  // num_keys(seqlen_k) are the rows of k and v of a sequence; spare_rows follow the last one.
  AttnCase(const Sizes& from, const std::function<int64_t(int64_t)>& num_keys,
           int64_t spare_rows = 0, double scale = 1)
      : sizes(from) {
    for (size_t b = 0; b < sizes.seqlens_q.size(); ++b) {
      cu_q.push_back(cu_q.back() + static_cast<int32_t>(sizes.seqlens_q[b]));
      cu_k.push_back(cu_k.back() + static_cast<int32_t>(sizes.seqlens_k[b]));
      cu_keys.push_back(cu_keys.back() + static_cast<int32_t>(num_keys(sizes.seqlens_k[b])));
    }
    packing = {static_cast<int64_t>(sizes.seqlens_q.size()),
               cu_q.data(),
               cu_k.data(),
               sizes.q_offset.empty() ? nullptr : sizes.q_offset.data(),
               cu_q.back(),
               cu_k.back(),
               0,
               0};
    for (size_t b = 0; b < sizes.seqlens_q.size(); ++b) {
      packing.max_q = std::max(packing.max_q, sizes.seqlens_q[b]);
      packing.max_k = std::max(packing.max_k, sizes.seqlens_k[b]);
    }
    shape = {sizes.dtype,    sizes.num_heads_q, sizes.num_heads_kv,
             sizes.head_dim, sizes.head_dim_v,  1 / std::sqrt(double(sizes.head_dim))};
    const int64_t rows = cu_keys.back() + spare_rows;
    q = Tensor(sizes.dtype, packing.total_q, sizes.num_heads_q, sizes.head_dim);
    k = Tensor(sizes.dtype, rows, sizes.num_heads_kv, sizes.head_dim);
    v = Tensor(sizes.dtype, rows, sizes.num_heads_kv, sizes.head_dim_v);
    o = dout = Tensor(sizes.dtype, packing.total_q, sizes.num_heads_q, sizes.head_dim_v);
    dq = q, dk = k, dv = v;
    q.randomize(rng, scale);
    k.randomize(rng);
    v.randomize(rng);
    dout.randomize(rng);
    const size_t stats = static_cast<size_t>(sizes.num_heads_q * packing.total_q) * stat_size();
    lse.assign(stats, 0x7b);
    dlse.assign(stats, 0);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < sizes.num_heads_q * packing.total_q; ++i) {
      write(dlse.data(), stat_dtype(), i, normal(rng));
    }
  }
  AttnCase(const AttnCase&) = delete;

  DType stat_dtype() const {
    return sizes.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  size_t stat_size() const { return size_of(stat_dtype()); }
  double stat(const std::vector<char>& of, int64_t head, int64_t token) const {
    return read(of.data(), stat_dtype(), head * packing.total_q + token);
  }
  Stats stats(std::vector<char>& of) { return {of.data(), packing.total_q}; }
  int64_t offset(int64_t seq) const {
    const auto b = static_cast<size_t>(seq);
    return sizes.q_offset.empty() ? sizes.seqlens_k[b] - sizes.seqlens_q[b] : sizes.q_offset[b];
  }
  Problem problem(Op op, Pass pass) const {
    Problem p;
    p.op = op;
    p.pass = pass;
    p.dtype = sizes.dtype;
    p.batch = packing.batch;
    p.total_q = packing.total_q, p.total_k = packing.total_k;
    p.max_q = packing.max_q, p.max_k = packing.max_k;
    p.num_heads_q = sizes.num_heads_q, p.num_heads_kv = sizes.num_heads_kv;
    p.head_dim = sizes.head_dim, p.head_dim_v = sizes.head_dim_v;
    return p;
  }
  AttnFwdTensors fwd() {
    return {packing, shape, q.rows(), k.rows(), v.rows(), o.rows(), stats(lse)};
  }
  AttnBwdTensors bwd() {
    return {packing,  shape,      dout.rows(), stats(dlse), q.rows(),  k.rows(), v.rows(),
            o.rows(), stats(lse), dq.rows(),   dk.rows(),   dv.rows(), false,    false};
  }
};

using Visible =
    std::function<bool(int64_t seq, int64_t head_kv, int64_t token, int64_t position, int64_t key)>;

// Results, flat: o [total_q, Hq, Dv] and so on.
struct Expected {
  std::vector<double> o, lse, dq, dk, dv;
};

// One query row: scores of its visible keys, -inf elsewhere.
template <class Real>
std::vector<Real> scores_of(const AttnCase& c, const Visible& visible, int64_t seq, int64_t token,
                            int64_t head) {
  const auto b = static_cast<size_t>(seq);
  const int64_t kv = head / c.shape.group_size(), num_keys = c.cu_keys[b + 1] - c.cu_keys[b];
  const int64_t position = token - c.cu_q[b] + c.offset(seq);
  std::vector<Real> scores(static_cast<size_t>(num_keys), -std::numeric_limits<Real>::infinity());
  for (int64_t j = 0; j < num_keys; ++j) {
    if (!visible(seq, kv, token, position, j)) continue;
    Real dot = 0;
    for (int64_t i = 0; i < c.shape.head_dim; ++i) {
      dot += static_cast<Real>(c.q.get(token, head, i)) *
             static_cast<Real>(c.k.get(c.cu_keys[b] + j, kv, i));
    }
    scores[static_cast<size_t>(j)] = dot * static_cast<Real>(c.shape.softmax_scale);
  }
  return scores;
}

template <class F>
void for_each_row(const AttnCase& c, const F& f) {
  for (int64_t seq = 0; seq < c.packing.batch; ++seq) {
    const auto b = static_cast<size_t>(seq);
    for (int64_t token = c.cu_q[b]; token < c.cu_q[b + 1]; ++token) {
      for (int64_t head = 0; head < c.shape.num_heads_q; ++head) f(seq, token, head);
    }
  }
}

// A tensor of sums, kept in Real.
template <class Real>
struct Sums {
  int64_t heads, dim;
  std::vector<Real> values;

  Sums(const Tensor& like)
      : heads(like.heads),
        dim(like.dim),
        values(static_cast<size_t>(like.tokens * like.heads * like.dim), 0) {}
  Real& at(int64_t token, int64_t head, int64_t i) {
    return values[static_cast<size_t>((token * heads + head) * dim + i)];
  }
  std::vector<double> result() const { return {values.begin(), values.end()}; }
};

// Real is the type of the arithmetic.
template <class Real = double>
Expected expected_fwd(const AttnCase& c, const Visible& visible) {
  Sums<Real> o(c.o);
  Expected e;
  e.lse.assign(static_cast<size_t>(c.packing.total_q * c.shape.num_heads_q),
               -std::numeric_limits<double>::infinity());
  for_each_row(c, [&](int64_t seq, int64_t token, int64_t head) {
    const std::vector<Real> s = scores_of<Real>(c, visible, seq, token, head);
    Real largest = -std::numeric_limits<Real>::infinity(), sum = 0;
    for (const Real x : s) largest = std::max(largest, x);
    if (std::isinf(largest)) return;
    for (const Real x : s) sum += std::exp(x - largest);
    e.lse[static_cast<size_t>(head * c.packing.total_q + token)] =
        static_cast<double>(largest + std::log(sum));
    for (size_t j = 0; j < s.size(); ++j) {
      const Real p = std::exp(s[j] - largest) / sum;
      if (p == 0) continue;
      const int64_t row = c.cu_keys[static_cast<size_t>(seq)] + static_cast<int64_t>(j);
      for (int64_t i = 0; i < c.shape.head_dim_v; ++i) {
        o.at(token, head, i) += p * static_cast<Real>(c.v.get(row, head / c.shape.group_size(), i));
      }
    }
  });
  e.o = o.result();
  return e;
}

// From the case's o and lse, as a backward call gets them.
template <class Real = double>
Expected expected_bwd(const AttnCase& c, const Visible& visible) {
  const int64_t d = c.shape.head_dim, dv = c.shape.head_dim_v;
  Sums<Real> dq(c.q), dk(c.k), dval(c.v);
  for_each_row(c, [&](int64_t seq, int64_t token, int64_t head) {
    const std::vector<Real> s = scores_of<Real>(c, visible, seq, token, head);
    const int64_t kv = head / c.shape.group_size();
    const auto dout = [&](int64_t i) { return static_cast<Real>(c.dout.get(token, head, i)); };
    Real delta = 0;
    // From the end: in the order of dP, a query with one visible key would cancel without any error.
    for (int64_t i = dv - 1; i >= 0; --i) {
      delta += dout(i) * static_cast<Real>(c.o.get(token, head, i));
    }
    delta -= static_cast<Real>(c.stat(c.dlse, head, token));
    for (size_t j = 0; j < s.size(); ++j) {
      if (std::isinf(s[j])) continue;
      const int64_t row = c.cu_keys[static_cast<size_t>(seq)] + static_cast<int64_t>(j);
      const Real p = std::exp(s[j] - static_cast<Real>(c.stat(c.lse, head, token)));
      Real dp = 0;
      for (int64_t i = 0; i < dv; ++i) {
        dp += dout(i) * static_cast<Real>(c.v.get(row, kv, i));
        dval.at(row, kv, i) += p * dout(i);
      }
      const Real ds = p * (dp - delta) * static_cast<Real>(c.shape.softmax_scale);
      for (int64_t i = 0; i < d; ++i) {
        dq.at(token, head, i) += ds * static_cast<Real>(c.k.get(row, kv, i));
        dk.at(row, kv, i) += ds * static_cast<Real>(c.q.get(token, head, i));
      }
    }
  });
  return {{}, {}, dq.result(), dk.result(), dval.result()};
}

// Largest distance of two equally long lists; a NaN or an unmatched infinity counts as infinite.
inline double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    const double x = std::fabs(a[i] - b[i]);
    worst = std::isnan(x) ? std::numeric_limits<double>::infinity() : std::max(worst, x);
  }
  return worst;
}

inline double rms(const std::vector<double>& a) {
  double squares = 0;
  for (const double x : a) squares += x * x;
  return std::sqrt(squares / std::max(1.0, double(a.size())));
}

inline std::vector<double> flat(const Tensor& t) {
  std::vector<double> values;
  for (int64_t token = 0; token < t.tokens; ++token) {
    for (int64_t head = 0; head < t.heads; ++head) {
      for (int64_t i = 0; i < t.dim; ++i) values.push_back(t.get(token, head, i));
    }
  }
  return values;
}

inline std::vector<double> rounded(std::vector<double> values, DType dtype) {
  double to = 0;
  for (double& x : values) {
    write(&to, dtype, 0, x);
    x = read(&to, dtype, 0);
  }
  return values;
}

// The contract's tolerance: the error over that of a plain loop in the compute type, rounded to the
// dtype. Above 2 is a failure.
inline double error_ratio(const std::vector<double>& found, const std::vector<double>& exact,
                          const std::vector<double>& plain, DType dtype) {
  // One ulp for lists so short or so exact that the loop has no error by luck.
  const double ulp = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
  return distance(found, exact) /
         (distance(rounded(plain, dtype), exact) + ulp * rms(exact) + 1e-300);
}

}  // namespace fsattn::test
