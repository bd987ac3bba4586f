// What a query sees. For all three masks the keys of a tile that one query sees are one range, so that
// the kernels know ranges alone:
//     compressed  [0, V(t))         V(t): windows that end at or before t
//     window      [t - w, t]
//     selected    block b of the query's row, cut at t, one block after the other
// all clipped to the keys of the sequence. Tiles start at multiples of 64 keys (or of the block, if it is
// shorter) of the sequence: the sums of a query do not depend on the queries that share its tile.
#pragma once
#include <algorithm>
#include <cstdint>

#include "base/math.h"
#include "cpu/tile.h"
#include "params/attention.h"

namespace fsattn::cpu {

// Where one sequence lies. Query i is token query_begin + i and stands at position i + offset; key j is
// row key_begin + j of k and v.
struct SequenceView {
  int64_t idx;
  int64_t query_begin, num_queries;
  int64_t offset;
  int64_t key_begin, num_keys;
};

template <class Mask>
SequenceView sequence_view(const Packing& packing, const Mask&, int64_t seq) {
  const int64_t num_queries = packing.cu_q[seq + 1] - packing.cu_q[seq];
  const int64_t num_keys = packing.cu_k[seq + 1] - packing.cu_k[seq];
  const int64_t offset =
      packing.q_offset != nullptr ? packing.q_offset[seq] : num_keys - num_queries;
  return {seq, packing.cu_q[seq], num_queries, offset, packing.cu_k[seq], num_keys};
}

inline SequenceView sequence_view(const Packing& packing, const CompressedMask& mask, int64_t seq) {
  SequenceView view = sequence_view(packing, WindowMask{}, seq);
  const int64_t complete = num_windows(view.num_keys, mask.kernel_size, mask.kernel_stride);
  view.key_begin = mask.cu_cmp[seq];
  view.num_keys = std::min<int64_t>(mask.cu_cmp[seq + 1] - mask.cu_cmp[seq], complete);
  return view;
}

// Keys begin .. end - 1; empty if end <= begin.
struct KeyRange {
  int64_t begin, end;
};

inline KeyRange visible_range(const CompressedMask& mask, const SequenceView& seq,
                              int64_t position) {
  const int64_t visible = num_visible_windows(position, mask.kernel_size, mask.kernel_stride);
  return {0, std::min(visible, seq.num_keys)};
}

inline KeyRange visible_range(const WindowMask& mask, const SequenceView& seq, int64_t position) {
  return {std::max<int64_t>(position - mask.window_size, 0), std::min(position + 1, seq.num_keys)};
}

// The keys that a row of topk_idx may name.
inline KeyRange visible_range(const SelectedMask&, const SequenceView& seq, int64_t position) {
  return {0, std::min(position + 1, seq.num_keys)};
}

template <class Mask>
int64_t tile_keys(const Mask&) {
  return kTileKeys;
}
inline int64_t tile_keys(const SelectedMask& mask) { return std::min(mask.block_size, kTileKeys); }

// Walks over the key tiles that the queries of a tile see, in ascending order.
template <class Mask>
class KeyTiles {
 public:
  KeyTiles(const Mask& mask, const SequenceView& seq, int64_t /*head*/, int64_t first_query,
           int64_t num_queries, int32_t* /*rows*/)
      : num_queries_(num_queries), num_keys_(seq.num_keys), next_key_(seq.num_keys) {
    for (int64_t i = 0; i < num_queries; ++i) {
      ranges_[i] = visible_range(mask, seq, first_query + i + seq.offset);
      if (ranges_[i].begin >= ranges_[i].end) continue;
      next_key_ = std::min(next_key_, ranges_[i].begin / kTileKeys * kTileKeys);
      end_ = std::max(end_, ranges_[i].end);
    }
  }

  // False when there is no further tile.
  bool next() {
    if (next_key_ >= end_) return false;
    key_ = next_key_;
    next_key_ += kTileKeys;
    for (int64_t i = 0; i < num_queries_; ++i) {
      const int64_t first = std::max<int64_t>(ranges_[i].begin - key_, 0);
      const int64_t last = std::min(ranges_[i].end - key_, width());
      first_[i] = static_cast<int32_t>(first < last ? first : 0);
      last_[i] = static_cast<int32_t>(first < last ? last : 0);
    }
    return true;
  }

  int64_t key() const { return key_; }  // the tile's first key
  int64_t width() const { return std::min(kTileKeys, num_keys_ - key_); }
  int64_t num_queries() const { return num_queries_; }
  // Query i sees the keys key() + first()[i] .. key() + last()[i] - 1; none if both are 0.
  const int32_t* first() const { return first_; }
  const int32_t* last() const { return last_; }

 private:
  int64_t num_queries_, num_keys_;
  int64_t key_ = 0, next_key_, end_ = 0;
  KeyRange ranges_[kTileRows];
  int32_t first_[kTileRows], last_[kTileRows];
};

// Writes the distinct ids of a row that lie in [0, num_blocks), ascending; returns their number.
inline int64_t sort_row(const int32_t* row, int64_t topk, int64_t num_blocks, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < topk; ++i) {
    const int32_t block = row[i];
    if (block < 0 || block >= num_blocks) continue;
    // Rows are usually ascending, so that the search from the end stops at once.
    int64_t place = count;
    while (place > 0 && out[place - 1] > block) --place;
    if (place > 0 && out[place - 1] == block) continue;
    std::copy_backward(out + place, out + count, out + count + 1);
    out[place] = block;
    ++count;
  }
  return count;
}

// Merges the sorted rows of the queries: a block that several of them want is one tile.
template <>
class KeyTiles<SelectedMask> {
 public:
  // rows: num_queries * topk numbers of scratch memory.
  KeyTiles(const SelectedMask& mask, const SequenceView& seq, int64_t head, int64_t first_query,
           int64_t num_queries, int32_t* rows)
      : mask_(mask),
        num_queries_(num_queries),
        num_keys_(seq.num_keys),
        position_(first_query + seq.offset),
        rows_(rows) {
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t num_visible = visible_range(mask, seq, position_ + i).end;
      const int64_t num_blocks = num_visible <= 0 ? 0 : ceil_div(num_visible, mask.block_size);
      const int32_t* row = mask.topk_idx + head * mask.head_stride +
                           (seq.query_begin + first_query + i) * mask.token_stride;
      end_[i] = i * mask.topk + sort_row(row, mask.topk, num_blocks, rows + i * mask.topk);
      next_[i] = i * mask.topk;
    }
  }

  bool next() {
    key_ += tile_keys(mask_);
    if (key_ >= block_end_ && !next_block()) return false;
    for (int64_t i = 0; i < num_queries_; ++i) {
      const int64_t last = std::min(position_ + i + 1 - key_, width());
      last_[i] = static_cast<int32_t>(is_wanted_[i] && last > 0 ? last : 0);
    }
    return true;
  }

  int64_t key() const { return key_; }
  int64_t width() const { return std::min(tile_keys(mask_), block_end_ - key_); }
  int64_t num_queries() const { return num_queries_; }
  const int32_t* first() const { return first_; }
  const int32_t* last() const { return last_; }

 private:
  bool next_block() {
    int32_t block = INT32_MAX;
    for (int64_t i = 0; i < num_queries_; ++i) {
      if (next_[i] < end_[i]) block = std::min(block, rows_[next_[i]]);
    }
    if (block == INT32_MAX) return false;
    for (int64_t i = 0; i < num_queries_; ++i) {
      is_wanted_[i] = next_[i] < end_[i] && rows_[next_[i]] == block;
      next_[i] += is_wanted_[i] ? 1 : 0;
    }
    key_ = block * mask_.block_size;
    block_end_ = std::min(key_ + mask_.block_size, num_keys_);
    return true;
  }

  const SelectedMask& mask_;
  int64_t num_queries_, num_keys_, position_;
  int64_t key_ = 0, block_end_ = 0;
  int32_t* rows_;
  int64_t next_[kTileRows], end_[kTileRows];
  bool is_wanted_[kTileRows];
  int32_t first_[kTileRows] = {};
  int32_t last_[kTileRows];
};

// Calls f(first query, keys) for every maximal run of queries that all see a key of the tile.
template <class Tiles, class F>
void for_each_run(const Tiles& tiles, int64_t group, const F& f) {
  const int32_t *first = tiles.first(), *last = tiles.last();
  for (int64_t i = 0; i < tiles.num_queries();) {
    if (last[i] == 0) {
      ++i;
      continue;
    }
    VisibleKeys keys{0, group, first + i, last + i, first[i], last[i]};
    const int64_t run_begin = i;
    for (; i < tiles.num_queries() && last[i] > 0; ++i) {
      keys.begin = std::min<int64_t>(keys.begin, first[i]);
      keys.end = std::max<int64_t>(keys.end, last[i]);
    }
    keys.num_queries = i - run_begin;
    f(run_begin, keys);
  }
}

}  // namespace fsattn::cpu
