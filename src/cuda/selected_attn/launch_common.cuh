// Host side that forward and backward share: the shape of a call, its block index, its work items.
#pragma once
#include "base/cuda_check.h"
#include "cuda/block_index/block_index.h"
#include "cuda/selected_attn/work_items.cuh"
#include "plan/selected_attn_table.h"

namespace fsattn::selected {

template <class Params>
SelectedShape shape_of(const Params& params) {
  const Packing& packing = params.attn.packing;
  const AttnShape& shape = params.attn.shape;
  return {packing.batch,       packing.total_q,
          packing.total_k,     shape.num_heads_q,
          shape.num_heads_kv,  shape.head_dim,
          shape.head_dim_v,    params.mask.block_size,
          params.mask.topk,    params.mask.index.start != nullptr,
          params.workspace_cap};
}

// The caller's block index, or one built in scratch memory.
inline BlockIndexView make_index(const SelectedShape& shape, const Packing& packing,
                                 const SelectedMask& mask, const SelectedIndexRegions& regions,
                                 char* scratch, Stream stream) {
  FSATTN_ASSERT(shape.total_q * shape.topk < INT32_MAX);
  if (shape.has_block_index) return mask.index;
  BlockIndexParams build{
      packing, shape.num_heads_kv, mask, {scratch + regions.counts, regions.counts_bytes}
  };
  build.mask.index = {reinterpret_cast<int32_t*>(scratch + regions.start),
                      reinterpret_cast<int32_t*>(scratch + regions.entry), shape.num_block_slots()};
  launch_block_index(find_block_index_row(shape.topk), build, stream);
  return build.mask.index;
}

inline ItemArgs make_item_args(const SelectedShape& shape, const SelectedSplit& split,
                               const Packing& packing, const BlockIndexView& index) {
  ItemArgs a{};
  a.packing = packing;
  a.index = index;
  a.block_size = static_cast<int>(shape.block_size);
  a.topk = static_cast<int>(shape.topk);
  a.keys = static_cast<int>(split.keys);
  a.splits = static_cast<int>(split.splits);
  a.num_parts = static_cast<int>(split.num_parts);
  a.range = static_cast<int>(split.range);
  a.num_ranges = static_cast<int>(split.num_ranges);
  a.item_entries = static_cast<int>(split.item_entries);
  a.item_capacity = static_cast<int>(split.item_capacity);
  a.segments_per_launch = static_cast<int>(split.segments_per_launch);
  return a;
}

inline void launch_items(const ItemArgs& args, int64_t num_segments, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(num_segments);
  selected_attn_items_kernel<kItemThreads><<<grid, kItemThreads, 0, stream>>>(args);
}

inline RowSpace make_row_space(const SelectedShape& shape, const SelectedSplit& split) {
  return {0,
          static_cast<int>(split.num_ranges),
          static_cast<int>(split.range),
          static_cast<int>(split.partials),
          static_cast<int>(split.splits),
          static_cast<int>(shape.group_size()),
          FastDiv(shape.group_size()),
          FastDiv(shape.topk)};
}

// Rows are addressed by 32 bits in units of 16 bytes.
inline void assert_addressable(const Rows& rows, int64_t tokens, int64_t heads) {
  FSATTN_ASSERT(tokens * rows.token_stride + heads * rows.head_stride < (int64_t{1} << 35));
}

// CTAs of `kernel` that the device holds at a time.
template <class Kernel>
int resident_ctas(Kernel kernel, int threads, int smem_bytes) {
  allow_shared_memory(kernel, smem_bytes);
  int device = 0, num_sms = 0, per_sm = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  FSATTN_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads,
                                                                  static_cast<size_t>(smem_bytes)));
  FSATTN_ASSERT(per_sm > 0);
  return num_sms * per_sm;
}

}  // namespace fsattn::selected
