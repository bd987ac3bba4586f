// Step 1 of a call: everything that a caller can get wrong is caught here, and only here. Each
// overload throws fsattn::Error, or returns what plan/ decides from and what the backend gets.
// Scratch stays empty until run/ fills it.
//
// What a Problem guarantees: dtypes, devices, shapes and strides follow fsattn/ops.h; sizes are not
// negative, token counts fit int32; head dims are multiples of 8 in 8 .. 256; 1 <= G <= 64; l and S
// are multiples of d; S in {16, 32, 64, 128, 256}; 1 <= topk <= 128; softmax_scale is resolved and
// positive. On the CPU the values of cu_seqlens fit the tensors too; on CUDA they are the caller's
// promise. Values in topk_idx and q_offset are never trusted.
#pragma once
#include "api/arguments.h"
#include "fsattn/ops.h"
#include "params/compress_kv.h"
#include "params/nsa.h"
#include "plan/nsa_problem.h"

namespace fsattn {

template <class ProblemType, class Params>
struct Checked {
  ProblemType problem;
  Params params;
};

Checked<Problem, CompressKvFwdParams> validate(const CompressKvFwd& call, Purpose purpose);
Checked<Problem, CompressKvBwdParams> validate(const CompressKvBwd& call, Purpose purpose);
Checked<Problem, CompressedAttnFwdParams> validate(const CompressedAttentionFwd& call,
                                                   Purpose purpose);
Checked<Problem, CompressedAttnBwdParams> validate(const CompressedAttentionBwd& call,
                                                   Purpose purpose);
Checked<Problem, SelectBlocksParams> validate(const SelectBlocks& call, Purpose purpose);
Checked<Problem, BlockIndexParams> validate(const BuildBlockIndex& call, Purpose purpose);
Checked<Problem, SelectedAttnFwdParams> validate(const SelectedAttentionFwd& call, Purpose purpose);
Checked<Problem, SelectedAttnBwdParams> validate(const SelectedAttentionBwd& call, Purpose purpose);
Checked<Problem, WindowAttnFwdParams> validate(const WindowAttentionFwd& call, Purpose purpose);
Checked<Problem, WindowAttnBwdParams> validate(const WindowAttentionBwd& call, Purpose purpose);
Checked<Problem, GateFwdParams> validate(const GateFwd& call, Purpose purpose);
Checked<Problem, GateBwdParams> validate(const GateBwd& call, Purpose purpose);
Checked<NsaFwdProblem, NsaFwdParams> validate(const NativeSparseAttentionFwd& call,
                                              Purpose purpose);
Checked<NsaBwdProblem, NsaBwdParams> validate(const NativeSparseAttentionBwd& call,
                                              Purpose purpose);

}  // namespace fsattn
