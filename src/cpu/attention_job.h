// What the attention passes and the block selection share: the cut of a call into tasks, the scratch
// memory, and keys that are converted once for many query tiles.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/dtype.h"
#include "cpu/attention_mask.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "params/attention.h"

namespace fsattn::cpu {

inline char* element(const Rows& rows, DType dtype, int64_t token, int64_t head) {
  const int64_t idx = token * rows.token_stride + head * rows.head_stride;
  return static_cast<char*>(rows.data) + idx * static_cast<int64_t>(size_of(dtype));
}

template <class Real>
Real* statistic(const Stats& stats, int64_t head, int64_t token) {
  return static_cast<Real*>(stats.data) + head * stats.head_stride + token;
}

inline int64_t row_pitch(int64_t head_dim) { return round_up(head_dim, kPitch); }

// Tasks of one sequence after the other: tasks start[seq] .. start[seq + 1] - 1 belong to seq.
struct TaskTable {
  int64_t* start;
  int64_t batch;

  int64_t size() const { return start[batch]; }
  int64_t sequence_of(int64_t task) const {
    return std::upper_bound(start, start + batch + 1, task) - start - 1;
  }
};

// num_tasks(sequence idx) says how many tasks a sequence has.
template <class NumTasks>
TaskTable make_task_table(ScratchArena& arena, int64_t batch, NumTasks num_tasks) {
  TaskTable table{arena.take<int64_t>(batch + 1), batch};
  table.start[0] = 0;
  for (int64_t seq = 0; seq < batch; ++seq) {
    table.start[seq + 1] = table.start[seq] + num_tasks(seq);
  }
  return table;
}

// Queries of one sequence and KV head that are worked on together; their rows are (query, head of the
// group), query-major.
struct QueryTile {
  SequenceView seq;
  int64_t head;
  int64_t first_query, num_queries;

  int64_t token(int64_t i) const { return seq.query_begin + first_query + i; }
};

// 2^-n with n = ceil(log2(count)) + 1: a sum of `count` numbers times this cannot overflow, and a power of
// two loses nothing (but bits below 2^(n - 126) in fp32).
template <class Real>
Real sum_factor(int64_t count) {
  const auto bits =
      static_cast<int>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(count, 1) - 1)));
  return std::ldexp(Real{1}, -bits - 1);
}

// Loads the group's rows of every query of the tile times factor: [num_queries * group, pitch].
template <class Real>
void load_query_rows(const TileOps<Real>& ops, const AttnShape& shape, const Rows& rows,
                     const QueryTile& tile, int64_t cols, Real factor, Real* to) {
  const int64_t group = shape.group_size(), pitch = row_pitch(cols);
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    const char* from = element(rows, shape.dtype, tile.token(i), tile.head * group);
    ops.load(from, rows.head_stride, group, cols, factor, to + i * group * pitch, pitch);
  }
}

// What a panel of up to 64 keys holds. k_t [D, kTileKeys]; v [kTileKeys, pitch of Dv];
// v_t [Dv, kTileKeys]; k [kTileKeys, pitch of D].
template <class Real>
struct Panel {
  const Real *k_t, *v, *v_t, *k;
};

enum class PanelKind : int {
  kFwd,     // k_t, v
  kBwd,     // k_t, v_t, k
  kSelect,  // k_t
};

// The keys and values of a call in the compute type.
template <class Real>
struct PanelSource {
  const TileOps<Real>* ops;
  AttnShape shape;
  Rows k, v;
  PanelKind kind;

  // V is multiplied by this, so that sums over V do not overflow where their result does not: forward
  // P V before it is divided by the sum of P, backward dO V^T with |dO| <= 1.
  Real v_factor(const SequenceView& seq) const {
    return sum_factor<Real>(kind == PanelKind::kFwd ? seq.num_keys : shape.head_dim_v);
  }

  void fill(const SequenceView& seq, int64_t head, int64_t key, int64_t width, Real* to) const {
    const char* k_rows = element(k, shape.dtype, seq.key_begin + key, head);
    ops->load_transposed(k_rows, k.token_stride, width, shape.head_dim, Real{1}, to);
    if (kind == PanelKind::kSelect) return;
    Real* behind_k = to + shape.head_dim * kTileKeys;
    const char* v_rows = element(v, shape.dtype, seq.key_begin + key, head);
    const Real factor = v_factor(seq);
    if (kind == PanelKind::kFwd) {
      ops->load(v_rows, v.token_stride, width, shape.head_dim_v, factor, behind_k,
                row_pitch(shape.head_dim_v));
      return;
    }
    ops->load_transposed(v_rows, v.token_stride, width, shape.head_dim_v, factor, behind_k);
    ops->load(k_rows, k.token_stride, width, shape.head_dim, Real{1},
              behind_k + shape.head_dim_v * kTileKeys, row_pitch(shape.head_dim));
  }

  // The panel's parts from key `skip` on.
  Panel<Real> view(const Real* panel, int64_t skip) const {
    const Real* behind_k = panel + shape.head_dim * kTileKeys;
    const Real* behind_v = behind_k + shape.head_dim_v * kTileKeys;
    return {panel + skip, behind_k + skip * row_pitch(shape.head_dim_v), behind_k + skip,
            behind_v + skip * row_pitch(shape.head_dim)};
  }
};

// One call: its tasks and its scratch memory.
template <class Mask, class Real>
class AttnJob {
 public:
  AttnJob(const Packing& packing, const Mask& mask, const PanelSource<Real>& source,
          const CpuAttnLayout& layout, const Scratch& scratch)
      : packing_(packing),
        mask_(mask),
        source_(source),
        layout_(layout),
        arena_(scratch.data, scratch.bytes),
        query_tiles_(make_task_table(
            arena_, packing.batch,
            [&](int64_t seq) { return ceil_div(sequence(seq).num_queries, layout.tile_queries); })),
        panels_(make_task_table(arena_, packing.batch,
                                [&, left = layout.max_panels](int64_t seq) mutable {
                                  const int64_t num_panels = num_panels_of(seq, left);
                                  left -= num_panels;
                                  return num_panels;
                                })) {
    panel_data_ = arena_.take<Real>(layout.heads_in_flight * layout.max_panels * layout.panel_size);
  }

  SequenceView sequence(int64_t seq) const { return sequence_view(packing_, mask_, seq); }
  const Mask& mask() const { return mask_; }
  const PanelSource<Real>& source() const { return source_; }
  const CpuAttnLayout& layout() const { return layout_; }
  ScratchArena& arena() { return arena_; }

  int num_threads() const {
    const size_t affordable = arena_.left() / layout_.thread;
    FSATTN_ASSERT(affordable > 0);
    return static_cast<int>(std::min<size_t>(affordable, static_cast<size_t>(num_cpu_threads())));
  }
  ScratchArena thread_arena(int thread) const {
    return {arena_.rest() + static_cast<size_t>(thread) * layout_.thread, layout_.thread};
  }

  // Calls f(query tile, thread) for every tile of every KV head. The keys of a few heads at a time are
  // converted before their tiles run.
  template <class F>
  void for_each_query_tile(const F& f) {
    const int64_t num_heads = source_.shape.num_heads_kv, num_tiles = query_tiles_.size();
    for (int64_t head = 0; head < num_heads; head += layout_.heads_in_flight) {
      const int64_t count = std::min(layout_.heads_in_flight, num_heads - head);
      fill_panels(head, count);
      parallel_for(count * num_tiles, num_threads(), Schedule::kDynamic,
                   [&](int64_t task, int thread) {
                     f(query_tile(task % num_tiles, head + task / num_tiles), thread);
                   });
    }
  }

  // Keys key .. key + width - 1 (in one panel) of the tile's sequence and head; local holds a panel of
  // its own for sequences that are not converted ahead.
  Panel<Real> panel(const QueryTile& tile, int64_t key, int64_t width, Real* local) const {
    const int64_t seq = tile.seq.idx;
    if (panels_.start[seq + 1] == panels_.start[seq]) {
      source_.fill(tile.seq, tile.head, key, width, local);
      return source_.view(local, 0);
    }
    const int64_t idx = panels_.start[seq] + key / kTileKeys;
    return source_.view(panel_at(tile.head % layout_.heads_in_flight, idx), key % kTileKeys);
  }

 private:
  // Panels of a sequence that is converted ahead, else 0.
  int64_t num_panels_of(int64_t seq, int64_t left) const {
    const SequenceView view = sequence(seq);
    const int64_t tiles = ceil_div(view.num_queries, layout_.tile_queries);
    const int64_t panels = ceil_div(view.num_keys, kTileKeys);
    return tiles >= kCpuMinTilesForPanels && panels <= left ? panels : 0;
  }

  QueryTile query_tile(int64_t tile, int64_t head) const {
    const int64_t seq = query_tiles_.sequence_of(tile);
    const SequenceView view = sequence(seq);
    const int64_t first = (tile - query_tiles_.start[seq]) * layout_.tile_queries;
    return {view, head, first, std::min(layout_.tile_queries, view.num_queries - first)};
  }

  Real* panel_at(int64_t head_in_flight, int64_t panel) const {
    return panel_data_ + (head_in_flight * layout_.max_panels + panel) * layout_.panel_size;
  }

  void fill_panels(int64_t first_head, int64_t num_heads) const {
    const int64_t num_panels = panels_.size();
    parallel_for(num_heads * num_panels, num_threads(), Schedule::kStatic, [&](int64_t task, int) {
      const int64_t head = task / num_panels, panel = task % num_panels;
      const int64_t seq = panels_.sequence_of(panel);
      fill_panel(sequence(seq), first_head + head, panel - panels_.start[seq],
                 panel_at(head, panel));
    });
  }

  // Panels that no query sees stay as they are: the window of a chunk is short in a long sequence.
  void fill_panel(const SequenceView& seq, int64_t head, int64_t panel, Real* to) const {
    const int64_t key = panel * kTileKeys;
    const int64_t begin = visible_range(mask_, seq, seq.offset).begin;
    const int64_t end = visible_range(mask_, seq, seq.offset + seq.num_queries - 1).end;
    if (key >= end || key + kTileKeys <= begin) return;
    source_.fill(seq, head, key, std::min(kTileKeys, seq.num_keys - key), to);
  }

  Packing packing_;
  Mask mask_;
  PanelSource<Real> source_;
  CpuAttnLayout layout_;
  ScratchArena arena_;
  TaskTable query_tiles_, panels_;
  Real* panel_data_;
};

// What the layout of the scratch memory is made from; num_slots is the caller's to set.
template <class Real>
CpuAttnDims attn_dims(Op op, Pass pass, const Packing& packing, const AttnShape& shape) {
  CpuAttnDims dims;
  dims.op = op;
  dims.pass = pass;
  dims.real_bytes = sizeof(Real);
  dims.batch = packing.batch;
  dims.total_q = packing.total_q;
  dims.max_q = packing.max_q;
  dims.total_keys = packing.total_k;
  dims.num_heads_q = shape.num_heads_q;
  dims.num_heads_kv = shape.num_heads_kv;
  dims.head_dim = shape.head_dim;
  dims.head_dim_v = shape.head_dim_v;
  return dims;
}

// Adds what a mask knows.
inline void add_mask(CpuAttnDims&, const WindowMask&) {}
inline void add_mask(CpuAttnDims& dims, const CompressedMask& mask) {
  dims.total_keys /= mask.kernel_stride;
}
inline void add_mask(CpuAttnDims& dims, const SelectedMask& mask) {
  dims.topk = mask.topk;
  dims.block_size = mask.block_size;
}

template <class Mask>
constexpr Op kOpOf = Op::kWindowAttn;
template <>
inline constexpr Op kOpOf<CompressedMask> = Op::kCompressedAttn;
template <>
inline constexpr Op kOpOf<SelectedMask> = Op::kSelectedAttn;

// Scratch memory of the rows of topk_idx that a tile sorts.
template <class Mask>
int32_t* take_rows(ScratchArena&, const CpuAttnLayout&, const Mask&) {
  return nullptr;
}
inline int32_t* take_rows(ScratchArena& arena, const CpuAttnLayout& layout,
                          const SelectedMask& mask) {
  return arena.take<int32_t>(layout.tile_queries * mask.topk);
}

}  // namespace fsattn::cpu
