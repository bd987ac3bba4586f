// Launches of the selected backward: index, row statistics, then for each launch work items, main
// kernel and the two sums.
#pragma once
#include "cuda/selected_attn/launch_common.cuh"
#include "cuda/selected_attn/selected_attn.h"
#include "cuda/selected_attn/selected_attn_bwd_reduce.cuh"
#include "cuda/selected_attn/selected_attn_bwd_sm80.cuh"
#include "cuda/selected_attn/selected_attn_bwd_sm90.cuh"
#include "cuda/side_stream.h"

namespace fsattn {
namespace selected {

inline BwdArgs make_bwd_args(const SelectedAttnBwdParams& params, const SelectedShape& shape,
                             const SelectedBwdLayout& layout, char* scratch) {
  BwdArgs a{};
  a.attn = params.attn;
  a.means = params.means;
  a.entry_stride = shape.total_q * shape.topk;
  a.list.capacity = static_cast<int>(layout.split.item_capacity);
  a.space = make_row_space(shape, layout.split);
  a.chunks_qk = static_cast<int>(shape.head_dim / 8);
  a.chunks_v = static_cast<int>(shape.head_dim_v / 8);
  a.scale = static_cast<float>(params.attn.shape.softmax_scale);
  a.scale_log2 = a.scale * device::kLog2E;
  a.stats = reinterpret_cast<float2*>(params.attn.row_stats != nullptr ? params.attn.row_stats
                                                                       : scratch + layout.stats);
  a.dq_partial = scratch + layout.dq_partial;
  a.marks = reinterpret_cast<uint8_t*>(scratch + layout.marks);
  a.dkv_items = reinterpret_cast<float*>(scratch + layout.dkv_items);
  a.dkv_sum = reinterpret_cast<float*>(scratch + layout.dkv_sum);
  a.keys = static_cast<int>(layout.split.keys);
  a.num_parts = static_cast<int>(layout.split.num_parts);
  return a;
}

template <SelectedAttnBwdConfig kConfig>
void launch_stats(const BwdArgs& a, cudaStream_t stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  constexpr int64_t kRowsPerCta = kReduceThreads / 8;
  const int64_t rows = a.attn.packing.total_q * a.attn.shape.num_heads_q;
  const auto grid = static_cast<unsigned>(ceil_div(rows, kRowsPerCta));
  selected_attn_stats_kernel<Element><<<grid, kReduceThreads, 0, stream>>>(a);
}

// dQ of the launch's segments, and dK, dV of its KV heads.
template <SelectedAttnBwdConfig kConfig>
void launch_sums(const BwdArgs& a, const ItemArgs& build, int64_t heads, cudaStream_t stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  constexpr int kLanes = kConfig.head_dim > 128 ? 32 : kConfig.head_dim / 8;
  constexpr bool kInterleaved = kConfig.arch == Arch::kSm90a;
  using Sum = std::conditional_t<kInterleaved, DkvOfWgmma<Element>, DkvOfFp32<Element>>;
  SumArgs args{a, build};
  args.heads = static_cast<int>(heads);
  args.num_slices =
      ceil_div(a.keys * (a.chunks_qk + a.chunks_v) * 8 / Sum::kColumns, kDkvSlice<Sum>);
  args.dkv_ctas = a.num_parts * args.num_slices * args.heads;
  args.row_ctas = ceil_div(a.space.range * a.space.group, kReduceThreads / kLanes);
  const int ctas = args.dkv_ctas + args.row_ctas * a.list.num_segments;
  selected_attn_sums_kernel<Element, kLanes, kInterleaved>
      <<<static_cast<unsigned>(ctas), kReduceThreads, 0, stream>>>(args);
}

// The main kernel of a row: how many CTAs of it the device holds, and its launch.
template <SelectedAttnBwdConfig kConfig>
struct BwdKernel {
  using T = BwdTraits<kConfig>;

  explicit BwdKernel(const SelectedAttnBwdParams&) {}
  static int num_ctas() {
    return resident_ctas(selected_attn_bwd_kernel<T>, T::kThreads, sizeof(BwdStorage<T>));
  }
  void launch(const BwdArgs& a, int num_ctas, cudaStream_t stream) const {
    selected_attn_bwd_kernel<T><<<num_ctas, T::kThreads, sizeof(BwdStorage<T>), stream>>>(a);
  }
};

template <SelectedAttnBwdConfig kConfig>
requires(kConfig.arch == Arch::kSm90a) struct BwdKernel<kConfig> {
  using T = BwdWgmmaTraits<kConfig>;
  using Storage = BwdWgmmaStorage<T>;

  explicit BwdKernel(const SelectedAttnBwdParams& params)
      : k_map(make_map(params, params.attn.k)), v_map(make_map(params, params.attn.v)) {}
  static CUtensorMap make_map(const SelectedAttnBwdParams& params, Rows rows) {
    // Without keys no box is ever read, but a map needs an address and a size.
    const int64_t tokens = std::max<int64_t>(1, params.attn.packing.total_k);
    if (params.attn.packing.total_k == 0) rows = {params.attn.q.data, T::kD, T::kD};
    return device::make_rows_map(rows, kConfig.dtype, tokens, params.attn.shape.num_heads_kv, T::kD,
                                 T::kKeys);
  }
  static int num_ctas() {
    return resident_ctas(selected_attn_bwd_wgmma_kernel<T>, T::kThreads, sizeof(Storage));
  }
  void launch(const BwdArgs& a, int num_ctas, cudaStream_t stream) const {
    selected_attn_bwd_wgmma_kernel<T>
        <<<num_ctas, T::kThreads, sizeof(Storage), stream>>>(a, k_map, v_map);
  }

  CUtensorMap k_map, v_map;
};

// The sums read what the second stream writes; once they may, so may all later launches.
inline void wait_for_side(Stream side, cudaStream_t stream) {
  if (side != nullptr) join_stream(side, stream);
}

// One launch: the segments `a.space.first_segment` and on, of `heads` KV heads.
template <SelectedAttnBwdConfig kConfig>
void run_bwd_launch(const BwdKernel<kConfig>& kernel, const BwdArgs& a, const ItemArgs& build,
                    int64_t heads, int num_ctas, Stream side, cudaStream_t stream) {
  const int64_t slots = int64_t{a.list.num_segments} * a.space.range * a.space.partials;
  FSATTN_CUDA_CHECK(cudaMemsetAsync(a.marks, 0, static_cast<size_t>(slots), stream));
  kernel.launch(a, num_ctas, stream);
  wait_for_side(side, stream);
  launch_sums<kConfig>(a, build, heads, stream);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

template <SelectedAttnBwdConfig kConfig>
void run_bwd(const SelectedAttnBwdParams& params, Stream stream) {
  const SelectedShape shape = shape_of(params);
  const SelectedBwdLayout layout = selected_bwd_layout(shape);
  FSATTN_ASSERT(params.scratch.bytes >= layout.bytes);
  assert_addressable(params.attn.q, shape.total_q, shape.num_heads_q);
  assert_addressable(params.attn.dout, shape.total_q, shape.num_heads_q);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  char* scratch = static_cast<char*>(params.scratch.data);
  const BlockIndexView index =
      make_index(shape, params.attn.packing, params.mask, layout.index, scratch, stream);
  BwdArgs a = make_bwd_args(params, shape, layout, scratch);
  a.entries = index.entry;
  ItemArgs build = make_item_args(shape, layout.split, params.attn.packing, index);
  build.items = reinterpret_cast<Item*>(scratch + layout.items);
  build.item_counts = reinterpret_cast<int*>(scratch + layout.item_counts);
  build.part_items = reinterpret_cast<int*>(scratch + layout.part_items);
  build.segments_per_launch = static_cast<int>(layout.segments_per_launch());
  const int64_t num_launches = layout.num_launches(shape.num_heads_kv);
  int* counters = reinterpret_cast<int*>(scratch + layout.counters);
  const size_t counter_bytes = static_cast<size_t>(num_launches) * sizeof(int);
  FSATTN_CUDA_CHECK(cudaMemsetAsync(counters, 0, counter_bytes, cuda_stream));
  if (params.attn.row_stats == nullptr) launch_stats<kConfig>(a, cuda_stream);
  const BwdKernel<kConfig> kernel(params);
  const int num_ctas = kernel.num_ctas();

  for (int64_t launch = 0; launch < num_launches; ++launch) {
    const int64_t head = launch / layout.launches_per_head * layout.heads_per_launch;
    const int64_t range = launch % layout.launches_per_head * layout.ranges_per_launch;
    const int64_t heads = std::min(layout.heads_per_launch, shape.num_heads_kv - head);
    const int64_t ranges = std::min(layout.ranges_per_launch, layout.split.num_ranges - range);
    a.space.first_segment = static_cast<int>(head * layout.split.num_ranges + range);
    a.list.num_segments = static_cast<int>(heads * ranges);
    const int64_t in_build = launch % layout.launches_per_build * layout.segments_per_launch();
    if (in_build == 0) {
      build.first_segment = a.space.first_segment;
      launch_items(build,
                   std::min(layout.launches_per_build * layout.segments_per_launch(),
                            layout.split.num_segments - build.first_segment),
                   cuda_stream);
    }
    a.list.items = build.items + in_build * layout.split.item_capacity;
    a.list.item_counts = build.item_counts + in_build;
    a.part_items = build.part_items + in_build * (layout.split.num_parts + 1);
    a.list.counter = counters + launch;
    a.is_first = range == 0;
    a.is_last = range + ranges == layout.split.num_ranges;
    const Stream side = launch == 0 ? params.side : nullptr;
    run_bwd_launch<kConfig>(kernel, a, build, heads, num_ctas, side, cuda_stream);
  }
}

// Without queries every gradient of a key is zero.
inline void zero_dkv(const SelectedAttnBwdParams& params, cudaStream_t stream) {
  const AttnBwdTensors& t = params.attn;
  if (t.accumulate_dkv) return;
  const auto zero = [&](const Rows& rows, int64_t dim) {
    for (int64_t h = 0; h < t.shape.num_heads_kv; ++h) {
      auto* first = static_cast<uint16_t*>(rows.data) + h * rows.head_stride;
      FSATTN_CUDA_CHECK(cudaMemset2DAsync(first, static_cast<size_t>(rows.token_stride) * 2, 0,
                                          static_cast<size_t>(dim) * 2,
                                          static_cast<size_t>(t.packing.total_k), stream));
    }
  };
  zero(t.dk, t.shape.head_dim);
  zero(t.dv, t.shape.head_dim_v);
}

}  // namespace selected

template <SelectedAttnBwdConfig kConfig>
void launch_selected_attn_bwd(const SelectedAttnBwdParams& params, Stream stream) {
  if (params.attn.packing.total_q == 0) {
    selected::wait_for_side(params.side, static_cast<cudaStream_t>(stream));
    selected::zero_dkv(params, static_cast<cudaStream_t>(stream));
  } else {
    selected::run_bwd<kConfig>(params, stream);
  }
}

}  // namespace fsattn
