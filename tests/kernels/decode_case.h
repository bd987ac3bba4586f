// A call of the fused kernels over a paged cache on the device, and its check against fp64.
#pragma once
#include <set>
#include <string>

#include "cuda/decode/decode.h"
#include "kernels/paged_case.h"

namespace fsattn::test {
// Clusters of CTAs.
inline bool has_clusters() {
  int major = 0;
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major >= 9;
}

// A call of native sparse attention on the device.
struct Call {
  const PagedShapeCase& s;
  std::vector<int> totals, cmps;
  std::vector<int32_t> cu{0};
  int max_q = 0, max_k = 0;
  PagedStore cache, cmp;
  std::vector<double> q, gates;
  DeviceArray<uint16_t> dev_q, dev_gates, dev_o;
  DeviceArray<int32_t> dev_cu, dev_len, dev_topk;
  DeviceArray<float> dev_lse;
  DeviceArray<char> scratch;
  PagedTuning tuning;

  static std::vector<int> all_totals(const PagedShapeCase& s) {
    std::vector<int> x;
    for (size_t b = 0; b < s.len.size(); ++b) x.push_back(s.total(b));
    return x;
  }
  static std::vector<int> all_cmps(const PagedShapeCase& s) {
    std::vector<int> x;
    for (size_t b = 0; b < s.len.size(); ++b) x.push_back(s.num_cmp(b));
    return x;
  }
  static int longest(const PagedShapeCase& s) {
    const auto x = all_totals(s);
    return std::max(s.max_k, *std::max_element(x.begin(), x.end()));
  }

  explicit Call(const PagedShapeCase& c)
      : s(c),
        totals(all_totals(c)),
        cmps(all_cmps(c)),
        max_k(longest(c)),
        cache(c, totals, c.page, max_k, c.seed),
        cmp(c, cmps, c.cmp_page, int(num_windows(max_k, c.size, c.stride)), c.seed + 1) {
    for (int n : c.new_q) {
      cu.push_back(cu.back() + n);
      max_q = std::max(max_q, n);
    }
    q = random(size_t(total_q() * heads_q() * c.dim), dev_q, c.logit, 3);
    gates = random(size_t(total_q() * heads_q() * 3), dev_gates, 1.0, 4);
    dev_o = DeviceArray<uint16_t>(size_t(total_q() * heads_q() * c.dim_v));
    dev_lse = DeviceArray<float>(size_t(total_q() * heads_q()));
    dev_topk = DeviceArray<int32_t>(size_t(c.heads_kv * total_q() * c.topk));
    dev_cu = DeviceArray<int32_t>(cu);
    dev_len = DeviceArray<int32_t>(std::vector<int32_t>(c.len.begin(), c.len.end()));
    tuning.cmp_split = kDecodeSplit;
    tuning.cmp_long = kDecodeNeverLong;
  }
  bool fits(const DecodeFinish& finish) const {
    const int64_t blocks = (max_k + s.block - 1) / s.block;
    return finish_fits({1, s.group, blocks, s.block, s.topk, s.window, s.size, s.stride},
                       finish.ctas, finish.is_wide) &&
           (!finish.is_wide || can_finish_wide(kDecodeTable[size_t(row())]));
  }
  int row() const { return find_decode_row(s.dtype, s.dim, s.dim_v); }
  int64_t total_q() const { return cu.back(); }
  int64_t heads_q() const { return s.heads_kv * s.group; }
  double scale() const { return 1.0 / std::sqrt(double(s.dim)); }

  std::vector<double> random(size_t n, DeviceArray<uint16_t>& dev, double factor, uint64_t salt) {
    std::mt19937_64 rng(s.seed * 977 + salt);
    std::normal_distribution<double> normal;
    std::vector<uint16_t> bits(n);
    std::vector<double> x(n);
    for (size_t i = 0; i < n; ++i) {
      bits[i] = to_bits(s.dtype, factor * normal(rng));
      x[i] = from_bits(s.dtype, bits[i]);
    }
    dev = DeviceArray<uint16_t>(bits);
    return x;
  }

  AttnShape shape() const { return {s.dtype, heads_q(), s.heads_kv, s.dim, s.dim_v, scale()}; }
  PagedPacking packing() const {
    return {s.batch(), dev_cu.data, dev_len.data, total_q(), max_q, max_k};
  }
  Rows rows(const DeviceArray<uint16_t>& x, int64_t width) const {
    return {x.data, heads_q() * width, width};
  }
  void need_scratch(const DecodeSplits& splits, int64_t max_cmp, bool is_nsa) {
    const int64_t blocks = is_nsa ? (max_k + s.block - 1) / s.block : 0;
    scratch = DeviceArray<char>(size_t(decode_scratch(s.batch() * s.heads_kv, max_q, s.group,
                                                      s.dim_v, max_cmp, blocks, splits, is_nsa)
                                           .bytes));
    scratch.poison();
  }

  void run_attn() {
    PagedAttnParams p{};
    p.packing = packing();
    p.shape = shape();
    p.q = rows(dev_q, s.dim);
    p.gates = s.gates_per_head ? Rows{dev_gates.data, heads_q() * 3, 3}
                               : Rows{dev_gates.data, heads_q() * 3, 0};
    p.activation = s.has_sigmoid ? GateActivation::kSigmoid : GateActivation::kNone;
    p.cache = cache.view();
    p.cmp = cmp.view();
    p.kernel_size = s.size;
    p.kernel_stride = s.stride;
    p.block_size = s.block;
    p.topk = s.topk;
    p.init_blocks = s.init;
    p.local_blocks = s.local;
    p.window_size = s.window;
    p.group_reduce = s.reduce;
    p.score_dtype = s.score_dtype;
    p.topk_idx = dev_topk.data;
    p.o = rows(dev_o, s.dim_v);
    p.tuning = tuning;
    const int64_t max_cmp = num_windows(max_k, s.size, s.stride);
    DecodeSplits splits = decode_splits(max_cmp, kDecodeSplit, s.block, s.topk, s.window);
    if (tuning.finish.ctas > 0) splits = decode_finish_splits(splits, tuning.finish.ctas);
    need_scratch(splits, max_cmp, true);
    p.scratch = {scratch.data, scratch.size};
    dev_o.poison();
    dev_topk.poison();
    launch_paged_attn(row(), p, nullptr);
    FSATTN_CUDA_CHECK(cudaDeviceSynchronize());
  }

  void run_selected(const std::vector<int32_t>& topk_idx) {
    dev_topk.upload(topk_idx);
    PagedSelectedParams p{};
    p.packing = packing();
    p.shape = shape();
    p.q = rows(dev_q, s.dim);
    p.cache = cache.view();
    p.mask = {dev_topk.data, total_q() * s.topk, s.topk, s.topk, s.block, {}};
    p.o = rows(dev_o, s.dim_v);
    p.lse = {dev_lse.data, total_q()};
    need_scratch(decode_splits(0, kDecodeSplit, s.block, s.topk, 0), 0, false);
    p.scratch = {scratch.data, scratch.size};
    dev_o.poison();
    dev_lse.poison();
    launch_paged_selected(find_decode_row(s.dtype, s.dim, s.dim_v), p, nullptr);
    FSATTN_CUDA_CHECK(cudaDeviceSynchronize());
  }
};

// The largest relative error of a rounding: half the distance of 1 and the next number.
inline double rounding(DType dtype) { return dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048; }

// P is rounded before P V, the output once more; the fp32 statistics add little.
inline double tolerance(DType dtype, double value, double weight) {
  return rounding(dtype) * (weight + std::fabs(value)) + 3e-5 * weight + 1e-7;
}

struct Errors {
  int output = 0, selection = 0;
  double worst = 0;
  void check(double got, double want, double limit) {
    const double ratio = std::fabs(got - want) / limit;
    if (!(ratio <= 1)) ++output;
    if (!(ratio <= worst)) worst = ratio;
  }
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Scores of the blocks that compete and the row that was chosen: is it the best one?
inline int count_wrong_selection(const PagedShapeCase& s, const std::vector<double>& score,
                                 int num_blocks, int query_block, const int32_t* row) {
  std::vector<int> got;
  for (int i = 0; i < s.topk; ++i) {
    if (row[i] < 0) {
      for (int j = i; j < s.topk; ++j)
        if (row[j] != -1) return 1;
      break;
    }
    got.push_back(row[i]);
  }
  const int blocks = std::min(query_block + 1, num_blocks);
  if (int(got.size()) != std::min(s.topk, blocks)) return 1;
  for (size_t i = 1; i < got.size(); ++i)
    if (got[i] <= got[i - 1]) return 1;
  const std::set<int> chosen(got.begin(), got.end());
  const int num_init = std::min({s.init, blocks, s.topk});
  const int local_begin = std::min(std::max(query_block + 1 - s.local, num_init), blocks);
  int wrong = 0;
  for (int i = 0; i < num_init; ++i) wrong += !chosen.count(i);
  for (int i = 0; i < std::min(blocks - local_begin, s.topk - num_init); ++i)
    wrong += !chosen.count(blocks - 1 - i);
  double worst_in = INFINITY, best_out = -INFINITY;
  for (int i = num_init; i < local_begin; ++i) {
    double& side = chosen.count(i) ? worst_in : best_out;
    side = chosen.count(i) ? std::min(side, score[size_t(i)]) : std::max(side, score[size_t(i)]);
  }
  const double slack = s.score_dtype == ScoreDType::kBFloat16 ? 1.0 / 128 : 1e-4;
  return wrong + (worst_in < best_out * (1 - slack) ? 1 : 0);
}

inline std::vector<int> selected_keys(const PagedShapeCase& s, const int32_t* row, int t,
                                      int total) {
  std::set<int> blocks;
  std::vector<int> keys;
  for (int i = 0; i < s.topk; ++i)
    if (row[i] >= 0 && row[i] < (total + s.block - 1) / s.block) blocks.insert(row[i]);
  for (int b : blocks)
    for (int j = b * s.block; j < std::min({(b + 1) * s.block, total, t + 1}); ++j)
      keys.push_back(j);
  return keys;
}

inline Errors check_attn(const Call& c) {
  const PagedShapeCase& s = c.s;
  const auto o = c.dev_o.download();
  const auto topk = c.dev_topk.download();
  const int per_block = s.block / s.stride, overlap = s.size / s.stride;
  std::vector<Errors> errors(size_t(c.total_q() * s.heads_kv));
  std::vector<int> seq_of;
  for (size_t b = 0; b < s.len.size(); ++b) seq_of.insert(seq_of.end(), size_t(s.new_q[b]), int(b));
  parallel_for(c.total_q() * s.heads_kv, [&](int64_t item) {
    const int64_t row = item / s.heads_kv;
    const int h = int(item % s.heads_kv);
    const size_t b = size_t(seq_of[size_t(row)]);
    const int t = s.len[b] + int(row - c.cu[b]), total = s.total(b);
    const int visible = std::min(int(num_visible_windows(t, s.size, s.stride)), s.num_cmp(b));
    const int blocks = (total + s.block - 1) / s.block;
    std::vector<double> shared(size_t(visible), 0), score(size_t(blocks), 0);
    std::vector<BranchResult> cmp;
    for (int g = 0; g < s.group; ++g) {
      const double* q = &c.q[size_t((row * c.heads_q() + h * s.group + g) * s.dim)];
      cmp.push_back(attend_reference(c.cmp, b, h, q, c.scale(), key_range(0, visible - 1)));
      for (int i = 0; i < visible; ++i) {
        double& x = shared[size_t(i)];
        const double p = cmp.back().p[size_t(i)];
        if (s.reduce == GroupReduce::kSum) x += p;
        if (s.reduce == GroupReduce::kMax) x = std::max(x, p);
        if (s.reduce == GroupReduce::kFirstHead && g == 0) x = p;
      }
    }
    for (int k = 0; k < blocks; ++k)
      for (int m = 0; m < per_block; ++m)
        for (int n = 0; n < overlap; ++n) {
          const int i = per_block * k + m - n;
          if (i >= 0 && i < visible) score[size_t(k)] += shared[size_t(i)];
        }
    Errors& e = errors[size_t(item)];
    const int32_t* idx = &topk[size_t((h * c.total_q() + row) * s.topk)];
    e.selection = count_wrong_selection(s, score, blocks, t / s.block, idx);
    for (int g = 0; g < s.group; ++g) {
      const int64_t head = h * s.group + g, at = row * c.heads_q() + head;
      const double* q = &c.q[size_t(at * s.dim)];
      const auto sel =
          attend_reference(c.cache, b, h, q, c.scale(), selected_keys(s, idx, t, total));
      const auto win = attend_reference(c.cache, b, h, q, c.scale(),
                                        key_range(t - s.window, std::min(t, total - 1)));
      double gate[3];
      for (int i = 0; i < 3; ++i) {
        const double x =
            c.gates[size_t((row * c.heads_q() + (s.gates_per_head ? head : 0)) * 3 + i)];
        gate[i] = s.has_sigmoid ? sigmoid(x) : x;
      }
      for (int d = 0; d < s.dim_v; ++d) {
        const size_t i = size_t(d);
        const double want = gate[0] * cmp[size_t(g)].o[i] + gate[1] * sel.o[i] + gate[2] * win.o[i];
        const double weight = std::fabs(gate[0]) * cmp[size_t(g)].weight[i] +
                              std::fabs(gate[1]) * sel.weight[i] +
                              std::fabs(gate[2]) * win.weight[i];
        e.check(from_bits(s.dtype, o[size_t(at * s.dim_v + d)]), want,
                tolerance(s.dtype, want, weight));
      }
    }
  });
  Errors sum;
  for (const Errors& e : errors) {
    sum.output += e.output;
    sum.selection += e.selection;
    sum.worst = std::max(sum.worst, e.worst);
  }
  return sum;
}

}  // namespace fsattn::test
