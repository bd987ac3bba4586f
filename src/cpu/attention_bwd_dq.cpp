#include "cpu/attention_bwd.h"

namespace fsattn::cpu {
namespace {

// lse and delta of the tile's rows; delta goes to the shared table, too.
template <class Mask, class Real>
void load_statistics(const BwdJob<Mask, Real>& bwd, const QueryTile& tile,
                     const BwdBuffers<Real>& buffers) {
  const AttnBwdTensors& attn = bwd.attn;
  const int64_t group = attn.shape.group_size(), head_dim_v = attn.shape.head_dim_v;
  const TileOps<Real>& ops = *bwd.job.source().ops;
  const Real v_factor = bwd.job.source().v_factor(tile.seq);
  load_query_rows(ops, attn.shape, attn.o, tile, head_dim_v, v_factor, buffers.dv_grad);
  ops.row_dot(buffers.dout, buffers.dv_grad, row_pitch(head_dim_v), tile.num_queries * group,
              buffers.delta);
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = tile.head * group + g, row = i * group + g;
      buffers.lse[row] = *statistic<Real>(attn.lse, head, tile.token(i));
      if (attn.dlse.data != nullptr) {
        buffers.delta[row] -= *statistic<Real>(attn.dlse, head, tile.token(i)) * v_factor;
      }
      *bwd.delta_of(head, tile.token(i)) = buffers.delta[row];
    }
  }
}

template <class Mask, class Real>
void run_tile(const BwdJob<Mask, Real>& bwd, const QueryTile& tile, int thread) {
  const AttnBwdTensors& attn = bwd.attn;
  const PanelSource<Real>& source = bwd.job.source();
  const int64_t group = attn.shape.group_size(), pitch = row_pitch(attn.shape.head_dim);
  const BwdBuffers<Real> buffers = make_bwd_buffers(bwd.job, thread);
  load_query_rows(*source.ops, attn.shape, attn.q, tile, attn.shape.head_dim, Real{1}, buffers.q);
  load_query_rows(*source.ops, attn.shape, attn.dout, tile, attn.shape.head_dim_v, Real{1},
                  buffers.dout);
  load_statistics(bwd, tile, buffers);
  std::fill_n(buffers.d_grad, tile.num_queries * group * pitch, Real{0});
  KeyTiles<Mask> tiles(bwd.job.mask(), tile.seq, tile.head, tile.first_query, tile.num_queries,
                       buffers.rows);
  while (tiles.next()) {
    const Panel<Real> panel = bwd.job.panel(tile, tiles.key(), tiles.width(), buffers.panel);
    for_each_run(tiles, group, [&](int64_t first, const VisibleKeys& keys) {
      compute_grad_scores(source, buffers, panel, keys, first * group);
      source.ops->gemm({keys.num_queries * group, pitch, keys.end - keys.begin,
                        buffers.dscore + first * group * kTileKeys + keys.begin, kTileKeys, 1,
                        panel.k + keys.begin * pitch, pitch, buffers.d_grad + first * group * pitch,
                        pitch, true, kTileKeys});
    });
  }
  std::fill_n(buffers.scale, group, bwd.grad_scale(tile.seq));
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    source.ops->store(buffers.d_grad + i * group * pitch, pitch, buffers.scale, group,
                      attn.shape.head_dim,
                      element(attn.dq, attn.shape.dtype, tile.token(i), tile.head * group),
                      attn.dq.head_stride, store_mode(attn.accumulate_dq));
  }
}

}  // namespace

template <class Mask, class Real>
void run_dq_pass(const BwdJob<Mask, Real>& bwd) {
  bwd.job.for_each_query_tile(
      [&](const QueryTile& tile, int thread) { run_tile(bwd, tile, thread); });
}

template void run_dq_pass(const BwdJob<CompressedMask, float>&);
template void run_dq_pass(const BwdJob<CompressedMask, double>&);
template void run_dq_pass(const BwdJob<SelectedMask, float>&);
template void run_dq_pass(const BwdJob<SelectedMask, double>&);
template void run_dq_pass(const BwdJob<WindowMask, float>&);
template void run_dq_pass(const BwdJob<WindowMask, double>&);

}  // namespace fsattn::cpu
