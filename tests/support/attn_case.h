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

// fp64 results, flat: o [total_q, Hq, Dv] and so on.
struct Expected {
  std::vector<double> o, lse, dq, dk, dv;
};

// One query row: scores of its visible keys, -inf elsewhere.
inline std::vector<double> scores_of(const AttnCase& c, const Visible& visible, int64_t seq,
                                     int64_t token, int64_t head) {
  const auto b = static_cast<size_t>(seq);
  const int64_t kv = head / c.shape.group_size(), num_keys = c.cu_keys[b + 1] - c.cu_keys[b];
  const int64_t position = token - c.cu_q[b] + c.offset(seq);
  std::vector<double> scores(static_cast<size_t>(num_keys),
                             -std::numeric_limits<double>::infinity());
  for (int64_t j = 0; j < num_keys; ++j) {
    if (!visible(seq, kv, token, position, j)) continue;
    double dot = 0;
    for (int64_t i = 0; i < c.shape.head_dim; ++i) {
      dot += c.q.get(token, head, i) * c.k.get(c.cu_keys[b] + j, kv, i);
    }
    scores[static_cast<size_t>(j)] = dot * c.shape.softmax_scale;
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

inline Expected expected_fwd(const AttnCase& c, const Visible& visible) {
  const int64_t hq = c.shape.num_heads_q, dv = c.shape.head_dim_v;
  Expected e;
  e.o.assign(static_cast<size_t>(c.packing.total_q * hq * dv), 0);
  e.lse.assign(static_cast<size_t>(c.packing.total_q * hq),
               -std::numeric_limits<double>::infinity());
  for_each_row(c, [&](int64_t seq, int64_t token, int64_t head) {
    const std::vector<double> s = scores_of(c, visible, seq, token, head);
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const double x : s) largest = std::max(largest, x);
    if (std::isinf(largest)) return;
    for (const double x : s) sum += std::exp(x - largest);
    e.lse[static_cast<size_t>(head * c.packing.total_q + token)] = largest + std::log(sum);
    for (size_t j = 0; j < s.size(); ++j) {
      const double p = std::exp(s[j] - largest) / sum;
      if (p == 0) continue;
      const int64_t row = c.cu_keys[static_cast<size_t>(seq)] + static_cast<int64_t>(j);
      for (int64_t i = 0; i < dv; ++i) {
        e.o[static_cast<size_t>((token * hq + head) * dv + i)] +=
            p * c.v.get(row, head / c.shape.group_size(), i);
      }
    }
  });
  return e;
}

// From the case's o and lse, as a backward call gets them.
inline Expected expected_bwd(const AttnCase& c, const Visible& visible) {
  const int64_t hq = c.shape.num_heads_q, d = c.shape.head_dim, dv = c.shape.head_dim_v;
  const int64_t hkv = c.shape.num_heads_kv;
  Expected e;
  e.dq.assign(static_cast<size_t>(c.packing.total_q * hq * d), 0);
  e.dk.assign(static_cast<size_t>(c.k.tokens * hkv * d), 0);
  e.dv.assign(static_cast<size_t>(c.k.tokens * hkv * dv), 0);
  for_each_row(c, [&](int64_t seq, int64_t token, int64_t head) {
    const std::vector<double> s = scores_of(c, visible, seq, token, head);
    const int64_t kv = head / c.shape.group_size();
    double delta = -c.stat(c.dlse, head, token);
    for (int64_t i = 0; i < dv; ++i) delta += c.dout.get(token, head, i) * c.o.get(token, head, i);
    for (size_t j = 0; j < s.size(); ++j) {
      if (std::isinf(s[j])) continue;
      const int64_t row = c.cu_keys[static_cast<size_t>(seq)] + static_cast<int64_t>(j);
      const double p = std::exp(s[j] - c.stat(c.lse, head, token));
      double dp = 0;
      for (int64_t i = 0; i < dv; ++i) {
        dp += c.dout.get(token, head, i) * c.v.get(row, kv, i);
        e.dv[static_cast<size_t>((row * hkv + kv) * dv + i)] += p * c.dout.get(token, head, i);
      }
      const double ds = p * (dp - delta) * c.shape.softmax_scale;
      for (int64_t i = 0; i < d; ++i) {
        e.dq[static_cast<size_t>((token * hq + head) * d + i)] += ds * c.k.get(row, kv, i);
        e.dk[static_cast<size_t>((row * hkv + kv) * d + i)] += ds * c.q.get(token, head, i);
      }
    }
  });
  return e;
}

// The largest error over rounding: |found - expected| / (tolerance of the dtype * (|expected| + rms)).
// Above 1 is a failure; NaN counts as infinite.
inline double error_of(const Tensor& found, const std::vector<double>& expected) {
  double squares = 0, worst = 0;
  for (const double x : expected) squares += x * x;
  const double rms = std::sqrt(squares / std::max<double>(1, double(expected.size())));
  const DType dtype = found.dtype;
  const double unit = dtype == DType::kFloat64   ? 1e-13
                      : dtype == DType::kFloat32 ? 2e-6
                      : dtype == DType::kFloat16 ? 0x1.1p-11
                                                 : 0x1.04p-8;
  size_t n = 0;
  for (int64_t t = 0; t < found.tokens; ++t) {
    for (int64_t h = 0; h < found.heads; ++h) {
      for (int64_t i = 0; i < found.dim; ++i, ++n) {
        const double x = found.get(t, h, i);
        const double error = std::fabs(x - expected[n]) /
                             (unit * std::fabs(expected[n]) + std::min(unit, 4e-6) * rms + 1e-30);
        worst = std::isnan(x) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
      }
    }
  }
  return worst;
}

}  // namespace fsattn::test
