// A paged cache on the device for the tests of decoding, and what it holds as fp64.
#pragma once
#include <numeric>

#include "kernels/dense_attn_case.h"
#include "params/paged.h"

namespace fsattn::test {

struct PagedShapeCase {
  DType dtype = DType::kBFloat16;
  int heads_kv = 2, group = 4, dim = 128, dim_v = 128;
  std::vector<int> len;    // tokens before the new ones
  std::vector<int> new_q;  // new tokens of each sequence
  int page = 64, cmp_page = 16;
  bool is_hnd = false;
  int size = 32, stride = 16, block = 64, topk = 16, init = 1, local = 2, window = 512;
  int max_k = 0;  // 0: the longest sequence
  GroupReduce reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
  bool has_sigmoid = true, gates_per_head = true;
  double logit = 1.0;
  bool has_bad_pages = false;
  uint64_t seed = 1;

  int total(size_t b) const { return len[b] + new_q[b]; }
  int num_cmp(size_t b) const { return int(num_windows(total(b), size, stride)); }
  int64_t batch() const { return int64_t(len.size()); }
};

// Near to normal, variance 1, fast enough for caches of many tokens.
struct QuickNormal {
  uint64_t state;
  double operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto x = static_cast<uint32_t>(state >> 32);
    const int sum = int(x & 255) + int(x >> 8 & 255) + int(x >> 16 & 255) + int(x >> 24) - 510;
    return sum / 147.8;
  }
};

// Sequences of rows [len, heads, dim] and [len, heads, dim_v], and their pages in a random order.
struct PagedStore {
  int heads, dim, dim_v, page, max_pages, num_pages;
  bool is_hnd;
  std::vector<std::vector<double>> k, v;  // by sequence, as rounded; bad pages are zeros
  std::vector<int32_t> table;
  DeviceArray<int32_t> dev_table;
  DeviceArray<uint16_t> dev_k, dev_v;

  int64_t row(int p, int t, int h, int width) const {
    return (is_hnd ? (int64_t(p) * heads + h) * page + t : (int64_t(p) * page + t) * heads + h) *
           width;
  }

  PagedStore(const PagedShapeCase& s, const std::vector<int>& lens, int page_, int max_len,
             uint64_t seed)
      : heads(s.heads_kv), dim(s.dim), dim_v(s.dim_v), page(page_), is_hnd(s.is_hnd) {
    std::mt19937_64 rng(seed);
    QuickNormal normal{seed * 7919};
    max_pages = std::max(1, (max_len + page - 1) / page);
    int used = 0;
    for (int n : lens) used += (n + page - 1) / page;
    num_pages = used + 3;
    std::vector<int> order(static_cast<size_t>(num_pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    table.assign(lens.size() * size_t(max_pages), -1);
    // Whatever belongs to nobody is NaN.
    std::vector<uint16_t> pool_k(size_t(num_pages) * page * heads * dim, 0xffff);
    std::vector<uint16_t> pool_v(size_t(num_pages) * page * heads * dim_v, 0xffff);
    size_t next = 0;
    for (size_t b = 0; b < lens.size(); ++b) {
      k.emplace_back(size_t(lens[b]) * heads * dim);
      v.emplace_back(size_t(lens[b]) * heads * dim_v);
      for (int t = 0; t < lens[b]; ++t) {
        if (t % page == 0) table[b * max_pages + t / page] = order[next++];
        const int p = table[b * max_pages + t / page];
        for (int h = 0; h < heads; ++h) {
          const auto fill = [&](std::vector<uint16_t>& pool, std::vector<double>& values,
                                int width) {
            for (int i = 0; i < width; ++i) {
              const uint16_t bits = to_bits(s.dtype, normal());
              pool[size_t(row(p, t % page, h, width) + i)] = bits;
              values[size_t((int64_t(t) * heads + h) * width + i)] = from_bits(s.dtype, bits);
            }
          };
          fill(pool_k, k[b], dim);
          fill(pool_v, v[b], dim_v);
        }
      }
      if (s.has_bad_pages) spoil(b, lens[b]);
    }
    dev_table = DeviceArray<int32_t>(table);
    dev_k = DeviceArray<uint16_t>(pool_k);
    dev_v = DeviceArray<uint16_t>(pool_v);
  }

  // Every third page of a sequence gets an id that does not exist.
  void spoil(size_t b, int len) {
    for (int p = 1; p * page < len; p += 3) {
      table[b * max_pages + p] = p % 2 ? -7 : num_pages + p;
      for (int t = p * page; t < std::min(len, (p + 1) * page); ++t) {
        std::fill_n(k[b].begin() + int64_t(t) * heads * dim, heads * dim, 0.0);
        std::fill_n(v[b].begin() + int64_t(t) * heads * dim_v, heads * dim_v, 0.0);
      }
    }
  }

  PagedKvView view() const {
    const auto rows = [&](uint16_t* data, int width) {
      const int64_t w = width;
      return is_hnd ? PagedRows{data, w * page * heads, w, w * page}
                    : PagedRows{data, w * page * heads, w * heads, w};
    };
    return {
        rows(dev_k.data, dim), rows(dev_v.data, dim_v),
        PageTable{dev_table.data, max_pages, max_pages, num_pages, page}
    };
  }
  const double* key(size_t b, int64_t t, int h) const {
    return &k[b][size_t((t * heads + h) * dim)];
  }
  const double* value(size_t b, int64_t t, int h) const {
    return &v[b][size_t((t * heads + h) * dim_v)];
  }
};

// One attention branch in fp64.
struct BranchResult {
  std::vector<double> p, o, weight;  // weight: sum of p |v|, what rounding errors are relative to
  double lse = -INFINITY;
};

inline BranchResult attend_reference(const PagedStore& store, size_t b, int h, const double* q,
                                     double scale, const std::vector<int>& keys) {
  BranchResult r;
  r.o.assign(size_t(store.dim_v), 0);
  r.weight.assign(size_t(store.dim_v), 0);
  double top = -INFINITY, sum = 0;
  for (int j : keys) {
    const double* k = store.key(b, j, h);
    double x = 0;
    for (int d = 0; d < store.dim; ++d) x += q[d] * k[d];
    r.p.push_back(x * scale);
    top = std::max(top, x * scale);
  }
  for (double& x : r.p) sum += (x = std::exp(x - top));
  for (size_t i = 0; i < keys.size(); ++i) {
    r.p[i] /= sum;
    const double* v = store.value(b, keys[i], h);
    for (int d = 0; d < store.dim_v; ++d) {
      r.o[size_t(d)] += r.p[i] * v[d];
      r.weight[size_t(d)] += r.p[i] * std::fabs(v[d]);
    }
  }
  if (!keys.empty()) r.lse = top + std::log(sum);
  return r;
}

inline std::vector<int> key_range(int first, int last) {
  std::vector<int> keys;
  for (int j = std::max(first, 0); j <= last; ++j) keys.push_back(j);
  return keys;
}

}  // namespace fsattn::test
