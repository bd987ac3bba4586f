// selected_attn_fwd, query-stationary part, sm_90a: the popular blocks of a tile of queries.
//
// Math    for the rows of a tile (queries x heads of the group) and its list of popular blocks:
//             S = softmax_scale * Q K^T, -inf where the query does not want the block or may not see
//             the key; one softmax over the whole list; partial = P V / l in the input dtype, with
//             its maximum and l. It stays in `o` until the merge adds the other blocks.
// Shapes  head dims 128, blocks of 64 keys, groups of up to 64 heads.
// Tiles   one persistent CTA an SM. Three consumer warpgroups, each with a third of the tile's queries: up
//         to 64 rows. A warpgroup passes over blocks that none of its queries wants; they would leave its
//         softmax as it is.
// Roles   one producer warp: queries (two buffers), the tile's list, and K, V of its blocks (three
//         stages), all by TMA and ahead of the consumers across tile borders.
// Memory  queries 2 x 48 KiB, K, V 3 x 32 KiB, lists.
// Regs    O 64, S 32, P 16.
// Bound   the tensor cores for long lists: 55 ps a row and block; for short ones the queries and the
//         partial row, 516 B a row.
#pragma once
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tma_sm90.cuh"
#include "cuda/selected_attn/selected_attn_fwd_args.cuh"
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

template <SelectedAttnFwdConfig kConfig>
struct TileTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kKeys = 64, kRowBytes = 256;
  static constexpr int kGroups = kSelectedTileGroups;
  static constexpr int kConsumerWarps = 4 * kGroups;
  // A warpgroup of its own for the producer warp, whose registers the others take over.
  static constexpr int kThreads = kConsumerWarps * kWarpSize + 128;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
  static constexpr int kQBuffers = 2, kStages = 3;
  static constexpr int kQBytes = kGroups * device::kPanelTileBytes,
                       kKvBytes = 2 * device::kPanelTileBytes;
  static constexpr int kKvOffset = kQBuffers * kQBytes;
  static constexpr int kBarrierOffset = kKvOffset + kStages * kKvBytes;
  static constexpr int kListOffset =
      round_up<int>(kBarrierOffset + 2 * (kQBuffers + kStages) * 8, 16);

  static int smem_bytes(const SelectedTiles& tiles) {
    const int list = round_up<int>(static_cast<int>(tiles.list_ints()) * 4, 16);
    return kListOffset + kQBuffers * (int{sizeof(TileItem)} + list);
  }
};

template <class T>
struct TileSmem {
  unsigned char* memory;
  uint32_t base;
  int list_bytes;

  __device__ TileSmem(unsigned char* memory_, int list_ints)
      : memory(memory_),
        base(device::smem_address(memory_)),
        list_bytes(round_up(list_ints * 4, 16)) {}
  __device__ uint32_t queries(int buffer, int group) const {
    return base + buffer * T::kQBytes + group * device::kPanelTileBytes;
  }
  __device__ uint32_t kv(int stage) const { return base + T::kKvOffset + stage * T::kKvBytes; }
  __device__ TileItem* item(int buffer) const {
    return reinterpret_cast<TileItem*>(memory + T::kListOffset) + buffer;
  }
  __device__ int32_t* list(int buffer) const {
    return reinterpret_cast<int32_t*>(memory + T::kListOffset +
                                      T::kQBuffers * int{sizeof(TileItem)} + buffer * list_bytes);
  }
  __device__ uint32_t bar(int i) const { return base + T::kBarrierOffset + i * 8; }
  __device__ uint32_t q_full(int buffer) const { return bar(buffer); }
  __device__ uint32_t q_empty(int buffer) const { return bar(T::kQBuffers + buffer); }
  __device__ uint32_t kv_full(int stage) const { return bar(2 * T::kQBuffers + stage); }
  __device__ uint32_t kv_empty(int stage) const {
    return bar(2 * T::kQBuffers + T::kStages + stage);
  }
};

// ---- Producer warp ----

template <class T>
struct TileProducer {
  const TileFwdArgs& a;
  const CUtensorMap *q_map, *k_map, *v_map;
  const TileSmem<T>& s;
  int lane;
  int num_tiles = 0, num_blocks = 0;  // brought so far

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
  // The lane's block among the 32 from `first` on.
  __device__ int fetch_block(const TileItem& item, int first) const {
    return first + lane < item.count
               ? __ldg(a.lists + (int64_t{item.list} * a.capacity + first + lane) * a.entry_ints)
               : 0;
  }

  // Hands the next tile to the consumers: the item, its list and its queries; or the end.
  __device__ void bring_tile(const TileItem& item) {
    const int buffer = num_tiles % T::kQBuffers;
    if (num_tiles >= T::kQBuffers) {
      device::mbarrier_wait(s.q_empty(buffer), (num_tiles / T::kQBuffers - 1) & 1);
    }
    const uint32_t full = s.q_full(buffer);
    if (lane == 0) *s.item(buffer) = item;
    const int list_ints = item.count * a.entry_ints;
    const int32_t* from = a.lists + int64_t{item.list} * a.capacity * a.entry_ints;
    const uint32_t to = device::smem_address(s.list(buffer));
    for (int i = lane; i < list_ints; i += kWarpSize) device::cp_async_4(to + i * 4, from + i);
    device::cp_async_arrive(full);
    if (lane == 0 && item.count < 0) device::mbarrier_arrive(full);
    if (lane == 0 && item.count > 0) {
      const int share = a.queries / T::kGroups, group = a.fwd.space.group;
      device::mbarrier_arrive_expect(full, share * group * T::kRowBytes * T::kGroups);
      const uint64_t policy = device::l2_evict_last();
      for (int i = 0; i < 2 * T::kGroups; ++i) {
        device::tma_load_3d(s.queries(buffer, i / 2) + i % 2 * device::kPanelBytes, q_map,
                            i % 2 * device::kTmaColumns, item.head * group,
                            item.first_token + i / 2 * share, full, policy);
      }
    }
    ++num_tiles;
  }

  // The first row of the lane's block.
  __device__ int find_row(const TileItem& item, int block) const {
    const int key = block * T::kKeys;
    return a.fwd.pages.defined() ? find_key_row(a.fwd.pages, item.key_base, key, item.head)
                                 : item.key_base + key;
  }

  __device__ void bring_block(const TileItem& item, int block, int key_row) {
    const int stage = num_blocks % T::kStages;
    if (num_blocks >= T::kStages) {
      device::mbarrier_wait(s.kv_empty(stage), (num_blocks / T::kStages - 1) & 1);
    }
    const uint32_t at = s.kv(stage), full = s.kv_full(stage);
    const int num_keys = item.num_keys - block * T::kKeys, head = a.fwd.key_head(item.head);
    if (num_keys < T::kKeys) {
      load_short_part(a.fwd, at, full, key_row, num_keys, head, lane);
    } else if (lane == 0) {
      const uint64_t policy = device::l2_evict_last();
      device::mbarrier_arrive_expect(full, T::kKvBytes);
      load_part(at, k_map, v_map, key_row, head, full, policy);
    }
    ++num_blocks;
  }

  __device__ void run() {
    // Nothing is used in the round that asks for it: a number, its item and its blocks take a round each.
    TileItem item = fetch(blockIdx.x), next = fetch(take());
    int block = fetch_block(item, 0), number = take();
    while (item.count >= 0) {
      const TileItem after = fetch(number);
      const int next_block = fetch_block(next, 0);
      number = take();
      int row = item.count > 0 ? find_row(item, block) : 0;
      if (item.count > 0) bring_tile(item);
      for (int i = 0; i < item.count; i += kWarpSize) {
        if (i > 0) {
          block = fetch_block(item, i);
          row = find_row(item, block);
        }
        const int count = min(item.count - i, kWarpSize);
        for (int j = 0; j < count; ++j) {
          bring_block(item, __shfl_sync(kFullMask, block, j), __shfl_sync(kFullMask, row, j));
        }
      }
      item = next;
      block = next_block;
      next = after;
    }
    bring_tile(item);
  }
};

// ---- Consumer warps ----

// A lane's two rows of the tile, 8 apart.
struct TileRows {
  int query[2];     // of the tile; -1 when the row does not exist
  int position[2];  // of the query
};

template <class T>
struct TileConsumer {
  const TileFwdArgs& a;
  const TileSmem<T>& s;
  int group, warp, lane;  // warp of the warpgroup
  int num_blocks = 0;     // consumed so far

  using Softmax = device::OnlineSoftmax<typename T::Element, 1>;

  __device__ uint32_t wait_kv(int n) const {
    device::mbarrier_wait(s.kv_full(n % T::kStages), n / T::kStages & 1);
    return s.kv(n % T::kStages);
  }
  __device__ void release_kv(int n) const {
    if (lane == 0) device::mbarrier_arrive(s.kv_empty(n % T::kStages));
  }

  __device__ TileRows find_rows(const TileItem& item) const {
    TileRows rows;
    const int share = a.queries / T::kGroups;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int in_group = a.fwd.space.group_div.quotient(warp * 16 + lane / 4 + i * 8);
      const int query = group * share + in_group;
      rows.query[i] = in_group < share && query < item.num_queries ? query : -1;
      rows.position[i] = item.position + query;
    }
    return rows;
  }

  __device__ void issue_scores(int buffer, int n, float (&acc)[32]) const {
    const uint32_t k_tile = wait_kv(n);
    device::wgmma_fence();
    device::panel_product<typename T::Element>(acc, s.queries(buffer, group), k_tile);
    device::wgmma_commit();
  }
  __device__ void issue_output(int n, const uint32_t (&prob)[1][8][2], float (&o)[64]) const {
    device::wgmma_fence();
    device::packed_product<typename T::Element>(o, prob,
                                                s.kv(n % T::kStages) + device::kPanelTileBytes);
    device::wgmma_commit();
  }

  // -inf for keys that a row does not see.
  __device__ void mask(const int32_t* entry, const TileItem& item, const TileRows& rows,
                       float (&acc)[32]) const {
    const int first_key = entry[0] * T::kKeys;
    const int last_key = item.num_keys - first_key - 1;
    int limit[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = max(rows.query[i], 0);
      const bool is_wanted = static_cast<uint32_t>(entry[1 + query / 32]) >> (query % 32) & 1;
      limit[i] = rows.query[i] >= 0 && is_wanted ? min(rows.position[i] - first_key, last_key) : -1;
    }
    if (!__any_sync(kFullMask, min(limit[0], limit[1]) < T::kKeys - 1)) return;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 > limit[i / 2 % 2]) acc[i] = -INFINITY;
    }
  }

  // Scores to probabilities; true when the output has to be scaled by `keep`.
  __device__ bool take_softmax(Softmax& softmax, float (&acc)[32], float (&keep)[2]) const {
    auto& scores = device::as_fragments(acc)[0];
    const bool is_moved = softmax.adapt(0, scores, a.fwd.scale_log2, keep);
    const auto is_large = [](float x) { return fabsf(x) > kLargeLogit && x > -INFINITY; };
    float scale = a.fwd.scale_log2;
    if (__any_sync(kFullMask, is_large(softmax.max[0]) || is_large(softmax.max[1]))) {
#pragma unroll
      for (int i = 0; i < 32; ++i) acc[i] *= scale;
      scale = 1.f;
    }
    softmax.exponentiate(0, scores, scale);
    return is_moved;
  }

  // The next block of the list from `i` on that one of the warpgroup's queries wants; `count` when there
  // is none.
  __device__ int find_wanted(const int32_t* list, int count, int i) const {
    const int share = a.queries / T::kGroups,
              first = group * share;  // a set's word has all of them
    const uint32_t wanted = ((1u << share) - 1) << first % 32;
    while (i < count && (list[i * a.entry_ints + 1 + first / 32] & wanted) == 0) ++i;
    return i;
  }
  // Gives back blocks that nobody here wants. Only behind their arrival, so that no barrier counts this for
  // the block before in the same stage.
  __device__ void pass_over(int n, int end) const {
    for (; n < end; ++n) {
      wait_kv(n);
      release_kv(n);
    }
  }

  // The whole list; leaves the unnormalised output in `o`.
  __device__ void attend(const TileItem& item, int buffer, Softmax& softmax, float (&o)[64]) {
    const TileRows rows = find_rows(item);
    const int32_t* list = s.list(buffer);
    int i = find_wanted(list, item.count, 0), passed = 0;
    float acc[32], keep[2];
    uint32_t prob[1][8][2];
    while (i < item.count) {
      pass_over(num_blocks + passed, num_blocks + i);
      issue_scores(buffer, num_blocks + i, acc);
      device::wgmma_wait_group<0>();
      device::pin_registers(acc);
      mask(list + i * a.entry_ints, item, rows, acc);
      if (take_softmax(softmax, acc, keep)) {
        Softmax::rescale(device::as_fragments(o)[0], keep);
      }
      softmax.pack(prob[0], device::as_fragments(acc)[0]);
      int next = find_wanted(list, item.count, i + 1);
      // As long as the next block can arrive before this one is given back, its scores are under way
      // together with the output of this one.
      while (next < item.count && next - i < T::kStages) {
        pass_over(num_blocks + i + 1, num_blocks + next);
        issue_scores(buffer, num_blocks + next, acc);
        issue_output(num_blocks + i, prob, o);
        device::wgmma_wait_group<1>();
        device::pin_registers(acc);
        mask(list + next * a.entry_ints, item, rows, acc);
        const bool is_moved = take_softmax(softmax, acc, keep);
        device::wgmma_wait_group<0>();
        device::pin_registers(o);
        release_kv(num_blocks + i);
        if (is_moved) Softmax::rescale(device::as_fragments(o)[0], keep);
        softmax.pack(prob[0], device::as_fragments(acc)[0]);
        i = next;
        next = find_wanted(list, item.count, i + 1);
      }
      issue_output(num_blocks + i, prob, o);
      device::wgmma_wait_group<0>();
      device::pin_registers(o);
      release_kv(num_blocks + i);
      passed = i + 1;
      i = next;
    }
    pass_over(num_blocks + passed, num_blocks + item.count);
    num_blocks += item.count;
  }

  // Normalised rows to `o`, in the order of fragment_chunk().
  __device__ void write(const TileItem& item, const Softmax& softmax, float (&o)[64]) const {
    using Element = typename T::Element;
    const float total[2] = {device::quad_sum(softmax.sum[0]), device::quad_sum(softmax.sum[1])};
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = total[i] == 0.f ? 0.f : 1.f / total[i];
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] *= scale[i / 2 % 2];  // finite: 1 / total is at most 1
    const uint64_t policy = device::l2_evict_first();
    const TileRows rows = find_rows(item);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A row without a popular block has no partial row here.
      if (rows.query[i] < 0 || total[i] == 0.f) continue;
      const int row = warp * 16 + lane / 4 + i * 8;
      const int head = a.fwd.space.group_div.remainder(row, a.fwd.space.group_div.quotient(row));
      const int token = item.first_token + rows.query[i];
      const int64_t query = int64_t{item.head} * a.fwd.total_q + token;
      if (lane % 4 == 0) {
        __stcs(a.fwd.tile_stats + query * a.fwd.space.group + head,
               float2{softmax.max[i], total[i]});
        if (head == 0) a.fwd.tile_marks[query] = 1;
      }
      const Rows& out = a.fwd.o;
      Element* to = static_cast<Element*>(out.data) + token * out.token_stride +
                    (item.head * a.fwd.space.group + head) * out.head_stride;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        device::store_global_u128_hint(reinterpret_cast<char*>(to) + lane % 4 * 16 + k * 64,
                                       fragment_chunk<Element>(o, k, i, Softmax::kScaleUp), policy);
      }
    }
  }

  __device__ void run() {
    for (int n = 0;; ++n) {
      const int buffer = n % T::kQBuffers;
      device::mbarrier_wait(s.q_full(buffer), n / T::kQBuffers & 1);
      const TileItem& item = *s.item(buffer);  // a copy would take eight registers
      if (item.count < 0) break;
      float o[64] = {};
      Softmax softmax;
      softmax.init();
      attend(item, buffer, softmax, o);
      write(item, softmax, o);
      __syncwarp();  // all scores are done, and all lanes with the item and its list
      if (lane == 0) device::mbarrier_arrive(s.q_empty(buffer));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    selected_attn_fwd_tiles_kernel(const __grid_constant__ TileFwdArgs a,
                                   const __grid_constant__ CUtensorMap q_map,
                                   const __grid_constant__ CUtensorMap k_map,
                                   const __grid_constant__ CUtensorMap v_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  const TileSmem<T> s(smem, a.capacity * a.entry_ints);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kQBuffers; ++i) {
      device::mbarrier_init(s.q_full(i), kWarpSize + 1);  // the list's copies, and the rest
      device::mbarrier_init(s.q_empty(i), T::kConsumerWarps);
    }
    for (int i = 0; i < T::kStages; ++i) {
      device::mbarrier_init(s.kv_full(i), 1);
      device::mbarrier_init(s.kv_empty(i), T::kConsumerWarps);
    }
    device::mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < T::kConsumerWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kConsumerRegisters));
    TileConsumer<T>{a, s, warp / 4, warp % 4, lane}.run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::kProducerRegisters));
    if (warp != T::kConsumerWarps) return;
    TileProducer<T>{a, &q_map, &k_map, &v_map, s, lane}.run();
  }
#endif
}

}  // namespace fsattn::selected
