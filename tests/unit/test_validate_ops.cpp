// Rules of compression, selection, block index, gate and native sparse attention.
#include "rules.h"

namespace fsattn::test {
namespace {

constexpr ErrorCode kValue = ErrorCode::kInvalidArgument;
constexpr ErrorCode kType = ErrorCode::kInvalidType;

template <class Call>
std::vector<Rule<Call>> compress_rules() {
  return {
      {kValue, "x: must be given, found none",                                             [](Call& c, Calls&) { c.x = {}; }                             },
      {kValue, "x: head_dim must be a multiple of 8 up to 256, found 9",
       [](Call& c,                                                                                     Calls&) { c.x.shape[2] = 9; }                     },
      {kValue, "x: number of heads: must be between 1 and 2147483647, found 0",
       [](Call& c,                                                                                     Calls&) { c.x.shape[1] = 0; }                     },
      {kValue, "max_seqlen: must be between 1 and 2147483647, found 0",
       [](Call& c,                                                                                     Calls&) { c.max_seqlen = 0; }                     },
      {kValue, "max_seqlen: must not be smaller than the longest sequence (40), found 20",
       [](Call& c,                                                                                     Calls&) { c.max_seqlen = 20; }                    },
      {kValue, "cu_seqlens: must end at the number of tokens (64), found 60",
       [](Call& c,                                                                                     Calls& f) {
         c.cu_seqlens = index_tensor(f.arena(), {0, 40, 60});
       }                                                                                                                               },
      {kValue, "kernel_size: must be a multiple of kernel_stride (3), found 8",
       [](Call& c,                                                                                     Calls&) { c.kernel_stride = 3; }                  },
      {kValue, "kind: must be between 0 and 3, found 7",
       [](Call& c,                                                                                     Calls&) { c.kind = static_cast<CompressKind>(7); }},
      {kValue, "weight: must be given, found none",                                        [](Call& c, Calls&) { c.weight = {}; }                        },
      {kValue, "weight: must be absent for the kind mean, found a tensor of shape [2, 8]",
       [](Call& c,                                                                                     Calls&) { c.kind = CompressKind::kMean; }         },
      {kValue, "weight: must have 3 dimensions [2, 128, 16], found 2",
       [](Call& c,                                                                                     Calls&) { c.kind = CompressKind::kLinear; }       },
      {kValue, "weight: shape must be [2, 8], found [2, 4]",
       [](Call& c,                                                                                     Calls&) { c.weight.shape[1] = 4; }                },
      {kValue, "weight: must be contiguous, found stride 16 in dimension 0",
       [](Call& c,                                                                                     Calls&) { c.weight.stride[0] = 16; }              },
      {kType,  "weight: dtype must be that of the other tensors, float32, found float64",
       [](Call& c,                                                                                     Calls& f) {
         c.weight = f.arena().make(DType::kFloat64, kHeadsKv, kKernelSize);
       }                                                                                                                               },
      {kValue, "pos_emb: shape must be [2, 8, 16], found [2, 8, 8]",
       [](Call& c,                                                                                     Calls&) { c.pos_emb.shape[2] = 8; }               },
  };
}

TEST(compress_forward) {
  using Fwd = CompressKvFwd;
  auto rules = compress_rules<Fwd>();
  rules.push_back({kValue, "x_cmp: shape must be [16, 2, 16], found [15, 2, 16]",
                   [](Fwd& c, Calls&) { c.x_cmp.shape[0] = 15; }});
  rules.push_back({kValue, "cu_seqlens_cmp: shape must be [3], found [2]",
                   [](Fwd& c, Calls&) { c.cu_seqlens_cmp.shape[0] = 2; }});
  EXPECT_RULES(Fwd, compress_fwd, (rules));
}

TEST(compress_backward) {
  using Bwd = CompressKvBwd;
  auto rules = compress_rules<Bwd>();
  rules.push_back({kValue, "dx_cmp: shape must be [16, 2, 16], found [64, 2, 16]",
                   [](Bwd& c, Calls& f) { c.dx_cmp = f.k(kTotalK); }});
  rules.push_back({kValue, "cu_seqlens_cmp: sequence 0 must have 9 windows by cu_seqlens, found 8",
                   [](Bwd& c, Calls& f) {
                     c.cu_seqlens_cmp = index_tensor(f.arena(), {0, 8, 13});
                   }});
  rules.push_back({kValue, "dx: shape must be [64, 2, 16], found [16, 2, 16]",
                   [](Bwd& c, Calls&) { c.dx.shape[0] = 16; }});
  rules.push_back(
      {kValue, "dweight: must be given, found none", [](Bwd& c, Calls&) { c.dweight = {}; }});
  rules.push_back(
      {kValue, "dpos_emb: must be given, found none", [](Bwd& c, Calls&) { c.dpos_emb = {}; }});
  rules.push_back({kValue, "dweight: must be absent without weight, found a tensor of shape [2, 8]",
                   [](Bwd& c, Calls&) {
                     c.kind = CompressKind::kMean;
                     c.weight = {};
                   }});
  rules.push_back({kValue, "dpos_emb: must be absent without pos_emb, found a tensor of shape",
                   [](Bwd& c, Calls&) { c.pos_emb = {}; }});
  EXPECT_RULES(Bwd, compress_bwd, (rules));
}

TEST(selection) {
  using Call = SelectBlocks;
  EXPECT_RULES(
      Call, select,
      {
          {kValue, "k_cmp: must be given, found none",                                        [](Call& c, Calls&) { c.k_cmp = {}; }                                  },
          {kValue, "lse: shape must be [4, 8], found [4, 7]",
           [](Call& c,                                                                                    Calls&) { c.lse.shape[1] = 7; }                            },
          {kValue, "block_size: must be 16, 32, 64, 128 or 256, found 8",
           [](Call& c,                                                                                    Calls&) { c.block_size = 8; }                              },
          {kValue, "block_size: must be a multiple of kernel_stride (40), found 16",
           [](Call& c,                                                                                    Calls& f) {
             c.kernel_stride = c.kernel_size = 40;
             c.cu_seqlens_cmp = index_tensor(f.arena(), {0, 1, 1});
           }                                                                                                                                   },
          {kValue, "topk: must be between 1 and 128, found 0",                                [](Call& c, Calls&) { c.topk = 0; }                                    },
          {kValue, "topk: must be between 1 and 128, found 129",
           [](Call& c,                                                                                    Calls&) { c.topk = 129; }                                  },
          {kValue, "init_blocks: must be between 0 and 2147483647, found -1",
           [](Call& c,                                                                                    Calls&) { c.init_blocks = -1; }                            },
          {kValue, "local_blocks: must be between 0 and 2147483647, found -2",
           [](Call& c,                                                                                    Calls&) { c.local_blocks = -2; }                           },
          {kValue, "topk: must be at least init_blocks + local_blocks (2 + 2), found 3",
           [](Call& c,                                                                                    Calls&) { c.topk = 3, c.init_blocks = c.local_blocks = 2; }},
          {kValue, "group_reduce: must be between 0 and 2, found 3",
           [](Call& c,                                                                                    Calls&) { c.group_reduce = static_cast<GroupReduce>(3); }  },
          {kValue, "score_dtype: must be between 0 and 1, found 2",
           [](Call& c,                                                                                    Calls&) { c.score_dtype = static_cast<ScoreDType>(2); }    },
          {kValue, "topk_idx: shape must be [2, 8, 3], found [2, 8, 2]",
           [](Call& c,                                                                                    Calls&) { c.topk = 3; }                                    },
          {kValue, "topk_idx: must be contiguous, found stride 4 in dimension 1",
           [](Call& c,                                                                                    Calls&) { c.topk_idx.stride[1] = 4; }                      },
          {kType,  "topk_idx: dtype must be int32, found float32",
           [](Call& c,                                                                                    Calls&) { c.topk_idx.dtype = DType::kFloat32; }            },
          {kValue, "softmax_scale: must be finite and positive",
           [](Call& c,                                                                                    Calls&) { c.softmax_scale = -1.0; }                        },
          {kValue, "q: the number of heads must be a multiple of that of k_cmp (2), found 3",
           [](Call& c,                                                                                    Calls&) { c.q.shape[1] = c.lse.shape[0] = 3; }             },
  });
}

TEST(block_index) {
  using Call = BuildBlockIndex;
  EXPECT_RULES(
      Call, block_index,
      {
          {kValue, "topk_idx: must be given, found none",                                           [](Call& c, Calls&) { c.topk_idx = {}; }                     },
          {kType,  "topk_idx: dtype must be int32, found float32",
           [](Call& c,                                                                                          Calls&) { c.topk_idx.dtype = DType::kFloat32; }  },
          {kValue, "topk_idx: number of heads: must be between 1 and 2147483647, found 0",
           [](Call& c,                                                                                          Calls&) { c.topk_idx.shape[0] = 0; }             },
          {kValue, "topk_idx: size of the last dimension: must be between 1 and 128, found 0",
           [](Call& c,                                                                                          Calls&) { c.topk_idx.shape[2] = 0; }             },
          {kValue, "block_size: must be 16, 32, 64, 128 or 256, found 0",
           [](Call& c,                                                                                          Calls&) { c.block_size = 0; }                    },
          {kValue, "block_start: must be given, found none",
           [](Call& c,                                                                                          Calls&) { c.block_start = {}; }                  },
          {kValue, "block_start: must have 2 dimensions [num_heads_kv, num_slots + 1], found 1",
           [](Call& c,                                                                                          Calls&) { c.block_start.ndim = 1; }              },
          {kValue, "block_start: must have total_k / block_size + batch + 1 columns (7), found 6",
           [](Call& c,                                                                                          Calls&) { c.block_start.shape[1] = 6; }          },
          {kValue,
           "block_start: must have total_k / block_size + batch + 1 columns (at least 3), found 2", [](Call& c, Calls&) { c.block_start.shape[1] = 2; }          },
          {kValue, "block_entry: shape must be [2, 16], found [2, 8]",
           [](Call& c,                                                                                          Calls&) { c.block_entry.shape[1] = 8; }          },
          {kValue, "block_entry: memory of an output may not overlap an input, found overlap with",
           [](Call& c,                                                                                          Calls&) { c.block_entry.data = c.topk_idx.data; }},
          {kValue, "cu_seqlens_k: must not decrease, found 64 before 40 at 2",
           [](Call& c,                                                                                          Calls& f) {
             c.seq.cu_seqlens_k = index_tensor(f.arena(), {0, 64, 40});
             c.seq.max_seqlen_k = 64;
           }                                                                                                                               },
  });
  Calls calls;
  EXPECT_EQ(validate(calls.block_index(), Purpose::kRun).problem.num_block_slots(), kNumSlots);
}

TEST(gate_forward) {
  using Fwd = GateFwd;
  EXPECT_RULES(
      Fwd, gate_fwd,
      {
          {kValue, "o_cmp: must be given, found none",                                              [](Fwd& c, Calls&) { c.o_cmp = {}; }                                 },
          {kValue, "o_sel: shape must be [8, 4, 8], found [8, 4, 16]",
           [](Fwd& c,                                                                                          Calls& f) { c.o_sel = f.q(); }                            },
          {kValue, "o_win: must be given, found none",                                              [](Fwd& c, Calls&) { c.o_win = {}; }                                 },
          {kValue, "o_cmp: number of heads: must be between 1 and 2147483647, found 0",
           [](Fwd& c,                                                                                          Calls&) { c.o_cmp.shape[1] = 0; }                         },
          {kValue, "o_cmp: head_dim must be a multiple of 8 up to 256, found 7",
           [](Fwd& c,                                                                                          Calls&) { c.o_cmp.shape[2] = 7; }                         },
          {kType,  "o_cmp: dtype must be float64, float32, float16 or bfloat16, found int32",
           [](Fwd& c,                                                                                          Calls&) { c.o_cmp.dtype = DType::kInt32; }                },
          {kValue, "gates: must be given, found none",                                              [](Fwd& c, Calls&) { c.gates = {}; }                                 },
          {kValue, "gates: must have 2 or 3 dimensions [tokens, 3] or [tokens, heads, 3], found 1",
           [](Fwd& c,                                                                                          Calls&) { c.gates.ndim = 1; }                             },
          {kValue, "gates: shape must be [8, 4, 3], found [8, 4, 4]",
           [](Fwd& c,                                                                                          Calls& f) { c.gates = f.random(kTotalQ, kHeadsQ, 4); }    },
          {kValue, "gates: shape must be [8, 3], found [8, 4]",
           [](Fwd& c,                                                                                          Calls&) { c.gates.ndim = 2; }                             },
          {kValue, "activation: must be between 0 and 1, found 2",
           [](Fwd& c,                                                                                          Calls&) { c.activation = static_cast<GateActivation>(2); }},
          {kValue, "o: memory of an output may not overlap an input, found overlap with o_win",
           [](Fwd& c,                                                                                          Calls&) { c.o.data = c.o_win.data; }                      },
  });
  Calls calls;
  Fwd call = calls.gate_fwd();
  EXPECT_EQ(validate(call, Purpose::kRun).params.gates.head_stride, 3);
  call.gates = calls.arena().make(DType::kFloat32, kTotalQ, 3);
  EXPECT_EQ(validate(call, Purpose::kRun).params.gates.head_stride, 0);
}

TEST(gate_backward) {
  using Bwd = GateBwd;
  EXPECT_RULES(
      Bwd, gate_bwd,
      {
          {kValue, "dout: must be given, found none",                                    [](Bwd& c, Calls&) { c.dout = {}; }                                             },
          {kValue, "do_cmp: must be given, found none",                                  [](Bwd& c, Calls&) { c.do_cmp = {}; }                                           },
          {kValue, "do_sel: shape must be [8, 4, 8], found [8, 4, 16]",
           [](Bwd& c,                                                                               Calls& f) { c.do_sel = f.q(); }                                      },
          {kValue, "do_win: elements of an output may not share memory, found stride 0",
           [](Bwd& c,                                                                               Calls&) { c.do_win.stride[1] = 0; }                                  },
          {kValue, "dgates: must have 3 dimensions [8, 4, 3], found 2",
           [](Bwd& c,                                                                               Calls& f) { c.dgates = f.arena().make(DType::kFloat32, kTotalQ, 3); }},
  });
}

template <class Call>
std::vector<Rule<Call>> nsa_rules() {
  return {
      {kValue, "k: must be given, found none",                                             [](Call& c, Calls&) { c.k = {}; }                                           },
      {kValue, "k_cmp: must be given, found none",                                         [](Call& c, Calls&) { c.k_cmp = {}; }                                       },
      {kValue, "k_cmp: number of heads must be that of k (2), found 1",
       [](Call& c,                                                                                     Calls&) { c.k_cmp.shape[1] = c.v_cmp.shape[1] = 1; }            },
      {kValue, "v_cmp: head_dim must be that of v (8), found 16",
       [](Call& c,                                                                                     Calls& f) { c.v_cmp = f.k(kRowsCmp); }                          },
      {kValue, "gates: shape must be [8, 4, 3], found [8, 2, 3]",
       [](Call& c,                                                                                     Calls&) { c.gates.shape[1] = 2; }                               },
      {kValue, "window_size: must be between 0 and 2147483647, found -5",
       [](Call& c,                                                                                     Calls&) { c.config.window_size = -5; }                          },
      {kValue, "block_size: must be 16, 32, 64, 128 or 256, found 20",
       [](Call& c,                                                                                     Calls&) { c.config.block_size = 20; }                           },
      {kValue, "kernel_size: must be a multiple of kernel_stride (4), found 9",
       [](Call& c,                                                                                     Calls&) { c.config.kernel_size = 9; }                           },
      {kValue, "activation: must be between 0 and 1, found -1",
       [](Call& c,                                                                                     Calls&) { c.activation = static_cast<GateActivation>(-1); }     },
      {kValue, "o_sel: shape must be [8, 4, 8], found [8, 4, 16]",
       [](Call& c,                                                                                     Calls& f) { c.o_sel = f.q(); }                                  },
      {kValue, "lse_win: shape must be [4, 8], found [8, 4]",
       [](Call& c,                                                                                     Calls& f) { c.lse_win = f.arena().make(DType::kFloat32, 8, 4); }},
      {kValue, "cu_seqlens_cmp: sequence 0 must have 9 windows by cu_seqlens_k, found 10",
       [](Call& c,                                                                                     Calls& f) {
         c.cu_seqlens_cmp = index_tensor(f.arena(), {0, 10, 15});
       }                                                                                                                                             },
  };
}

TEST(nsa_forward) {
  using Fwd = NativeSparseAttentionFwd;
  auto rules = nsa_rules<Fwd>();
  rules.push_back({kValue, "topk: must be between 1 and 128, found 200",
                   [](Fwd& c, Calls&) { c.config.topk = 200; }});
  rules.push_back(
      {kValue, "topk_idx: must be given, found none", [](Fwd& c, Calls&) { c.topk_idx = {}; }});
  rules.push_back({kValue,
                   "o_win: must not start where another output does, found the data of o_cmp",
                   [](Fwd& c, Calls&) { c.o_win.data = c.o_cmp.data; }});
  rules.push_back({kValue,
                   "o_cmp: memory of an output may not overlap an input, found overlap with v",
                   [](Fwd& c, Calls&) { c.o_cmp.data = c.v.data; }});
  rules.push_back({kValue,
                   "topk_idx: size of the last dimension: must be between 1 and 128, found 0",
                   [](Fwd& c, Calls&) {
                     c.select = false;
                     c.topk_idx.shape[2] = 0;
                   }});
  EXPECT_RULES(Fwd, nsa_fwd, (rules));

  Calls calls;
  Fwd call = calls.nsa_fwd();
  const auto checked = validate(call, Purpose::kRun);
  EXPECT_TRUE(checked.problem.has_select);
  EXPECT_EQ(checked.problem.select.topk, kTopk);
  EXPECT_TRUE(checked.params.selected.mask.topk_idx == checked.params.select.topk_idx);
  call.select = false;
  call.config.topk = 77;  // the row length of the caller's topk_idx counts
  EXPECT_EQ(validate(call, Purpose::kRun).problem.selected.topk, kTopk);
}

TEST(nsa_backward) {
  using Bwd = NativeSparseAttentionBwd;
  auto rules = nsa_rules<Bwd>();
  rules.push_back({kValue, "dout: shape must be [8, 4, 8], found [8, 4, 16]",
                   [](Bwd& c, Calls& f) { c.dout = f.q(); }});
  rules.push_back({kValue, "dk_cmp: shape must be [16, 2, 16], found [64, 2, 16]",
                   [](Bwd& c, Calls& f) { c.dk_cmp = f.k(kTotalK); }});
  rules.push_back({kValue, "dq: must be given, found none", [](Bwd& c, Calls&) { c.dq = {}; }});
  rules.push_back({kValue, "dgates: must have 3 dimensions [8, 4, 3], found 2",
                   [](Bwd& c, Calls&) { c.dgates.ndim = 2; }});
  rules.push_back({kValue,
                   "dv_cmp: memory of an output may not overlap an input, found overlap with",
                   [](Bwd& c, Calls&) { c.dv_cmp.data = c.v_cmp.data; }});
  EXPECT_RULES(Bwd, nsa_bwd, (rules));
  Calls calls;
  const auto checked = validate(calls.nsa_bwd(), Purpose::kRun);
  EXPECT_TRUE(!checked.params.compressed.attn.accumulate_dq);
  EXPECT_TRUE(checked.params.selected.attn.accumulate_dq);
  EXPECT_TRUE(!checked.params.selected.attn.accumulate_dkv);
  EXPECT_TRUE(checked.params.window.attn.accumulate_dkv);
}

TEST(every_dtype_of_the_cpu) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Calls calls(dtype);
    EXPECT_EQ(validate(calls.nsa_bwd(), Purpose::kRun).problem.gate.dtype, dtype);
    EXPECT_EQ(validate(calls.compress_bwd(), Purpose::kRun).problem.dtype, dtype);
  }
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
