// A problem of select_blocks on the device and its float64 reference.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/select_blocks/select_blocks.h"
#include "kernels/kernel_test.cuh"

namespace fsattn::test {

// Ramp: logits rise or fall with the window, in steps that make plateaus. One lane: the best blocks lie in
// every fourth group of eight.
enum class Keys { kRandom, kEqual, kRamp, kOneLane };

struct SelectCase {
  std::vector<int> lens_q, lens_k;
  int heads_q, heads_kv, dim = 128;
  int topk = 16, init = 1, local = 2;
  GroupReduce reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
  float scale = 1.f;  // of the queries: large ones make peaky probabilities
  std::vector<int> offsets = {};
  int kernel_size = 32, stride = 16, block = 64;
  Keys keys = Keys::kRandom;
};

// Uniform in [-1.7, 1.7], variance 1, times `scale`.
template <class Element>
__global__ void fill_kernel(Element* x, int64_t count, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h =
        (static_cast<uint64_t>(i) + (static_cast<uint64_t>(seed) << 40)) * 0x9e3779b97f4a7c15u;
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9u;
    h ^= h >> 32;
    x[i] = Element((static_cast<float>(h & 0xffffff) / 8388608.f - 1.f) * 1.7320508f * scale);
  }
}

// Two columns of the keys of one sequence, zeros elsewhere: a high part in coarse steps and what is left of it.
template <class Element>
__global__ void pattern_kernel(Element* k, int num_keys, int heads, int dim, Keys keys) {
  for (int w = blockIdx.x * blockDim.x + threadIdx.x; w < num_keys; w += gridDim.x * blockDim.x) {
    const bool is_raised = keys == Keys::kRamp || w / 32 % 4 == 1;
    const float x = is_raised ? 64.f * static_cast<float>(w) / static_cast<float>(num_keys) : 0.f;
    const Element high(x), low(x - static_cast<float>(high));
    for (int head = 0; head < heads; ++head) {
      Element* row = k + (int64_t{w} * heads + head) * dim;
      for (int i = 0; i < dim; ++i) row[i] = i == 0 ? high : i == 1 ? low : Element(0.f);
    }
  }
}

__device__ inline double dot(const void* a, const void* b, int dim, bool is_bf16) {
  double sum = 0;
  for (int i = 0; i < dim; ++i) {
    sum += is_bf16
               ? static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(a)[i])) *
                     static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(b)[i]))
               : static_cast<double>(__half2float(static_cast<const __half*>(a)[i])) *
                     static_cast<double>(__half2float(static_cast<const __half*>(b)[i]));
  }
  return sum;
}

struct Sampled {
  int token, seq_first_key, num_keys, position;
};

// A CTA a (sample, query head): logits of the windows and lse of the visible ones.
static __global__ void logits_kernel(SelectBlocksParams p, const Sampled* samples, int max_keys,
                                     double* logits, double* lse) {
  __shared__ double part[256];
  const Sampled s = samples[blockIdx.x];
  const int head = blockIdx.y, kv = head / static_cast<int>(p.shape.group_size());
  const int dim = static_cast<int>(p.shape.head_dim);
  const char* q = static_cast<const char*>(p.q.data) +
                  2 * (s.token * p.q.token_stride + head * p.q.head_stride);
  double* row = logits + (int64_t{blockIdx.x} * gridDim.y + head) * max_keys;
  double largest = -INFINITY;
  for (int i = threadIdx.x; i < s.num_keys; i += blockDim.x) {
    const char* k = static_cast<const char*>(p.k_cmp.data) +
                    2 * ((s.seq_first_key + i) * p.k_cmp.token_stride + kv * p.k_cmp.head_stride);
    const bool is_seen = s.position >= i * p.mask.kernel_stride + p.mask.kernel_size - 1;
    row[i] = is_seen ? dot(q, k, dim, p.shape.dtype == DType::kBFloat16) * p.shape.softmax_scale
                     : -INFINITY;
    largest = fmax(largest, row[i]);
  }
  part[threadIdx.x] = largest;
  __syncthreads();
  for (int i = 0; i < 256; ++i) largest = fmax(largest, part[i]);
  __syncthreads();
  double sum = 0;
  for (int i = threadIdx.x; i < s.num_keys; i += blockDim.x)
    if (row[i] > -INFINITY) sum += exp(row[i] - largest);
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int i = 0; i < 256; ++i) sum += part[i];
    lse[int64_t{blockIdx.x} * gridDim.y + head] = sum > 0 ? largest + log(sum) : -INFINITY;
  }
}

// lse of every row in fp32 arithmetic that is far from what is tested: one CTA a (token, head).
static __global__ void lse_kernel(SelectBlocksParams p, const Sampled* all, float* lse) {
  const Sampled s = all[blockIdx.x];
  const int head = blockIdx.y, kv = head / static_cast<int>(p.shape.group_size());
  const int dim = static_cast<int>(p.shape.head_dim);
  const char* q = static_cast<const char*>(p.q.data) +
                  2 * (s.token * p.q.token_stride + head * p.q.head_stride);
  double largest = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < s.num_keys; i += blockDim.x) {
    if (s.position < i * p.mask.kernel_stride + p.mask.kernel_size - 1) break;
    const char* k = static_cast<const char*>(p.k_cmp.data) +
                    2 * ((s.seq_first_key + i) * p.k_cmp.token_stride + kv * p.k_cmp.head_stride);
    const double x = dot(q, k, dim, p.shape.dtype == DType::kBFloat16) * p.shape.softmax_scale;
    if (x > largest) sum *= exp(largest - x), largest = x;
    sum += exp(x - largest);
  }
  __shared__ double sums[128], tops[128];
  sums[threadIdx.x] = sum, tops[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 128; ++i) largest = fmax(largest, tops[i]);
    sum = 0;
    for (int i = 0; i < 128; ++i)
      if (sums[i] > 0) sum += sums[i] * exp(tops[i] - largest);
    lse[head * p.packing.total_q + s.token] =
        sum > 0 ? static_cast<float>(largest + log(sum)) : -INFINITY;
  }
}

inline std::vector<int32_t> prefix(const std::vector<int>& lens) {
  std::vector<int32_t> cu{0};
  for (int n : lens) cu.push_back(cu.back() + n);
  return cu;
}

template <class Element>
struct SelectProblem {
  SelectCase c;
  std::vector<int32_t> cu_q, cu_k, cu_cmp;
  DeviceArray<int32_t> dcu_q, dcu_k, dcu_cmp, doffset;
  int total_q, total_cmp;
  DeviceArray<Element> q, k;
  DeviceArray<float> lse;
  DeviceArray<int32_t> out;
  SelectBlocksParams p{};
  Problem problem{};

  static std::vector<int32_t> compressed(const SelectCase& c) {
    std::vector<int> lens;
    for (int n : c.lens_k)
      lens.push_back(static_cast<int>(num_windows(n, c.kernel_size, c.stride)));
    return prefix(lens);
  }

  explicit SelectProblem(const SelectCase& c_)
      : c(c_),
        cu_q(prefix(c.lens_q)),
        cu_k(prefix(c.lens_k)),
        cu_cmp(compressed(c)),
        dcu_q(cu_q),
        dcu_k(cu_k),
        dcu_cmp(cu_cmp),
        doffset(c.offsets.empty() ? std::vector<int32_t>{0} : std::vector<int32_t>(c.offsets)),
        total_q(cu_q.back()),
        total_cmp(std::max(cu_cmp.back(), cu_k.back() / c.stride)),
        q(static_cast<size_t>(total_q) * c.heads_q * c.dim),
        k(static_cast<size_t>(total_cmp + 1) * c.heads_kv * c.dim),
        lse(static_cast<size_t>(total_q) * c.heads_q),
        out(static_cast<size_t>(total_q) * c.heads_kv * c.topk) {
    fill_kernel<<<1024, 256>>>(q.get(), int64_t{total_q} * c.heads_q * c.dim, 1, c.scale);
    fill_kernel<<<1024, 256>>>(k.get(), int64_t{cu_cmp.back()} * c.heads_kv * c.dim, 2,
                               c.keys == Keys::kRandom ? 1.f : 0.f);
    if (c.keys == Keys::kRamp || c.keys == Keys::kOneLane)
      pattern_kernel<<<64, 256>>>(k.get(), cu_cmp.back(), c.heads_kv, c.dim, c.keys);
    p.packing = {static_cast<int64_t>(c.lens_q.size()),
                 dcu_q.get(),
                 dcu_k.get(),
                 c.offsets.empty() ? nullptr : doffset.get(),
                 total_q,
                 int64_t{total_cmp} * c.stride,
                 *std::max_element(c.lens_q.begin(), c.lens_q.end()),
                 *std::max_element(c.lens_k.begin(), c.lens_k.end())};
    const DType dtype = kIs<Element> ? DType::kBFloat16 : DType::kFloat16;
    p.shape = {dtype, c.heads_q, c.heads_kv, c.dim, c.dim, 1 / std::sqrt(double(c.dim))};
    p.q = {q.get(), int64_t{c.heads_q} * c.dim, c.dim};
    p.k_cmp = {k.get(), int64_t{c.heads_kv} * c.dim, c.dim};
    p.lse = {lse.get(), total_q};
    p.mask = {dcu_cmp.get(), total_cmp, c.kernel_size, c.stride};
    p.block_size = c.block, p.topk = c.topk, p.init_blocks = c.init, p.local_blocks = c.local;
    p.group_reduce = c.reduce, p.score_dtype = c.score_dtype;
    p.topk_idx = out.get();
    problem.dtype = dtype, problem.head_dim = problem.head_dim_v = c.dim;
    problem.num_heads_q = c.heads_q, problem.num_heads_kv = c.heads_kv;
    problem.kernel_size = c.kernel_size, problem.kernel_stride = c.stride;
    problem.block_size = c.block, problem.topk = c.topk;
  }

  template <class T>
  static constexpr bool kIs = std::is_same_v<T, __nv_bfloat16>;

  Sampled sample(int token) const {
    const auto seq =
        static_cast<size_t>(std::upper_bound(cu_q.begin(), cu_q.end(), token) - cu_q.begin() - 1);
    const int in_seq = token - cu_q[seq];
    const int offset = c.offsets.empty() ? c.lens_k[seq] - c.lens_q[seq] : c.offsets[seq];
    return {token, cu_cmp[seq], cu_cmp[seq + 1] - cu_cmp[seq], offset + in_seq};
  }

  void make_lse() {
    std::vector<Sampled> all;
    for (int t = 0; t < total_q; ++t) all.push_back(sample(t));
    const DeviceArray<Sampled> dall(all);
    lse_kernel<<<dim3(total_q, c.heads_q), 128>>>(p, dall.get(), lse.get());
    finish_kernel();
  }

  std::vector<int32_t> run(int row) {
    cuda_ok(cudaMemset(out.get(), 0x55, static_cast<size_t>(total_q) * c.heads_kv * c.topk * 4));
    launch_select_blocks(row, p, nullptr);
    finish_kernel();
    return out.host();
  }

  // What is wrong with a row, given its scores; empty when nothing is.
  std::string wrong(const int32_t* found, const std::vector<double>& score, int position) const {
    const int blocks = static_cast<int>(score.size());
    const int own = position < 0 ? -1 : position / c.block, end = std::min(own + 1, blocks);
    const int init = std::min(c.init, end), local = std::clamp(own + 1 - c.local, init, end);
    const int room = c.topk - init - (end - local);
    std::vector<int> order(static_cast<size_t>(local - init));
    std::iota(order.begin(), order.end(), init);
    const auto key = [&](int b) {
      const double x = score[static_cast<size_t>(b)];
      return c.score_dtype == ScoreDType::kBFloat16
                 ? static_cast<double>(__bfloat162float(__float2bfloat16_rn(static_cast<float>(x))))
                 : x;
    };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) > key(b); });
    const size_t taken = std::min(order.size(), static_cast<size_t>(room));
    std::vector<int> want(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(taken));
    for (int b = 0; b < init; ++b) want.push_back(b);
    for (int b = local; b < end; ++b) want.push_back(b);
    std::sort(want.begin(), want.end());
    std::vector<int> got;
    for (int i = 0; i < c.topk; ++i) {
      const bool is_valid = i < static_cast<int>(want.size());
      if (is_valid != (found[i] >= 0) || found[i] >= end || found[i] < -1) return "form";
      if (is_valid && i > 0 && found[i] <= found[i - 1]) return "order";
      if (is_valid) got.push_back(found[i]);
    }
    const double close = c.score_dtype == ScoreDType::kBFloat16 ? std::exp2(-7) : 2e-5;
    for (int a : got) {
      if (std::find(want.begin(), want.end(), a) != want.end()) continue;
      for (int b : want) {
        if (std::find(got.begin(), got.end(), b) != got.end()) continue;
        const double x = score[static_cast<size_t>(a)], y = score[static_cast<size_t>(b)];
        if (std::abs(x - y) > close * std::max(x, y)) {
          return "took " + std::to_string(a) + " (" + std::to_string(x) + ") not " +
                 std::to_string(b) + " (" + std::to_string(y) + ")";
        }
      }
    }
    return "";
  }

  // Number of wrong rows among every `every`-th token.
  int count_wrong_rows(const std::vector<int32_t>& found, int every, bool prints) {
    std::vector<Sampled> samples;
    for (int t = total_q - 1; t >= 0; t -= every) samples.push_back(sample(t));
    int max_keys = 1;
    for (const Sampled& s : samples) max_keys = std::max(max_keys, s.num_keys);
    const DeviceArray<Sampled> dsamples(samples);
    const size_t rows = samples.size() * static_cast<size_t>(c.heads_q);
    const DeviceArray<double> dlogits(rows * static_cast<size_t>(max_keys)), dlse(rows);
    logits_kernel<<<dim3(static_cast<unsigned>(samples.size()), c.heads_q), 256>>>(
        p, dsamples.get(), max_keys, dlogits.get(), dlse.get());
    finish_kernel();
    const std::vector<double> logits = dlogits.host(), lses = dlse.host();
    int wrong_rows = 0;
    const int group = c.heads_q / c.heads_kv;
    const int heads = c.reduce == GroupReduce::kFirstHead ? 1 : group;
    for (size_t i = 0; i < samples.size(); ++i) {
      const Sampled& s = samples[i];
      const auto seq = static_cast<size_t>(std::upper_bound(cu_q.begin(), cu_q.end(), s.token) -
                                           cu_q.begin() - 1);
      for (int kv = 0; kv < c.heads_kv; ++kv) {
        std::vector<double> score(static_cast<size_t>(ceil_div(c.lens_k[seq], c.block)));
        for (int w = 0; w < s.num_keys; ++w) {
          double sum = 0;
          for (int h = 0; h < heads; ++h) {
            const size_t r =
                i * static_cast<size_t>(c.heads_q) + static_cast<size_t>(kv * group + h);
            const double x = logits[r * static_cast<size_t>(max_keys) + static_cast<size_t>(w)];
            const double e = x > -INFINITY ? std::exp(x - lses[r]) : 0;
            sum = c.reduce == GroupReduce::kMax ? std::max(sum, e) : sum + e;
          }
          for (int piece = 0; piece < c.kernel_size / c.stride; ++piece) {
            score.at(static_cast<size_t>((w + piece) * c.stride / c.block)) += sum;
          }
        }
        const std::string what =
            wrong(found.data() + (int64_t{kv} * total_q + s.token) * c.topk, score, s.position);
        if (what.empty()) continue;
        if (prints && wrong_rows < 5) {
          std::printf("  head %d token %d: %s\n", kv, s.token, what.c_str());
        }
        ++wrong_rows;
      }
    }
    return wrong_rows;
  }
};

}  // namespace fsattn::test
