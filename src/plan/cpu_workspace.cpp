#include "plan/cpu_workspace.h"

#include <algorithm>

#include "plan/cpu_compress_kv.h"

namespace fsattn {
namespace {

constexpr size_t kInt32 = sizeof(int32_t), kInt64 = sizeof(int64_t);

int64_t row_pitch(int64_t head_dim) { return round_up(head_dim, kCpuPitch); }

int64_t tile_queries(const CpuAttnDims& dims) {
  const int64_t queries =
      std::max<int64_t>(1, kCpuTileRows / (dims.num_heads_q / dims.num_heads_kv));
  // Block selection keeps a row of scores for each query of its tile.
  const bool is_short = dims.op == Op::kSelectedAttn || dims.op == Op::kSelectBlocks;
  return is_short ? std::min(queries, kCpuSelectedTileQueries) : queries;
}

// Numbers in a panel of kCpuTileKeys keys. Forward: K transposed, V. Backward: K and V transposed, K.
int64_t panel_size(const CpuAttnDims& dims) {
  const int64_t k_transposed = dims.head_dim;
  if (dims.op == Op::kSelectBlocks) return kCpuTileKeys * k_transposed;
  if (dims.pass == Pass::kFwd) return kCpuTileKeys * (k_transposed + row_pitch(dims.head_dim_v));
  return kCpuTileKeys * (k_transposed + dims.head_dim_v + row_pitch(dims.head_dim));
}

size_t fwd_thread_bytes(const CpuAttnDims& dims) {
  const size_t real = dims.real_bytes;
  return cpu_buffer_bytes(kCpuTileRows * row_pitch(dims.head_dim), real) +    // q
         cpu_buffer_bytes(kCpuTileRows * row_pitch(dims.head_dim_v), real) +  // o
         cpu_buffer_bytes(kCpuTileRows * kCpuTileKeys, real) +                // scores
         2 * cpu_buffer_bytes(kCpuTileRows, real);                            // row_max, row_sum
}

// The larger of the two passes: q, dO, two score tiles, and dQ with O, or dK and dV.
size_t bwd_thread_bytes(const CpuAttnDims& dims) {
  const size_t real = dims.real_bytes;
  const size_t rows_d = cpu_buffer_bytes(kCpuTileRows * row_pitch(dims.head_dim), real);
  const size_t rows_dv = cpu_buffer_bytes(kCpuTileRows * row_pitch(dims.head_dim_v), real);
  static_assert(kCpuTileRows == kCpuTileKeys);  // dK is as large as dQ, dV as large as O
  return 2 * rows_d + 2 * rows_dv + 2 * cpu_buffer_bytes(kCpuTileRows * kCpuTileKeys, real) +
         3 * cpu_buffer_bytes(kCpuTileRows, real);  // lse, delta, row_scale
}

size_t select_thread_bytes(const CpuAttnDims& dims, int64_t num_tile_queries) {
  const size_t real = dims.real_bytes;
  return cpu_buffer_bytes(kCpuTileRows * row_pitch(dims.head_dim), real) +         // q
         cpu_buffer_bytes(kCpuTileRows * kCpuTileKeys, real) +                     // scores
         cpu_buffer_bytes(num_tile_queries * kCpuTileKeys, real) +                 // group scores
         cpu_buffer_bytes(kCpuTileRows, real) +                                    // lse
         cpu_buffer_bytes(num_tile_queries * dims.num_blocks, real) +              // block scores
         cpu_buffer_bytes(dims.topk, real) + cpu_buffer_bytes(dims.topk, kInt32);  // the best
}

size_t thread_bytes(const CpuAttnDims& dims, const CpuAttnLayout& layout) {
  size_t bytes = cpu_buffer_bytes(layout.panel_size, dims.real_bytes);
  if (dims.op == Op::kSelectBlocks) return bytes + select_thread_bytes(dims, layout.tile_queries);
  bytes += dims.pass == Pass::kFwd ? fwd_thread_bytes(dims) : bwd_thread_bytes(dims);
  if (dims.op == Op::kSelectedAttn) {
    bytes += cpu_buffer_bytes(layout.tile_queries * dims.topk, kInt32);  // sorted rows of topk_idx
  }
  return bytes;
}

CpuAttnDims attn_dims(const Problem& problem) {
  CpuAttnDims dims;
  dims.op = problem.op;
  dims.pass = problem.pass;
  dims.real_bytes = size_of(stats_dtype(problem.dtype));
  dims.batch = problem.batch;
  dims.total_q = problem.total_q;
  dims.max_q = problem.max_q;
  const bool is_compressed = problem.op == Op::kCompressedAttn || problem.op == Op::kSelectBlocks;
  dims.total_keys = is_compressed ? problem.total_k / problem.kernel_stride : problem.total_k;
  dims.num_heads_q = problem.num_heads_q;
  dims.num_heads_kv = problem.num_heads_kv;
  dims.head_dim = problem.head_dim;
  dims.head_dim_v = problem.head_dim_v;
  dims.topk = problem.topk;
  dims.block_size = problem.block_size;
  if (problem.op == Op::kSelectBlocks) {
    dims.num_blocks = ceil_div(problem.max_k, problem.block_size);
  }
  if (problem.op == Op::kSelectedAttn && problem.pass == Pass::kBwd && !problem.has_block_index) {
    dims.num_slots = problem.num_block_slots();
  }
  return dims;
}

size_t compress_kv_bytes(const Problem& problem) {
  const CpuCompressKvSizes sizes{problem.dtype,
                                 problem.compress_kind,
                                 problem.num_heads_kv,
                                 problem.head_dim,
                                 problem.total_k / problem.kernel_stride,
                                 problem.kernel_size};
  return cpu_compress_kv_scratch(problem.pass, sizes).bytes;
}

}  // namespace

CpuAttnLayout make_cpu_attn_layout(const CpuAttnDims& dims) {
  CpuAttnLayout layout;
  layout.tile_queries = tile_queries(dims);
  layout.panel_size = panel_size(dims);
  if (dims.max_q > (kCpuMinTilesForPanels - 1) * layout.tile_queries) {
    layout.max_panels = dims.total_keys / kCpuTileKeys + dims.batch;
  }
  const size_t head_panels =
      static_cast<size_t>(layout.max_panels * layout.panel_size) * dims.real_bytes;
  const int64_t affordable =
      static_cast<int64_t>(kCpuPanelBudget / std::max<size_t>(head_panels, 1));
  layout.heads_in_flight =
      std::clamp<int64_t>(affordable, 1, std::max<int64_t>(dims.num_heads_kv, 1));
  layout.tables = 3 * cpu_buffer_bytes(dims.batch + 1, kInt64);
  layout.panels = cpu_buffer_bytes(layout.heads_in_flight * layout.max_panels * layout.panel_size,
                                   dims.real_bytes);
  if (dims.pass == Pass::kBwd) {
    layout.delta = cpu_buffer_bytes(dims.num_heads_q * dims.total_q, dims.real_bytes);
  }
  if (dims.num_slots > 0) {
    const int64_t heads = dims.num_heads_kv;
    layout.index_start = cpu_buffer_bytes(heads * (dims.num_slots + 1), kInt32);
    layout.index_entry = cpu_buffer_bytes(heads * dims.total_q * dims.topk, kInt32);
    layout.index_counts =
        round_up(cpu_index_counts_bytes(heads, dims.total_q, dims.num_slots), size_t{64});
  }
  layout.thread = thread_bytes(dims, layout);
  return layout;
}

size_t cpu_workspace_bytes(const Problem& problem, int num_threads) {
  size_t bytes = 0;
  switch (problem.op) {
    case Op::kCompressedAttn:
    case Op::kSelectBlocks:
    case Op::kSelectedAttn:
    case Op::kWindowAttn: {
      const CpuAttnLayout layout = make_cpu_attn_layout(attn_dims(problem));
      bytes = layout.shared() + static_cast<size_t>(std::max(num_threads, 1)) * layout.thread;
      break;
    }
    case Op::kCompressKv:
      bytes = compress_kv_bytes(problem);
      break;
    case Op::kBlockIndex:
      bytes =
          cpu_index_counts_bytes(problem.num_heads_kv, problem.total_q, problem.num_block_slots());
      break;
    case Op::kGate:
      break;
  }
  return round_up(bytes, size_t{256});
}

}  // namespace fsattn
