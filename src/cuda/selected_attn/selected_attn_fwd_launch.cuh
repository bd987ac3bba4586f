// Launches of the selected forward: index, then for each launch work items, main kernel and merge.
#pragma once
#include "cuda/selected_attn/launch_common.cuh"
#include "cuda/selected_attn/selected_attn.h"
#include "cuda/selected_attn/selected_attn_fwd_block_major_sm80.cuh"
#include "cuda/selected_attn/selected_attn_fwd_block_major_sm90.cuh"
#include "cuda/selected_attn/selected_attn_fwd_query_major_sm80.cuh"
#include "cuda/selected_attn/selected_attn_merge.cuh"

namespace fsattn {
namespace selected {

inline FwdArgs make_fwd_args(const SelectedAttnFwdParams& params, const SelectedShape& shape,
                             const SelectedFwdLayout& layout, char* scratch) {
  const AttnFwdTensors& t = params.attn;
  FwdArgs a{};
  a.q = t.q;
  a.k = t.k;
  a.v = t.v;
  a.o = t.o;
  a.lse = t.lse;
  a.entry_stride = shape.total_q * shape.topk;
  a.list.capacity = static_cast<int>(layout.split.item_capacity);
  a.space = make_row_space(shape, layout.split);
  a.total_q = static_cast<int>(shape.total_q);
  a.chunks_qk = static_cast<int>(shape.head_dim / 8);
  a.chunks_v = static_cast<int>(shape.head_dim_v / 8);
  a.scale_log2 = static_cast<float>(t.shape.softmax_scale) * device::kLog2E;
  a.partial = scratch + layout.partial;
  a.partial_stats = reinterpret_cast<float2*>(scratch + layout.partial_stats);
  return a;
}

template <SelectedAttnFwdConfig kConfig>
void launch_merge(const FwdArgs& a, cudaStream_t stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  constexpr int kLanes = kConfig.head_dim_v / 8;
  const auto rows = static_cast<unsigned>(a.space.range * a.space.group);
  const dim3 grid(ceil_div(rows, static_cast<unsigned>(kMergeThreads / kLanes)),
                  static_cast<unsigned>(a.list.num_segments));
  selected_attn_merge_kernel<Element, kLanes><<<grid, kMergeThreads, 0, stream>>>(a);
}

// The main kernel of a row: how many CTAs of it the device holds, and its launch.
template <SelectedAttnFwdConfig kConfig>
struct MainKernel {
  using T = FwdTraits<kConfig>;

  static int num_ctas(const SelectedSplit& split) {
    return resident_ctas(selected_attn_fwd_block_major_kernel<T>, T::kThreads,
                         T::smem_bytes(static_cast<int>(split.segments_per_launch)));
  }
  explicit MainKernel(const SelectedAttnFwdParams&) {}
  void launch(const FwdArgs& a, int num_ctas, cudaStream_t stream) const {
    const int bytes = T::smem_bytes(a.list.num_segments);
    selected_attn_fwd_block_major_kernel<T><<<num_ctas, T::kThreads, bytes, stream>>>(a);
  }
};

template <SelectedAttnFwdConfig kConfig>
requires(kConfig.algorithm == SelectedAlgorithm::kBlockMajorWgmma) struct MainKernel<kConfig> {
  using T = WgmmaTraits<kConfig>;

  static int num_ctas(const SelectedSplit& split) {
    return resident_ctas(selected_attn_fwd_block_major_wgmma_kernel<T>, T::kThreads,
                         T::smem_bytes(static_cast<int>(split.segments_per_launch)));
  }
  explicit MainKernel(const SelectedAttnFwdParams& params)
      : k_map(make_map(params, params.attn.k)), v_map(make_map(params, params.attn.v)) {}
  static CUtensorMap make_map(const SelectedAttnFwdParams& params, Rows rows) {
    // Without keys no box is ever read, but a map needs an address and a size.
    const int64_t tokens = std::max<int64_t>(1, params.attn.packing.total_k);
    if (params.attn.packing.total_k == 0) rows = {params.attn.q.data, T::kD, T::kD};
    return device::make_rows_map(rows, kConfig.dtype, tokens, params.attn.shape.num_heads_kv, T::kD,
                                 T::kKeys);
  }
  void launch(const FwdArgs& a, int num_ctas, cudaStream_t stream) const {
    const int bytes = T::smem_bytes(a.list.num_segments);
    selected_attn_fwd_block_major_wgmma_kernel<T>
        <<<num_ctas, T::kThreads, bytes, stream>>>(a, k_map, v_map);
  }

  CUtensorMap k_map, v_map;
};

template <SelectedAttnFwdConfig kConfig>
void run_fwd_block_major(const SelectedAttnFwdParams& params, Stream stream) {
  const SelectedShape shape = shape_of(params);
  const SelectedFwdLayout layout = selected_fwd_layout(shape);
  const SelectedSplit& split = layout.split;
  FSATTN_ASSERT(params.scratch.bytes >= layout.bytes);
  assert_addressable(params.attn.q, shape.total_q, shape.num_heads_q);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  char* scratch = static_cast<char*>(params.scratch.data);
  const BlockIndexView index =
      make_index(shape, params.attn.packing, params.mask, layout.index, scratch, stream);
  ItemArgs build = make_item_args(shape, split, params.attn.packing, index);
  build.items = reinterpret_cast<Item*>(scratch + layout.items);
  build.item_counts = reinterpret_cast<int*>(scratch + layout.item_counts);
  FwdArgs a = make_fwd_args(params, shape, layout, scratch);
  a.entries = index.entry;
  int* counters = reinterpret_cast<int*>(scratch + layout.counters);
  const size_t counter_bytes = static_cast<size_t>(split.num_launches) * sizeof(int);
  FSATTN_CUDA_CHECK(cudaMemsetAsync(counters, 0, counter_bytes, cuda_stream));
  // No partial row is written yet; the merge of each launch leaves them so for the next.
  const int64_t rows = split.rows_per_launch(shape.group_size());
  const size_t stats_bytes = static_cast<size_t>(rows) * sizeof(float2);
  FSATTN_CUDA_CHECK(cudaMemsetAsync(a.partial_stats, 0xff, stats_bytes, cuda_stream));
  const MainKernel<kConfig> main_kernel(params);
  const int num_ctas = main_kernel.num_ctas(split);

  for (int64_t launch = 0; launch < split.num_launches; ++launch) {
    const int64_t first = launch * split.segments_per_launch;
    const int64_t in_build = launch % split.launches_per_build * split.segments_per_launch;
    if (in_build == 0) {
      build.first_segment = static_cast<int>(first);
      const int64_t count = std::min(split.segments_per_build(), split.num_segments - first);
      launch_items(build, count, cuda_stream);
    }
    a.space.first_segment = static_cast<int>(first);
    a.list.items = build.items + in_build * split.item_capacity;
    a.list.item_counts = build.item_counts + in_build;
    a.list.counter = counters + launch;
    a.list.num_segments =
        static_cast<int>(std::min(split.segments_per_launch, split.num_segments - first));
    main_kernel.launch(a, num_ctas, cuda_stream);
    launch_merge<kConfig>(a, cuda_stream);
    FSATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace selected

template <SelectedAttnFwdConfig kConfig>
void launch_selected_attn_fwd(const SelectedAttnFwdParams& params, Stream stream) {
  if (params.attn.packing.total_q == 0) return;
  if constexpr (kConfig.algorithm == SelectedAlgorithm::kQueryMajor) {
    selected::run_fwd_query_major<kConfig>(params, static_cast<cudaStream_t>(stream));
  } else {
    selected::run_fwd_block_major<kConfig>(params, stream);
  }
}

}  // namespace fsattn
