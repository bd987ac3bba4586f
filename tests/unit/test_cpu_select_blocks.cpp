// The CPU block selection against plain fp64 loops over (window, block) overlaps.
#include <algorithm>
#include <string>

#include "cpu/attention.h"
#include "cpu/select_blocks.h"
#include "support/attn_case.h"
#include "support/test.h"
#include "support/threads.h"

using namespace fsattn;
using namespace fsattn::test;

namespace {

struct Options {
  int64_t l = 32, d = 16, block_size = 64, topk = 4, init_blocks = 1, local_blocks = 2;
  GroupReduce reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
};

int64_t windows_in(const Options& options, int64_t length) {
  return length < options.l ? 0 : (length - options.l) / options.d + 1;
}

CompressedMask mask_of(const AttnCase& c, const Options& options) {
  return {c.cu_keys.data(), c.k.tokens, options.l, options.d};
}

std::vector<int32_t> select(AttnCase& c, const Options& options, int threads = 2) {
  const auto fill_in = [&](Op op) {
    Problem problem = c.problem(op, Pass::kFwd);
    problem.kernel_size = options.l, problem.kernel_stride = options.d;
    problem.block_size = options.block_size, problem.topk = options.topk;
    return problem;
  };
  Workspace attn_space(fill_in(Op::kCompressedAttn), threads);
  cpu::compressed_attn_fwd(0, {c.fwd(), mask_of(c, options), 0, attn_space.scratch()}, nullptr);
  const auto count = static_cast<size_t>(c.shape.num_heads_kv * c.packing.total_q * options.topk);
  std::vector<int32_t> idx(count + 1, 12345);
  Workspace space(fill_in(Op::kSelectBlocks), threads);
  cpu::select_blocks(
      0,
      {c.packing, c.shape, c.q.rows(), c.k.rows(), c.stats(c.lse), mask_of(c, options),
       options.block_size, options.topk, options.init_blocks, options.local_blocks, options.reduce,
       options.score_dtype, idx.data(), space.scratch()},
      nullptr);
  EXPECT_TRUE(space.guard_intact());
  EXPECT_EQ(idx.back(), 12345);
  idx.pop_back();
  return idx;
}

// Scores of every block of one (query, KV head), from the definition: tokens that a window and a block
// share, over d.
std::vector<double> block_scores(const AttnCase& c, const Options& options, int64_t seq,
                                 int64_t token, int64_t head_kv) {
  const auto b = static_cast<size_t>(seq);
  const int64_t group = c.shape.group_size(), num_windows = c.cu_keys[b + 1] - c.cu_keys[b];
  const int64_t blocks = (c.sizes.seqlens_k[b] + options.block_size - 1) / options.block_size;
  const Visible visible = [&](int64_t, int64_t, int64_t, int64_t t, int64_t i) {
    return t >= i * options.d + options.l - 1;
  };
  std::vector<double> joint(static_cast<size_t>(num_windows), 0);
  for (int64_t g = 0; g < group; ++g) {
    const std::vector<double> s = scores_of<double>(c, visible, seq, token, head_kv * group + g);
    double sum = 0;
    for (const double x : s) sum += std::exp(x);
    for (size_t i = 0; i < s.size() && sum > 0; ++i) {
      const double p = std::exp(s[i]) / sum;
      if (options.reduce == GroupReduce::kSum) joint[i] += p;
      if (options.reduce == GroupReduce::kMax) joint[i] = std::max(joint[i], p);
      if (options.reduce == GroupReduce::kFirstHead && g == 0) joint[i] = p;
    }
  }
  std::vector<double> scores(static_cast<size_t>(blocks), 0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < num_windows; ++i) {
      const int64_t begin = std::max(i * options.d, block * options.block_size);
      const int64_t end = std::min(i * options.d + options.l, (block + 1) * options.block_size);
      if (begin >= end) continue;
      scores[static_cast<size_t>(block)] += joint[static_cast<size_t>(i)] *
                                            static_cast<double>(end - begin) /
                                            static_cast<double>(options.d);
    }
  }
  return scores;
}

// What one row must be. Of two candidates whose scores differ by less than `slack` (relative) either
// may be chosen, so the chosen set is checked against its own smallest score.
void check_row(const AttnCase& c, const Options& options, int64_t seq, int64_t token,
               int64_t head_kv, const int32_t* row) {
  const auto b = static_cast<size_t>(seq);
  const int64_t position = token - c.cu_q[b] + c.offset(seq);
  const int64_t blocks = (c.sizes.seqlens_k[b] + options.block_size - 1) / options.block_size;
  const int64_t own = position < 0 ? -1 : position / options.block_size;
  const int64_t last = std::min(own, blocks - 1);
  const int64_t filled = std::min(options.topk, last + 1);
  for (int64_t n = 0; n < options.topk; ++n) {
    EXPECT_EQ(row[n] >= 0, n < filled);
    if (n > 0 && n < filled) EXPECT_TRUE(row[n - 1] < row[n]);
  }
  if (filled > 0) EXPECT_TRUE(row[filled - 1] <= last);
  const auto is_forced = [&](int64_t x) {
    return x < options.init_blocks || x > own - options.local_blocks;
  };
  const auto is_chosen = [&](int64_t x) {
    return std::find(row, row + filled, static_cast<int32_t>(x)) != row + filled;
  };
  const double slack = options.score_dtype == ScoreDType::kBFloat16 ? 0x1.02p-7
                       : c.sizes.dtype == DType::kFloat64           ? 1e-12
                                                                    : 1e-5;
  const std::vector<double> scores = block_scores(c, options, seq, token, head_kv);
  for (int64_t x = 0; x <= last; ++x) {
    if (is_forced(x)) EXPECT_TRUE(is_chosen(x));
    if (is_forced(x) || is_chosen(x)) continue;
    for (int64_t n = 0; n < filled; ++n) {
      if (is_forced(row[n])) continue;
      const double chosen = scores[static_cast<size_t>(row[n])];
      EXPECT_TRUE(chosen >= scores[static_cast<size_t>(x)] * (1 - slack) - 1e-30);
    }
  }
}

void check(const Sizes& sizes, const Options& options) {
  AttnCase c(
      sizes, [&](int64_t length) { return windows_in(options, length); }, 3);
  const std::vector<int32_t> idx = select(c, options);
  for (int64_t seq = 0; seq < c.packing.batch; ++seq) {
    const auto b = static_cast<size_t>(seq);
    for (int64_t token = c.cu_q[b]; token < c.cu_q[b + 1]; ++token) {
      for (int64_t head = 0; head < c.shape.num_heads_kv; ++head) {
        check_row(c, options, seq, token, head,
                  idx.data() + (head * c.packing.total_q + token) * options.topk);
      }
    }
  }
}

const std::vector<int64_t> kLengthsQ{0, 1, 90, 30, 400}, kLengthsK{40, 1, 90, 600, 400};

}  // namespace

TEST(dtypes) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    check({dtype, 4, 2, 32, 32, kLengthsQ, kLengthsK, {}}, {});
  }
}

TEST(overlaps) {
  const int64_t shapes[][3] = {
      {16,  16, 16 },
      {32,  16, 32 },
      {64,  16, 32 },
      {128, 32, 32 },
      {32,  32, 64 },
      {32,  16, 128},
      {24,  8,  16 },
      {16,  4,  256}
  };
  for (const auto& [l, d, block_size] : shapes) {
    Options options{l, d, block_size};
    check(
        {
            DType::kFloat64, 2, 1, 16, 16, {300,  20},
                 {300,    200},
                 {      }
    },
        options);
  }
}

TEST(group_reductions_and_score_rounding) {
  for (const GroupReduce reduce : {GroupReduce::kSum, GroupReduce::kMax, GroupReduce::kFirstHead}) {
    for (const ScoreDType score_dtype : {ScoreDType::kFloat32, ScoreDType::kBFloat16}) {
      Options options{16, 8, 16, 6, 1, 2, reduce, score_dtype};
      check({DType::kFloat32, 6, 2, 24, 24, {260}, {260}, {}}, options);
    }
  }
}

TEST(forced_blocks) {
  const int64_t forced[][2] = {
      {0, 0},
      {0, 1},
      {3, 0},
      {1, 1},
      {2, 2},
      {5, 0},
      {0, 5}
  };
  for (const auto& [init_blocks, local_blocks] : forced) {
    Options options{16, 16, 16, 5, init_blocks, local_blocks};
    check({DType::kFloat32, 2, 1, 16, 16, {200}, {200}, {}}, options);
  }
}

TEST(ties_go_to_the_lowest_block) {
  AttnCase c({DType::kFloat32, 2, 1, 16, 16, {320}, {320}, {}}, [](int64_t length) {
    return windows_in({16, 16}, length);
  });
  c.k.fill(0);  // every visible window is as likely as every other
  const std::vector<int32_t> idx = select(c, {16, 16, 16, 4, 0, 1});
  const int32_t* last = idx.data() + 319 * 4;
  EXPECT_TRUE(std::vector<int32_t>(last, last + 4) == (std::vector<int32_t>{0, 1, 2, 19}));
}

TEST(offsets) {
  for (const int32_t offset : {-100, -3, 0, 50, 5000}) {
    check(
        {
            DType::kFloat32, 2, 1, 16, 16, {60,     5     },
                 {130,    0     },
                 {offset, offset}
    },
        {16, 16, 16});
  }
}

TEST(any_number_of_threads_gives_the_same_rows) {
  const Sizes sizes{DType::kFloat32, 4, 2, 32, 32, kLengthsQ, kLengthsK, {}};
  const auto run = [&](int threads) {
    const ThreadScope scope(threads);
    AttnCase c(sizes, [](int64_t length) { return windows_in({}, length); });
    return select(c, {}, threads);
  };
  const std::vector<int32_t> one = run(1);
  EXPECT_TRUE(one == run(2));
  EXPECT_TRUE(one == run(5));
}

FSATTN_TEST_MAIN()
