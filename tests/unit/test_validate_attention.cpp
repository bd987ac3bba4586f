// Rules of the three attention branches.
#include <cmath>
#include <limits>

#include "rules.h"

namespace fsattn::test {
namespace {

constexpr ErrorCode kValue = ErrorCode::kInvalidArgument;
constexpr int64_t kTooLong = int64_t{1} << 31;

// A view without memory of its own: for sizes that no test could allocate.
TensorView resized(TensorView view, int dim, int64_t size) {
  view.shape[static_cast<size_t>(dim)] = size;
  return view;
}

TEST(heads_and_head_dims) {
  using Fwd = WindowAttentionFwd;
  EXPECT_RULES(Fwd, window_fwd,
               {
                   {kValue, "q: head_dim must be a multiple of 8 up to 256, found 12",
                    [](Fwd& c, Calls&) { c.q.shape[2] = c.k.shape[2] = 12; }    },
                   {kValue, "q: head_dim must be a multiple of 8 up to 256, found 0",
                    [](Fwd& c, Calls&) { c.q.shape[2] = c.k.shape[2] = 0; }     },
                   {kValue, "q: head_dim must be a multiple of 8 up to 256, found 264",
                    [](Fwd& c, Calls& f) {
                      c.q = f.random(kTotalQ, kHeadsQ, 264);
                      c.k = f.random(kTotalK, kHeadsKv, 264);
                    }                             },
                   {kValue, "v: head_dim must be a multiple of 8 up to 256, found 4",
                    [](Fwd& c, Calls&) { c.v.shape[2] = 4; }                    },
                   {kValue, "k: shape must be [*, *, 16], found [64, 2, 8]",
                    [](Fwd& c, Calls&) { c.k.shape[2] = 8; }                    },
                   {kValue, "k: must have at least 1 head, found 0",
                    [](Fwd& c, Calls&) { c.k.shape[1] = c.v.shape[1] = 0; }     },
                   {kValue, "q: the number of heads must be a multiple of that of k (2), found 3",
                    [](Fwd& c, Calls&) { c.q.shape[1] = 3; }                    },
                   {kValue, "q: the number of heads must be a multiple of that of k (2), found 0",
                    [](Fwd& c, Calls&) { c.q.shape[1] = 0; }                    },
                   {kValue, "q: must have at most 64 heads for one head of k, found 65",
                    [](Fwd& c, Calls& f) { c.q = f.random(kTotalQ, 130, kDim); }},
                   {kValue, "q: must have fewer than 2^31 tokens, found 2147483648",
                    [](Fwd& c, Calls&) { c.q = resized(c.q, 0, kTooLong); }     },
                   {kValue, "k: must have fewer than 2^31 rows, found 2147483648",
                    [](Fwd& c, Calls&) {
                      c.k = resized(c.k, 0, kTooLong);
                      c.v = resized(c.v, 0, kTooLong);
                    }                             },
                   {kValue, "v: shape must be [64, 2, *], found [63, 2, 8]",
                    [](Fwd& c, Calls&) { c.v.shape[0] = 63; }                   },
  });
}

TEST(softmax_scale) {
  using Fwd = WindowAttentionFwd;
  const double inf = std::numeric_limits<double>::infinity();
  const char* rule = "softmax_scale: must be finite and positive, or 0 for head_dim^-0.5, found ";
  const char* limits = "softmax_scale: must be between 1e-37 and 1e+38, found 1e";
  EXPECT_RULES(Fwd, window_fwd,
               {
                   {kValue, rule,   [](Fwd& c,  Calls&) { c.softmax_scale = -0.5; }        },
                   {kValue, rule,   [=](Fwd& c, Calls&) { c.softmax_scale = inf; }         },
                   {kValue, rule,   [](Fwd& c,  Calls&) { c.softmax_scale = std::nan(""); }},
                   {kValue, limits, [](Fwd& c,  Calls&) { c.softmax_scale = 1e39; }        },
                   {kValue, limits, [](Fwd& c,  Calls&) { c.softmax_scale = 1e-38; }       },
  });
  Calls calls;
  Fwd call = calls.window_fwd();
  EXPECT_NEAR(validate(call, Purpose::kRun).params.attn.shape.softmax_scale, 0.25, 0.0);
  call.softmax_scale = 0.125;
  EXPECT_NEAR(validate(call, Purpose::kRun).params.attn.shape.softmax_scale, 0.125, 0.0);
}

TEST(sequences) {
  using Fwd = WindowAttentionFwd;
  EXPECT_RULES(
      Fwd, window_fwd,
      {
          {kValue, "cu_seqlens_q: must start at 0, found 1",
           [](Fwd& c, Calls& f) {
             c.seq.cu_seqlens_q = index_tensor(f.arena(), {1, 3, 8});
           }                               },
          {kValue, "cu_seqlens_q: must not decrease, found 9 before 8 at 2",
           [](Fwd& c, Calls& f) {
             c.seq.cu_seqlens_q = index_tensor(f.arena(), {0, 9, 8});
             c.seq.max_seqlen_q = 9;
           }                               },
          {kValue, "cu_seqlens_q: must end at the number of tokens (8), found 7",
           [](Fwd& c, Calls& f) {
             c.seq.cu_seqlens_q = index_tensor(f.arena(), {0, 3, 7});
           }                               },
          {kValue, "cu_seqlens_k: must end at the number of tokens (64), found 65",
           [](Fwd& c, Calls& f) {
             c.seq.cu_seqlens_k = index_tensor(f.arena(), {0, 40, 65});
           }                               },
          {kValue, "cu_seqlens_k: must start at 0, found -1",
           [](Fwd& c, Calls& f) {
             c.seq.cu_seqlens_k = index_tensor(f.arena(), {-1, 40, 64});
           }                               },
          {kValue, "max_seqlen_q: must not be smaller than the longest sequence (5), found 4",
           [](Fwd& c, Calls&) { c.seq.max_seqlen_q = 4; }       },
          {kValue, "max_seqlen_k: must not be smaller than the longest sequence (40), found 39",
           [](Fwd& c, Calls&) { c.seq.max_seqlen_k = 39; }      },
          {kValue, "max_seqlen_q: must be between 1 and 2147483647, found 0",
           [](Fwd& c, Calls&) { c.seq.max_seqlen_q = 0; }       },
          {kValue, "max_seqlen_k: must be between 1 and 2147483647, found -3",
           [](Fwd& c, Calls&) { c.seq.max_seqlen_k = -3; }      },
          {kValue, "max_seqlen_k: must be between 1 and 2147483647, found 2147483648",
           [](Fwd& c, Calls&) { c.seq.max_seqlen_k = kTooLong; }},
          {kValue, "window_size: must be between 0 and 2147483647, found -1",
           [](Fwd& c, Calls&) { c.window_size = -1; }           },
  });
  Calls calls;
  Fwd call = calls.window_fwd();
  call.seq.max_seqlen_q = 1000;  // an upper bound may be too large
  EXPECT_EQ(validate(call, Purpose::kRun).problem.max_q, kTotalQ);
}

TEST(window_gradients) {
  using Bwd = WindowAttentionBwd;
  EXPECT_RULES(
      Bwd, window_bwd,
      {
          {kValue, "dout: must be given, found none",                                           [](Bwd& c, Calls&) { c.dout = {}; }                      },
          {kValue, "o: must be given, found none",                                              [](Bwd& c, Calls&) { c.o = {}; }                         },
          {kValue, "lse: must be given, found none",                                            [](Bwd& c, Calls&) { c.lse = {}; }                       },
          {kValue, "dout: shape must be [8, 4, 8], found [8, 4, 16]",
           [](Bwd& c,                                                                                      Calls& f) { c.dout = f.q(); }                 },
          {kValue, "dlse: shape must be [4, 8], found [4, 4]",
           [](Bwd& c,                                                                                      Calls& f) { c.dlse = resized(f.lse(), 1, 4); }},
          {kValue, "dq: shape must be [8, 4, 16], found [8, 4, 8]",
           [](Bwd& c,                                                                                      Calls&) { c.dq.shape[2] = 8; }                },
          {kValue, "dk: shape must be [64, 2, 16], found [8, 2, 16]",
           [](Bwd& c,                                                                                      Calls&) { c.dk.shape[0] = 8; }                },
          {kValue, "dv: shape must be [64, 2, 8], found [64, 2, 16]",
           [](Bwd& c,                                                                                      Calls& f) { c.dv = f.k(kTotalK); }            },
          {kValue, "dq: memory of an output may not overlap an input, found overlap with dout",
           [](Bwd& c,                                                                                      Calls&) { c.dout.data = c.dq.data; }          },
          {kValue, "dv: must not start where another output does, found the data of dk",
           [](Bwd& c,                                                                                      Calls&) { c.dv.data = c.dk.data; }            },
  });
  Calls calls;
  Bwd call = calls.window_bwd();
  EXPECT_TRUE(validate(call, Purpose::kRun).params.attn.dlse.data == nullptr);
  call.dlse = calls.lse();
  EXPECT_TRUE(validate(call, Purpose::kRun).params.attn.dlse.data == call.dlse.data);
}

template <class Call>
std::vector<Rule<Call>> window_rules() {
  return {
      {kValue, "kernel_stride: must be between 1 and 2147483647, found 0",
       [](Call& c, Calls&) { c.kernel_stride = 0; }  },
      {kValue, "kernel_size: must be between 1 and 2147483647, found -8",
       [](Call& c, Calls&) { c.kernel_size = -8; }   },
      {kValue, "kernel_size: must be a multiple of kernel_stride (4), found 10",
       [](Call& c, Calls&) { c.kernel_size = 10; }   },
      {kValue, "cu_seqlens_cmp: must be given, found none",
       [](Call& c, Calls&) { c.cu_seqlens_cmp = {}; }},
      {kValue, "cu_seqlens_cmp: must start at 0, found 2",
       [](Call& c, Calls& f) {
         c.cu_seqlens_cmp = index_tensor(f.arena(), {2, 11, 16});
       }                           },
      {kValue, "cu_seqlens_cmp: sequence 1 must have 5 windows by ",
       [](Call& c, Calls& f) {
         c.cu_seqlens_cmp = index_tensor(f.arena(), {0, 9, 15});
       }                           },
      {kValue, "cu_seqlens_cmp: sequence 0 must have 4 windows by ",
       [](Call& c, Calls&) { c.kernel_size = 28; }   },
      {kValue, "cu_seqlens_cmp: shape must be [3], found [4]",
       [](Call& c, Calls& f) {
         c.cu_seqlens_cmp = index_tensor(f.arena(), {0, 9, 14, 14});
       }                           },
  };
}

TEST(compressed_windows) {
  using Fwd = CompressedAttentionFwd;
  auto rules = window_rules<Fwd>();
  rules.push_back({kValue, "cu_seqlens_cmp: must not end behind the compressed rows (13), found 14",
                   [](Fwd& c, Calls&) { c.k.shape[0] = c.v.shape[0] = 13; }});
  rules.push_back({kValue, "v_cmp: shape must be [16, 2, *], found [15, 2, 8]",
                   [](Fwd& c, Calls&) { c.v.shape[0] = 15; }});
  rules.push_back({kValue,
                   "q: the number of heads must be a multiple of that of k_cmp (2), found 3",
                   [](Fwd& c, Calls&) { c.q.shape[1] = 3; }});
  EXPECT_RULES(Fwd, compressed_fwd, (rules));
  using Bwd = CompressedAttentionBwd;
  auto bwd_rules = window_rules<Bwd>();
  bwd_rules.push_back({kValue, "dk_cmp: shape must be [16, 2, 16], found [15, 2, 16]",
                       [](Bwd& c, Calls&) { c.dk.shape[0] = 15; }});
  EXPECT_RULES(Bwd, compressed_bwd, (bwd_rules));
}

// On CUDA nobody reads the lengths: a forgotten max_seqlen_k must not pass as "no keys".
TEST(compressed_max_seqlen_on_cuda) {
  Calls calls(DType::kBFloat16);
  CompressedAttentionFwd call = calls.compressed_fwd();
  for (TensorView* view : {&call.q, &call.k, &call.v, &call.o, &call.lse, &call.cu_seqlens_cmp,
                           &call.seq.cu_seqlens_q, &call.seq.cu_seqlens_k}) {
    move_to_cuda(*view);
  }
  EXPECT_EQ(validate(call, Purpose::kRun).problem.max_k, 40);
  call.seq.max_seqlen_k = 0;
  EXPECT_THROWS(validate(call, Purpose::kRun), Error,
                "max_seqlen_k: must be between 1 and 2147483647, found 0");
}

TEST(compressed_problem) {
  Calls calls;
  const Problem problem = validate(calls.compressed_fwd(), Purpose::kRun).problem;
  EXPECT_EQ(problem.op, Op::kCompressedAttn);
  EXPECT_EQ(problem.total_k, kRowsCmp * kKernelStride);
  EXPECT_EQ(problem.max_k, 40);
  EXPECT_EQ(problem.kernel_size, kKernelSize);
}

template <class Call>
std::vector<Rule<Call>> selection_rules() {
  return {
      {kValue, "block_size: must be 16, 32, 64, 128 or 256, found 48",
       [](Call& c,                                                                                       Calls&) { c.block_size = 48; }                            },
      {kValue, "topk_idx: must be given, found none",                                        [](Call& c, Calls&) { c.topk_idx = {}; }                              },
      {kValue, "topk_idx: shape must be [2, 8, *], found [1, 8, 2]",
       [](Call& c,                                                                                       Calls&) { c.topk_idx.shape[0] = 1; }                      },
      {kValue, "topk_idx: size of the last dimension: must be between 1 and 128, found 0",
       [](Call& c,                                                                                       Calls&) { c.topk_idx.shape[2] = 0; }                      },
      {kValue, "topk_idx: size of the last dimension: must be between 1 and 128, found 129",
       [](Call& c,                                                                                       Calls&) { c.topk_idx.shape[2] = 129; }                    },
      {kValue, "topk_idx: the last dimension must be contiguous, found stride 2",
       [](Call& c,                                                                                       Calls&) { c.topk_idx.stride[2] = 2; }                     },
      {kValue, "block_entry: must be given together with block_start, found none",
       [](Call& c,                                                                                       Calls& f) { c.block_start = f.block_index().block_start; }},
      {kValue, "block_start: must be given together with block_entry, found none",
       [](Call& c,                                                                                       Calls& f) { c.block_entry = f.block_index().block_entry; }},
      {kValue, "block_start: shape must be [2, 7], found [2, 6]",
       [](Call& c,                                                                                       Calls& f) {
         c.block_start = resized(f.block_index().block_start, 1, 6);
         c.block_entry = f.block_index().block_entry;
       }                                                                                                                                         },
      {kValue, "block_entry: shape must be [2, 16], found [2, 15]",
       [](Call& c,                                                                                       Calls& f) {
         c.block_start = f.block_index().block_start;
         c.block_entry = resized(f.block_index().block_entry, 1, 15);
       }                                                                                                                                         },
  };
}

TEST(selected_selection) {
  EXPECT_RULES(SelectedAttentionFwd, selected_fwd, (selection_rules<SelectedAttentionFwd>()));
  EXPECT_RULES(SelectedAttentionBwd, selected_bwd, (selection_rules<SelectedAttentionBwd>()));
}

TEST(selected_index_numbers_fit_int32) {
  Calls calls;
  SelectedAttentionFwd call = calls.selected_fwd();
  const int64_t tokens = int64_t{1} << 25;
  call.q = resized(call.q, 0, tokens);
  call.topk_idx = contiguous_view(call.topk_idx.data, DType::kInt32, {}, kHeadsKv, tokens, 64);
  call.seq.max_seqlen_q = tokens;
  call.seq.cu_seqlens_q.data = nullptr;
  EXPECT_THROWS(validate(call, Purpose::kPlan), Error,
                "topk_idx: total_q * topk must be smaller than 2^31, found 33554432 * 64");
}

// A row of topk_idx is a set that may hold anything.
TEST(selected_values_are_not_judged) {
  Calls calls;
  SelectedAttentionFwd call = calls.selected_fwd();
  index_at(call.topk_idx, 0, 0, 0) = 1 << 30;
  index_at(call.topk_idx, 1, 3, 1) = -(1 << 30);
  const auto checked = validate(call, Purpose::kRun);
  EXPECT_EQ(checked.problem.topk, kTopk);
  EXPECT_TRUE(!checked.problem.has_block_index);
  EXPECT_EQ(checked.problem.workspace_cap, size_t{1} << 30);

  const BuildBlockIndex index = calls.block_index();
  call.block_start = index.block_start;
  call.block_entry = index.block_entry;
  const auto with_index = validate(call, Purpose::kRun);
  EXPECT_TRUE(with_index.problem.has_block_index);
  EXPECT_EQ(with_index.params.mask.index.num_slots, kNumSlots);
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
