// The backward pass of the three attention branches, in two passes that each own what they write.
//
// Math     P = exp(scale * Q K^T - lse),  delta = rowsum(dO * O) - dlse,  dP = dO V^T,
//          dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q,  dV = P^T dO
//          dP, delta and dS are kept times v_factor (PanelSource)
// dQ       one task a (query tile, KV head), as the forward pass; also leaves delta for the second pass
// dK, dV   one task a (key tile, KV head): all queries that see a key of the tile, in ascending order;
//          for the selected branch they come from the block index
//
// S and dP are computed twice (7 products instead of 5): the price of results without atomics, the same
// for any number of threads.
#pragma once
#include "cpu/attention_job.h"

namespace fsattn::cpu {

// What one thread works on. Rows are (query, head of the group).
template <class Real>
struct BwdBuffers {
  Real *q, *dout;          // [kTileRows, pitch of D], [kTileRows, pitch of Dv]
  Real *d_grad, *dv_grad;  // dQ or dK [64, pitch of D]; O or dV [64, pitch of Dv]
  Real *score, *dscore;    // [kTileRows, kTileKeys]
  Real *lse, *delta;       // [kTileRows]
  Real* scale;             // [kTileRows]: grad_scale or 1, for the store
  Real* panel;
  int32_t* rows;  // selected, dQ: sorted rows of topk_idx
};

inline StoreMode store_mode(bool accumulate) {
  return accumulate ? StoreMode::kAdd : StoreMode::kWrite;
}

// A backward call. delta [num_heads_q, total_q] and key_tiles lie in scratch memory.
template <class Mask, class Real>
struct BwdJob {
  const AttnBwdTensors& attn;
  AttnJob<Mask, Real>& job;
  Real* delta;
  TaskTable key_tiles;

  Real* delta_of(int64_t head, int64_t token) const {
    return delta + head * attn.packing.total_q + token;
  }
  // What dQ and dK are multiplied by in the end.
  Real grad_scale(const SequenceView& seq) const {
    return static_cast<Real>(attn.shape.softmax_scale) / job.source().v_factor(seq);
  }
};

template <class Mask, class Real>
BwdBuffers<Real> make_bwd_buffers(const AttnJob<Mask, Real>& job, int thread) {
  const AttnShape& shape = job.source().shape;
  ScratchArena arena = job.thread_arena(thread);
  BwdBuffers<Real> buffers{};
  buffers.q = arena.take<Real>(kTileRows * row_pitch(shape.head_dim));
  buffers.d_grad = arena.take<Real>(kTileRows * row_pitch(shape.head_dim));
  buffers.dout = arena.take<Real>(kTileRows * row_pitch(shape.head_dim_v));
  buffers.dv_grad = arena.take<Real>(kTileRows * row_pitch(shape.head_dim_v));
  buffers.score = arena.take<Real>(kTileRows * kTileKeys);
  buffers.dscore = arena.take<Real>(kTileRows * kTileKeys);
  buffers.lse = arena.take<Real>(kTileRows);
  buffers.delta = arena.take<Real>(kTileRows);
  buffers.scale = arena.take<Real>(kTileRows);
  buffers.panel = arena.take<Real>(job.layout().panel_size);
  buffers.rows = take_rows(arena, job.layout(), job.mask());
  return buffers;
}

// score becomes P and dscore becomes dS for the rows from first_row on.
template <class Real>
void compute_grad_scores(const PanelSource<Real>& source, const BwdBuffers<Real>& buffers,
                         const Panel<Real>& panel, const VisibleKeys& keys, int64_t first_row) {
  const AttnShape& shape = source.shape;
  const int64_t rows = keys.num_queries * keys.group;
  const int64_t d_pitch = row_pitch(shape.head_dim), dv_pitch = row_pitch(shape.head_dim_v);
  const int64_t col = keys.begin / kPitch * kPitch;
  Real* score = buffers.score + first_row * kTileKeys;
  Real* dscore = buffers.dscore + first_row * kTileKeys;
  const GemmArgs<Real> qk{rows,
                          keys.end - col,
                          shape.head_dim,
                          buffers.q + first_row * d_pitch,
                          d_pitch,
                          1,
                          panel.k_t + col,
                          kTileKeys,
                          score + col,
                          kTileKeys,
                          false};
  const GemmArgs<Real> dout_v{rows,
                              keys.end - col,
                              shape.head_dim_v,
                              buffers.dout + first_row * dv_pitch,
                              dv_pitch,
                              1,
                              panel.v_t + col,
                              kTileKeys,
                              dscore + col,
                              kTileKeys,
                              false};
  source.ops->gemm(qk);
  source.ops->gemm(dout_v);
  source.ops->softmax_grad({keys, static_cast<Real>(shape.softmax_scale), score, dscore,
                            buffers.lse + first_row, buffers.delta + first_row});
}

// dQ and delta.
template <class Mask, class Real>
void run_dq_pass(const BwdJob<Mask, Real>& bwd);

// dK and dV. index is used by the selected branch.
template <class Mask, class Real>
void run_dkv_pass(const BwdJob<Mask, Real>& bwd, const BlockIndexView& index);

}  // namespace fsattn::cpu
