// Every operator through the public functions on small fp64 tensors, against the naive loops.
#include <algorithm>

#include "fsattn/version.h"
#include "support/calls.h"
#include "support/naive.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

constexpr double kTolerance = 1e-11;

template <class Call>
void run_call(Calls& calls, const Call& call) {
  const size_t bytes = workspace_bytes(call);
  run(call, {.workspace = calls.arena().allocate(bytes), .workspace_bytes = bytes});
}

void expect_close(const char* name, const TensorView& found, const TensorView& wanted) {
  double worst = 0.0;
  for_each(wanted, [&](int64_t i, int64_t j, int64_t k) {
    const double a = get(found, i, j, k), b = get(wanted, i, j, k);
    if (a == b) return;  // infinities
    const double error = std::fabs(a - b);
    worst = error <= worst ? worst : error;  // a NaN stays
  });
  expect_near(__FILE__, __LINE__, name, worst, 0.0, kTolerance);
}

TensorView like(Calls& calls, const TensorView& view) {
  TensorView made = view;
  const TensorView memory = calls.arena().make(DType::kFloat64, view.numel());
  made.data = memory.data;
  int64_t stride = 1;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    made.stride[static_cast<size_t>(dim)] = stride;
    stride *= view.shape[static_cast<size_t>(dim)];
  }
  return made;
}

template <class Call>
void check_forward(Calls& calls, const Call& call, const VisibleKeys& visible) {
  run_call(calls, call);
  const TensorView o = like(calls, call.o), lse = like(calls, call.lse);
  naive_attention_fwd({call.q, call.k, call.v, call.seq, call.softmax_scale, visible}, o, lse);
  expect_close("o", call.o, o);
  expect_close("lse", call.lse, lse);
}

// o and lse come from the naive forward; dlse is part of the test.
template <class Call>
void check_backward(Calls& calls, Call call, const VisibleKeys& visible) {
  const NaiveQkv in{call.q, call.k, call.v, call.seq, call.softmax_scale, visible};
  naive_attention_fwd(in, call.o, call.lse);
  call.dlse = calls.lse();
  fill_random(call.dlse, 4);
  run_call(calls, call);
  const TensorView dq = like(calls, call.dq), dk = like(calls, call.dk), dv = like(calls, call.dv);
  naive_attention_bwd(in, {call.dout, call.dlse, dq, dk, dv});
  expect_close("dq", call.dq, dq);
  expect_close("dk", call.dk, dk);
  expect_close("dv", call.dv, dv);
}

TEST(window_attention) {
  Calls calls(DType::kFloat64);
  const auto fwd = calls.window_fwd();
  check_forward(calls, fwd, window_keys(fwd.seq, fwd.window_size));
  const auto bwd = calls.window_bwd();
  check_backward(calls, bwd, window_keys(bwd.seq, bwd.window_size));
}

TEST(window_attention_with_offsets) {
  Calls calls(DType::kFloat64);
  auto fwd = calls.window_fwd();
  fwd.seq.q_offset = index_tensor(calls.arena(), {-2, 30});  // before the start, behind the end
  fwd.softmax_scale = 0.7;
  check_forward(calls, fwd, window_keys(fwd.seq, fwd.window_size));
  EXPECT_TRUE(std::isinf(get(fwd.lse, 0, 0)));
}

TEST(selected_attention) {
  Calls calls(DType::kFloat64);
  auto fwd = calls.selected_fwd();
  index_at(fwd.topk_idx, 0, 1, 0) = 99;  // outside of the sequence: counts as -1
  index_at(fwd.topk_idx, 1, 4, 1) = 0;   // twice: counts once
  check_forward(calls, fwd, selected_keys(fwd.seq, fwd.topk_idx, kBlockSize));
  auto bwd = calls.selected_bwd();
  bwd.topk_idx = fwd.topk_idx;
  check_backward(calls, bwd, selected_keys(bwd.seq, bwd.topk_idx, kBlockSize));
}

TEST(selected_attention_with_given_index) {
  Calls calls(DType::kFloat64);
  const auto index = calls.block_index();
  run_call(calls, index);
  auto fwd = calls.selected_fwd();
  auto bwd = calls.selected_bwd();
  fwd.topk_idx = bwd.topk_idx = index.topk_idx;
  fwd.block_start = bwd.block_start = index.block_start;
  fwd.block_entry = bwd.block_entry = index.block_entry;
  check_forward(calls, fwd, selected_keys(fwd.seq, fwd.topk_idx, kBlockSize));
  check_backward(calls, bwd, selected_keys(bwd.seq, bwd.topk_idx, kBlockSize));
}

TEST(compressed_attention) {
  Calls calls(DType::kFloat64);
  const auto fwd = calls.compressed_fwd();
  check_forward(calls, fwd, compressed_keys(fwd.cu_seqlens_cmp, kKernelSize, kKernelStride));
  const auto bwd = calls.compressed_bwd();
  check_backward(calls, bwd, compressed_keys(bwd.cu_seqlens_cmp, kKernelSize, kKernelStride));
}

TEST(selection) {
  Calls calls(DType::kFloat64);
  auto attention = calls.compressed_fwd();
  auto call = calls.select();
  attention.q = call.q;
  attention.k = call.k_cmp;
  attention.lse = call.lse;
  run_call(calls, attention);
  run_call(calls, call);
  for (const QueryPlace& place : places_of(call.seq)) {
    for (int64_t h = 0; h < kHeadsKv; ++h) {
      const std::vector<int32_t> wanted = naive_selection(call, place, h);
      for (int64_t n = 0; n < kTopk; ++n) {
        EXPECT_EQ(index_at(call.topk_idx, h, place.token, n), wanted[static_cast<size_t>(n)]);
      }
    }
  }
}

TEST(block_index) {
  Calls calls;
  const auto call = calls.block_index();
  run_call(calls, call);
  for (int64_t h = 0; h < kHeadsKv; ++h) {
    std::vector<std::vector<int32_t>> wanted(kNumSlots);
    for (const QueryPlace& place : places_of(call.seq)) {
      const int64_t first = index_at(call.seq.cu_seqlens_k, place.sequence) / kBlockSize;
      for (int64_t n = 0; n < kTopk; ++n) {
        const int32_t block = index_at(call.topk_idx, h, place.token, n);
        if (block < 0 || block * kBlockSize > place.position) continue;
        wanted[static_cast<size_t>(first + place.sequence + block)].push_back(
            static_cast<int32_t>(place.token * kTopk + n));
      }
    }
    EXPECT_EQ(index_at(call.block_start, h, 0), 0);
    for (int64_t slot = 0; slot < kNumSlots; ++slot) {
      const int32_t begin = index_at(call.block_start, h, slot);
      const auto& list = wanted[static_cast<size_t>(slot)];
      EXPECT_EQ(index_at(call.block_start, h, slot + 1) - begin, list.size());
      for (size_t i = 0; i < list.size(); ++i) {
        EXPECT_EQ(index_at(call.block_entry, h, begin + static_cast<int64_t>(i)), list[i]);
      }
    }
  }
}

// weighted: y_i = sum_t w_t (x_{i d + t} + pe_t), rows behind the last sequence are zero.
TensorView naive_compress(Calls& calls, const CompressKvFwd& call) {
  const TensorView y = like(calls, call.x_cmp);
  set_zero(y);
  for (int64_t b = 0, row = 0; b < 2; ++b) {
    const int64_t begin = index_at(call.cu_seqlens, b), end = index_at(call.cu_seqlens, b + 1);
    for (int64_t start = begin; start + kKernelSize <= end; start += kKernelStride, ++row) {
      for (int64_t h = 0; h < kHeadsKv; ++h) {
        for (int64_t t = 0; t < kKernelSize; ++t) {
          for (int64_t d = 0; d < kDim; ++d) {
            const double value = get(call.x, start + t, h, d) + get(call.pos_emb, h, t, d);
            add(y, get(call.weight, h, t) * value, row, h, d);
          }
        }
      }
    }
  }
  return y;
}

TEST(compression) {
  Calls calls(DType::kFloat64);
  const auto call = calls.compress_fwd();
  run_call(calls, call);
  expect_close("x_cmp", call.x_cmp, naive_compress(calls, call));
  const int32_t wanted[] = {0, 9, 14};
  for (int64_t b = 0; b < 3; ++b) EXPECT_EQ(index_at(call.cu_seqlens_cmp, b), wanted[b]);
}

// y is linear in each of x, weight, pos_emb: the gradient times a direction is the change of y along
// it, summed against dy.
TEST(compression_gradients) {
  Calls calls(DType::kFloat64);
  const auto bwd = calls.compress_bwd();
  run_call(calls, bwd);
  CompressKvFwd fwd = calls.compress_fwd();
  fwd.x = bwd.x;
  fwd.weight = bwd.weight;
  fwd.pos_emb = bwd.pos_emb;
  const TensorView y = naive_compress(calls, fwd);
  struct Case {
    const char* name;
    TensorView* input;
    const TensorView* gradient;
  };
  const Case cases[] = {
      {"dx",       &fwd.x,       &bwd.dx      },
      {"dweight",  &fwd.weight,  &bwd.dweight },
      {"dpos_emb", &fwd.pos_emb, &bwd.dpos_emb}
  };
  for (const auto& [name, input, gradient] : cases) {
    const TensorView direction = like(calls, *input), moved = like(calls, *input);
    fill_random(direction, 21);
    double predicted = 0.0;
    for_each(direction, [&](int64_t i, int64_t j, int64_t k) {
      predicted += get(direction, i, j, k) * get(*gradient, i, j, k);
      set(moved, get(*input, i, j, k) + get(direction, i, j, k), i, j, k);
    });
    const TensorView kept = *input;
    *input = moved;
    const TensorView moved_y = naive_compress(calls, fwd);
    *input = kept;
    double change = 0.0;
    for_each(y, [&](int64_t i, int64_t j, int64_t k) {
      change += (get(moved_y, i, j, k) - get(y, i, j, k)) * get(bwd.dx_cmp, i, j, k);
    });
    expect_near(__FILE__, __LINE__, name, predicted, change, 1e-9);
  }
}

TEST(gate) {
  Calls calls(DType::kFloat64);
  const auto call = calls.gate_fwd();
  run_call(calls, call);
  const TensorView o = like(calls, call.o);
  for_each(o, [&](int64_t t, int64_t h, int64_t d) {
    const double sum = sigmoid(get(call.gates, t, h, 0)) * get(call.o_cmp, t, h, d) +
                       sigmoid(get(call.gates, t, h, 1)) * get(call.o_sel, t, h, d) +
                       sigmoid(get(call.gates, t, h, 2)) * get(call.o_win, t, h, d);
    set(o, sum, t, h, d);
  });
  expect_close("o", call.o, o);
}

TEST(gate_gradients) {
  Calls calls(DType::kFloat64);
  const auto call = calls.gate_bwd();
  run_call(calls, call);
  const TensorView branches[] = {call.o_cmp, call.o_sel, call.o_win};
  const TensorView gradients[] = {call.do_cmp, call.do_sel, call.do_win};
  const TensorView dgates = like(calls, call.dgates);
  for (int64_t i = 0; i < 3; ++i) {
    const TensorView& branch = branches[i];
    const TensorView wanted = like(calls, branch);
    for_each(wanted, [&](int64_t t, int64_t h, int64_t d) {
      set(wanted, sigmoid(get(call.gates, t, h, i)) * get(call.dout, t, h, d), t, h, d);
    });
    expect_close("do", gradients[i], wanted);
    for (int64_t t = 0; t < kTotalQ; ++t) {
      for (int64_t h = 0; h < kHeadsQ; ++h) {
        double dot = 0.0;
        for (int64_t d = 0; d < kDimV; ++d) dot += get(branch, t, h, d) * get(call.dout, t, h, d);
        const double g = sigmoid(get(call.gates, t, h, i));
        set(dgates, dot * g * (1.0 - g), t, h, i);
      }
    }
  }
  expect_close("dgates", call.dgates, dgates);
}

// Gates per head that are one row broadcast: each head still gets a gradient of its own.
TEST(gate_gradients_of_broadcast_gates) {
  Calls calls(DType::kFloat64);
  auto broadcast = calls.gate_bwd();
  broadcast.gates.stride[1] = 0;
  auto full = broadcast;
  full.gates = like(calls, broadcast.gates);
  for_each(full.gates, [&](int64_t t, int64_t h, int64_t i) {
    set(full.gates, get(broadcast.gates, t, h, i), t, h, i);
  });
  full.dgates = like(calls, broadcast.dgates);
  run_call(calls, broadcast);
  run_call(calls, full);
  expect_close("dgates", broadcast.dgates, full.dgates);
}

GateFwd gate_of(const NativeSparseAttentionFwd& call, const TensorView& o) {
  return {call.o_cmp, call.o_sel, call.o_win, call.gates, call.activation, o};
}

TEST(native_sparse_attention_is_the_composition) {
  Calls calls(DType::kFloat64);
  const auto call = calls.nsa_fwd();
  run_call(calls, call);
  const NsaConfig& config = call.config;
  const TensorView o = like(calls, call.o), lse = like(calls, call.lse_cmp);
  const auto expect_branch = [&](const char* name, const TensorView& k, const TensorView& v,
                                 const VisibleKeys& keys, const TensorView& found) {
    naive_attention_fwd({call.q, k, v, call.seq, 0.0, keys}, o, lse);
    expect_close(name, found, o);
  };
  expect_branch("o_cmp", call.k_cmp, call.v_cmp,
                compressed_keys(call.cu_seqlens_cmp, config.kernel_size, config.kernel_stride),
                call.o_cmp);
  expect_close("lse_cmp", call.lse_cmp, lse);
  expect_branch("o_sel", call.k, call.v, selected_keys(call.seq, call.topk_idx, config.block_size),
                call.o_sel);
  expect_close("lse_sel", call.lse_sel, lse);
  expect_branch("o_win", call.k, call.v, window_keys(call.seq, config.window_size), call.o_win);
  expect_close("lse_win", call.lse_win, lse);
  run_call(calls, gate_of(call, o));
  expect_close("o", call.o, o);
  for_each(call.topk_idx, [&](int64_t h, int64_t t, int64_t n) {
    EXPECT_TRUE(n > 0 || index_at(call.topk_idx, h, t, n) == 0);
  });

  auto own = call;
  own.select = false;
  own.o = like(calls, call.o);
  own.o_cmp = like(calls, call.o);
  own.o_sel = like(calls, call.o);
  own.o_win = like(calls, call.o);
  run_call(calls, own);
  expect_close("o with a given selection", own.o, call.o);

  auto without = own;
  without.o = like(calls, call.o);
  without.o_sel = TensorView{};
  run_call(calls, without);
  expect_close("o without o_sel", without.o, call.o);
}

// dq, dk, dv are sums over branches: each branch alone, with the gradient that its gate passes on.
TEST(native_sparse_attention_gradients) {
  Calls calls(DType::kFloat64);
  auto bwd = calls.nsa_bwd();
  auto fwd = calls.nsa_fwd();
  fwd.q = bwd.q;
  fwd.k = bwd.k;
  fwd.v = bwd.v;
  fwd.k_cmp = bwd.k_cmp;
  fwd.v_cmp = bwd.v_cmp;
  fwd.gates = bwd.gates;
  run_call(calls, fwd);
  bwd.topk_idx = fwd.topk_idx;
  bwd.o_cmp = fwd.o_cmp;
  bwd.o_sel = fwd.o_sel;
  bwd.o_win = fwd.o_win;
  bwd.lse_cmp = fwd.lse_cmp;
  bwd.lse_sel = fwd.lse_sel;
  bwd.lse_win = fwd.lse_win;
  run_call(calls, bwd);

  const TensorView dq = like(calls, bwd.dq), dk = like(calls, bwd.dk), dv = like(calls, bwd.dv);
  for (const TensorView* view : {&dq, &dk, &dv}) set_zero(*view);
  const auto accumulate = [](const TensorView& sum, const TensorView& part) {
    for_each(part, [&](int64_t i, int64_t j, int64_t k) { add(sum, get(part, i, j, k), i, j, k); });
  };
  const VisibleKeys keys[] = {compressed_keys(bwd.cu_seqlens_cmp, kKernelSize, kKernelStride),
                              selected_keys(bwd.seq, bwd.topk_idx, kBlockSize),
                              window_keys(bwd.seq, bwd.config.window_size)};
  for (int64_t branch = 0; branch < 3; ++branch) {
    const bool is_cmp = branch == 0;
    const TensorView& k = is_cmp ? bwd.k_cmp : bwd.k;
    const TensorView& v = is_cmp ? bwd.v_cmp : bwd.v;
    const TensorView dout = like(calls, bwd.dout);
    for_each(dout, [&](int64_t t, int64_t h, int64_t d) {
      set(dout, sigmoid(get(bwd.gates, t, h, branch)) * get(bwd.dout, t, h, d), t, h, d);
    });
    const TensorView part_q = like(calls, dq), part_k = like(calls, k), part_v = like(calls, v);
    naive_attention_bwd({bwd.q, k, v, bwd.seq, 0.0, keys[branch]},
                        {dout, {}, part_q, part_k, part_v});
    accumulate(dq, part_q);
    if (is_cmp) {
      expect_close("dk_cmp", bwd.dk_cmp, part_k);
      expect_close("dv_cmp", bwd.dv_cmp, part_v);
    } else {
      accumulate(dk, part_k);
      accumulate(dv, part_v);
    }
  }
  expect_close("dq", bwd.dq, dq);
  expect_close("dk", bwd.dk, dk);
  expect_close("dv", bwd.dv, dv);
}

TEST(workspace_rules) {
  Calls calls;
  const auto call = calls.window_bwd();
  const size_t bytes = workspace_bytes(call);
  EXPECT_TRUE(bytes > 0);
  std::byte* memory = static_cast<std::byte*>(calls.arena().allocate(bytes + 256));
  EXPECT_THROWS(run(call, {}), Error,
                "workspace: must have " + std::to_string(bytes) + " bytes, found none");
  EXPECT_THROWS(run(call, {.workspace = memory, .workspace_bytes = bytes - 1}), Error,
                "bytes, found " + std::to_string(bytes - 1));
  EXPECT_THROWS(run(call, {.workspace = memory + 16, .workspace_bytes = bytes}), Error,
                "workspace: must be 256-byte aligned, found an address 16 bytes past a multiple");
  run(call, {.workspace = memory, .workspace_bytes = bytes});
}

TEST(cuda_tensors_need_a_cuda_build_and_device) {
  Calls calls(DType::kBFloat16);
  auto call = calls.gate_fwd();
  for (TensorView* view : {&call.o_cmp, &call.o_sel, &call.o_win, &call.gates, &call.o}) {
    view->device = {DeviceType::kCuda, 4711};
  }
  EXPECT_THROWS(explain(call), Error, "device: ");
}

TEST(build_description) {
  const std::string text = describe_build();
  EXPECT_TRUE(text.find(std::string("fsattn ") + FSATTN_VERSION) == 0);
  EXPECT_TRUE(text.find("\ncpu: ") != std::string::npos);
  EXPECT_TRUE(text.find("\ncuda: ") != std::string::npos);
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
