#include "cpu/backend.h"

#include "cpu/attention.h"
#include "cpu/block_index.h"
#include "cpu/compress_kv.h"
#include "cpu/gate.h"
#include "cpu/isa.h"
#include "cpu/paged.h"
#include "cpu/select_blocks.h"

namespace fsattn::cpu {

const Backend& cpu_backend() {
  static constexpr Backend backend{
      .name = "cpu",
      .compress_kv_fwd = compress_kv_fwd,
      .compress_kv_bwd = compress_kv_bwd,
      .compressed_attn_fwd = compressed_attn_fwd,
      .compressed_attn_bwd = compressed_attn_bwd,
      .select_blocks = select_blocks,
      .block_index = block_index,
      .selected_attn_fwd = selected_attn_fwd,
      .selected_attn_bwd = selected_attn_bwd,
      .window_attn_fwd = window_attn_fwd,
      .window_attn_bwd = window_attn_bwd,
      .gate_fwd = gate_fwd,
      .gate_bwd = gate_bwd,
      .paged_write = paged_write,
      .paged_scatter = paged_scatter,
      .paged_gather = paged_gather,
  };
  return backend;
}

const char* instruction_set() { return name_of(active_isa()); }

}  // namespace fsattn::cpu
