// Scratch memory of a CPU call. For a problem and a number of threads:
//
//     bytes = tables + panels + delta + index + num_threads * thread
//
// tables   three int64 [B + 1]: which tile belongs to which sequence
// panels   keys (and values) of `heads_in_flight` KV heads, converted and transposed in panels of 64:
//          64 * panel_row numbers a panel, total_keys / 64 + B panels a head; linear in the length, and
//          0 when every sequence has few queries. As many heads at once as fit into kCpuPanelBudget,
//          at least one.
// delta    rowsum(dO * O) - dlse, one number a query and head (backward)
// index    the block index and the counts that build it (selected backward without one)
// thread   the tiles that one thread works on, independent of the sequence length; block selection
//          adds one score a block and query of its tile (up to 16 * max_k / S numbers)
//
// A run may use fewer threads than were planned for; results do not depend on the number.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/math.h"
#include "plan/problem.h"

namespace fsattn {

constexpr int64_t kCpuTileKeys = 64;  // keys in a tile, the width of a panel
constexpr int64_t kCpuTileRows = 64;  // queries times heads of the group in a tile
constexpr int64_t kCpuPitch = 16;  // row pitches are multiples of the longest vector (fp32 AVX-512)
// Queries of a tile whose keys are their own. More would share few blocks and lengthen the merge.
constexpr int64_t kCpuSelectedTileQueries = 16;
// A sequence with fewer query tiles converts its keys tile by tile: packing a whole cache for one
// decoded token would cost more than attending to it.
constexpr int64_t kCpuMinTilesForPanels = 4;
constexpr size_t kCpuPanelBudget = size_t{64} << 20;

// What the layout is made from; the plan fills it from a Problem, the backend from its parameters.
struct CpuAttnDims {
  Op op{};
  Pass pass{};
  size_t real_bytes = 4;  // 8 for fp64
  int64_t batch = 0;
  int64_t total_q = 0, max_q = 0;
  int64_t total_keys = 0;  // compressed: total_k / d
  int64_t num_heads_q = 0, num_heads_kv = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t topk = 0;
  int64_t block_size = 0;
  int64_t num_blocks = 0;  // select_blocks: blocks that a query may score, ceil(max_k / S)
  int64_t num_slots = 0;   // selected backward: slots of the index to build, 0 when it is given
};

// Sizes in bytes unless said otherwise; the parts follow each other in this order.
struct CpuAttnLayout {
  int64_t tile_queries = 0;
  int64_t panel_size = 0;  // numbers in a panel
  int64_t max_panels = 0;  // panels a head
  int64_t heads_in_flight = 0;
  size_t tables = 0;
  size_t panels = 0;
  size_t delta = 0;
  size_t index_start = 0, index_entry = 0, index_counts = 0;
  size_t thread = 0;

  size_t shared() const {
    return tables + panels + delta + index_start + index_entry + index_counts;
  }
};

// One buffer of `count` numbers, on cache lines of its own.
constexpr size_t cpu_buffer_bytes(int64_t count, size_t bytes) {
  return round_up(static_cast<size_t>(count) * bytes, size_t{64});
}

// Chunks of tokens whose entries are counted apart, so that one head fills every core. At most 16: the
// counts stay linear in the length.
constexpr int64_t cpu_index_num_chunks(int64_t total_q) {
  const int64_t chunks = total_q / 1024;
  return chunks < 1 ? 1 : chunks > 16 ? 16 : chunks;
}

// One count a (KV head, chunk, slot).
constexpr size_t cpu_index_counts_bytes(int64_t num_heads_kv, int64_t total_q, int64_t num_slots) {
  return static_cast<size_t>(num_heads_kv * cpu_index_num_chunks(total_q) * num_slots) *
         sizeof(int32_t);
}

CpuAttnLayout make_cpu_attn_layout(const CpuAttnDims& dims);

// Bytes that a backend call needs on the CPU, a multiple of 256.
size_t cpu_workspace_bytes(const Problem& problem, int num_threads);

}  // namespace fsattn
