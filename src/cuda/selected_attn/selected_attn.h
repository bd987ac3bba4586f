#pragma once
#include "params/attention.h"
#include "plan/selected_attn_table.h"

namespace fsattn {

// Selected attention (SelectedAttentionFwd, SelectedAttentionBwd in fsattn/ops.h). Stream-ordered,
// allocates nothing; params.scratch holds what selected_attn_{fwd,bwd}_workspace() says. `row` is an
// index into kSelectedAttn{Fwd,Bwd}Table.
void launch_selected_attn_fwd(int row, const SelectedAttnFwdParams& params, Stream stream);
void launch_selected_attn_bwd(int row, const SelectedAttnBwdParams& params, Stream stream);

template <SelectedAttnFwdConfig kConfig>
void launch_selected_attn_fwd(const SelectedAttnFwdParams& params, Stream stream);

template <SelectedAttnBwdConfig kConfig>
void launch_selected_attn_bwd(const SelectedAttnBwdParams& params, Stream stream);

}  // namespace fsattn
