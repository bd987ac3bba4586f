// selected_attn_sort: finds the popular blocks of every tile of queries (plan/selected_tiles.h).
//
// Math    block b of a tile is popular iff at least min_queries of its queries have b in their rows of
//         topk_idx and may see it, or iff one does and the tile is whole: what all blocks of the list cost
//         is compared with what popular ones and a tail would (not among more than 2048 blocks). Its list holds the popular blocks, each with the set of the queries
//         that want it, by the warpgroups that these belong to and in ascending order among those of the
//         same ones (of 2048 blocks at a time); tail[h, t, j] is topk_idx[h, t, j], or -1 where the list
//         of t's tile has that block, t may not see it, or an earlier place has it too.
// Tiles   grid (units, Hkv), 128 threads. A unit is the one to sixteen tiles whose sets fit in 64 bits;
//         units are numbered like block slots.
// Order   bits are or-ed; the first query of a set speaks for its block, and a block's place in a list
//         is the number of lower ones: no order of the atomics can show.
// Memory  a bit set of the unit's queries for up to 2048 blocks; longer sequences take windows.
// Bound   memory: topk_idx is read three times (twice from the L1), tail written once.
#pragma once
#include "cuda/device/fast_div.cuh"
#include "cuda/device/packing.cuh"
#include "cuda/device/scan.cuh"
#include "params/attention.h"
#include "plan/selected_attn_table.h"

namespace fsattn::selected {

// Work of the query-stationary kernel: a tile.
struct alignas(16) TileItem {
  int list;   // of popular blocks, counted over all KV heads: the item's own number
  int count;  // of them; -1 marks the end of all work
  int head;   // KV head
  int first_token;
  int16_t num_queries;
  int16_t is_whole;  // no query of the tile has any other block
  int position;      // of the first query
  int num_keys;      // of the sequence
  int key_base;      // its first row of k and v; in pages: the sequence
};
static_assert(sizeof(TileItem) == kSelectedItemBytes);

struct TileArgs {
  Packing packing;
  SelectedMask mask;
  FastDiv topk_div, queries_div;
  int queries, bits, min_queries, capacity, entry_ints, unit, per_unit, num_units;
  int group;        // heads
  int window;       // blocks whose sets fit in shared memory
  bool is_paged;    // k and v are in pages
  int32_t* tail;    // [Hkv, total_q, topk]
  int32_t* lists;   // [Hkv, tiles, capacity, entry_ints]: block, set of queries
  TileItem* items;  // [Hkv, tiles]
};

// A unit's queries and what they may see.
struct Unit {
  int first_token;
  int num_queries;  // 0 when the slot is empty
  int64_t position;
  device::KeyRange keys;
  int seq;

  __device__ int num_blocks(int query) const {  // that a query may see
    const int64_t last = min(position + query, int64_t{keys.end} - keys.begin - 1);
    return last < 0 ? 0 : static_cast<int>(last / kSelectedTileKeys) + 1;
  }
};

__device__ __forceinline__ Unit find_unit(const TileArgs& a, int number) {
  const Packing& packing = a.packing;
  const int batch = static_cast<int>(packing.batch), total = static_cast<int>(packing.total_q);
  const int seq = device::find_slot_sequence(packing.cu_q, batch, number, a.unit);
  const int begin = __ldg(packing.cu_q + seq), end = min(__ldg(packing.cu_q + seq + 1), total);
  Unit u{};
  const int64_t first =
      begin + (number - first_block_slot(begin, seq, a.unit)) * static_cast<int64_t>(a.unit);
  if (first < max(begin, 0) || first >= end) return u;
  u.first_token = static_cast<int>(first);
  u.num_queries = min(a.unit, end - u.first_token);
  u.position = first + device::position_shift(packing, seq);
  u.keys = device::find_keys(packing, seq);
  u.seq = seq;
  return u;
}

inline constexpr int kSortThreads = 128;
inline constexpr int kSortBlocks = 2048;  // of a window, at most; a number of them has 16 bits

// What a CTA has of the blocks of one window.
struct SortWindow {
  uint64_t* sets;  // [blocks] of the unit's queries
  int* found;      // [tiles, capacity] popular blocks and what orders them above, in no order
  int* num_found;  // [tiles]
};

// The queries of one tile that want a block.
__device__ __forceinline__ uint64_t tile_set(const TileArgs& a, const SortWindow& s, int block,
                                             int tile) {
  return s.sets[block] << (64 - a.bits - tile * a.bits) >> (64 - a.bits);
}

inline constexpr int kFoundBlockBits = 16;

// The warpgroups of a set's queries, as bits.
__device__ __forceinline__ uint32_t find_groups(const TileArgs& a, uint64_t set) {
  const int share = a.queries / kSelectedTileGroups;
  uint32_t groups = 0;
#pragma unroll
  for (int g = 0; g < kSelectedTileGroups; ++g) {
    if ((set >> g * share & ((uint64_t{1} << share) - 1)) != 0) groups |= 1u << g;
  }
  return groups;
}

// Sums over the blocks of a tile.
struct TileSums {
  uint32_t all, popular;  // blocks in the upper half, products of a warpgroup in the lower one
  uint32_t tail;          // picks of the others
};

// What bringing and multiplying blocks costs.
__device__ __forceinline__ int list_cost(uint32_t blocks) {
  return max(static_cast<int>(blocks >> 16) * kSelectedBlockCost,
             static_cast<int>(blocks & 0xffff) * kSelectedProductCost);
}

__device__ __forceinline__ bool is_whole_tile(const TileArgs& a, const TileSums& sums,
                                              int num_queries) {
  const int rest =
      static_cast<int>(sums.tail) * kSelectedRowCost + num_queries * kSelectedMergeCost;
  return static_cast<int>(sums.all >> 16) <= a.capacity &&
         list_cost(sums.all) <= list_cost(sums.popular) + rest * a.group;
}

// Where blocks that these queries of a tile want stand in its list: those of the same warpgroups together,
// so that one passes over both blocks of a step or over none, and most of a warpgroup's own beside each other.
__device__ __forceinline__ int find_order(const TileArgs& a, uint64_t set) {
  static_assert(kSelectedTileGroups == 3);
  // Of 7 down to 1: all, 2 and 1, 2, 2 and 0, 0, 1 and 0, 1.
  constexpr uint32_t kOrder = 0x01325640;
  return static_cast<int>(kOrder >> find_groups(a, set) * 4 & 15);
}

// Writes the found blocks of all tiles to their lists, behind what is there.
__device__ __forceinline__ void list_found(const TileArgs& a, const SortWindow& s, int first_block,
                                           int first_tile, const int* list_sizes) {
  for (int i = threadIdx.x; i < a.per_unit * a.capacity; i += kSortThreads) {
    const int tile = i / a.capacity, count = s.num_found[tile];
    if (i - tile * a.capacity >= count) continue;
    const int found = s.found[i], block = found & ((1 << kFoundBlockBits) - 1);
    int rank = list_sizes[tile];
    for (int j = 0; j < count; ++j) rank += s.found[tile * a.capacity + j] < found;
    int32_t* to = a.lists + (int64_t{first_tile + tile} * a.capacity + rank) * a.entry_ints;
    const uint64_t set = tile_set(a, s, block, tile);
    to[0] = first_block + block;
    to[1] = static_cast<int32_t>(set);
    if (a.entry_ints == 3) to[2] = static_cast<int32_t>(set >> 32);
  }
}

// Whether an earlier place of the query's row has the same id.
__device__ __forceinline__ bool is_repeat(const TileArgs& a, const int32_t* ids, int pick,
                                          int query) {
  const int32_t* row = ids + query * a.mask.token_stride;
  const int place = a.topk_div.remainder(pick, query), id = __ldg(row + place);
#pragma unroll 1
  for (int j = 0; j < place; ++j) {
    if (__ldg(row + j) == id) return true;
  }
  return false;
}

// Adds what the lanes of a warp have; most often all of one tile.
__device__ __forceinline__ void add_sums(TileSums* sums, int tile, const TileSums& own) {
  const auto add = [&](uint32_t TileSums::*sum) {
    const uint32_t total = __reduce_add_sync(kFullMask, own.*sum);
    if (threadIdx.x % kWarpSize == 0 && total != 0) atomicAdd(&(sums[tile].*sum), total);
  };
  if (__all_sync(kFullMask, tile == __shfl_sync(kFullMask, tile, 0))) {
    add(&TileSums::all);
    add(&TileSums::popular);
    add(&TileSums::tail);
    return;
  }
  if (own.all == 0) return;
  atomicAdd(&sums[tile].all, own.all);
  atomicAdd(&sums[tile].popular, own.popular);
  atomicAdd(&sums[tile].tail, own.tail);
}

__device__ __forceinline__ TileItem make_item(const TileArgs& a, const Unit& unit, int tile,
                                              int list, int count, bool is_whole) {
  constexpr int64_t kFar = int64_t{1} << 30;  // behind all keys
  const int before = tile * a.queries;
  TileItem item{};
  item.list = list;
  item.count = count;
  item.head = blockIdx.y;
  item.first_token = unit.first_token + before;
  item.num_queries = static_cast<int16_t>(min(unit.num_queries - before, a.queries));
  item.is_whole = is_whole;
  item.position = static_cast<int>(min(max(unit.position + before, -kFar), kFar));
  item.num_keys = unit.keys.end - unit.keys.begin;
  item.key_base = a.is_paged ? unit.seq : unit.keys.begin;
  return item;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 8)
    selected_attn_sort_kernel(const __grid_constant__ TileArgs a) {
  static_assert(kThreads == kSortThreads);
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ int list_sizes[16], num_found[16], has_repeats;
  __shared__ TileSums sums[16];
  __shared__ bool is_whole[16];
  auto* sets = reinterpret_cast<uint64_t*>(smem);
  const SortWindow s{sets, reinterpret_cast<int*>(sets + a.window), num_found};
  const int head = blockIdx.y, topk = static_cast<int>(a.mask.topk);
  const Unit unit = find_unit(a, blockIdx.x);
  const int first_tile = (head * a.num_units + blockIdx.x) * a.per_unit;
  const int num_blocks = unit.num_queries == 0 ? 0 : unit.num_blocks(unit.num_queries - 1);
  const int num_picks = unit.num_queries * topk;
  const int32_t* ids =
      a.mask.topk_idx + head * a.mask.head_stride + unit.first_token * a.mask.token_stride;
  int32_t* tail = a.tail + (head * a.packing.total_q + unit.first_token) * topk;
  if (threadIdx.x < 16) {
    list_sizes[threadIdx.x] = num_found[threadIdx.x] = 0;
    sums[threadIdx.x] = {};
    is_whole[threadIdx.x] = false;
  }
  for (int begin = 0; begin == 0 || begin < num_blocks; begin += a.window) {
    const int window = min(a.window, num_blocks - begin);
    for (int i = threadIdx.x; i < window; i += kThreads) sets[i] = 0;
    if (threadIdx.x == 0) has_repeats = 0;
    __syncthreads();
    // Calls f(pick, query, block in the window, or -1), also for what is behind the last pick.
    const auto for_picks = [&](const auto& f) {
      constexpr int kUnroll = 6;  // loads in flight: all of a thread where topk is 16
#pragma unroll 1
      for (int p0 = 0; p0 < num_picks; p0 += kUnroll * kThreads) {
        int id[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          const int pick = p0 + i * kThreads + threadIdx.x, query = a.topk_div.quotient(pick);
          const int32_t* row = ids + query * a.mask.token_stride;
          id[i] = pick < num_picks ? __ldg(row + a.topk_div.remainder(pick, query)) : -1;
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          const int pick = p0 + i * kThreads + threadIdx.x, query = a.topk_div.quotient(pick);
          const bool is_inside =
              id[i] >= begin && id[i] < begin + window && id[i] < unit.num_blocks(query);
          f(pick, query, is_inside ? id[i] - begin : -1);
        }
      }
    };
    for_picks([&](int, int query, int block) {
      if (block < 0) return;
      const int tile = a.queries_div.quotient(query);
      const int at = tile * a.bits + a.queries_div.remainder(query, tile);
      const uint32_t bit = 1u << (at % 32);
      const uint32_t before = atomicOr(reinterpret_cast<uint32_t*>(sets + block) + at / 32, bit);
      if (before & bit) has_repeats = 1;
    });
    __syncthreads();
    // Whether the pick is its query's first one of the block and its query the first one of the set.
    const auto speaks = [&](uint64_t set, int pick, int query, int in_tile) {
      return __ffsll(static_cast<long long>(set)) - 1 == in_tile &&
             !(has_repeats && is_repeat(a, ids, pick, query));
    };
    if (num_blocks <= a.window) {
      for_picks([&](int pick, int query, int block) {
        const int tile = a.queries_div.quotient(min(query, a.unit - 1));
        TileSums own{};
        if (block >= 0) {
          const uint64_t set = tile_set(a, s, block, tile);
          if (speaks(set, pick, query, a.queries_div.remainder(query, tile))) {
            const int count = __popcll(set);
            own.all = 1u << 16 | __popc(find_groups(a, set));
            (count >= a.min_queries ? own.popular : own.tail) =
                count >= a.min_queries ? own.all : static_cast<uint32_t>(count);
          }
        }
        add_sums(sums, tile, own);
      });
      __syncthreads();
      if (threadIdx.x < a.per_unit) {
        const int queries = unit.num_queries - static_cast<int>(threadIdx.x) * a.queries;
        is_whole[threadIdx.x] =
            is_whole_tile(a, sums[threadIdx.x], max(min(queries, a.queries), 0));
      }
      __syncthreads();
    }
    for_picks([&](int pick, int query, int block) {
      if (pick >= num_picks) return;
      if (block < 0) {
        if (begin == 0) tail[pick] = -1;  // a later window may know better
        return;
      }
      const int tile = a.queries_div.quotient(query);
      const uint64_t set = tile_set(a, s, block, tile);
      const bool is_popular = is_whole[tile] || __popcll(set) >= a.min_queries;
      const bool is_extra = has_repeats && is_repeat(a, ids, pick, query);
      tail[pick] = is_popular || is_extra ? -1 : begin + block;
      const int first = __ffsll(static_cast<long long>(set)) - 1;
      if (is_popular && !is_extra && first == a.queries_div.remainder(query, tile)) {
        s.found[tile * a.capacity + atomicAdd(&num_found[tile], 1)] =
            find_order(a, set) << kFoundBlockBits | block;
      }
    });
    __syncthreads();
    list_found(a, s, begin, first_tile, list_sizes);
    __syncthreads();
    if (threadIdx.x < a.per_unit) {
      list_sizes[threadIdx.x] += num_found[threadIdx.x];
      num_found[threadIdx.x] = 0;
    }
  }
  if (threadIdx.x < a.per_unit) {
    const int list = first_tile + threadIdx.x;
    a.items[list] =
        make_item(a, unit, threadIdx.x, list, list_sizes[threadIdx.x], is_whole[threadIdx.x]);
  }
}

}  // namespace fsattn::selected
