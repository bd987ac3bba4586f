// A packed batch on the device for the tests of the attention branches, and its definition in fp64.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "base/cuda_check.h"
#include "base/math.h"
#include "params/attention.h"

namespace fsattn::test {

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t size = 0;
  DeviceArray() = default;
  explicit DeviceArray(size_t n) : size(n) {
    if (n > 0) FSATTN_CUDA_CHECK(cudaMalloc(&data, n * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { upload(host); }
  DeviceArray(DeviceArray&& o) noexcept : data(o.data), size(o.size) { o.data = nullptr; }
  DeviceArray& operator=(DeviceArray&& o) noexcept {
    std::swap(data, o.data);
    std::swap(size, o.size);
    return *this;
  }
  ~DeviceArray() { cudaFree(data); }
  void upload(const std::vector<T>& host) {
    FSATTN_CUDA_CHECK(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    std::vector<T> host(size);
    FSATTN_CUDA_CHECK(cudaMemcpy(host.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  // NaN in every type used here.
  void poison() { FSATTN_CUDA_CHECK(cudaMemset(data, 0xff, size * sizeof(T))); }
};

inline uint16_t to_bits(DType dtype, double x) {
  if (dtype == DType::kBFloat16) return __bfloat16_as_ushort(__float2bfloat16(float(x)));
  return __half_as_ushort(__float2half(float(x)));
}

inline double from_bits(DType dtype, uint16_t x) {
  if (dtype == DType::kBFloat16) return __bfloat162float(__ushort_as_bfloat16(x));
  return __half2float(__ushort_as_half(x));
}

// [tokens, heads, dim] with gaps between heads and between tokens.
struct Tensor {
  int64_t tokens, heads, dim, head_stride, token_stride;
  std::vector<uint16_t> host;
  DeviceArray<uint16_t> dev;

  Tensor(int64_t tokens_, int64_t heads_, int64_t dim_, int64_t gap)
      : tokens(tokens_),
        heads(heads_),
        dim(dim_),
        head_stride(dim_ + gap),
        token_stride(heads_ * (dim_ + gap) + gap),
        host(static_cast<size_t>(std::max<int64_t>(1, tokens_) * token_stride), 0xffff),
        dev(host) {}
  uint16_t& at(int64_t t, int64_t h, int64_t d) {
    return host[static_cast<size_t>(t * token_stride + h * head_stride + d)];
  }
  void randomize(DType dtype, uint64_t seed, double scale) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<double> normal;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; ++d) at(t, h, d) = to_bits(dtype, scale * normal(rng));
    dev.upload(host);
  }
  std::vector<double> values(DType dtype) {
    std::vector<double> x(static_cast<size_t>(tokens * heads * dim));
    size_t i = 0;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; ++d) x[i++] = from_bits(dtype, at(t, h, d));
    return x;
  }
  void poison() { dev.poison(); }
  void fetch() { host = dev.download(); }
  Rows rows() { return {dev.data, token_stride, head_stride}; }
};

struct Shape {
  DType dtype = DType::kBFloat16;
  int heads_q = 4, heads_kv = 2, dim = 128, dim_v = 128;
  std::vector<int> len_q, len_k;
  std::vector<int> offset;  // empty: bottom-right
  int size = 32, stride = 16;
  int window = -1;  // negative: compressed
  int gap = 0;
  double logit = 1.0;  // scale of q
  int extra_keys = 0;  // rows of k_cmp behind the last sequence
};

inline void parallel_for(int64_t n, const auto& body) {
  std::vector<std::thread> pool;
  const int num = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int i = 0; i < num; ++i)
    pool.emplace_back([&, i] {
      for (int64_t j = i; j < n; j += num) body(j);
    });
  for (auto& t : pool) t.join();
}

struct Batch {
  std::vector<int32_t> cu_q{0}, cu_k{0}, cu_keys{0};
  int64_t total_q = 0, total_k = 0, total_keys = 0, max_q = 0, max_k = 0;
  explicit Batch(const Shape& s) {
    for (size_t b = 0; b < s.len_q.size(); ++b) {
      cu_q.push_back(cu_q.back() + s.len_q[b]);
      cu_k.push_back(cu_k.back() + s.len_k[b]);
      const int keys = s.window >= 0 ? s.len_k[b] : int(num_windows(s.len_k[b], s.size, s.stride));
      cu_keys.push_back(cu_keys.back() + keys);
      max_q = std::max<int64_t>(max_q, s.len_q[b]);
      max_k = std::max<int64_t>(max_k, s.len_k[b]);
    }
    total_q = cu_q.back();
    total_k = cu_k.back();
    total_keys = cu_keys.back() + (s.window >= 0 ? 0 : s.extra_keys);
  }
};

// Everything in fp64 from the rounded inputs.
struct Reference {
  std::vector<double> o, lse, dq, dk, dv;
};

struct Inputs {
  std::vector<double> q, k, v, dout, dlse;
};

inline Reference reference(const Shape& s, const Batch& b, const Inputs& in, double scale,
                           bool backward) {
  const int64_t H = s.heads_q, K = s.heads_kv, D = s.dim, V = s.dim_v, G = H / K;
  Reference r;
  r.o.assign(size_t(b.total_q * H * V), 0);
  r.lse.assign(size_t(H * b.total_q), -INFINITY);
  r.dq.assign(size_t(b.total_q * H * D), 0);
  r.dk.assign(size_t(b.total_keys * K * D), 0);
  r.dv.assign(size_t(b.total_keys * K * V), 0);
  const int64_t num_seqs = int64_t(b.cu_q.size()) - 1;
  parallel_for(K * num_seqs, [&](int64_t item) {
    std::vector<double> p;
    const int64_t kvh = item % K;
    {
      const size_t seq = size_t(item / K);
      const int lq = b.cu_q[seq + 1] - b.cu_q[seq], lk = b.cu_k[seq + 1] - b.cu_k[seq];
      const int keys = b.cu_keys[seq + 1] - b.cu_keys[seq];
      const int offset = s.offset.empty() ? lk - lq : s.offset[seq];
      for (int64_t h = kvh * G; h < (kvh + 1) * G; ++h)
        for (int i = 0; i < lq; ++i) {
          const int64_t t = i + offset, row = b.cu_q[seq] + i;
          const double* q = &in.q[size_t((row * H + h) * D)];
          int64_t low = 0, high = -1;
          if (s.window >= 0) {
            low = std::max<int64_t>(0, t - s.window);
            high = std::min<int64_t>(t, keys - 1);
          } else {
            high = -1;
            while (high + 1 < keys && t >= (high + 1) * s.stride + s.size - 1) ++high;
          }
          if (high < low) continue;
          p.assign(size_t(high - low + 1), 0);
          double top = -INFINITY, sum = 0;
          for (int64_t j = low; j <= high; ++j) {
            const double* k = &in.k[size_t(((b.cu_keys[seq] + j) * K + kvh) * D)];
            double x = 0;
            for (int64_t d = 0; d < D; ++d) x += q[d] * k[d];
            p[size_t(j - low)] = x * scale;
            top = std::max(top, x * scale);
          }
          for (double& x : p) sum += (x = std::exp(x - top));
          for (double& x : p) x /= sum;
          r.lse[size_t(h * b.total_q + row)] = top + std::log(sum);
          double* o = &r.o[size_t((row * H + h) * V)];
          for (int64_t j = low; j <= high; ++j) {
            const double* v = &in.v[size_t(((b.cu_keys[seq] + j) * K + kvh) * V)];
            for (int64_t d = 0; d < V; ++d) o[d] += p[size_t(j - low)] * v[d];
          }
          if (!backward) continue;
          const double* go = &in.dout[size_t((row * H + h) * V)];
          double delta = -(in.dlse.empty() ? 0 : in.dlse[size_t(h * b.total_q + row)]);
          for (int64_t d = 0; d < V; ++d) delta += go[d] * o[d];
          double* dq = &r.dq[size_t((row * H + h) * D)];
          for (int64_t j = low; j <= high; ++j) {
            const int64_t key = (b.cu_keys[seq] + j) * K + kvh;
            const double* v = &in.v[size_t(key * V)];
            const double* k = &in.k[size_t(key * D)];
            double dp = 0;
            for (int64_t d = 0; d < V; ++d) dp += go[d] * v[d];
            const double ds = p[size_t(j - low)] * (dp - delta) * scale;
            for (int64_t d = 0; d < V; ++d) r.dv[size_t(key * V + d)] += p[size_t(j - low)] * go[d];
            for (int64_t d = 0; d < D; ++d) {
              dq[d] += ds * k[d];
              r.dk[size_t(key * D + d)] += ds * q[d];
            }
          }
        }
    }
  });
  return r;
}

// The largest error relative to the largest magnitude of its row of `dim` values and an absolute
// floor of the whole tensor; NaN where an exact value is finite counts as infinite.
inline double worst_error(const std::vector<double>& got, const std::vector<double>& exact,
                          double* rms = nullptr) {
  double norm = 0, err2 = 0, worst = 0, top = 0;
  for (double x : exact) {
    norm += x * x;
    top = std::max(top, std::abs(x));
  }
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = std::abs(got[i] - exact[i]);
    if (!(e <= 1e300)) return INFINITY;
    err2 += e * e;
    worst = std::max(worst, e);
  }
  if (rms) *rms = norm > 0 ? std::sqrt(err2 / norm) : std::sqrt(err2);
  return top > 0 ? worst / top : worst;
}

}  // namespace fsattn::test
