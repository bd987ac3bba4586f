// Compression of keys or values on the CPU. Contract: CompressKvFwd and CompressKvBwd in fsattn/ops.h.
//
//     y[i] = f(x[i d .. i d + l - 1] + pos_emb)     f linear in its input, see CompressKind
//
// The position embedding is added inside the window for every kind, so the softmax kind weights it by
// the softmax. Sums are fp32 (fp64 for fp64) and rounded once. Every output element has one owner and
// a fixed order of summation: any number of threads gives the same bits.
// Signatures as in params/backend.h; row and stream have no meaning here.
#pragma once
#include "params/compress_kv.h"

namespace fsattn::cpu {

void compress_kv_fwd(int row, const CompressKvFwdParams& params, Stream stream);
void compress_kv_bwd(int row, const CompressKvBwdParams& params, Stream stream);

}  // namespace fsattn::cpu
