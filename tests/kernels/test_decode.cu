// The fused kernels over a paged cache against their definition in fp64, over the whole table.
#include "kernels/decode_case.h"
#include "kernels/skip.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

using Case = PagedShapeCase;

void check_call(const char* name, Call& call) {
  call.run_attn();
  const Errors e = check_attn(call);
  std::printf("  %-28s %d%s: worst error %.2f of the tolerance\n", name, call.tuning.finish.ctas,
              call.tuning.finish.is_wide ? " wide" : "", e.worst);
  EXPECT_EQ(e.output, 0);
  EXPECT_EQ(e.selection, 0);
  const auto first = call.dev_o.download();
  const auto chosen = call.dev_topk.download();
  call.run_attn();
  EXPECT_TRUE(first == call.dev_o.download());
  EXPECT_TRUE(chosen == call.dev_topk.download());
}

// Several kernels behind the compressed branch, and the clusters that hold the case.
constexpr DecodeFinish kFinishes[] = {
    {0, false},
    {2, true },
    {8, false},
    {4, false},
    {2, false},
    {8, true }
};

// By several kernels, and by the first `clusters` kinds of clusters that fit.
void check(const char* name, const Case& s, int clusters = 1) {
  Call call(s);
  for (const DecodeFinish& finish : kFinishes) {
    if (finish.ctas > 0 && (clusters == 0 || !has_clusters() || !call.fits(finish))) continue;
    if (finish.ctas > 0) --clusters;
    call.tuning.finish = finish;
    check_call(name, call);
  }
}

Case ragged() {
  Case s;
  s.len = {0, 1, 31, 32, 63, 64, 700, 2999, 9000};
  s.new_q = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  return s;
}

TEST(ragged_batch) { check("ragged batch", ragged(), 5); }

// Long sequences of a batch have larger splits.
TEST(long_splits) {
  Case s = ragged();
  s.size = 8, s.stride = 4, s.block = 16, s.page = 16;
  s.len = {9000, 3000, 6000, 50};
  s.new_q = {1, 1, 2, 1};
  Call call(s);
  call.tuning.cmp_long = 1000;
  check_call("splits of 512 and 1024", call);
  if (!has_clusters()) return;
  call.tuning.finish = {8, false};
  EXPECT_TRUE(call.fits(call.tuning.finish));
  check_call("splits of 512 and 1024", call);
}

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

// One CTA, clusters of CTAs and, for long bounds, several kernels find the same blocks.
TEST(bounds_do_not_change_bits) {
  Case s;
  s.size = 8, s.stride = 4, s.block = 16, s.page = 16;
  s.heads_kv = 1;
  s.group = 6;
  s.len = {20000, 4000, 300, 9};
  s.new_q = {1, 2, 1, 1};
  s.max_k = 40000;
  Call call(s);
  call.run_attn();
  const Errors e = check_attn(call);
  EXPECT_EQ(e.output, 0);
  EXPECT_EQ(e.selection, 0);
  const auto o = call.dev_o.download();
  const auto chosen = call.dev_topk.download();
  for (int max_k : {20001, 30000}) {
    call.max_k = max_k;
    call.run_attn();
    EXPECT_TRUE(o == call.dev_o.download());
    EXPECT_TRUE(chosen == call.dev_topk.download());
  }
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
