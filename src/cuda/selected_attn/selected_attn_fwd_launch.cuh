// Launches of the selected forward: index, then for each launch work items, main kernel and merge.
#pragma once
#include "cuda/selected_attn/launch_common.cuh"
#include "cuda/selected_attn/selected_attn.h"
#include "cuda/selected_attn/selected_attn_fwd_block_major_sm80.cuh"
#include "cuda/selected_attn/selected_attn_fwd_block_major_sm90.cuh"
#include "cuda/selected_attn/selected_attn_fwd_query_major_sm80.cuh"
#include "cuda/selected_attn/selected_attn_fwd_tiles_sm90.cuh"
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
  a.ranges_div = FastDiv(layout.split.num_ranges);
  a.total_q = static_cast<int>(shape.total_q);
  a.chunks_qk = static_cast<int>(shape.head_dim / 8);
  a.chunks_v = static_cast<int>(shape.head_dim_v / 8);
  a.scale_log2 = static_cast<float>(t.shape.softmax_scale) * device::kLog2E;
  a.gate = params.gate;
  a.pages = params.pages;
  a.partial = scratch + layout.partial;
  a.partial_stats = reinterpret_cast<float2*>(scratch + layout.partial_stats);
  a.marks = shape.has_tiles() ? reinterpret_cast<uint8_t*>(scratch + layout.marks) : nullptr;
  a.tile_stats = reinterpret_cast<float2*>(scratch + layout.tile_stats);
  a.tile_marks = reinterpret_cast<uint8_t*>(scratch + layout.tile_marks);
  return a;
}

inline TileArgs make_tile_args(const SelectedShape& shape, const SelectedFwdLayout& layout,
                               const Packing& packing, const SelectedMask& mask, char* scratch) {
  const SelectedTiles& tiles = layout.tiles;
  TileArgs a{};
  a.packing = packing;
  a.mask = mask;
  a.topk_div = FastDiv(shape.topk);
  a.queries_div = FastDiv(tiles.queries);
  a.bits = static_cast<int>(tiles.bits);
  a.queries = static_cast<int>(tiles.queries);
  a.min_queries = static_cast<int>(tiles.min_queries);
  a.capacity = static_cast<int>(tiles.capacity);
  a.entry_ints = static_cast<int>(tiles.entry_ints());
  a.unit = static_cast<int>(tiles.unit);
  a.per_unit = static_cast<int>(tiles.per_unit);
  a.group = static_cast<int>(shape.group_size());
  a.num_units = static_cast<int>(tiles.num_units);
  const int64_t blocks = ceil_div<int64_t>(shape.total_k, kSelectedTileKeys);
  a.window = static_cast<int>(std::clamp<int64_t>(blocks, 1, kSortBlocks));
  a.tail = reinterpret_cast<int32_t*>(scratch + layout.tail);
  a.lists = reinterpret_cast<int32_t*>(scratch + layout.tile_lists);
  a.items = reinterpret_cast<TileItem*>(scratch + layout.tile_items);
  return a;
}

// A template, so that only the rows with tiles compile the kernel.
template <int kThreads = kSortThreads>
void launch_sort(const TileArgs& a, int64_t heads_kv, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.num_units), static_cast<unsigned>(heads_kv));
  const int bytes = a.window * 8 + a.per_unit * a.capacity * 4;
  selected_attn_sort_kernel<kThreads><<<grid, kThreads, bytes, stream>>>(a);
}

// How a row of the table writes its partial rows.
template <SelectedAttnFwdConfig kConfig>
using PartialRows =
    std::conditional_t<has_packed_rows(kConfig), PackedRows,
                       WholeRows<device::ElementOf<kConfig.dtype>, kConfig.head_dim_v / 8,
                                 kConfig.algorithm == SelectedAlgorithm::kBlockMajorWgmma>>;

template <class Format, bool kHasMarks>
void launch_merge(const FwdArgs& a, cudaStream_t stream) {
  constexpr unsigned kRows = kMergeThreads / Format::kLanes;  // of a CTA
  const auto rows = static_cast<unsigned>(a.space.range * a.space.group);
  const dim3 grid(ceil_div(rows, kRows), static_cast<unsigned>(a.list.num_segments));
  if (a.space.partials <= Format::kPlaces) {
    selected_attn_merge_kernel<Format, kHasMarks, true><<<grid, kMergeThreads, 0, stream>>>(a);
  } else {
    selected_attn_merge_kernel<Format, kHasMarks, false><<<grid, kMergeThreads, 0, stream>>>(a);
  }
}

template <SelectedAttnFwdConfig kConfig>
void launch_merge(const FwdArgs& a, cudaStream_t stream) {
  using Format = PartialRows<kConfig>;
  if constexpr (kConfig.algorithm == SelectedAlgorithm::kBlockMajorWgmma) {
    if (a.marks != nullptr) {
      launch_merge<Format, true>(a, stream);
      return;
    }
  }
  launch_merge<Format, false>(a, stream);
}

// What computes the partial rows of a launch.
template <SelectedAttnFwdConfig kConfig>
class MainKernel {
  using T = FwdTraits<kConfig>;

 public:
  MainKernel(const SelectedAttnFwdParams&, const SelectedShape&, const SelectedFwdLayout& layout,
             char*)
      : num_warps_(choose_warps(layout.split.segments_per_launch)),
        num_ctas_(resident_ctas(selected_attn_fwd_block_major_kernel<T>, num_warps_ * kWarpSize,
                                smem_bytes(layout.split.segments_per_launch))) {}
  static bool has_tiles() { return false; }
  BlockIndexView index(const SelectedAttnFwdParams& params, const SelectedShape& shape,
                       const SelectedFwdLayout& layout, char* scratch, Stream stream) const {
    return make_index(shape, params.attn.packing, params.mask, layout.index, scratch, stream);
  }
  void launch_tiles(const FwdArgs&, int*, cudaStream_t) const {}
  void launch(const FwdArgs& a, cudaStream_t stream) const {
    const int bytes = smem_bytes(a.list.num_segments), threads = num_warps_ * kWarpSize;
    selected_attn_fwd_block_major_kernel<T><<<num_ctas_, threads, bytes, stream>>>(a);
  }

 private:
  int smem_bytes(int64_t segments) const {
    return T::smem_bytes(num_warps_, static_cast<int>(segments));
  }
  // All of them, or half where the shared memory of a CTA does not hold the queries of all.
  static int choose_warps(int64_t segments) {
    int device = 0, limit = 0;
    FSATTN_CUDA_CHECK(cudaGetDevice(&device));
    FSATTN_CUDA_CHECK(
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return T::smem_bytes(T::kWarps, static_cast<int>(segments)) <= limit ? T::kWarps
                                                                         : T::kWarps / 2;
  }

  int num_warps_, num_ctas_;
};

// With wgmma: the query-stationary kernel for the popular blocks of all query tiles, once, and the
// block-major kernel for what they leave.
template <SelectedAttnFwdConfig kConfig>
requires(kConfig.algorithm == SelectedAlgorithm::kBlockMajorWgmma) class MainKernel<kConfig> {
  using T = WgmmaTraits<kConfig>;
  using Tile = TileTraits<kConfig>;

 public:
  MainKernel(const SelectedAttnFwdParams& params, const SelectedShape& shape,
             const SelectedFwdLayout& layout, char* scratch)
      : k_map_(make_map(params, params.attn.k)),
        v_map_(make_map(params, params.attn.v)),
        num_ctas_(resident_ctas(selected_attn_fwd_block_major_wgmma_kernel<T>, T::kThreads,
                                T::smem_bytes(static_cast<int>(layout.split.segments_per_launch)))),
        has_tiles_(shape.has_tiles()) {
    if (!has_tiles_) return;
    const SelectedTiles& tiles = layout.tiles;
    q_map_ = device::make_rows_map(params.attn.q, kConfig.dtype, shape.total_q, shape.num_heads_q,
                                   T::kD, static_cast<int>(tiles.queries / Tile::kGroups),
                                   static_cast<int>(shape.group_size()));
    tile_smem_bytes_ = Tile::kSmemBytes;
    tile_ctas_ =
        resident_ctas(selected_attn_fwd_tiles_kernel<Tile>, Tile::kThreads, tile_smem_bytes_);
    tiles_ = make_tile_args(shape, layout, params.attn.packing, params.mask, scratch);
    tiles_.is_paged = params.pages.defined();
    num_tiles_ = static_cast<int>(shape.num_heads_kv * tiles.num_tiles());
  }
  bool has_tiles() const { return has_tiles_; }

  // Of what the tiles leave, so a block index of the caller's does not serve.
  BlockIndexView index(const SelectedAttnFwdParams& params, SelectedShape shape,
                       const SelectedFwdLayout& layout, char* scratch, Stream stream) const {
    SelectedMask mask = params.mask;
    if (has_tiles_) {
      launch_sort<>(tiles_, shape.num_heads_kv, static_cast<cudaStream_t>(stream));
      mask.topk_idx = tiles_.tail;
      mask.token_stride = shape.topk;
      mask.head_stride = shape.total_q * shape.topk;
      shape.has_block_index = false;
    }
    return make_index(shape, params.attn.packing, mask, layout.index, scratch, stream);
  }
  // The popular blocks of all tiles.
  void launch_tiles(const FwdArgs& a, int* counter, cudaStream_t stream) const {
    if (!has_tiles_) return;
    const TileFwdArgs args{a,
                           tiles_.items,
                           counter,
                           num_tiles_,
                           tiles_.lists,
                           tiles_.queries,
                           tiles_.capacity,
                           tiles_.entry_ints};
    selected_attn_fwd_tiles_kernel<Tile>
        <<<tile_ctas_, Tile::kThreads, tile_smem_bytes_, stream>>>(args, q_map_, k_map_, v_map_);
  }
  void launch(const FwdArgs& a, cudaStream_t stream) const {
    const int bytes = T::smem_bytes(a.list.num_segments);
    selected_attn_fwd_block_major_wgmma_kernel<T>
        <<<num_ctas_, T::kThreads, bytes, stream>>>(a, k_map_, v_map_);
  }

 private:
  static CUtensorMap make_map(const SelectedAttnFwdParams& params, Rows rows) {
    // Without keys no box is ever read, but a map needs an address and a size.
    const int64_t tokens = std::max<int64_t>(1, params.attn.packing.total_k);
    if (params.attn.packing.total_k == 0) rows = {params.attn.q.data, T::kD, T::kD};
    const PagedKeys& pages = params.pages;
    if (!pages.defined()) {
      return device::make_rows_map(rows, kConfig.dtype, tokens, params.attn.shape.num_heads_kv,
                                   T::kD, T::kKeys);
    }
    const int64_t heads = pages.head_rows > 0 ? 1 : params.attn.shape.num_heads_kv;
    return device::make_rows_map(rows, kConfig.dtype, pages.total_rows, heads, T::kD, T::kKeys);
  }

  CUtensorMap k_map_, v_map_;
  int num_ctas_;
  bool has_tiles_;
  CUtensorMap q_map_{};
  int tile_ctas_ = 0, tile_smem_bytes_ = 0, num_tiles_ = 0;
  TileArgs tiles_{};
};

// No row of the launch is written yet.
inline void clear_stats(const FwdArgs& a, const SelectedSplit& split, cudaStream_t stream) {
  const int64_t rows = a.list.num_segments * split.range * a.space.partials * a.space.group;
  const size_t bytes = static_cast<size_t>(rows) * sizeof(float2);
  FSATTN_CUDA_CHECK(cudaMemsetAsync(a.partial_stats, 0xff, bytes, stream));
}

template <SelectedAttnFwdConfig kConfig>
void run_fwd_block_major(const SelectedAttnFwdParams& params, Stream stream) {
  const SelectedShape shape = shape_of(params);
  const SelectedFwdLayout layout = selected_fwd_layout(shape, kConfig);
  const SelectedSplit& split = layout.split;
  FSATTN_ASSERT(params.scratch.bytes >= layout.bytes);
  assert_addressable(params.attn.q, shape.total_q, shape.num_heads_q);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  char* scratch = static_cast<char*>(params.scratch.data);
  MainKernel<kConfig> main_kernel(params, shape, layout, scratch);
  const BlockIndexView index = main_kernel.index(params, shape, layout, scratch, stream);
  ItemArgs build = make_item_args(shape, split, params.attn.packing, index);
  build.pages = params.pages;
  build.items = reinterpret_cast<Item*>(scratch + layout.items);
  build.item_counts = reinterpret_cast<int*>(scratch + layout.item_counts);
  FwdArgs a = make_fwd_args(params, shape, layout, scratch);
  a.entries = index.entry;
  int* counters = reinterpret_cast<int*>(scratch + layout.counters);
  FSATTN_CUDA_CHECK(cudaMemsetAsync(scratch + layout.zeros, 0, layout.zero_bytes, cuda_stream));
  if (main_kernel.has_tiles()) {
    main_kernel.launch_tiles(a, counters + split.num_launches, cuda_stream);
  } else {
    a.marks = nullptr;
  }

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
    if (a.marks == nullptr) clear_stats(a, split, cuda_stream);
    main_kernel.launch(a, cuda_stream);
    launch_merge<kConfig>(a, cuda_stream);
    FSATTN_CUDA_CHECK(cudaGetLastError());
    if (a.marks != nullptr) a.marks += split.slots_per_launch();
  }
}

}  // namespace selected

template <SelectedAttnFwdConfig kConfig>
void launch_selected_attn_fwd(const SelectedAttnFwdParams& params, Stream stream) {
  if (params.attn.packing.total_q == 0) return;
  FSATTN_ASSERT(!params.pages.defined() ||
                kConfig.algorithm == SelectedAlgorithm::kBlockMajorWgmma);
  if constexpr (kConfig.algorithm == SelectedAlgorithm::kQueryMajor) {
    selected::run_fwd_query_major<kConfig>(params, static_cast<cudaStream_t>(stream));
  } else {
    selected::run_fwd_block_major<kConfig>(params, stream);
  }
}

}  // namespace fsattn
