// The three attention branches on the CPU. Contracts: CompressedAttentionFwd and its neighbours in
// fsattn/ops.h. Signatures as in params/backend.h; row and stream have no meaning here.
#pragma once
#include "params/attention.h"

namespace fsattn::cpu {

void compressed_attn_fwd(int row, const CompressedAttnFwdParams& params, Stream stream);
void compressed_attn_bwd(int row, const CompressedAttnBwdParams& params, Stream stream);
void selected_attn_fwd(int row, const SelectedAttnFwdParams& params, Stream stream);
void selected_attn_bwd(int row, const SelectedAttnBwdParams& params, Stream stream);
void window_attn_fwd(int row, const WindowAttnFwdParams& params, Stream stream);
void window_attn_bwd(int row, const WindowAttnBwdParams& params, Stream stream);

}  // namespace fsattn::cpu
