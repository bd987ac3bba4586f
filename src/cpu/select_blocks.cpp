// Block selection, fused: the probabilities of a tile of queries are recomputed from lse, added up to
// block scores and ranked; nothing but one row of block scores a query is ever stored.
//
//     p[g, i] = exp(scale * q_g . k_i - lse_g)   for the visible windows i, 0 for the others
//     P[i]    = sum (or max) over the heads g of the group, or head 0 alone
//     score b = sum_i P[i] * overlap(window i, block b) / d
//
// With a = l / d and r = S / d, block b overlaps the windows r b - (a - 1) .. r b + r - 1, and the weight
// of number o of them is min(o + 1, a, r, a + r - 1 - o): 1, 2, 2, 2, 1 for l, d, S = 32, 16, 64.
#include "cpu/select_blocks.h"

#include <limits>

#include "cpu/attention_job.h"
#include "cpu/simd.h"

namespace fsattn::cpu {
namespace {

template <class Real>
struct SelectBuffers {
  Real* q;            // [kTileRows, pitch of D]
  Real* score;        // [kTileRows, kTileKeys]
  Real* group_score;  // [tile_queries, kTileKeys]
  Real* lse;          // [kTileRows]
  Real* block_score;  // [tile_queries, num_blocks]
  Real* best_score;   // [topk]
  int32_t* best;      // [topk]
  Real* panel;
};

// How windows weigh in a block, in the order of the header comment: a rise from 1, a plateau, a fall
// to 1.
struct Overlap {
  int64_t windows;    // l / d
  int64_t per_block;  // S / d
  int64_t plateau;    // its weight

  explicit Overlap(const SelectBlocksParams& params)
      : windows(params.mask.kernel_size / params.mask.kernel_stride),
        per_block(params.block_size / params.mask.kernel_stride),
        plateau(std::min(windows, per_block)) {}
};

template <class Real>
struct SelectJob {
  const SelectBlocksParams& params;
  AttnJob<CompressedMask, Real>& job;
  int64_t num_blocks;  // pitch of the block scores
  Overlap overlap;
};

template <class Real>
SelectBuffers<Real> make_buffers(const SelectJob<Real>& select, int thread) {
  const CpuAttnLayout& layout = select.job.layout();
  ScratchArena arena = select.job.thread_arena(thread);
  SelectBuffers<Real> buffers{};
  buffers.q = arena.take<Real>(kTileRows * row_pitch(select.params.shape.head_dim));
  buffers.score = arena.take<Real>(kTileRows * kTileKeys);
  buffers.group_score = arena.take<Real>(layout.tile_queries * kTileKeys);
  buffers.lse = arena.take<Real>(kTileRows);
  buffers.block_score = arena.take<Real>(layout.tile_queries * select.num_blocks);
  buffers.best_score = arena.take<Real>(select.params.topk);
  buffers.best = arena.take<int32_t>(select.params.topk);
  buffers.panel = arena.take<Real>(layout.panel_size);
  return buffers;
}

// Heads of a group that the score is made of.
int64_t num_scored_heads(const SelectBlocksParams& params) {
  return params.group_reduce == GroupReduce::kFirstHead ? 1 : params.shape.group_size();
}

template <class Real>
void load_rows(const SelectJob<Real>& select, const QueryTile& tile,
               const SelectBuffers<Real>& buffers) {
  const SelectBlocksParams& params = select.params;
  const int64_t heads = num_scored_heads(params), pitch = row_pitch(params.shape.head_dim);
  const int64_t first_head = tile.head * params.shape.group_size();
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    select.job.source().ops->load(element(params.q, params.shape.dtype, tile.token(i), first_head),
                                  params.q.head_stride, heads, params.shape.head_dim, Real{1},
                                  buffers.q + i * heads * pitch, pitch);
    for (int64_t g = 0; g < heads; ++g) {
      buffers.lse[i * heads + g] = *statistic<Real>(params.lse, first_head + g, tile.token(i));
    }
  }
}

// The group's probabilities of a key tile, for a run of queries.
template <class Real>
void score_windows(const SelectJob<Real>& select, const SelectBuffers<Real>& buffers,
                   const Real* k_t, const VisibleKeys& keys, int64_t first_query) {
  const AttnShape& shape = select.params.shape;
  const TileOps<Real>& ops = *select.job.source().ops;
  const int64_t pitch = row_pitch(shape.head_dim), col = keys.begin / kPitch * kPitch;
  const int64_t first_row = first_query * keys.group;
  Real* score = buffers.score + first_row * kTileKeys;
  ops.gemm({keys.num_queries * keys.group, keys.end - col, shape.head_dim,
            buffers.q + first_row * pitch, pitch, 1, k_t + col, kTileKeys, score + col, kTileKeys,
            false});
  ops.group_score({keys, static_cast<Real>(shape.softmax_scale),
                   select.params.group_reduce == GroupReduce::kMax, score, buffers.lse + first_row,
                   buffers.group_score + first_query * kTileKeys});
}

// sum of P[i] * weight over the windows begin .. end - 1 that overlap a block; p[0] belongs to `begin`.
template <class Real>
Real overlap_sum(const Overlap& overlap, const Real* p, int64_t begin, int64_t end, int64_t block) {
  const int64_t first = overlap.per_block * block - (overlap.windows - 1);
  const int64_t last = overlap.per_block * (block + 1) - 1;
  const int64_t rise_end = first + overlap.plateau - 1, fall_begin = last - overlap.plateau + 2;
  const int64_t i_begin = std::max(begin, first), i_end = std::min(end, last + 1);
  Real sum = 0, flat = 0;
  int64_t i = i_begin;
  for (; i < std::min(rise_end, i_end); ++i) sum += p[i - begin] * static_cast<Real>(i - first + 1);
  for (; i < std::min(fall_begin, i_end); ++i) flat += p[i - begin];
  for (; i < i_end; ++i) sum += p[i - begin] * static_cast<Real>(last - i + 1);
  return sum + flat * static_cast<Real>(overlap.plateau);
}

// Adds the windows begin .. end - 1 of one query to its blocks.
template <class Real>
void add_to_blocks(const Overlap& overlap, const Real* p, int64_t begin, int64_t end,
                   int64_t num_blocks, Real* block_score) {
  const int64_t last_block =
      std::min((end - 1 + overlap.windows - 1) / overlap.per_block, num_blocks - 1);
  for (int64_t block = begin / overlap.per_block; block <= last_block; ++block) {
    block_score[block] += overlap_sum(overlap, p, begin, end, block);
  }
}

template <class Real>
Real ranked_score(ScoreDType dtype, Real score) {
  if (dtype == ScoreDType::kFloat32) return score;
  BFloat16 rounded;
  store(rounded, static_cast<float>(score));
  return load(rounded);
}

// The blocks that compete: all up to the query's own but the forced ones.
struct Candidates {
  int64_t begin, end;
};

// Keeps the best `room` candidates by descending score, ties by ascending id; returns their number.
template <class Real>
int64_t rank_blocks(const SelectJob<Real>& select, const Real* block_score, Candidates candidates,
                    int64_t room, const SelectBuffers<Real>& buffers) {
  int64_t count = 0;
  if (room == 0) return 0;
  for (int64_t block = candidates.begin; block < candidates.end; ++block) {
    const Real score = ranked_score(select.params.score_dtype, block_score[block]);
    if (count == room && !(score > buffers.best_score[count - 1])) continue;
    int64_t place = count < room ? count++ : count - 1;
    for (; place > 0 && score > buffers.best_score[place - 1]; --place) {
      buffers.best_score[place] = buffers.best_score[place - 1];
      buffers.best[place] = buffers.best[place - 1];
    }
    buffers.best_score[place] = score;
    buffers.best[place] = static_cast<int32_t>(block);
  }
  return count;
}

// Writes one query's row: forced and best blocks ascending, then -1. The forced blocks fit: topk is at
// least init_blocks + local_blocks. query_block is that of the query's position, which may lie behind
// the sequence's num_blocks.
template <class Real>
void select_row(const SelectJob<Real>& select, const Real* block_score, int64_t query_block,
                int64_t num_blocks, const SelectBuffers<Real>& buffers, int32_t* row) {
  const SelectBlocksParams& params = select.params;
  const int64_t end = std::min(query_block + 1, num_blocks);
  const int64_t num_init = std::min(params.init_blocks, end);
  const int64_t local_begin = std::clamp(query_block + 1 - params.local_blocks, num_init, end);
  const int64_t num_ranked = rank_blocks(select, block_score, {num_init, local_begin},
                                         params.topk - num_init - (end - local_begin), buffers);
  std::sort(buffers.best, buffers.best + num_ranked);
  int32_t* out = row;
  for (int64_t i = 0; i < num_init; ++i) *out++ = static_cast<int32_t>(i);
  out = std::copy_n(buffers.best, num_ranked, out);
  for (int64_t i = local_begin; i < end; ++i) *out++ = static_cast<int32_t>(i);
  std::fill(out, row + params.topk, -1);
}

template <class Real>
void select_rows(const SelectJob<Real>& select, const QueryTile& tile,
                 const SelectBuffers<Real>& buffers) {
  const SelectBlocksParams& params = select.params;
  const Packing& packing = params.packing;
  const int64_t seq = tile.seq.idx;
  const int64_t seqlen_k = packing.cu_k[seq + 1] - packing.cu_k[seq];
  const int64_t num_blocks = std::min(ceil_div(seqlen_k, params.block_size), select.num_blocks);
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    const int64_t position = tile.first_query + i + tile.seq.offset;
    const int64_t query_block = position < 0 ? -1 : position / params.block_size;
    int32_t* row = params.topk_idx + (tile.head * packing.total_q + tile.token(i)) * params.topk;
    select_row(select, buffers.block_score + i * select.num_blocks, query_block, num_blocks,
               buffers, row);
  }
}

template <class Real>
void run_tile(const SelectJob<Real>& select, const QueryTile& tile, int thread) {
  const SelectBuffers<Real> buffers = make_buffers(select, thread);
  load_rows(select, tile, buffers);
  std::fill_n(buffers.block_score, tile.num_queries * select.num_blocks, Real{0});
  KeyTiles<CompressedMask> tiles(select.params.mask, tile.seq, tile.head, tile.first_query,
                                 tile.num_queries, nullptr);
  while (tiles.next()) {
    const Panel<Real> panel = select.job.panel(tile, tiles.key(), tiles.width(), buffers.panel);
    for_each_run(tiles, num_scored_heads(select.params),
                 [&](int64_t first_query, const VisibleKeys& keys) {
                   score_windows(select, buffers, panel.k_t, keys, first_query);
                   for (int64_t i = 0; i < keys.num_queries; ++i) {
                     const int64_t query = first_query + i;
                     add_to_blocks(select.overlap, buffers.group_score + query * kTileKeys,
                                   tiles.key(), tiles.key() + keys.last[i], select.num_blocks,
                                   buffers.block_score + query * select.num_blocks);
                   }
                 });
  }
  select_rows(select, tile, buffers);
}

template <class Real>
void run(const SelectBlocksParams& params) {
  CpuAttnDims dims = attn_dims<Real>(Op::kSelectBlocks, Pass::kFwd, params.packing, params.shape);
  add_mask(dims, params.mask);
  dims.topk = params.topk;
  dims.block_size = params.block_size;
  dims.num_blocks = ceil_div(params.packing.max_k, params.block_size);
  AttnJob<CompressedMask, Real> job(
      params.packing, params.mask,
      {&tile_ops<Real>(params.shape.dtype), params.shape, params.k_cmp, {}, PanelKind::kSelect},
      make_cpu_attn_layout(dims), params.scratch);
  const SelectJob<Real> select{params, job, dims.num_blocks, Overlap(params)};
  job.for_each_query_tile(
      [&](const QueryTile& tile, int thread) { run_tile(select, tile, thread); });
}

}  // namespace

void select_blocks(int /*row*/, const SelectBlocksParams& params, Stream /*stream*/) {
  if (params.shape.dtype == DType::kFloat64) {
    run<double>(params);
  } else {
    run<float>(params);
  }
}

}  // namespace fsattn::cpu
