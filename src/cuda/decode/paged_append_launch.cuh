// Which kernel of paged_append takes a call.
#pragma once
#include "cuda/decode/paged_append.cuh"
#include "cuda/decode/paged_append_chunk.cuh"

namespace fsattn {

template <PagedCopyConfig kConfig>
void launch_paged_append(const PagedAppendParams& p, Stream stream) {
  using Element = device::ElementOf<kConfig.dtype>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (p.tuning.has_chunks) {
    launch_paged_append_chunk<kConfig>(p, stream);
    return;
  }
  const int64_t units = p.write.packing.batch * p.write.shape.num_heads_kv;
  if (p.write.packing.total_q * units == 0) return;
  if (p.kind != CompressKind::kLinear || p.cmp.k.data == nullptr) {
    const auto smem = static_cast<int>(
        paged_append_smem(p.write.kernel_size, p.write.shape.head_dim, p.write.shape.head_dim_v));
    allow_shared_memory(paged_append_kernel<Element>, smem);
    paged_append_kernel<Element>
        <<<static_cast<unsigned>(units), kAppendThreads, static_cast<size_t>(smem), cuda_stream>>>(
            p);
    FSATTN_CUDA_CHECK(cudaGetLastError());
    return;
  }
  const int64_t dim = std::max(p.write.shape.head_dim, p.write.shape.head_dim_v);
  const int64_t parts = ceil_div(dim / 2, int64_t{kLinearColumns});
  const int smem = static_cast<int>(paged_append_linear_smem(p.write.kernel_size, dim));
  allow_shared_memory(paged_append_linear_kernel<Element>, smem);
  paged_append_linear_kernel<Element>
      <<<static_cast<unsigned>(units * 2 * parts), kLinearThreads, static_cast<size_t>(smem),
         cuda_stream>>>(p, static_cast<int>(parts));
  paged_store_kernel<Element>
      <<<paged_ctas(p.write.packing.total_q, p.write.shape), kPagedThreads, 0, cuda_stream>>>(
          p.write);
  FSATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fsattn
