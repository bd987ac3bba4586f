// The forward pass of the three attention branches.
//
// Math     for every query t and head h, over the keys j that the mask lets t see:
//              s_j = scale * q . k_j,  p_j = exp(s_j - max),  o = sum p_j v_j / sum p_j
//              lse = max + log(sum p_j);  no visible key: o = 0, lse = -inf
// Tiles    one task a (query tile, KV head): up to 64 rows (queries times heads of the group), which walk
//          over key tiles of 64 with a running maximum, in fp32 (fp64 for fp64). P is not
//          rounded to the storage type.
#pragma once
#include "params/attention.h"

namespace fsattn::cpu {

// Real is the compute type of params.attn.shape.dtype.
template <class Mask, class Real>
void attn_fwd(const AttnFwdParams<Mask>& params);

}  // namespace fsattn::cpu
