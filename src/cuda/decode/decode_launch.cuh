// The launches of the fused kernels over a paged cache.
#pragma once
#include <algorithm>

#include "base/cuda_check.h"
#include "cuda/decode/decode.h"
#include "cuda/decode/decode_branches.cuh"
#include "cuda/decode/decode_compressed.cuh"
#include "cuda/decode/decode_finish.cuh"
#include "cuda/decode/decode_rank.cuh"
#include "cuda/decode/decode_select.cuh"

namespace fsattn {

// How a kernel is launched, beside its grid.
struct DecodeLaunch {
  bool overlaps;  // it may start before the one in front ends (sm_90), and waits for what it reads
  int cluster = 1;  // CTAs of a cluster
};

template <class... Params>
void launch_decode_kernel(void (*kernel)(Params...), int64_t ctas, int threads, int smem,
                          const DecodeLaunch& launch, Stream stream, const Params&... params) {
  allow_shared_memory(kernel, smem);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = !launch.overlaps ? 0 : launch.cluster == 1 ? 1 : 2;
  FSATTN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params...));
}

struct DecodeDevice {
  int num_sms;
  bool has_overlap;
};

inline DecodeDevice decode_device() {
  int device = 0, sms = 0, major = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  FSATTN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return {sms, major >= 9};
}

inline void set_decode_splits(DecodeArgs& args, const DecodeSplits& splits, const DecodeScratch& at,
                              void* scratch) {
  const auto floats = [scratch](int64_t offset) {
    return reinterpret_cast<float*>(static_cast<char*>(scratch) + offset);
  };
  args.scores = floats(at.scores);
  args.cmp_o = floats(at.cmp_o);
  args.cmp_lse = floats(at.cmp_lse);
  args.part_o = floats(at.part_o);
  args.part_lse = floats(at.part_lse);
  args.counters = reinterpret_cast<int32_t*>(floats(at.counters));
  args.block_scores = reinterpret_cast<uint32_t*>(floats(at.block_scores));
  args.scores_pitch = at.scores_pitch;
  args.block_scores_pitch = at.block_scores_pitch;
  args.parts = static_cast<int>(at.parts);
  args.cmp_splits = static_cast<int>(splits.cmp);
  args.sel_entries = static_cast<int>(splits.sel_entries);
  args.sel_splits = static_cast<int>(splits.sel);
  args.win_keys = static_cast<int>(splits.win_keys);
  args.win_splits = static_cast<int>(splits.win);
}

// Fields that both operators have.
template <class Params>
DecodeArgs common_decode_args(const Params& p) {
  DecodeArgs args{};
  args.packing = p.packing;
  args.q = p.q;
  args.o = p.o;
  args.cache = p.cache;
  args.batch = static_cast<int>(p.packing.batch);
  args.heads_kv = static_cast<int>(p.shape.num_heads_kv);
  args.group = static_cast<int>(p.shape.group_size());
  args.max_q = static_cast<int>(p.packing.max_q);
  args.head_dim = static_cast<int>(p.shape.head_dim);
  args.head_dim_v = static_cast<int>(p.shape.head_dim_v);
  args.softmax_scale = static_cast<float>(p.shape.softmax_scale);
  return args;
}

inline DecodeArgs decode_args(const PagedAttnParams& p) {
  DecodeArgs args = common_decode_args(p);
  args.gates = p.gates;
  args.cmp = p.cmp;
  args.cmp_band = {static_cast<int>(p.kernel_stride), static_cast<int>(p.kernel_size),
                   device::Band::kUnlimited};
  args.topk_idx = p.topk_idx;
  args.topk_head_stride = p.packing.total_q * p.topk;
  args.topk_token_stride = p.topk;
  args.block_size = static_cast<int>(p.block_size);
  args.topk = static_cast<int>(p.topk);
  args.init_blocks = static_cast<int>(p.init_blocks);
  args.local_blocks = static_cast<int>(p.local_blocks);
  args.window_size = static_cast<int>(p.window_size);
  args.cmp_split = static_cast<int>(p.tuning.cmp_split);
  args.cmp_long = static_cast<int>(p.tuning.cmp_long);
  args.is_nsa = true;
  args.has_sigmoid = p.activation == GateActivation::kSigmoid;
  args.rounds_to_bf16 = p.score_dtype == ScoreDType::kBFloat16;
  args.group_reduce = p.group_reduce;
  args.has_pooled =
      pools_scores(p.tuning.finish, p.group_reduce, p.kernel_size, p.kernel_stride, p.block_size);
  args.max_blocks = static_cast<int>(ceil_div(p.packing.max_k, p.block_size));
  const int64_t max_cmp = num_windows(p.packing.max_k, p.kernel_size, p.kernel_stride);
  DecodeSplits splits =
      decode_splits(max_cmp, p.tuning.cmp_split, p.block_size, p.topk, p.window_size);
  if (p.tuning.finish.ctas > 0) splits = decode_finish_splits(splits, p.tuning.finish.ctas);
  set_decode_splits(args, splits,
                    decode_scratch(int64_t{args.batch} * args.heads_kv, args.max_q, args.group,
                                   args.head_dim_v, max_cmp, args.max_blocks, splits, true),
                    p.scratch.data);
  return args;
}

inline DecodeArgs decode_args(const PagedSelectedParams& p) {
  DecodeArgs args = common_decode_args(p);
  args.lse = p.lse;
  args.topk_idx = const_cast<int32_t*>(p.mask.topk_idx);  // only read without the other branches
  args.topk_head_stride = p.mask.head_stride;
  args.topk_token_stride = p.mask.token_stride;
  args.block_size = static_cast<int>(p.mask.block_size);
  args.topk = static_cast<int>(p.mask.topk);
  args.cmp_split = static_cast<int>(kDecodeSplit);
  const DecodeSplits splits = decode_splits(0, kDecodeSplit, p.mask.block_size, p.mask.topk, 0);
  set_decode_splits(args, splits,
                    decode_scratch(int64_t{args.batch} * args.heads_kv, args.max_q, args.group,
                                   args.head_dim_v, 0, 0, splits, false),
                    p.scratch.data);
  return args;
}

template <DecodeConfig kConfig>
void launch_decode_branches(const DecodeArgs& args, bool overlaps, Stream stream) {
  using Traits = DecodeTraits<kConfig>;
  const device::BranchGrid grid = device::branch_grid(args);
  const int64_t units = int64_t{args.batch} * args.heads_kv;
  launch_decode_kernel(decode_branches_kernel<Traits>, units * (grid.early + grid.late),
                       Traits::kThreads, Traits::kSmemBytes, {overlaps}, stream, args);
}

inline void launch_decode_rank(const DecodeArgs& args, int64_t queries, int ctas, Stream stream) {
  // A quad of windows a thread, in two turns where many queries share the SMs.
  const int share = ceil_div(args.max_blocks, ctas);
  const int quads = ceil_div(share * (args.block_size / args.cmp_band.stride), 4) + 1;
  const int most = queries > 32 ? 160 : kDecodeRankThreads;
  const int threads = std::clamp(round_up(quads, device::kWarpSize), 64, most);
  const int smem = device::rank_smem(args.topk, ctas);
  const auto kernel = args.group <= 4 ? decode_rank_kernel<kDecodeRankThreads, 4>
                                      : decode_rank_kernel<kDecodeRankThreads, 8>;
  launch_decode_kernel(kernel, queries * ctas, threads, smem, {true, ctas}, stream, args);
}

inline void launch_decode_select(const DecodeArgs& args, const DecodeDevice& gpu, Stream stream) {
  const int64_t queries = int64_t{args.batch} * args.heads_kv * args.max_q;
  const DecodeLaunch launch{gpu.has_overlap};
  const int ctas = gpu.has_overlap ? decode_rank_ctas(args.max_blocks, queries, gpu.num_sms) : 0;
  if (ctas > 0) {
    launch_decode_rank(args, queries, ctas, stream);
    return;
  }
  const int smem = static_cast<int>(decode_select_smem(args.max_blocks));
  constexpr int kThreads = kDecodeSelectThreads;
  if (args.block_scores_pitch == 0) {
    launch_decode_kernel(decode_select_kernel<kThreads, false>, queries, kThreads, smem, launch,
                         stream, args);
    return;
  }
  const int64_t steps = ceil_div(args.max_blocks, device::blocks_a_step(args, kDecodePoolKeys));
  launch_decode_kernel(decode_pool_kernel<kThreads>, queries * steps, kThreads, 0, launch, stream,
                       args);
  launch_decode_kernel(decode_select_kernel<kThreads, true>, queries, kThreads, smem, launch,
                       stream, args);
}

template <class Traits>
void launch_decode_finish(const DecodeArgs& args, int ctas, Stream stream) {
  using Finish = FinishTraits<Traits>;
  static_assert(Finish::kSmemBytes + sizeof(device::FinishShared) <= Finish::kPlannedBytes);
  const int64_t queries = int64_t{args.batch} * args.heads_kv * args.max_q;
  const auto kernel =
      args.group <= 4 ? decode_finish_kernel<Traits, 4> : decode_finish_kernel<Traits, 16>;
  launch_decode_kernel(kernel, queries * ctas, Finish::kThreads, Finish::kSmemBytes, {true, ctas},
                       stream, args);
}

template <DecodeConfig kConfig>
void launch_paged_attn(const PagedAttnParams& params, Stream stream) {
  using Traits = DecodeTraits<kConfig>;
  const DecodeArgs args = decode_args(params);
  const int64_t units = int64_t{args.batch} * args.heads_kv;
  if (params.packing.total_q == 0 || units == 0) return;
  const DecodeDevice device = decode_device();
  const int64_t tiles = ceil_div(int64_t{args.max_q} * args.group, kDecodeRows);
  const int64_t items = units * tiles * args.cmp_splits;
  launch_decode_kernel(
      decode_compressed_kernel<Traits>,
      std::max(std::min(items, int64_t{device.num_sms} * Traits::kMinCtas), int64_t{1}),
      kCompressedThreads<Traits>, Traits::kSmemBytes, {device.has_overlap}, stream, args);
  if (const DecodeFinish finish = params.tuning.finish; finish.ctas > 0) {
    if constexpr (can_finish_wide(kConfig)) {
      if (finish.is_wide) {
        launch_decode_finish<FinishAttendTraits<kConfig, 2>>(args, finish.ctas, stream);
        return;
      }
    }
    launch_decode_finish<FinishAttendTraits<kConfig, 1>>(args, finish.ctas, stream);
    return;
  }
  launch_decode_select(args, device, stream);
  launch_decode_branches<kConfig>(args, device.has_overlap, stream);
}

template <DecodeConfig kConfig>
void launch_paged_selected(const PagedSelectedParams& params, Stream stream) {
  const DecodeArgs args = decode_args(params);
  const int64_t units = int64_t{args.batch} * args.heads_kv;
  if (params.packing.total_q == 0 || units == 0) return;
  FSATTN_CUDA_CHECK(cudaMemsetAsync(args.counters, 0, static_cast<size_t>(units * args.max_q * 4),
                                    static_cast<cudaStream_t>(stream)));
  launch_decode_branches<kConfig>(args, false, stream);
}

}  // namespace fsattn
