// The CPU block index against its definition: for each slot, all (query, position) pairs in order.
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/block_index.h"
#include "plan/cpu_workspace.h"
#include "support/test.h"
#include "support/threads.h"

namespace {

using fsattn::BlockIndexParams;
using Ints = std::vector<int32_t>;

struct Input {
  Ints lengths_q, lengths_k, q_offset;
  int64_t heads, topk, block_size;
  Ints topk_idx;
  Ints cu_q{0}, cu_k{0};

  int64_t batch() const { return static_cast<int64_t>(lengths_q.size()); }
  int64_t total_q() const { return cu_q.back(); }
  int64_t num_slots() const { return cu_k.back() / block_size + batch(); }
};

Input make_input(Ints lengths_q, Ints lengths_k, int64_t heads, int64_t topk, int64_t block_size) {
  Input in{lengths_q, lengths_k, {}, heads, topk, block_size, {}};
  for (size_t i = 0; i < lengths_q.size(); ++i) {
    in.cu_q.push_back(in.cu_q.back() + lengths_q[i]);
    in.cu_k.push_back(in.cu_k.back() + lengths_k[i]);
  }
  std::mt19937 rng(7);
  std::uniform_int_distribution<int32_t> pick(-2, 12);
  in.topk_idx.resize(static_cast<size_t>(heads * in.total_q() * topk));
  for (int32_t& id : in.topk_idx) id = pick(rng);  // repeated, unsorted, out of range
  return in;
}

struct Index {
  Ints start, entry;
  bool operator==(const Index&) const = default;
};

Index run(const Input& in, int threads) {
  Index out{Ints(static_cast<size_t>(in.heads * (in.num_slots() + 1)), -7),
            Ints(in.topk_idx.size(), -7)};
  std::vector<char> scratch(fsattn::cpu_index_counts_bytes(in.heads, in.total_q(), in.num_slots()) +
                            1);
  const int32_t* offset = in.q_offset.empty() ? nullptr : in.q_offset.data();
  BlockIndexParams params{};
  params.packing = {in.batch(),   in.cu_q.data(), in.cu_k.data(), offset,
                    in.total_q(), in.cu_k.back(), in.total_q(),   in.cu_k.back()};
  params.num_heads_kv = in.heads;
  params.mask = {
      in.topk_idx.data(),
      in.total_q() * in.topk,
      in.topk,
      in.topk,
      in.block_size,
      {out.start.data(), out.entry.data(), in.num_slots()}
  };
  params.scratch = {scratch.data(), scratch.size()};
  const fsattn::test::ThreadScope scope(threads);
  fsattn::cpu::block_index(0, params, nullptr);
  return out;
}

bool wants(const Input& in, int64_t head, size_t seq, int64_t token, int64_t place, int64_t block) {
  const int32_t* row = in.topk_idx.data() + (head * in.total_q() + token) * in.topk;
  if (row[place] != block) return false;
  for (int64_t i = 0; i < place; ++i) {
    if (row[i] == block) return false;
  }
  const int64_t offset =
      in.q_offset.empty() ? in.lengths_k[seq] - in.lengths_q[seq] : in.q_offset[seq];
  return block * in.block_size <= token - in.cu_q[seq] + offset;
}

Index naive(const Input& in) {
  Index out;
  for (int64_t head = 0; head < in.heads; ++head) {
    std::vector<Ints> slots(static_cast<size_t>(in.num_slots()));
    for (size_t seq = 0; seq < in.lengths_q.size(); ++seq) {
      for (int64_t block = 0; block * in.block_size < in.lengths_k[seq]; ++block) {
        const int64_t slot = in.cu_k[seq] / in.block_size + static_cast<int64_t>(seq) + block;
        for (int64_t token = in.cu_q[seq]; token < in.cu_q[seq + 1]; ++token) {
          for (int64_t place = 0; place < in.topk; ++place) {
            if (!wants(in, head, seq, token, place, block)) continue;
            slots[static_cast<size_t>(slot)].push_back(
                static_cast<int32_t>(token * in.topk + place));
          }
        }
      }
    }
    Ints entries;
    for (const Ints& slot : slots) {
      out.start.push_back(static_cast<int32_t>(entries.size()));
      entries.insert(entries.end(), slot.begin(), slot.end());
    }
    out.start.push_back(static_cast<int32_t>(entries.size()));
    entries.resize(static_cast<size_t>(in.total_q() * in.topk), -1);
    out.entry.insert(out.entry.end(), entries.begin(), entries.end());
  }
  return out;
}

void expect_matches_naive(const Input& in) {
  const Index expected = naive(in);
  for (const int threads : {1, 2, 3}) EXPECT_TRUE(run(in, threads) == expected);
}

}  // namespace

TEST(one_sequence) { expect_matches_naive(make_input({300}, {300}, 2, 5, 32)); }

TEST(packed_sequences_with_empty_ones) {
  expect_matches_naive(make_input({0, 1, 70, 0, 33, 64}, {0, 1, 70, 0, 33, 64}, 3, 4, 16));
}

TEST(fewer_queries_than_keys) {
  expect_matches_naive(make_input({1, 20, 5}, {200, 70, 5}, 2, 6, 16));
}

TEST(more_queries_than_keys) { expect_matches_naive(make_input({40}, {17}, 1, 6, 16)); }

TEST(given_offsets) {
  Input in = make_input({50, 40, 30}, {100, 40, 90}, 2, 6, 16);
  in.q_offset = {-20, 500, 13};
  expect_matches_naive(in);
}

// More than 2048 tokens: several chunks a head, their borders inside sequences.
TEST(several_chunks) {
  expect_matches_naive(make_input({1500, 3, 1700}, {1500, 3, 1700}, 2, 3, 64));
}

TEST(hostile_ids) {
  Input in = make_input({100}, {100}, 1, 4, 16);
  for (size_t i = 0; i < in.topk_idx.size(); i += 3) in.topk_idx[i] = INT32_MIN;
  for (size_t i = 1; i < in.topk_idx.size(); i += 3) in.topk_idx[i] = INT32_MAX;
  expect_matches_naive(in);
}

TEST(no_queries) { expect_matches_naive(make_input({0}, {64}, 2, 4, 16)); }

FSATTN_TEST_MAIN()
