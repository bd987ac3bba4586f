// What run/ knows of a backend: one function an operator and pass. `row` is the index into the
// operator's kernel table (plan/<op>_table.h); the CPU backend ignores it.
#pragma once
#include "params/attention.h"
#include "params/compress_kv.h"
#include "params/gate.h"
#include "params/paged.h"
#include "params/select_blocks.h"

namespace fsattn {

struct Backend {
  const char* name;
  void (*compress_kv_fwd)(int row, const CompressKvFwdParams&, Stream);
  void (*compress_kv_bwd)(int row, const CompressKvBwdParams&, Stream);
  void (*compressed_attn_fwd)(int row, const CompressedAttnFwdParams&, Stream);
  void (*compressed_attn_bwd)(int row, const CompressedAttnBwdParams&, Stream);
  void (*select_blocks)(int row, const SelectBlocksParams&, Stream);
  void (*block_index)(int row, const BlockIndexParams&, Stream);
  void (*selected_attn_fwd)(int row, const SelectedAttnFwdParams&, Stream);
  void (*selected_attn_bwd)(int row, const SelectedAttnBwdParams&, Stream);
  void (*window_attn_fwd)(int row, const WindowAttnFwdParams&, Stream);
  void (*window_attn_bwd)(int row, const WindowAttnBwdParams&, Stream);
  void (*gate_fwd)(int row, const GateFwdParams&, Stream);
  void (*gate_bwd)(int row, const GateBwdParams&, Stream);
  void (*gate_bwd_stats)(int row, const GateStatsParams&, Stream) = nullptr;  // null on the CPU
  // Compressed attention and select_blocks at once; null on the CPU. plan/compressed_select_table.h
  void (*compressed_select)(int row, const CompressedAttnFwdParams&, const SelectBlocksParams&,
                            Stream) = nullptr;
  // Work on a second stream until it is joined; null on the CPU. cuda/side_stream.h
  Stream (*fork_stream)(Stream) = nullptr;
  void (*join_stream)(Stream side, Stream) = nullptr;
  // Paged cache. A backend may lack the fused ones (null): the others and the operators above compose
  // the same results.
  void (*paged_write)(int row, const PagedWriteParams&, Stream) = nullptr;
  void (*paged_scatter)(int row, const PagedScatterParams&, Stream) = nullptr;
  void (*paged_gather)(int row, const PagedGatherParams&, Stream) = nullptr;
  void (*paged_append)(int row, const PagedAppendParams&, Stream) = nullptr;      // fused
  void (*paged_attn)(int row, const PagedAttnParams&, Stream) = nullptr;          // fused
  void (*paged_selected)(int row, const PagedSelectedParams&, Stream) = nullptr;  // fused
};

}  // namespace fsattn
