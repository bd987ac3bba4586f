// A small valid call of every operator, for tests that change one thing in it. Two sequences: 3 and 5
// queries over 40 and 24 keys; l = 8, d = 4, S = 16.
#pragma once
#include "fsattn/ops.h"
#include "support/host_tensor.h"

namespace fsattn::test {

inline constexpr int64_t kTotalQ = 8, kTotalK = 64, kRowsCmp = 16;
inline constexpr int64_t kHeadsQ = 4, kHeadsKv = 2, kDim = 16, kDimV = 8;
inline constexpr int64_t kKernelSize = 8, kKernelStride = 4, kBlockSize = 16, kTopk = 2;
inline constexpr int64_t kNumSlots = kTotalK / kBlockSize + 2;

class Calls {
 public:
  explicit Calls(DType dtype = DType::kFloat32) : dtype_(dtype) {}

  Arena& arena() { return arena_; }

  Sequences sequences() {
    return {index_tensor(arena_, {0, 3, 8}), index_tensor(arena_, {0, 40, 64}), {}, 5, 40};
  }
  TensorView cu_seqlens_cmp() { return index_tensor(arena_, {0, 9, 14}); }

  TensorView random(int64_t tokens, int64_t heads, int64_t dim) {
    const TensorView view = arena_.make(dtype_, tokens, heads, dim);
    if (dtype_ == DType::kFloat32 || dtype_ == DType::kFloat64) fill_random(view, ++seed_);
    return view;
  }
  TensorView q() { return random(kTotalQ, kHeadsQ, kDim); }
  TensorView o() { return arena_.make(dtype_, kTotalQ, kHeadsQ, kDimV); }
  TensorView dout() { return random(kTotalQ, kHeadsQ, kDimV); }
  TensorView lse() { return arena_.make(stats(), kHeadsQ, kTotalQ); }
  TensorView k(int64_t rows) { return random(rows, kHeadsKv, kDim); }
  TensorView v(int64_t rows) { return random(rows, kHeadsKv, kDimV); }
  TensorView empty_index(int64_t a, int64_t b, int64_t c) {
    return arena_.make(DType::kInt32, a, b, c);
  }

  // Every query wants block 0 and, in the second place, nothing or block 1.
  TensorView topk_idx() {
    const TensorView view = empty_index(kHeadsKv, kTotalQ, kTopk);
    for_each(view, [&](int64_t h, int64_t t, int64_t n) {
      index_at(view, h, t, n) = n == 0 ? 0 : (t % 2 == 0 ? 1 : -1);
    });
    return view;
  }

  CompressKvFwd compress_fwd() {
    CompressKvFwd call;
    call.x = k(kTotalK);
    call.cu_seqlens = index_tensor(arena_, {0, 40, 64});
    call.max_seqlen = 40;
    call.kernel_size = kKernelSize;
    call.kernel_stride = kKernelStride;
    call.kind = CompressKind::kWeighted;
    call.weight = arena_.make(dtype_, kHeadsKv, kKernelSize);
    call.pos_emb = random(kHeadsKv, kKernelSize, kDim);
    if (dtype_ == DType::kFloat32 || dtype_ == DType::kFloat64) fill_random(call.weight, 99);
    call.x_cmp = arena_.make(dtype_, kRowsCmp, kHeadsKv, kDim);
    call.cu_seqlens_cmp = arena_.make(DType::kInt32, 3);
    return call;
  }

  CompressKvBwd compress_bwd() {
    const CompressKvFwd fwd = compress_fwd();
    CompressKvBwd call;
    call.dx_cmp = k(kRowsCmp);
    call.x = fwd.x;
    call.weight = fwd.weight;
    call.pos_emb = fwd.pos_emb;
    call.cu_seqlens = fwd.cu_seqlens;
    call.cu_seqlens_cmp = cu_seqlens_cmp();
    call.max_seqlen = fwd.max_seqlen;
    call.kernel_size = kKernelSize;
    call.kernel_stride = kKernelStride;
    call.kind = fwd.kind;
    call.dx = arena_.make(dtype_, kTotalK, kHeadsKv, kDim);
    call.dweight = arena_.make(dtype_, kHeadsKv, kKernelSize);
    call.dpos_emb = arena_.make(dtype_, kHeadsKv, kKernelSize, kDim);
    return call;
  }

  CompressedAttentionFwd compressed_fwd() {
    CompressedAttentionFwd call;
    set_forward(call, kRowsCmp);
    call.cu_seqlens_cmp = cu_seqlens_cmp();
    call.kernel_size = kKernelSize;
    call.kernel_stride = kKernelStride;
    return call;
  }

  CompressedAttentionBwd compressed_bwd() {
    CompressedAttentionBwd call;
    set_backward(call, kRowsCmp);
    call.cu_seqlens_cmp = cu_seqlens_cmp();
    call.kernel_size = kKernelSize;
    call.kernel_stride = kKernelStride;
    return call;
  }

  SelectBlocks select() {
    SelectBlocks call;
    call.q = q();
    call.k_cmp = k(kRowsCmp);
    call.lse = lse();
    call.seq = sequences();
    call.cu_seqlens_cmp = cu_seqlens_cmp();
    call.kernel_size = kKernelSize;
    call.kernel_stride = kKernelStride;
    call.block_size = kBlockSize;
    call.topk = kTopk;
    call.local_blocks = 1;
    call.topk_idx = empty_index(kHeadsKv, kTotalQ, kTopk);
    return call;
  }

  BuildBlockIndex block_index() {
    BuildBlockIndex call;
    call.topk_idx = topk_idx();
    call.seq = sequences();
    call.block_size = kBlockSize;
    call.block_start = arena_.make(DType::kInt32, kHeadsKv, kNumSlots + 1);
    call.block_entry = arena_.make(DType::kInt32, kHeadsKv, kTotalQ * kTopk);
    return call;
  }

  SelectedAttentionFwd selected_fwd() {
    SelectedAttentionFwd call;
    set_forward(call, kTotalK);
    call.topk_idx = topk_idx();
    call.block_size = kBlockSize;
    return call;
  }

  SelectedAttentionBwd selected_bwd() {
    SelectedAttentionBwd call;
    set_backward(call, kTotalK);
    call.topk_idx = topk_idx();
    call.block_size = kBlockSize;
    return call;
  }

  WindowAttentionFwd window_fwd() {
    WindowAttentionFwd call;
    set_forward(call, kTotalK);
    call.window_size = 6;
    return call;
  }

  WindowAttentionBwd window_bwd() {
    WindowAttentionBwd call;
    set_backward(call, kTotalK);
    call.window_size = 6;
    return call;
  }

  GateFwd gate_fwd() {
    GateFwd call;
    call.o_cmp = dout();
    call.o_sel = dout();
    call.o_win = dout();
    call.gates = random(kTotalQ, kHeadsQ, 3);
    call.o = o();
    return call;
  }

  GateBwd gate_bwd() {
    GateBwd call;
    call.dout = dout();
    call.o_cmp = dout();
    call.o_sel = dout();
    call.o_win = dout();
    call.gates = random(kTotalQ, kHeadsQ, 3);
    call.do_cmp = o();
    call.do_sel = o();
    call.do_win = o();
    call.dgates = arena_.make(dtype_, kTotalQ, kHeadsQ, 3);
    return call;
  }

  NativeSparseAttentionFwd nsa_fwd() {
    NativeSparseAttentionFwd call;
    set_nsa(call);
    call.topk_idx = empty_index(kHeadsKv, kTotalQ, kTopk);
    call.o = o();
    return call;
  }

  NativeSparseAttentionBwd nsa_bwd() {
    NativeSparseAttentionBwd call;
    set_nsa(call);
    call.dout = dout();
    call.topk_idx = topk_idx();
    call.dq = arena_.make(dtype_, kTotalQ, kHeadsQ, kDim);
    call.dk = arena_.make(dtype_, kTotalK, kHeadsKv, kDim);
    call.dv = arena_.make(dtype_, kTotalK, kHeadsKv, kDimV);
    call.dk_cmp = arena_.make(dtype_, kRowsCmp, kHeadsKv, kDim);
    call.dv_cmp = arena_.make(dtype_, kRowsCmp, kHeadsKv, kDimV);
    call.dgates = arena_.make(dtype_, kTotalQ, kHeadsQ, 3);
    return call;
  }

 private:
  DType stats() const { return dtype_ == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

  template <class Call>
  void set_inputs(Call& call, int64_t rows) {
    call.q = q();
    call.k = k(rows);
    call.v = v(rows);
    call.seq = sequences();
  }

  template <class Call>
  void set_forward(Call& call, int64_t rows) {
    set_inputs(call, rows);
    call.o = o();
    call.lse = lse();
  }

  template <class Call>
  void set_backward(Call& call, int64_t rows) {
    set_inputs(call, rows);
    call.dout = dout();
    call.o = dout();
    call.lse = lse();
    call.dq = arena_.make(dtype_, kTotalQ, kHeadsQ, kDim);
    call.dk = arena_.make(dtype_, rows, kHeadsKv, kDim);
    call.dv = arena_.make(dtype_, rows, kHeadsKv, kDimV);
  }

  template <class Call>
  void set_nsa(Call& call) {
    set_inputs(call, kTotalK);
    call.k_cmp = k(kRowsCmp);
    call.v_cmp = v(kRowsCmp);
    call.gates = random(kTotalQ, kHeadsQ, 3);
    call.cu_seqlens_cmp = cu_seqlens_cmp();
    call.config = {kKernelSize, kKernelStride, kBlockSize, kTopk, 1, 1, 6, 0.0};
    call.o_cmp = o();
    call.o_sel = o();
    call.o_win = o();
    call.lse_cmp = lse();
    call.lse_sel = lse();
    call.lse_win = lse();
  }

  DType dtype_;
  Arena arena_;
  unsigned seed_ = 0;
};

// The same call on a GPU that this test cannot reach: bf16, addresses that are never read.
inline void move_to_cuda(TensorView& view) {
  if (!view.defined()) return;
  view.device = {DeviceType::kCuda, 0};
}

}  // namespace fsattn::test
