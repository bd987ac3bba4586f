// selected_attn_fwd, query-stationary part, sm_90a: the popular blocks of a tile of queries.
//
// Math    for the rows of a tile (queries x heads of the group) and its list of popular blocks:
//             S = softmax_scale * Q K^T, -inf where the query does not want the block or may not see
//             the key; one softmax over the whole list; partial = P V / l in the input dtype, with
//             its maximum and l. It stays in `o` until the merge adds the other blocks. The rows of a
//             whole tile have no others: they and lse are final.
// Shapes  head dims 128, blocks of 64 keys, groups of up to 64 heads.
// Tiles   one persistent CTA an SM. Three consumer warpgroups, each with a third of the tile's queries: up
//         to 64 rows. A step is two blocks of the list, 128 keys; a warpgroup passes over those that none
//         of its queries wants, which would leave its softmax as it is.
// Roles   one producer warp: queries (two buffers), and K and V of a step (two stages each), all by TMA and
//         ahead of the consumers across tile borders. While one warpgroup does its softmax, the other two
//         keep the tensor cores busy.
// Memory  queries 2 x 48 KiB, K and V 2 x 32 KiB each.
// Regs    O 64, S or P 64: 160 a consumer thread, 32 a producer thread.
// Bound   the tensor cores for long lists: 55 ps a row and block; for short ones the queries and the
//         partial row, 516 B a row.
#pragma once
#include "cuda/device/softmax.cuh"
#include "cuda/device/wgmma_ss_n128_sm90.cuh"
#include "cuda/selected_attn/selected_attn_fwd_tiles_producer_sm90.cuh"

namespace fsattn::selected {

template <class T>
struct TileConsumer {
  using Element = typename T::Element;
  using Softmax = device::OnlineSoftmax<Element, 1>;

  const TileFwdArgs& a;
  const TileSmem<T>& s;
  unsigned n = 0;  // steps consumed so far

  __device__ static int group() { return device::reread_thread_index() / 128; }

  __device__ void wait_for(int operand, unsigned n) const {
    device::mbarrier_wait(s.full(operand, n % T::kStages), n / T::kStages & 1);
  }
  // This warp has left K or V of a step.
  __device__ void release(int operand, unsigned n) const {
    if (threadIdx.x % kWarpSize == 0) device::mbarrier_arrive(s.empty(operand, n % T::kStages));
  }
  // What the queries of the warpgroup want of a step: the first block in the lower half.
  __device__ uint32_t find_wanted(unsigned n) const {
    return *reinterpret_cast<const uint32_t*>(s.step(n)->wanted[group()]);
  }

  // Of the 16 rows of the calling warp, for its masks.
  __device__ void find_rows(const TileWork& work) const {
    const int thread = device::reread_thread_index(), lane = thread % kWarpSize;
    const int row = thread / kWarpSize * 16 + lane;
    if (lane < 16) {
      const int query = a.fwd.space.group_div.quotient(row % T::kGroupRows);
      const int position = work.position + row / T::kGroupRows * (a.queries / T::kGroups) + query;
      asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(s.row(row)),
                   "r"(min(position, work.num_keys - 1)), "r"(query)
                   : "memory");
    }
    __syncwarp();
  }

  template <int kKeys>
  __device__ void issue_scores(uint32_t queries, uint32_t keys, float (&scores)[kKeys / 2]) const {
    // Keeps the eight descriptors of the queries from being kept in registers over the loop.
    asm volatile("" : "+r"(queries));
    device::wgmma_fence();
    const uint32_t q = device::k_major(queries), k = device::k_major(keys);
#pragma unroll
    for (int kk = 0; kk < device::kPanelDim / 16; ++kk) {
      const uint32_t q_at = (kk / 4 * device::kPanelBytes + kk % 4 * 32) >> 4;
      const uint32_t k_at = (kk / 4 * T::kPanelBytes + kk % 4 * 32) >> 4;
      const uint64_t x = device::descriptor(q + q_at), y = device::descriptor(k + k_at);
      if constexpr (kKeys == 128) {
        device::wgmma_ss_m64n128k16<Element>(scores, x, y, kk > 0);
      } else {
        device::wgmma_ss_m64n64k16<Element>(scores, x, y, kk > 0);
      }
    }
    device::wgmma_commit();
  }
  template <int kKeys>
  __device__ void issue_output(uint32_t values, const uint32_t (&prob)[kKeys / 8][2],
                               float (&o)[64]) const {
    device::wgmma_fence();
    const uint32_t v = device::operand(values, T::kPanelBytes);
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      const uint32_t p[4] = {prob[2 * kk][0], prob[2 * kk][1], prob[2 * kk + 1][0],
                             prob[2 * kk + 1][1]};
      device::wgmma_m64n128k16_mn_major<Element>(o, p, device::descriptor(v + kk * (2048 >> 4)), 1);
    }
    device::wgmma_commit();
  }

  // -inf for keys of a block that a row does not see. wanted: by which queries of the warpgroup.
  __device__ void mask(float (&scores)[8][4], uint32_t wanted, int first_key) const {
    const int thread = device::reread_thread_index(), lane = thread % kWarpSize;
    int limit[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int last_key, query;
      asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                   : "=r"(last_key), "=r"(query)
                   : "r"(s.row(thread / kWarpSize * 16 + i * 8 + lane / 4)));
      limit[i] = wanted >> query & 1 ? last_key - first_key : -1;
    }
    if (!__any_sync(kFullMask, min(limit[0], limit[1]) < T::kKeys - 1)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Relative to the lane's first key, so that the others are compared with constants.
      const int last = limit[i] - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (n * 8 + e > last) scores[n][2 * i + e] = -INFINITY;
        }
      }
    }
  }

  // Which of the two blocks not all rows of the warpgroup see whole.
  __device__ uint32_t find_masked(const TileWork& work, uint32_t wanted) const {
    const int share = a.queries / T::kGroups;
    const int whole = min(work.position + group() * share, work.num_keys - 1) - (T::kKeys - 1);
    const uint32_t all = (1u << share) - 1;
    const TileStep& step = *s.step(n);
    uint32_t masked = 0;
    if ((wanted & 0xffff) != all || step.first_key[0] > whole) masked |= 1;
    if (wanted >> 16 != all || step.first_key[1] > whole) masked |= 2;
    return masked;
  }

  // One step of the warpgroup, with both blocks or with block `first` alone. K is there, and then that of the
  // next step is, if there is one; returns what the warpgroup wants of it. What the tensor cores need not
  // wait for is done while they work.
  template <int kKeys>
  __device__ uint32_t consume_step(const TileWork& work, uint32_t queries, uint32_t wanted,
                                   int first, Softmax& softmax, float (&o)[64]) const {
    using namespace device;
    float scores[kKeys / 2];
    auto& frag = reinterpret_cast<float(&)[1][kKeys / 8][4]>(scores)[0];
    const unsigned stage = n % T::kStages;
    issue_scores<kKeys>(queries, s.keys(0, stage) + first * kPanelBytes, scores);
    const uint32_t masked = find_masked(work, wanted);
    const int first_key[2] = {s.step(n)->first_key[first],
                              kKeys == 128 ? s.step(n)->first_key[1] : 0};
    wgmma_wait_group<0>();
    pin_registers(scores);
    release(0, n);
    if constexpr (kKeys == 128) {
      if (masked & 1) {
        mask(reinterpret_cast<float(&)[8][4]>(frag[0]), wanted & 0xffff, first_key[0]);
      }
      if (masked & 2) mask(reinterpret_cast<float(&)[8][4]>(frag[8]), wanted >> 16, first_key[1]);
    } else if (masked >> first & 1) {
      mask(frag, wanted >> first * 16 & 0xffff, first_key[0]);
    }
    float keep[2];
    if (softmax.adapt(0, frag, a.fwd.scale_log2, keep)) softmax.rescale(as_fragments(o)[0], keep);
    const auto is_large = [](float x) { return fabsf(x) > kLargeLogit && x > -INFINITY; };
    float scale = a.fwd.scale_log2;
    if (__any_sync(kFullMask, is_large(softmax.max[0]) || is_large(softmax.max[1]))) {
#pragma unroll
      for (float& x : scores) x *= scale;
      scale = 1.f;
    }
    uint32_t prob[kKeys / 8][2];
    softmax.exponentiate_and_pack(0, frag, prob, scale);
    wait_for(1, n);
    issue_output<kKeys>(s.keys(1, stage) + first * kPanelBytes, prob, o);
    uint32_t next = 0;
    if (n + 1 < work.end) {
      wait_for(0, n + 1);
      next = find_wanted(n + 1);
    }
    wgmma_wait_group<0>();
    pin_registers(o);
    release(1, n);
    return next;
  }
  // A step of which nobody here wants anything. The waits keep a warp from arriving twice in one phase.
  __device__ uint32_t pass_over(const TileWork& work) const {
    wait_for(1, n);
    release(0, n);
    release(1, n);
    if (n + 1 == work.end) return 0;
    wait_for(0, n + 1);
    return find_wanted(n + 1);
  }

  // The whole list; leaves the unnormalised output in `o`.
  __device__ void attend(const TileWork& work, uint32_t queries, Softmax& softmax, float (&o)[64]) {
    find_rows(work);
    wait_for(0, n);
    uint32_t wanted = find_wanted(n);
#pragma unroll 1
    for (; n < work.end; ++n) {
      const bool has_first = (wanted & 0xffff) != 0, has_second = wanted >> 16 != 0;
      if (has_first && has_second) {
        wanted = consume_step<128>(work, queries, wanted, 0, softmax, o);
      } else if (wanted != 0) {
        wanted = consume_step<64>(work, queries, wanted, has_second, softmax, o);
      } else {
        wanted = pass_over(work);
      }
    }
  }

  // Normalised rows to `o`: partial ones in the order of fragment_chunk(), final ones with their lse.
  template <bool kIsFinal>
  __device__ void write(const TileWork& work, const Softmax& softmax, float (&o)[64]) const {
    const float total[2] = {device::quad_sum(softmax.sum[0]), device::quad_sum(softmax.sum[1])};
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = total[i] == 0.f ? 0.f : 1.f / total[i];
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] *= scale[i / 2 % 2];  // finite: 1 / total is at most 1
    const uint64_t policy = device::l2_evict_first();
    const int thread = device::reread_thread_index(), lane = thread % kWarpSize;
    const int share = a.queries / T::kGroups;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = thread % 128 / kWarpSize * 16 + lane / 4 + i * 8;
      const int in_group = a.fwd.space.group_div.quotient(row);
      const int tile_query = thread / 128 * share + in_group;
      const bool is_row = in_group < share && tile_query < work.num_queries;
      // A row without a popular block has no partial row here.
      if (!kIsFinal && (!is_row || total[i] == 0.f)) continue;
      const int head = a.fwd.space.group_div.remainder(row, in_group);
      const int token = work.first_token + tile_query;
      const int64_t query = int64_t{work.head} * a.fwd.total_q + token;
      if (lane % 4 == 0 && is_row) {
        if constexpr (kIsFinal) {
          const Stats& lse = a.fwd.lse;
          static_cast<float*>(
              lse.data)[(work.head * a.fwd.space.group + head) * lse.head_stride + token] =
              total[i] == 0.f ? -INFINITY : (softmax.max[i] + log2f(total[i])) * device::kLn2;
        } else {
          __stcs(a.fwd.tile_stats + query * a.fwd.space.group + head,
                 float2{softmax.max[i], total[i]});
        }
        if (head == 0) a.fwd.tile_marks[query] = kIsFinal ? kFinalRow : kTileRow;
      }
      const Rows& out = a.fwd.o;
      Element* to = static_cast<Element*>(out.data) + token * out.token_stride +
                    (work.head * a.fwd.space.group + head) * out.head_stride;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint4 chunk = fragment_chunk<Element>(o, k, i, Softmax::kScaleUp);
        if constexpr (kIsFinal) {
          chunk = order_columns<1>(chunk, lane);
          if (total[i] == 0.f) chunk = {};  // probabilities of 0 times infinity are no numbers
          if (!is_row) continue;
        }
        device::store_global_u128_hint(reinterpret_cast<char*>(to) + lane % 4 * 16 + k * 64, chunk,
                                       policy);
      }
    }
  }

  __device__ void run() {
    for (unsigned tile = 0;;) {
      const unsigned buffer = tile % T::kQBuffers;
      device::mbarrier_wait(s.q_full(buffer), tile / T::kQBuffers & 1);
      const TileWork& work = *s.work(buffer);
      if (work.end == kNoTile) break;
      float o[64] = {};
      Softmax softmax;
      softmax.init();
      attend(work, s.queries(buffer, group()), softmax, o);
      if (work.is_whole) {
        write<true>(work, softmax, o);
      } else {
        write<false>(work, softmax, o);
      }
      tile = work.number + 1;  // a register less in between
      // All scores are done, and all lanes with the work and their rows.
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) {
        device::mbarrier_arrive(s.q_empty((tile - 1) % T::kQBuffers));
      }
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
  const TileSmem<T> s{smem, device::smem_address(smem)};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kQBuffers; ++i) {
      device::mbarrier_init(s.q_full(i), 1);
      device::mbarrier_init(s.q_empty(i), T::kConsumerWarps);
    }
    for (int i = 0; i < 2 * T::kStages; ++i) {
      device::mbarrier_init(s.full(i / T::kStages, i % T::kStages), 1);
      device::mbarrier_init(s.empty(i / T::kStages, i % T::kStages), T::kConsumerWarps);
    }
    device::mbarrier_init_fence();
  }
  // Rows that no query has: scores of 0, which decide nothing for the others.
  if (warp < T::kQBuffers * T::kGroups) {
    device::clear_panel_rows<T::kGroupRows>(s.queries(warp / T::kGroups, warp % T::kGroups),
                                            a.queries / T::kGroups * a.fwd.space.group, lane);
    device::fence_async_proxy();
  }
  __syncthreads();
  if (warp < T::kConsumerWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kConsumerRegisters));
    TileConsumer<T>{a, s}.run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::kProducerRegisters));
    if (warp != T::kConsumerWarps) return;
    TileProducer<T>{a, &q_map, &k_map, &v_map, s, lane}.run();
  }
#endif
}

}  // namespace fsattn::selected
