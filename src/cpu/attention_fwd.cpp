#include "cpu/attention_fwd.h"

#include <cmath>
#include <limits>

#include "cpu/attention_job.h"

namespace fsattn::cpu {
namespace {

// What one thread works on. Rows are (query, head of the group).
template <class Real>
struct FwdBuffers {
  Real* q;                  // [kTileRows, pitch of D]
  Real* out;                // [kTileRows, pitch of Dv]: P V times v_factor, not divided by row_sum
  Real* score;              // [kTileRows, kTileKeys]
  Real *row_max, *row_sum;  // [kTileRows]
  Real* panel;
  int32_t* rows;  // selected: sorted rows of topk_idx
};

template <class Mask, class Real>
FwdBuffers<Real> make_buffers(const AttnJob<Mask, Real>& job, int thread) {
  const AttnShape& shape = job.source().shape;
  ScratchArena arena = job.thread_arena(thread);
  FwdBuffers<Real> buffers{};
  buffers.q = arena.take<Real>(kTileRows * row_pitch(shape.head_dim));
  buffers.out = arena.take<Real>(kTileRows * row_pitch(shape.head_dim_v));
  buffers.score = arena.take<Real>(kTileRows * kTileKeys);
  buffers.row_max = arena.take<Real>(kTileRows);
  buffers.row_sum = arena.take<Real>(kTileRows);
  buffers.panel = arena.take<Real>(job.layout().panel_size);
  buffers.rows = take_rows(arena, job.layout(), job.mask());
  return buffers;
}

// One key tile for a run of queries: S = Q K^T, P = exp(S - max), O += P V.
template <class Real>
void attend(const PanelSource<Real>& source, const FwdBuffers<Real>& buffers,
            const Panel<Real>& panel, const VisibleKeys& keys, int64_t first_row) {
  const AttnShape& shape = source.shape;
  const int64_t rows = keys.num_queries * keys.group;
  const int64_t d_pitch = row_pitch(shape.head_dim), dv_pitch = row_pitch(shape.head_dim_v);
  const int64_t aligned_begin = keys.begin / kPitch * kPitch;
  Real* score = buffers.score + first_row * kTileKeys;
  Real* out = buffers.out + first_row * dv_pitch;
  source.ops->gemm({rows, keys.end - aligned_begin, shape.head_dim, buffers.q + first_row * d_pitch,
                    d_pitch, 1, panel.k_t + aligned_begin, kTileKeys, score + aligned_begin,
                    kTileKeys, false});
  source.ops->softmax_step({keys, static_cast<Real>(shape.softmax_scale), score,
                            buffers.row_max + first_row, buffers.row_sum + first_row, out,
                            dv_pitch});
  source.ops->gemm({rows, dv_pitch, keys.end - keys.begin, score + keys.begin, kTileKeys, 1,
                    panel.v + keys.begin * dv_pitch, dv_pitch, out, dv_pitch, true, kTileKeys});
}

// Divides by the row sums and writes o and lse. A row that saw no key has row_sum 0.
template <class Real>
void finish(const AttnFwdTensors& attn, const PanelSource<Real>& source, const QueryTile& tile,
            const FwdBuffers<Real>& buffers) {
  const int64_t group = attn.shape.group_size(), dv_pitch = row_pitch(attn.shape.head_dim_v);
  const auto scale = static_cast<Real>(attn.shape.softmax_scale);
  const Real unscale = 1 / source.v_factor(tile.seq);
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    for (int64_t g = 0; g < group; ++g) {
      Real& sum = buffers.row_sum[i * group + g];
      *statistic<Real>(attn.lse, tile.head * group + g, tile.token(i)) =
          sum == 0 ? -std::numeric_limits<Real>::infinity()
                   : scale * buffers.row_max[i * group + g] + std::log(sum);
      sum = sum == 0 ? 0 : unscale / sum;
    }
    source.ops->store(buffers.out + i * group * dv_pitch, dv_pitch, buffers.row_sum + i * group,
                      group, attn.shape.head_dim_v,
                      element(attn.o, attn.shape.dtype, tile.token(i), tile.head * group),
                      attn.o.head_stride, StoreMode::kAverage);
  }
}

template <class Mask, class Real>
void run_tile(const AttnFwdTensors& attn, const AttnJob<Mask, Real>& job, const QueryTile& tile,
              int thread) {
  const int64_t group = attn.shape.group_size(), rows = tile.num_queries * group;
  const FwdBuffers<Real> buffers = make_buffers(job, thread);
  load_query_rows(*job.source().ops, attn.shape, attn.q, tile, attn.shape.head_dim, Real{1},
                  buffers.q);
  std::fill_n(buffers.out, rows * row_pitch(attn.shape.head_dim_v), Real{0});
  std::fill_n(buffers.row_max, rows, -std::numeric_limits<Real>::infinity());
  std::fill_n(buffers.row_sum, rows, Real{0});
  KeyTiles<Mask> tiles(job.mask(), tile.seq, tile.head, tile.first_query, tile.num_queries,
                       buffers.rows);
  while (tiles.next()) {
    const Panel<Real> panel = job.panel(tile, tiles.key(), tiles.width(), buffers.panel);
    for_each_run(tiles, group, [&](int64_t first, const VisibleKeys& keys) {
      attend(job.source(), buffers, panel, keys, first * group);
    });
  }
  finish(attn, job.source(), tile, buffers);
}

}  // namespace

template <class Mask, class Real>
void attn_fwd(const AttnFwdParams<Mask>& params) {
  const AttnFwdTensors& attn = params.attn;
  const TileOps<Real>& ops = tile_ops<Real>(attn.shape.dtype);
  CpuAttnDims dims = attn_dims<Real>(kOpOf<Mask>, Pass::kFwd, attn.packing, attn.shape);
  add_mask(dims, params.mask);
  AttnJob<Mask, Real> job(attn.packing, params.mask,
                          {&ops, attn.shape, attn.k, attn.v, PanelKind::kFwd},
                          make_cpu_attn_layout(dims), params.scratch);
  job.for_each_query_tile(
      [&](const QueryTile& tile, int thread) { run_tile(attn, job, tile, thread); });
}

template void attn_fwd<CompressedMask, float>(const CompressedAttnFwdParams&);
template void attn_fwd<CompressedMask, double>(const CompressedAttnFwdParams&);
template void attn_fwd<SelectedMask, float>(const SelectedAttnFwdParams&);
template void attn_fwd<SelectedMask, double>(const SelectedAttnFwdParams&);
template void attn_fwd<WindowMask, float>(const WindowAttnFwdParams&);
template void attn_fwd<WindowMask, double>(const WindowAttnFwdParams&);

}  // namespace fsattn::cpu
