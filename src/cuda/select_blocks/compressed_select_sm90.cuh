// compressed_select, sm_90a: compressed attention and select_blocks of groups of one head in one kernel.
//
// Math     dense_attn_fwd_sm90.cuh and select_blocks_sm80.cuh. The order of a query's blocks does not depend
//          on lse, so blocks are ranked by what their windows add to the running sum of the softmax.
// Shapes   one query head a KV head, l / d = 2, S / d = 4, head dims and topk up to the row's; scores are
//          not rounded.
// Tiles    one CTA an SM takes every n-th tile (192 queries of a sequence, head); 128 windows (32 blocks) a
//          step, in ascending order.
// Roles    three consumer warpgroups of 64 queries: S with both operands in shared memory, O with P in
//          registers; while P V runs, the blocks of the step are ranked (compressed_select_rank.cuh). One
//          producer warp brings K and V by tensor copies, another finds the tiles of the CTA.
// Layout   the windows of a tile are copied in an order that gives a thread 32 side by side, which are whole
//          blocks; P V does not depend on their order.
// Memory   Q 48 KB, a ring of three tiles of K and V in turn 96 KB, lists 72 KB.
// Regs     O 64, S 64 or P 32 and 16 scores: 160 a consumer thread, 32 a producer thread.
// Bound    tensor cores: 256 FLOP a (query, window) at head_dim 128.
// Numbers  scores, sums and output fp32; P rounded to the input type before P V.
#pragma once
#include <algorithm>

#include "base/cuda_check.h"
#include "cuda/device/softmax.cuh"
#include "cuda/device/wgmma_ss_n128_sm90.cuh"
#include "cuda/select_blocks/compressed_select_rank.cuh"
#include "cuda/select_blocks/compressed_select_tiles.cuh"

namespace fsattn {
namespace device {

template <class Traits>
struct FusedConsumer {
  using Element = typename Traits::Element;
  using Softmax = OnlineSoftmax<Element, 1>;

  const FusedSmem<Traits>& smem;
  const FusedArgs& args;
  RingStep ring = {};

  // Issues S = Q K^T.
  __device__ __forceinline__ void issue_scores(float (&s)[64]) const {
    mbarrier_wait(smem.full(ring.k_stage()), ring.k_parity());
    wgmma_fence();
    uint32_t queries = smem.queries(reread_thread_index() / 128);
    const uint32_t q = k_major(queries), k = k_major(smem.stage(ring.k_stage()));
#pragma unroll
    for (int kk = 0; kk < kPanelDim / 16; ++kk) {
      const uint32_t q_at = (kk / 4 * kPanelBytes + kk % 4 * 32) >> 4;
      const uint32_t k_at = (kk / 4 * Traits::kPanelBytes + kk % 4 * 32) >> 4;
      wgmma_ss_m64n128k16<Element>(s, descriptor(q + q_at), descriptor(k + k_at), kk > 0);
    }
    wgmma_commit();
  }

  // Issues O += P V.
  __device__ __forceinline__ void issue_output(const uint32_t (&prob)[16][2],
                                               float (&o)[64]) const {
    mbarrier_wait(smem.full(ring.v_stage()), ring.v_parity());
    wgmma_fence();
    const uint32_t v = operand(smem.stage(ring.v_stage()), Traits::kPanelBytes);
#pragma unroll
    for (int kk = 0; kk < Traits::kTileKv / 16; ++kk) {
      const uint32_t p[4] = {prob[2 * kk][0], prob[2 * kk][1], prob[2 * kk + 1][0],
                             prob[2 * kk + 1][1]};
      wgmma_m64n128k16_mn_major<Element>(o, p, descriptor(v + kk * (2048 >> 4)), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(smem.empty(stage));
  }

  // -inf where a query does not see a window. Lane q has windows 32 q and on.
  __device__ __forceinline__ void mask_windows(const FusedTileWork& work, int first,
                                               float (&s)[64]) const {
    const int thread = reread_thread_index(), lane = thread % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = work.position + thread / kWarpSize * 16 + half * 8 + lane / 4;
      const int limit = min(args.band.last_key(t), work.num_keys - 1) - first - lane % 4 * 32;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (i > limit) s[i / 2 * 4 + half * 2 + i % 2] = -INFINITY;
      }
    }
  }

  // -1 where a block does not compete.
  __device__ __forceinline__ void mask_blocks(const FusedTileWork& work, int tile,
                                              int (&score)[2][kLaneBlocks]) const {
    const int thread = reread_thread_index(), lane = thread % kWarpSize;
    const int first = tile * kWarpSize + lane % 4 * kLaneBlocks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SelectRow row =
          select_row(args.geometry, work, thread / kWarpSize * 16 + half * 8 + lane / 4);
      const int begin = row.num_init - first;
      const int end = (row.room > 0 ? row.local_begin : 0) - first;
#pragma unroll
      for (int i = 0; i < kLaneBlocks; ++i) {
        if (i < begin || i >= end) score[half][i] = -1;
      }
    }
  }

  // Scores to packed probabilities and block scores; those of the first blocks lack the window before them.
  // last: the last window.
  static __device__ __forceinline__ void exponentiate(const float (&s)[64], float scale_log2,
                                                      Softmax& softmax, uint32_t (&prob)[16][2],
                                                      int (&score)[2][kLaneBlocks],
                                                      float (&last)[2]) {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      shift[half] = softmax.max[half] == -INFINITY ? 0.f : softmax.max[half];
#pragma unroll
    for (int i = 0; i < kLaneBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* x = s + i * 8 + half * 2;
        const float w0 = Softmax::power(x[0], scale_log2, shift[half]);
        const float w1 = Softmax::power(x[1], scale_log2, shift[half]);
        const float w2 = Softmax::power(x[4], scale_log2, shift[half]);
        const float w3 = Softmax::power(x[5], scale_log2, shift[half]);
        const float inner = w0 + w1 + w2;
        softmax.sum[half] += inner + w3;
        const float ends = i == 0 ? w3 : last[half] + w3;
        score[half][i] = __float_as_int(fmaf(2.f, inner, ends));
        last[half] = w3;
        prob[2 * i][half] = Softmax::scale_down(pack_pair<Element>(w0, w1));
        prob[2 * i + 1][half] = Softmax::scale_down(pack_pair<Element>(w2, w3));
      }
    }
  }

  // The last window of the tile before is kept in shared memory.
  __device__ __forceinline__ void finish_scores(int (&score)[2][kLaneBlocks],
                                                const float (&last)[2]) const {
    const float2 x = load_shared_f32x2(smem.carry());
    store_shared_f32x2(smem.carry(), last[0], last[1]);
    const float carry[2] = {x.x, x.y};
    const int lane = reread_thread_index() % kWarpSize;
    const int source = (lane & ~3) | ((lane + 3) & 3);  // the lane of the windows before
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = __shfl_sync(kFullMask, lane % 4 == 3 ? carry[half] : last[half], source);
      score[half][0] = __float_as_int(__int_as_float(score[half][0]) + before);
    }
  }

  // The reference of the softmax has moved.
  __device__ __forceinline__ void rescale_picks(const float (&keep)[2]) const {
    FusedLists list;
    load_lists(list, smem.lists(), smem.state());
    rescale_lists(list, keep, reread_thread_index() % 4);
    store_lists(list, smem.state());
    const float2 carry = load_shared_f32x2(smem.carry());
    store_shared_f32x2(smem.carry(), carry.x * keep[0], carry.y * keep[1]);
  }

  // One warpgroup: 64 queries over the windows that some of them sees or whose blocks compete.
  __device__ __forceinline__ void consume(const FusedTileWork& work, Softmax& softmax,
                                          float (&o)[64]) {
    int tile = 0;
#pragma unroll 1
    for (; tile < work.steps[reread_thread_index() / 128]; ++tile) {
      float s[64];
      issue_scores(s);
      wgmma_wait_group<0>();
      pin_registers(s);
      release(ring.k_stage());
      const int group = reread_thread_index() / 128;
      if (tile >= work.full_tiles[group]) mask_windows(work, tile * Traits::kTileKv, s);
      float keep[2];
      if (softmax.adapt(0, as_fragments(s)[0], args.geometry.scale_log2, keep)) {
        softmax.rescale(as_fragments(o)[0], keep);
        rescale_picks(keep);
      }
      uint32_t prob[16][2];
      int score[2][kLaneBlocks];
      float last[2];
      exponentiate(s, args.geometry.scale_log2, softmax, prob, score, last);
      issue_output(prob, o);
      finish_scores(score, last);
      bool is_ranked = true;
      if (tile < work.pick_tiles[reread_thread_index() / 128]) {
        const int* inner = work.inner_tiles[reread_thread_index() / 128];
        if (tile < inner[0] || tile >= inner[1]) mask_blocks(work, tile, score);
        FusedLists list;
        load_lists(list, smem.lists(), smem.state());
        const int capacity = is_planned(tile) ? 32 : FusedList::kCapacity;
        is_ranked = append_tile(list, score, tile, capacity, reread_thread_index() % 4);
        if (is_ranked) store_lists(list, smem.state());
      }
      wgmma_wait_group<0>();
      pin_registers(o);
      release(ring.v_stage());
      if (!is_ranked) {
        FusedLists list;
        load_lists(list, smem.lists(), smem.state());
        shorten_and_append(list, score, tile, reread_thread_index() % 4);
        store_lists(list, smem.state());
      }
      ring.advance();
    }
    pass_over(work.num_steps - tile);
  }

  // The warps of a group wait for each other at the next product, so lists should be shortened in all of
  // them at once. On inputs without order they overflow about at these tiles.
  static __device__ __forceinline__ bool is_planned(int tile) {
    return tile == 3 || tile == 9 || tile == 27 || tile == 81;
  }

  // Steps in which no query of the group has anything to do. The waits keep a warp from arriving twice in
  // one phase.
  __device__ __forceinline__ void pass_over(int steps) {
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      mbarrier_wait(smem.full(ring.k_stage()), ring.k_parity());
      release(ring.k_stage());
      mbarrier_wait(smem.full(ring.v_stage()), ring.v_parity());
      release(ring.v_stage());
      ring.advance();
    }
  }

  // Starts the copy of the queries of this group.
  __device__ __forceinline__ void load_queries(const FusedTileWork& work) const {
    const AttnFwdTensors& p = args.attn;
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128;
    if (work.num_queries > 0) {
      const MatrixView<Element> q{
          static_cast<const Element*>(p.q.data) + work.token * p.q.token_stride +
              work.kv_head * p.q.head_stride,
          p.q.token_stride, work.num_queries, static_cast<int>(p.shape.head_dim)};
      load_panels<128>(smem.queries(group), thread_part(q, thread), group * kPanelRows, thread);
    }
    cp_async_commit();
  }

  // Writes lse and the output of one warp, staged over its queries.
  __device__ __forceinline__ void store_output(const FusedTileWork& work, Softmax& softmax,
                                               float (&o)[64]) const {
    const AttnFwdTensors& p = args.attn;
    const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * 16;
    float lse[2];
    softmax.finish(as_fragments(o), lse);
    const int rows_left = work.num_queries - row;
    float* lse_out =
        static_cast<float*>(p.lse.data) + work.kv_head * p.lse.head_stride + work.token + row;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = i * 8 + lane / 4;
      if (lane % 4 == 0 && r < rows_left) lse_out[r] = lse[i];
    }
    store_rows(
        OutputRows<Element>{
            static_cast<Element*>(p.o.data) + (work.token + row) * p.o.token_stride +
                work.kv_head * p.o.head_stride,
            p.o.token_stride, rows_left, static_cast<int>(p.shape.head_dim_v), false},
        smem.queries(row / kPanelRows) + tile_bytes<kPanelDim>(row % kPanelRows), as_fragments(o),
        lane);
  }

  __device__ __forceinline__ void open_lists(const FusedTileWork& work) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    FusedLists list;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      list[r].init(smem.lists() + warp * FusedList::kWarpBytes, r,
                   select_row(args.geometry, work, warp * 16 + r * 8 + lane / 4), lane);
    }
    store_lists(list, smem.state());
    store_shared_f32x2(smem.carry(), 0.f, 0.f);
    __syncwarp();
  }

  __device__ __forceinline__ void write_lists(const FusedTileWork& work) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    FusedLists list;
    load_lists(list, smem.lists(), smem.state());
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const int query = warp * 16 + r * 8 + lane / 4;
      int32_t* out =
          args.select.topk_idx +
          (work.kv_head * args.attn.packing.total_q + work.token + query) * args.geometry.topk;
      write_row(list[0], select_row(args.geometry, work, query), query < work.num_queries, out,
                args.geometry.topk, lane);
      swap_lists(list[0], list[1]);
    }
    __syncwarp();
  }

  // All tiles of the CTA.
  __device__ __forceinline__ void run(const FusedTileWork* works, int num_tiles) {
    const int group = threadIdx.x / 128;
    const auto index_of = [](int tile) { return static_cast<int>(blockIdx.x + tile * gridDim.x); };
    load_queries(wait_for_work(smem, works, 0));
#pragma unroll 1
    for (int tile = 0; index_of(tile) < num_tiles; ++tile) {
      const FusedTileWork& work = works[tile % Traits::kWorkBuffers];
      cp_async_wait<0>();
      fence_async_proxy();
      sync_warpgroup(group);  // all warps have loaded their queries
      open_lists(work);
      float o[64] = {};
      Softmax softmax;
      softmax.init();
      consume(work, softmax, o);
      sync_warpgroup(group);  // nobody's wgmma reads these queries any more
      store_output(work, softmax, o);
      sync_warpgroup(group);  // nor any warp what it has staged there
      if (index_of(tile + 1) < num_tiles) load_queries(wait_for_work(smem, works, tile + 1));
      write_lists(work);
      release_work(smem, tile);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    compressed_select_sm90_kernel(const __grid_constant__ FusedArgs args,
                                  const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map, int num_tiles) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ FusedTileWork works[Traits::kWorkBuffers];
  const FusedSmem<Traits> smem{smem_address(memory)};
  constexpr int kConsumerWarps = Traits::kConsumerThreads / kWarpSize;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRingStages; ++i) {
      mbarrier_init(smem.full(i), 1);
      mbarrier_init(smem.empty(i), kConsumerWarps);
    }
    for (int i = 0; i < Traits::kWorkBuffers; ++i) {
      mbarrier_init(smem.work_full(i), 1);
      mbarrier_init(smem.work_empty(i), kConsumerWarps + 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    FusedConsumer<Traits>{smem, args}.run(works, num_tiles);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    const int warp = (threadIdx.x - Traits::kConsumerThreads) / kWarpSize;
    if (warp == 0) {
      produce_fused(smem, args, &k_map, &v_map, works, num_tiles);
    } else if (warp == 1 && threadIdx.x % kWarpSize == 0) {
      find_fused_works(smem, args, works, num_tiles);
    }
  }
}

}  // namespace device

template <CompressedSelectConfig kConfig>
void launch_compressed_select(const CompressedAttnFwdParams& attn, const SelectBlocksParams& select,
                              Stream stream) {
  using Traits = device::FusedTraits<kConfig>;
  const Packing& packing = attn.attn.packing;
  if (packing.total_q == 0) return;
  const AttnShape& shape = attn.attn.shape;
  const device::FusedArgs args{attn.attn, select, device::make_select_band(attn.mask),
                               device::make_select_geometry(select)};
  const int64_t tiles =
      device::num_tile_slots(packing.total_q, packing.batch, Traits::kTileQ) * shape.num_heads_q;
  int device = 0, num_sms = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  auto* kernel = device::compressed_select_sm90_kernel<Traits>;
  allow_shared_memory(kernel, Traits::kSmemBytes);
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(tiles, num_sms));
  const auto make_map = [&](const Rows& rows, int64_t dim) {
    if (attn.mask.total_cmp == 0) return CUtensorMap{};  // unused
    return device::make_windows_map(rows, shape.dtype, attn.mask.total_cmp, shape.num_heads_kv,
                                    dim);
  };
  kernel<<<ctas, Traits::kThreads, Traits::kSmemBytes, static_cast<cudaStream_t>(stream)>>>(
      args, make_map(attn.attn.k, shape.head_dim), make_map(attn.attn.v, shape.head_dim_v),
      static_cast<int>(tiles));
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
