// Launchers of compressed attention and window attention. `row` is an index into kDenseAttnFwdTable
// or kDenseAttnBwdTable.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/device/band.h"
#include "params/backend.h"
#include "plan/dense_attn_table.h"

namespace fsattn {

void launch_compressed_attn_fwd(int row, const CompressedAttnFwdParams& params, Stream stream);
void launch_compressed_attn_bwd(int row, const CompressedAttnBwdParams& params, Stream stream);
void launch_window_attn_fwd(int row, const WindowAttnFwdParams& params, Stream stream);
void launch_window_attn_bwd(int row, const WindowAttnBwdParams& params, Stream stream);

// Scratch memory of the backward, laid out by dense_attn_bwd_scratch().
struct DenseBwdBuffers {
  float* delta;       // [Hq, total_q]: rowsum(dO * O) - dlse
  float* partial_dk;  // unused when splits is 1
  float* partial_dv;
  int splits;
  int partial_rows;
  float* dq_sums;     // [Hq, total_q, 128]; used when one kernel computes all gradients
  int* turns;         // how many CTAs have started, then how many have added to each tile of dQ
  int64_t num_turns;  // 0: several kernels compute the gradients
  const int* prior_turns;  // of the kernel that added to them before; null when there is none
};

template <DenseAttnConfig kConfig>
void launch_dense_attn_fwd(const AttnFwdTensors& tensors, const device::KeySet& keys,
                           Stream stream);

template <DenseAttnConfig kConfig>
void launch_dense_attn_bwd(const AttnBwdTensors& tensors, const device::KeySet& keys,
                           const DenseBwdBuffers& buffers, Stream stream);

}  // namespace fsattn
