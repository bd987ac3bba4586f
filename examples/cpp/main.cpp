// Native sparse attention on the CPU, forward and backward, over two packed sequences.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "fsattn/ops.h"

namespace {

using fsattn::TensorView;

constexpr int64_t kHeadsQ = 8, kHeadsKv = 2, kHeadDim = 64;
constexpr int64_t kLengths[] = {300, 513};
constexpr int64_t kTotal = kLengths[0] + kLengths[1];

// The library owns no memory: a tensor is a view of a buffer that the program keeps.
template <class T, fsattn::DType kDType>
struct HostTensor {
  std::vector<T> data;
  TensorView view;

  template <class... Sizes>
  explicit HostTensor(Sizes... sizes) : data(static_cast<size_t>((int64_t{1} * ... * sizes))) {
    view = fsattn::contiguous_view(data.data(), kDType, {}, sizes...);
  }
  HostTensor(HostTensor&&) = default;  // moving a vector keeps its buffer, so the view stays valid
  HostTensor(const HostTensor&) = delete;
};
using Tensor = HostTensor<float, fsattn::DType::kFloat32>;
using IndexTensor = HostTensor<int32_t, fsattn::DType::kInt32>;

Tensor like(const TensorView& view) { return Tensor(view.shape[0], view.shape[1], view.shape[2]); }

void fill_random(Tensor& tensor, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  for (float& value : tensor.data) value = normal(generator);
}

double checksum(const Tensor& tensor) {
  double sum = 0.0;
  for (const float value : tensor.data) sum += std::fabs(value);
  return sum / static_cast<double>(tensor.data.size());
}

// Prints the plan, allocates the workspace that the call asks for, and runs it.
template <class Call>
void explain_and_run(const Call& call) {
  std::printf("%s\n", fsattn::explain(call).c_str());
  const size_t bytes = fsattn::workspace_bytes(call);
  const size_t padded = (bytes + 255) / 256 * 256;
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(256, std::max<size_t>(padded, 256)), &std::free);
  fsattn::run(call, {.workspace = workspace.get(), .workspace_bytes = bytes});
}

struct Compressed {
  Tensor rows;
  IndexTensor cu_seqlens;
};

Compressed compress(const Tensor& x, const TensorView& cu_seqlens,
                    const fsattn::NsaConfig& config) {
  Compressed out{Tensor(kTotal / config.kernel_stride, kHeadsKv, kHeadDim),
                 IndexTensor(cu_seqlens.shape[0])};
  fsattn::CompressKvFwd call;
  call.x = x.view;
  call.cu_seqlens = cu_seqlens;
  call.max_seqlen = *std::max_element(std::begin(kLengths), std::end(kLengths));
  call.kernel_size = config.kernel_size;
  call.kernel_stride = config.kernel_stride;
  call.x_cmp = out.rows.view;
  call.cu_seqlens_cmp = out.cu_seqlens.view;
  explain_and_run(call);
  return out;
}

// What both passes read.
struct Inputs {
  fsattn::NsaConfig config;
  IndexTensor cu_seqlens{int64_t{3}};
  Tensor q{kTotal, kHeadsQ, kHeadDim};
  Tensor k{kTotal, kHeadsKv, kHeadDim};
  Tensor v{kTotal, kHeadsKv, kHeadDim};
  Tensor gates{kTotal, kHeadsQ, int64_t{3}};  // logits: the sigmoid is fused
  Tensor dout{kTotal, kHeadsQ, kHeadDim};

  Inputs() {
    config.topk = 4;
    config.window_size = 128;
    cu_seqlens.data[1] = static_cast<int32_t>(kLengths[0]);
    cu_seqlens.data[2] = static_cast<int32_t>(kTotal);
    std::mt19937 generator(1);
    for (Tensor* tensor : {&q, &k, &v, &gates, &dout}) fill_random(*tensor, generator);
  }
};

// What the forward pass writes and the backward pass reads.
struct Saved {
  Compressed k_cmp, v_cmp;
  IndexTensor topk_idx;
  Tensor o, o_cmp, o_sel, o_win;
  Tensor lse_cmp, lse_sel, lse_win;

  explicit Saved(const Inputs& in)
      : k_cmp(compress(in.k, in.cu_seqlens.view, in.config)),
        v_cmp(compress(in.v, in.cu_seqlens.view, in.config)),
        topk_idx(kHeadsKv, kTotal, in.config.topk),
        o(like(in.q.view)),
        o_cmp(like(in.q.view)),
        o_sel(like(in.q.view)),
        o_win(like(in.q.view)),
        lse_cmp(kHeadsQ, kTotal),
        lse_sel(kHeadsQ, kTotal),
        lse_win(kHeadsQ, kTotal) {}
};

// The tensors that both calls name alike.
template <class Call>
Call make_call(const Inputs& in, const Saved& saved) {
  Call call;
  call.q = in.q.view;
  call.k = in.k.view;
  call.v = in.v.view;
  call.k_cmp = saved.k_cmp.rows.view;
  call.v_cmp = saved.v_cmp.rows.view;
  call.gates = in.gates.view;
  call.seq = {in.cu_seqlens.view, in.cu_seqlens.view, {}, kTotal, kTotal};
  call.cu_seqlens_cmp = saved.k_cmp.cu_seqlens.view;
  call.config = in.config;
  call.topk_idx = saved.topk_idx.view;
  call.o_cmp = saved.o_cmp.view;
  call.o_sel = saved.o_sel.view;
  call.o_win = saved.o_win.view;
  call.lse_cmp = saved.lse_cmp.view;
  call.lse_sel = saved.lse_sel.view;
  call.lse_win = saved.lse_win.view;
  return call;
}

void run_example() {
  const Inputs in;
  const Saved saved(in);
  auto fwd = make_call<fsattn::NativeSparseAttentionFwd>(in, saved);
  fwd.o = saved.o.view;
  explain_and_run(fwd);

  const Tensor dq = like(in.q.view), dk = like(in.k.view), dv = like(in.v.view);
  const Tensor dk_cmp = like(fwd.k_cmp), dv_cmp = like(fwd.v_cmp), dgates = like(in.gates.view);
  auto bwd = make_call<fsattn::NativeSparseAttentionBwd>(in, saved);
  bwd.dout = in.dout.view;
  bwd.dq = dq.view;
  bwd.dk = dk.view;
  bwd.dv = dv.view;
  bwd.dk_cmp = dk_cmp.view;
  bwd.dv_cmp = dv_cmp.view;
  bwd.dgates = dgates.view;
  explain_and_run(bwd);

  std::printf("mean |o| %.6f, |dq| %.6f, |dk| %.6f, |dv| %.6f, |dgates| %.6f\n", checksum(saved.o),
              checksum(dq), checksum(dk), checksum(dv), checksum(dgates));
}

}  // namespace

int main() {
  try {
    std::printf("%s", fsattn::describe_build().c_str());
    run_example();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
