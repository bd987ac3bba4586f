#include <cstring>

#include "cpu/attention_bwd.h"

namespace fsattn::cpu {
namespace {

struct KeyTile {
  SequenceView seq;
  int64_t head;
  int64_t key, width;
};

// Queries that may see a key of a tile, ascending: an interval, or entries of the block index.
struct QueryList {
  int64_t begin, end;
  const int32_t* entry = nullptr;
  int64_t topk = 1;

  // Index of the n-th query inside its sequence.
  int64_t query(int64_t n, const SequenceView& seq) const {
    return entry == nullptr ? n : entry[n] / topk - seq.query_begin;
  }
};

template <class Mask, class Real>
struct DkvPass {
  const BwdJob<Mask, Real>& bwd;
  const BlockIndexView& index;

  const AttnBwdTensors& attn() const { return bwd.attn; }
  const AttnShape& shape() const { return bwd.attn.shape; }
  const Mask& mask() const { return bwd.job.mask(); }
  const PanelSource<Real>& source() const { return bwd.job.source(); }
};

template <class Real>
QueryList find_queries(const DkvPass<CompressedMask, Real>& pass, const KeyTile& tile) {
  const int64_t first_position = tile.key * pass.mask().kernel_stride + pass.mask().kernel_size - 1;
  return {std::max<int64_t>(first_position - tile.seq.offset, 0), tile.seq.num_queries};
}

template <class Real>
QueryList find_queries(const DkvPass<WindowMask, Real>& pass, const KeyTile& tile) {
  // The bound keeps the sum from overflowing; no sequence is that long.
  const int64_t window = std::min(pass.mask().window_size, int64_t{1} << 40);
  const int64_t end_position = tile.key + tile.width + window;
  return {std::max<int64_t>(tile.key - tile.seq.offset, 0),
          std::min(end_position - tile.seq.offset, tile.seq.num_queries)};
}

template <class Real>
QueryList find_queries(const DkvPass<SelectedMask, Real>& pass, const KeyTile& tile) {
  const SelectedMask& mask = pass.mask();
  const int64_t slot = first_block_slot(tile.seq.key_begin, tile.seq.idx, mask.block_size) +
                       tile.key / mask.block_size;
  const int64_t num_entries = pass.attn().packing.total_q * mask.topk;
  const int32_t* start = pass.index.start + tile.head * (pass.index.num_slots + 1) + slot;
  // An index that the caller brought is clamped: a wrong one gives wrong gradients, not a crash.
  return {std::clamp<int64_t>(start[0], 0, num_entries),
          std::clamp<int64_t>(start[1], 0, num_entries), pass.index.entry + tile.head * num_entries,
          mask.topk};
}

// Up to a tile's worth of queries and the columns of the key tile that each of them sees.
struct QueryBatch {
  int64_t count = 0;
  int64_t query[kTileRows];
  int32_t first[kTileRows], last[kTileRows];
};

// Fills the batch from list entry n on; returns the next entry.
template <class Mask, class Real>
int64_t next_batch(const DkvPass<Mask, Real>& pass, const KeyTile& tile, const QueryList& list,
                   int64_t n, QueryBatch& batch) {
  const int64_t capacity = kTileRows / pass.shape().group_size();
  batch.count = 0;
  for (; n < list.end && batch.count < capacity; ++n) {
    const int64_t query = list.query(n, tile.seq);
    if (query < 0 || query >= tile.seq.num_queries) continue;
    const KeyRange range = visible_range(pass.mask(), tile.seq, query + tile.seq.offset);
    const int64_t first = std::max<int64_t>(range.begin - tile.key, 0);
    const int64_t last = std::min(range.end - tile.key, tile.width);
    if (first >= last) continue;
    batch.query[batch.count] = query;
    batch.first[batch.count] = static_cast<int32_t>(first);
    batch.last[batch.count] = static_cast<int32_t>(last);
    ++batch.count;
  }
  return n;
}

template <class Mask, class Real>
void load_batch(const DkvPass<Mask, Real>& pass, const KeyTile& tile, const QueryBatch& batch,
                const BwdBuffers<Real>& buffers) {
  const AttnBwdTensors& attn = pass.attn();
  const TileOps<Real>& ops = *pass.source().ops;
  const int64_t group = attn.shape.group_size();
  const int64_t d_pitch = row_pitch(attn.shape.head_dim);
  const int64_t dv_pitch = row_pitch(attn.shape.head_dim_v);
  const int64_t first_head = tile.head * group;
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t token = tile.seq.query_begin + batch.query[i], row = i * group;
    ops.load(element(attn.q, attn.shape.dtype, token, first_head), attn.q.head_stride, group,
             attn.shape.head_dim, Real{1}, buffers.q + row * d_pitch, d_pitch);
    ops.load(element(attn.dout, attn.shape.dtype, token, first_head), attn.dout.head_stride, group,
             attn.shape.head_dim_v, Real{1}, buffers.dout + row * dv_pitch, dv_pitch);
    for (int64_t g = 0; g < group; ++g) {
      buffers.lse[row + g] = *statistic<Real>(attn.lse, first_head + g, token);
      buffers.delta[row + g] = *pass.bwd.delta_of(first_head + g, token);
    }
  }
}

// dV += P^T dO, dK += dS^T Q.
template <class Mask, class Real>
void add_batch(const DkvPass<Mask, Real>& pass, const QueryBatch& batch,
               const BwdBuffers<Real>& buffers, const Panel<Real>& panel) {
  const AttnShape& shape = pass.shape();
  const int64_t d_pitch = row_pitch(shape.head_dim), dv_pitch = row_pitch(shape.head_dim_v);
  VisibleKeys keys{batch.count, shape.group_size(), batch.first, batch.last, kTileKeys, 0};
  for (int64_t i = 0; i < batch.count; ++i) {
    keys.begin = std::min<int64_t>(keys.begin, batch.first[i]);
    keys.end = std::max<int64_t>(keys.end, batch.last[i]);
  }
  compute_grad_scores(pass.source(), buffers, panel, keys, 0);
  const int64_t rows = batch.count * keys.group, num_keys = keys.end - keys.begin;
  pass.source().ops->gemm({num_keys, dv_pitch, rows, buffers.score + keys.begin, 1, kTileKeys,
                           buffers.dout, dv_pitch, buffers.dv_grad + keys.begin * dv_pitch,
                           dv_pitch, true});
  pass.source().ops->gemm({num_keys, d_pitch, rows, buffers.dscore + keys.begin, 1, kTileKeys,
                           buffers.q, d_pitch, buffers.d_grad + keys.begin * d_pitch, d_pitch,
                           true});
}

template <class Mask, class Real>
void store_tile(const DkvPass<Mask, Real>& pass, const KeyTile& tile,
                const BwdBuffers<Real>& buffers) {
  const AttnBwdTensors& attn = pass.attn();
  const AttnShape& shape = attn.shape;
  const TileOps<Real>& ops = *pass.source().ops;
  const int64_t token = tile.seq.key_begin + tile.key;
  const StoreMode mode = store_mode(attn.accumulate_dkv);
  std::fill_n(buffers.scale, tile.width, pass.bwd.grad_scale(tile.seq));
  ops.store(buffers.d_grad, row_pitch(shape.head_dim), buffers.scale, tile.width, shape.head_dim,
            element(attn.dk, shape.dtype, token, tile.head), attn.dk.token_stride, mode);
  std::fill_n(buffers.scale, tile.width, Real{1});
  ops.store(buffers.dv_grad, row_pitch(shape.head_dim_v), buffers.scale, tile.width,
            shape.head_dim_v, element(attn.dv, shape.dtype, token, tile.head), attn.dv.token_stride,
            mode);
}

template <class Mask, class Real>
void run_tile(const DkvPass<Mask, Real>& pass, const KeyTile& tile, int thread) {
  const AttnShape& shape = pass.shape();
  const BwdBuffers<Real> buffers = make_bwd_buffers(pass.bwd.job, thread);
  pass.source().fill(tile.seq, tile.head, tile.key, tile.width, buffers.panel);
  std::fill_n(buffers.d_grad, tile.width * row_pitch(shape.head_dim), Real{0});
  std::fill_n(buffers.dv_grad, tile.width * row_pitch(shape.head_dim_v), Real{0});
  const QueryList list = find_queries(pass, tile);
  QueryBatch batch;
  for (int64_t n = list.begin; n < list.end;) {
    n = next_batch(pass, tile, list, n, batch);
    if (batch.count == 0) continue;
    load_batch(pass, tile, batch, buffers);
    add_batch(pass, batch, buffers, pass.source().view(buffers.panel, 0));
  }
  store_tile(pass, tile, buffers);
}

// Rows of dK and dV that belong to no sequence: the compressed tensors have room for more windows than
// there are.
template <class Real>
void zero_rows(const AttnBwdTensors& attn, int64_t begin, int64_t end) {
  const AttnShape& shape = attn.shape;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < shape.num_heads_kv; ++head) {
      std::memset(element(attn.dk, shape.dtype, token, head), 0,
                  static_cast<size_t>(shape.head_dim) * size_of(shape.dtype));
      std::memset(element(attn.dv, shape.dtype, token, head), 0,
                  static_cast<size_t>(shape.head_dim_v) * size_of(shape.dtype));
    }
  }
}

inline int64_t num_key_rows(const Packing&, const CompressedMask& mask) { return mask.total_cmp; }
template <class Mask>
int64_t num_key_rows(const Packing& packing, const Mask&) {
  return packing.total_k;
}

template <class Mask, class Real>
void zero_unowned_rows(const DkvPass<Mask, Real>& pass) {
  const Packing& packing = pass.attn().packing;
  int64_t next = 0;
  for (int64_t seq = 0; seq < packing.batch; ++seq) {
    const SequenceView view = pass.bwd.job.sequence(seq);
    zero_rows<Real>(pass.attn(), next, view.key_begin);
    next = view.key_begin + view.num_keys;
  }
  zero_rows<Real>(pass.attn(), next, num_key_rows(packing, pass.mask()));
}

}  // namespace

template <class Mask, class Real>
void run_dkv_pass(const BwdJob<Mask, Real>& bwd, const BlockIndexView& index) {
  const DkvPass<Mask, Real> pass{bwd, index};
  const int64_t keys = tile_keys(pass.mask());
  const TaskTable& table = bwd.key_tiles;
  const int64_t num_tiles = table.size();
  parallel_for(
      num_tiles * pass.shape().num_heads_kv, bwd.job.num_threads(), Schedule::kDynamic,
      [&](int64_t task, int thread) {
        const int64_t tile = task % num_tiles, seq = table.sequence_of(tile);
        const SequenceView view = bwd.job.sequence(seq);
        const int64_t key = (tile - table.start[seq]) * keys;
        run_tile(pass, {view, task / num_tiles, key, std::min(keys, view.num_keys - key)}, thread);
      });
  if (!bwd.attn.accumulate_dkv) zero_unowned_rows(pass);
}

template void run_dkv_pass(const BwdJob<CompressedMask, float>&, const BlockIndexView&);
template void run_dkv_pass(const BwdJob<CompressedMask, double>&, const BlockIndexView&);
template void run_dkv_pass(const BwdJob<SelectedMask, float>&, const BlockIndexView&);
template void run_dkv_pass(const BwdJob<SelectedMask, double>&, const BlockIndexView&);
template void run_dkv_pass(const BwdJob<WindowMask, float>&, const BlockIndexView&);
template void run_dkv_pass(const BwdJob<WindowMask, double>&, const BlockIndexView&);

}  // namespace fsattn::cpu
