// The fused kernels over a paged cache against their definition in fp64, over the whole table.
#include <set>
#include <string>

#include "cuda/decode/decode.h"
#include "kernels/paged_case.h"
#include "kernels/skip.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

using Case = PagedShapeCase;

// A call of native sparse attention on the device.
struct Call {
  const Case& s;
  std::vector<int> totals, cmps;
  std::vector<int32_t> cu{0};
  int max_q = 0, max_k = 0;
  PagedStore cache, cmp;
  std::vector<double> q, gates;
  DeviceArray<uint16_t> dev_q, dev_gates, dev_o;
  DeviceArray<int32_t> dev_cu, dev_len, dev_topk;
  DeviceArray<float> dev_lse;
  DeviceArray<char> scratch;

  static std::vector<int> all_totals(const Case& s) {
    std::vector<int> x;
    for (size_t b = 0; b < s.len.size(); ++b) x.push_back(s.total(b));
    return x;
  }
  static std::vector<int> all_cmps(const Case& s) {
    std::vector<int> x;
    for (size_t b = 0; b < s.len.size(); ++b) x.push_back(s.num_cmp(b));
    return x;
  }
  static int longest(const Case& s) {
    const auto x = all_totals(s);
    return std::max(s.max_k, *std::max_element(x.begin(), x.end()));
  }

  explicit Call(const Case& c)
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
  }
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
    p.tuning.cmp_split = kDecodeSplit;
    const int64_t max_cmp = num_windows(max_k, s.size, s.stride);
    need_scratch(decode_splits(max_cmp, kDecodeSplit, s.block, s.topk, s.window), max_cmp, true);
    p.scratch = {scratch.data, scratch.size};
    dev_o.poison();
    dev_topk.poison();
    launch_paged_attn(find_decode_row(s.dtype, s.dim, s.dim_v), p, nullptr);
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
double rounding(DType dtype) { return dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048; }

// P is rounded before P V, the output once more; the fp32 statistics add little.
double tolerance(DType dtype, double value, double weight) {
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

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Scores of the blocks that compete and the row that was chosen: is it the best one?
int count_wrong_selection(const Case& s, const std::vector<double>& score, int num_blocks,
                          int query_block, const int32_t* row) {
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

std::vector<int> selected_keys(const Case& s, const int32_t* row, int t, int total) {
  std::set<int> blocks;
  std::vector<int> keys;
  for (int i = 0; i < s.topk; ++i)
    if (row[i] >= 0 && row[i] < (total + s.block - 1) / s.block) blocks.insert(row[i]);
  for (int b : blocks)
    for (int j = b * s.block; j < std::min({(b + 1) * s.block, total, t + 1}); ++j)
      keys.push_back(j);
  return keys;
}

Errors check_attn(const Call& c) {
  const Case& s = c.s;
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

void check(const char* name, const Case& s) {
  Call call(s);
  call.run_attn();
  const Errors e = check_attn(call);
  std::printf("  %-28s worst error %.2f of the tolerance\n", name, e.worst);
  EXPECT_EQ(e.output, 0);
  EXPECT_EQ(e.selection, 0);
  const auto first = call.dev_o.download();
  const auto chosen = call.dev_topk.download();
  call.run_attn();
  EXPECT_TRUE(first == call.dev_o.download());
  EXPECT_TRUE(chosen == call.dev_topk.download());
}

Case ragged() {
  Case s;
  s.len = {0, 1, 31, 32, 63, 64, 700, 2999, 9000};
  s.new_q = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  return s;
}

TEST(ragged_batch) { check("ragged batch", ragged()); }

TEST(hnd_large_pages) {
  Case s = ragged();
  s.is_hnd = true;
  s.page = 256;
  s.cmp_page = 48;
  check("HND, pages of 256 and 48", s);
}

TEST(every_row_of_the_table) {
  for (const DecodeConfig& row : kDecodeTable) {
    Case s;
    s.dtype = row.dtype;
    s.dim = row.head_dim;
    s.dim_v = row.head_dim_v;
    s.len = {5, 1500, 4100};
    s.new_q = {1, 2, 1};
    check("row of the table", s);
    s.dim -= 24;
    s.dim_v -= 8;
    check("smaller head_dim", s);
  }
}

TEST(groups) {
  for (int group : {1, 3, 16, 17, 64}) {
    Case s;
    s.heads_kv = 1;
    s.group = group;
    s.len = {77, 2500};
    s.new_q = {1, 1};
    check(("group of " + std::to_string(group)).c_str(), s);
  }
}

TEST(several_queries) {
  for (int group : {4, 5, 16}) {
    Case s;
    s.group = group;
    s.len = {0, 20, 30, 1000, 3333};
    s.new_q = {8, 0, 3, 8, 5};
    check(("8 queries, group of " + std::to_string(group)).c_str(), s);
  }
}

TEST(geometries) {
  Case s = ragged();
  s.size = 16, s.block = 16, s.topk = 5, s.window = 40, s.page = 16;
  check("16/16/16", s);
  s = ragged();
  s.size = 64, s.stride = 16, s.block = 128, s.page = 128, s.topk = 6, s.window = 0;
  check("64/16/128, window 0", s);
  s = ragged();
  s.size = 32, s.stride = 32, s.block = 256, s.page = 256, s.topk = 9, s.window = 5000;
  check("32/32/256, window 5000", s);
  s = ragged();
  s.size = 8, s.stride = 4, s.block = 16, s.page = 16, s.topk = 128, s.window = 100;
  check("8/4/16, topk 128", s);
}

// Bounds for long sequences: a kernel of its own scores the blocks, in several steps.
TEST(long_sequences) {
  Case s = ragged();
  s.size = 8, s.stride = 4, s.block = 16, s.page = 16;
  s.heads_kv = 1;
  s.len = {20000, 300, 9};
  s.new_q = {1, 2, 1};
  s.max_k = 40000;
  check("8/4/16, 20000 tokens", s);
  s = ragged();
  s.max_k = 200000;
  check("bounds for 200000 tokens", s);
}

// More work items than CTAs that stay: each takes several in turn.
TEST(more_items_than_ctas) {
  Case s;
  s.heads_kv = 8;
  s.group = 2;
  for (int b = 0; b < 60; ++b) {
    s.len.push_back(40 + b * 23);
    s.new_q.push_back(1);
  }
  check("480 items", s);
  s.len.assign(5, 9000);
  s.new_q.assign(5, 8);
  s.heads_kv = 4;
  s.group = 16;
  s.dim = s.dim_v = 64;
  check("320 items of two splits", s);
}

TEST(selection_options) {
  Case s = ragged();
  s.reduce = GroupReduce::kMax;
  check("max over the group", s);
  s.reduce = GroupReduce::kFirstHead;
  s.score_dtype = ScoreDType::kBFloat16;
  check("first head, bf16 scores", s);
  s.topk = 2;
  s.init = 3;
  check("more forced than topk", s);
  s.topk = 16, s.init = 0, s.local = 0;
  check("nothing forced", s);
}

TEST(gates) {
  Case s = ragged();
  s.has_sigmoid = false;
  s.gates_per_head = false;
  check("gates per token, values", s);
}

TEST(large_logits) {
  Case s = ragged();
  s.logit = 60;
  check("large logits", s);
  s.dtype = DType::kFloat16;
  check("large logits, fp16", s);
}

TEST(bad_pages) {
  Case s = ragged();
  s.has_bad_pages = true;
  check("pages that do not exist", s);
}

// Equal scores: the lowest blocks win.
TEST(ties) {
  Case s = ragged();
  s.logit = 0;
  Call call(s);
  call.run_attn();
  EXPECT_EQ(check_attn(call).output, 0);
  const auto topk = call.dev_topk.download();
  const size_t last = s.len.size() - 1;
  const int query_block = s.len[last] / s.block;
  for (int i = 0; i < s.topk; ++i) {
    const int want = i < s.topk - s.local ? i : query_block - (s.topk - 1 - i);
    EXPECT_EQ(topk[(last)*size_t(s.topk) + size_t(i)], want);
  }
}

// What a sequence gets depends neither on its neighbours nor on the bounds.
TEST(batch_invariance) {
  Case s = ragged();
  s.new_q = {1, 2, 1, 1, 1, 1, 3, 1, 2};
  Call whole(s);
  whole.run_attn();
  const auto want = whole.dev_o.download();
  const int64_t width = whole.heads_q() * s.dim_v;
  for (size_t b : {size_t(6), size_t(8)}) {
    const std::vector<int32_t> len{s.len[b]}, cu{0, s.new_q[b]};
    Case alone = s;
    alone.len = {s.len[b]};
    alone.new_q = {s.new_q[b]};
    Call call(alone);
    // The same cache, tables and queries as in the batch.
    call.cache = PagedStore(s, whole.totals, s.page, whole.max_k, s.seed);
    call.cmp = PagedStore(s, whole.cmps, s.cmp_page,
                          int(num_windows(whole.max_k, s.size, s.stride)), s.seed + 1);
    const auto row_of = [&](PagedStore& store) {
      std::vector<int32_t> row(store.table.begin() + int64_t(b) * store.max_pages,
                               store.table.begin() + int64_t(b + 1) * store.max_pages);
      store.dev_table = DeviceArray<int32_t>(row);
    };
    row_of(call.cache);
    row_of(call.cmp);
    const auto slice = [&](const DeviceArray<uint16_t>& from, int64_t row_width) {
      const auto host = from.download();
      return std::vector<uint16_t>(host.begin() + whole.cu[b] * row_width,
                                   host.begin() + whole.cu[b + 1] * row_width);
    };
    call.dev_q = DeviceArray<uint16_t>(slice(whole.dev_q, whole.heads_q() * s.dim));
    call.dev_gates = DeviceArray<uint16_t>(slice(whole.dev_gates, whole.heads_q() * 3));
    call.run_attn();
    const std::vector<uint16_t> expected(want.begin() + whole.cu[b] * width,
                                         want.begin() + whole.cu[b + 1] * width);
    EXPECT_TRUE(expected == call.dev_o.download());
  }
}

// The caller's own selection: sets with repeated, missing and impossible entries.
TEST(selected_alone) {
  for (int block : {16, 64, 256}) {
    Case s = ragged();
    s.block = block;
    s.page = 256;
    s.topk = 20;
    s.new_q = {1, 2, 1, 1, 8, 1, 1, 2, 1};
    Call c(s);
    std::mt19937 rng(5);
    std::vector<int32_t> topk(size_t(s.heads_kv * c.total_q() * s.topk));
    for (auto& x : topk) x = int32_t(rng() % unsigned(10000 / block + 4)) - 2;
    topk[3] = INT32_MAX;
    topk[4] = INT32_MIN;
    c.run_selected(topk);
    const auto o = c.dev_o.download();
    const auto lse = c.dev_lse.download();
    Errors e;
    for (size_t b = 0; b < s.len.size(); ++b)
      for (int i = 0; i < s.new_q[b]; ++i)
        for (int64_t head = 0; head < c.heads_q(); ++head) {
          const int64_t row = c.cu[b] + i, at = row * c.heads_q() + head;
          const int h = int(head / s.group), t = s.len[b] + i;
          const int32_t* idx = &topk[size_t((h * c.total_q() + row) * s.topk)];
          const auto want = attend_reference(c.cache, b, h, &c.q[size_t(at * s.dim)], c.scale(),
                                             selected_keys(s, idx, t, s.total(b)));
          const double got_lse = lse[size_t(head * c.total_q() + row)];
          if (want.lse == -INFINITY) {
            e.output += got_lse != -INFINITY;
          } else {
            e.check(got_lse, want.lse, 1e-4);
          }
          for (int d = 0; d < s.dim_v; ++d)
            e.check(from_bits(s.dtype, o[size_t(at * s.dim_v + d)]), want.o[size_t(d)],
                    tolerance(s.dtype, want.o[size_t(d)], want.weight[size_t(d)]));
        }
    std::printf("  %-28s worst error %.2f of the tolerance\n", "selected alone", e.worst);
    EXPECT_EQ(e.output, 0);
  }
}

}  // namespace
}  // namespace fsattn::test

int main(int argc, char** argv) {
  if (fsattn::test::is_skipped(argc, argv)) return 0;
  return fsattn::test::run_all(argc, argv);
}
