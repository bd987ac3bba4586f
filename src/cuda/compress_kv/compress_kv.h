#pragma once
#include "params/compress_kv.h"
#include "plan/compress_kv_table.h"

namespace fsattn {

void launch_compress_kv_fwd(int row, const CompressKvFwdParams& params, Stream stream);
void launch_compress_kv_bwd(int row, const CompressKvBwdParams& params, Stream stream);

template <CompressKvConfig kConfig>
void launch_compress_kv_fwd(const CompressKvFwdParams& params, Stream stream);
template <CompressKvConfig kConfig>
void launch_compress_kv_bwd(const CompressKvBwdParams& params, Stream stream);

}  // namespace fsattn
