// The tiles kernel (selected_attn_fwd_tiles_sm90.cuh): what its warps share in shared memory, and the producer
// warp, which brings the queries of a tile, and K and V of its blocks.
#pragma once
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"
#include "cuda/selected_attn/selected_attn_kv_sm90.cuh"
#include "cuda/selected_attn/selected_attn_tiles.cuh"

namespace fsattn::selected {

struct TileFwdArgs {
  FwdArgs fwd;
  const TileItem* items;  // [Hkv, tiles]
  int* counter;           // tiles handed out beyond the first of every CTA; zero before the launch
  int num_items;
  const int32_t* lists;  // [Hkv, tiles, capacity, entry_ints]
  int queries, capacity, entry_ints;
};

inline constexpr unsigned kNoTile = 0xffffffff;

// A tile as the consumers see it.
struct alignas(32) TileWork {
  unsigned number;  // of the tile, among those of the CTA
  unsigned end;     // behind its last step; kNoTile marks the end of all work
  int head;         // KV head
  int first_token;
  int num_queries;
  int position;  // of the first query
  int num_keys;  // of the sequence
  int is_whole;
};
static_assert(sizeof(TileWork) == 32);

// Two blocks of a list, as the consumers see them.
struct alignas(32) TileStep {
  int first_key[2];
  // By the queries of each warpgroup; 0 where the step has one block only.
  uint16_t wanted[kSelectedTileGroups][2];
};
static_assert(sizeof(TileStep) == 32);

// Of a row of a warpgroup.
struct TileRow {
  int last_key;  // that the query sees
  int query;     // of the warpgroup
};

template <SelectedAttnFwdConfig kConfig>
struct TileTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kKeys = 64, kStepKeys = 2 * kKeys, kRowBytes = 256;
  static constexpr int kGroups = kSelectedTileGroups, kGroupRows = kSelectedTileGroupRows;
  static constexpr int kConsumerWarps = 4 * kGroups;
  // A warpgroup of its own for the producer warp, whose registers the others take over.
  static constexpr int kThreads = kConsumerWarps * kWarpSize + 128;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
  // A step is described in its own place, which nobody reads any more two steps later.
  static constexpr int kQBuffers = 2, kStages = 2, kStepBuffers = 4;
  static constexpr int kQBytes = kGroups * device::kPanelTileBytes;
  static constexpr int kPanelBytes = kStepKeys * 128;  // 64 columns of K or V of a step
  static constexpr int kStageBytes = 2 * kPanelBytes;
  static constexpr int kKvOffset = kQBuffers * kQBytes;
  static constexpr int kBarrierOffset = kKvOffset + 2 * kStages * kStageBytes;
  static constexpr int kBarriers = 2 * kQBuffers + 4 * kStages;
  static constexpr int kWorkOffset = round_up<int>(kBarrierOffset + kBarriers * 8, 16);
  static constexpr int kStepOffset = kWorkOffset + kQBuffers * int{sizeof(TileWork)};
  static constexpr int kRowOffset = kStepOffset + kStepBuffers * int{sizeof(TileStep)};
  static constexpr int kSmemBytes = kRowOffset + kGroups * kGroupRows * 8;
};

template <class T>
struct TileSmem {
  unsigned char* memory;
  uint32_t base;

  __device__ uint32_t queries(unsigned buffer, int group) const {
    return base + buffer * T::kQBytes + group * device::kPanelTileBytes;
  }
  // operand: 0 is K, 1 is V.
  __device__ uint32_t keys(int operand, unsigned stage) const {
    return base + T::kKvOffset + (operand * T::kStages + stage) * T::kStageBytes;
  }
  __device__ TileWork* work(unsigned buffer) const {
    return reinterpret_cast<TileWork*>(memory + T::kWorkOffset) + buffer;
  }
  __device__ TileStep* step(unsigned n) const {
    return reinterpret_cast<TileStep*>(memory + T::kStepOffset) + n % T::kStepBuffers;
  }
  __device__ uint32_t row(int r) const { return base + T::kRowOffset + r * 8; }
  __device__ uint32_t bar(int i) const { return base + T::kBarrierOffset + i * 8; }
  __device__ uint32_t q_full(unsigned buffer) const { return bar(buffer); }
  __device__ uint32_t q_empty(unsigned buffer) const { return bar(T::kQBuffers + buffer); }
  __device__ uint32_t full(int operand, unsigned stage) const {
    return bar(2 * T::kQBuffers + operand * T::kStages + stage);
  }
  __device__ uint32_t empty(int operand, unsigned stage) const {
    return bar(2 * T::kQBuffers + (2 + operand) * T::kStages + stage);
  }
};

// A lane's block of a list.
struct TileBlock {
  int block = 0;
  int row = 0;           // its first one of k and v
  uint32_t set[2] = {};  // of the tile's queries that want it
};

template <class T>
struct TileProducer {
  const TileFwdArgs& a;
  const CUtensorMap *q_map, *k_map, *v_map;
  const TileSmem<T>& s;
  int lane;
  unsigned num_tiles = 0, num_steps = 0;  // brought so far

  __device__ int take() const {
    return lane == 0 ? static_cast<int>(gridDim.x) + atomicAdd(a.counter, 1) : 0;
  }
  __device__ TileItem fetch(int number) const {
    number = __shfl_sync(kFullMask, number, 0);
    TileItem item{};
    item.count = -1;
    if (number >= a.num_items) return item;
    const auto* from = reinterpret_cast<const int4*>(a.items + number);
    auto* to = reinterpret_cast<int4*>(&item);
    to[0] = __ldg(from);
    to[1] = __ldg(from + 1);
    return item;
  }
  // The first row of a block.
  __device__ int find_row(const TileItem& item, int block) const {
    const int key = block * T::kKeys;
    return a.fwd.pages.defined() ? find_key_row(a.fwd.pages, item.key_base, key, item.head)
                                 : item.key_base + key;
  }
  // The lane's block among the 32 from `first` on; wanted by nobody behind the last one.
  __device__ TileBlock fetch_block(const TileItem& item, int first) const {
    TileBlock b;
    if (first + lane >= item.count) return b;
    const int32_t* entry =
        a.lists + (int64_t{item.list} * a.capacity + first + lane) * a.entry_ints;
    b.block = __ldg(entry);
    b.set[0] = static_cast<uint32_t>(__ldg(entry + 1));
    if (a.entry_ints == 3) b.set[1] = static_cast<uint32_t>(__ldg(entry + 2));
    b.row = find_row(item, b.block);
    return b;
  }

  // Hands the next tile to the consumers: the item and its queries; or the end.
  __device__ void bring_tile(const TileItem& item) {
    const unsigned number = num_tiles++, buffer = number % T::kQBuffers;
    if (number >= T::kQBuffers) {
      device::mbarrier_wait(s.q_empty(buffer), (number / T::kQBuffers - 1) & 1);
    }
    if (lane != 0) return;
    const uint32_t full = s.q_full(buffer);
    TileWork& work = *s.work(buffer);
    work.number = number;
    work.end = item.count < 0 ? kNoTile : num_steps + (item.count + 1u) / 2;
    work.head = item.head;
    work.first_token = item.first_token;
    work.num_queries = item.num_queries;
    work.position = item.position;
    work.num_keys = item.num_keys;
    work.is_whole = item.is_whole;
    if (item.count < 0) {
      device::mbarrier_arrive(full);
      return;
    }
    const int share = a.queries / T::kGroups, group = a.fwd.space.group;
    device::mbarrier_arrive_expect(full, share * group * T::kRowBytes * T::kGroups);
    const uint64_t policy = device::l2_evict_last();
    for (int i = 0; i < 2 * T::kGroups; ++i) {
      device::tma_load_3d(s.queries(buffer, i / 2) + i % 2 * device::kPanelBytes, q_map,
                          i % 2 * device::kTmaColumns, item.head * group,
                          item.first_token + i / 2 * share, full, policy);
    }
  }

  // K or V of a step. num_keys: that its blocks have, none for a block that is missing.
  __device__ void bring_operand(int operand, const Rows& rows, const CUtensorMap* map, int head,
                                const int (&row)[2], const int (&num_keys)[2]) const {
    const unsigned stage = num_steps % T::kStages;
    if (num_steps >= T::kStages) {
      device::mbarrier_wait(s.empty(operand, stage), (num_steps / T::kStages - 1) & 1);
    }
    const uint32_t at = s.keys(operand, stage), full = s.full(operand, stage);
    const auto half_at = [&](int half) { return at + half * device::kPanelBytes; };
    int num_whole = 0;
    bool has_short = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      num_whole += num_keys[half] >= T::kKeys;
      if (num_keys[half] <= 0 || num_keys[half] >= T::kKeys) continue;
      copy_short_part(rows, half_at(half), T::kPanelBytes, row[half], num_keys[half], head, lane);
      has_short = true;
    }
    if (has_short) wait_short_part();
    if (lane != 0) return;
    device::mbarrier_arrive_expect(full, num_whole * device::kPanelTileBytes);
    const uint64_t policy = device::l2_evict_last();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, panel = i % 2;
      if (num_keys[half] < T::kKeys) continue;
      device::tma_load_3d(half_at(half) + panel * T::kPanelBytes, map, panel * device::kTmaColumns,
                          head, row[half], full, policy);
    }
  }

  // The blocks of lanes `first` and `first` + 1.
  __device__ void bring_step(const TileItem& item, const TileBlock& own, int first) {
    int row[2], num_keys[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = __shfl_sync(kFullMask, own.row, first + half);
      const int block = __shfl_sync(kFullMask, own.block, first + half);
      const uint32_t set = __shfl_sync(kFullMask, own.set[0] | own.set[1], first + half);
      num_keys[half] = set != 0 ? item.num_keys - block * T::kKeys : 0;
    }
    // Its place was read two steps before the one whose stage is waited for: nobody is there.
    const int half = lane - first;
    if (half == 0 || half == 1) {
      TileStep& step = *s.step(num_steps);
      step.first_key[half] = own.block * T::kKeys;
      const int share = a.queries / T::kGroups;
#pragma unroll
      for (int g = 0; g < T::kGroups; ++g) {  // a word of the set has all queries of a warpgroup
        const int at = g * share;
        const uint32_t word = (at < 32 ? own.set[0] : own.set[1]) >> at % 32;
        step.wanted[g][half] = static_cast<uint16_t>(word & ((1u << share) - 1));
      }
    }
    __syncwarp();
    const int head = a.fwd.key_head(item.head);
    bring_operand(0, a.fwd.k, k_map, head, row, num_keys);
    bring_operand(1, a.fwd.v, v_map, head, row, num_keys);
    ++num_steps;
  }

  __device__ void run() {
    // A number and its item are asked for a round before they are used.
    TileItem item = fetch(blockIdx.x);
    int number = take();
    while (item.count >= 0) {
      const TileItem next = fetch(number);
      number = take();
      if (item.count > 0) bring_tile(item);
      for (int i = 0; i < item.count; i += kWarpSize) {
        const TileBlock block = fetch_block(item, i);
        for (int j = 0; j < min(item.count - i, kWarpSize); j += 2) bring_step(item, block, j);
      }
      item = next;
    }
    bring_tile(item);
  }
};

}  // namespace fsattn::selected
