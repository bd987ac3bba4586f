#include "cuda/backend.h"

#include "cuda/block_index/block_index.h"
#include "cuda/compress_kv/compress_kv.h"
#include "cuda/decode/decode.h"
#include "cuda/decode/paged_append.h"
#include "cuda/decode/paged_copy.h"
#include "cuda/dense_attn/dense_attn.h"
#include "cuda/gate/gate.h"
#include "cuda/select_blocks/compressed_select.h"
#include "cuda/select_blocks/select_blocks.h"
#include "cuda/selected_attn/selected_attn.h"
#include "cuda/side_stream.h"

namespace fsattn {

const Backend& cuda_backend() {
  static constexpr Backend kBackend{
      .name = "cuda",
      .compress_kv_fwd = launch_compress_kv_fwd,
      .compress_kv_bwd = launch_compress_kv_bwd,
      .compressed_attn_fwd = launch_compressed_attn_fwd,
      .compressed_attn_bwd = launch_compressed_attn_bwd,
      .select_blocks = launch_select_blocks,
      .block_index = launch_block_index,
      .selected_attn_fwd = launch_selected_attn_fwd,
      .selected_attn_bwd = launch_selected_attn_bwd,
      .window_attn_fwd = launch_window_attn_fwd,
      .window_attn_bwd = launch_window_attn_bwd,
      .gate_fwd = launch_gate_fwd,
      .gate_bwd = launch_gate_bwd,
      .gate_bwd_stats = launch_gate_bwd_stats,
      .compressed_select = launch_compressed_select,
      .fork_stream = fork_stream,
      .join_stream = join_stream,
      .paged_write = launch_paged_write,
      .paged_scatter = launch_paged_scatter,
      .paged_gather = launch_paged_gather,
      .paged_append = launch_paged_append,
      .paged_attn = launch_paged_attn,
      .paged_selected = launch_paged_selected,
  };
  return kBackend;
}

}  // namespace fsattn
