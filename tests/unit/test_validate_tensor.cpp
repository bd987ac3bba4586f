// Rules that hold for every tensor argument, shown on the window attention.
#include "rules.h"

namespace fsattn::test {
namespace {

using Fwd = WindowAttentionFwd;
constexpr ErrorCode kValue = ErrorCode::kInvalidArgument;
constexpr ErrorCode kType = ErrorCode::kInvalidType;

TEST(presence_and_rank) {
  EXPECT_RULES(Fwd, window_fwd,
               {
                   {kValue, "q: must be given, found none",                                      [](Fwd& c, Calls&) { c.q = {}; }               },
                   {kValue, "v: must be given, found none",                                      [](Fwd& c, Calls&) { c.v = {}; }               },
                   {kValue, "lse: must be given, found none",                                    [](Fwd& c, Calls&) { c.lse = {}; }             },
                   {kValue, "cu_seqlens_k: must be given, found none",
                    [](Fwd& c,                                                                              Calls&) { c.seq.cu_seqlens_k = {}; }},
                   {kValue, "q: must have 3 dimensions [total_q, num_heads, head_dim], found 2",
                    [](Fwd& c,                                                                              Calls&) { c.q.ndim = 2; }           },
                   {kValue, "k: must have 3 dimensions [*, *, 16], found 4",
                    [](Fwd& c,                                                                              Calls&) { c.k.ndim = 4; }           },
                   {kValue, "q: must have 3 dimensions [total_q, num_heads, head_dim], found 7",
                    [](Fwd& c,                                                                              Calls&) { c.q.ndim = 7; }           },
  });
}

TEST(sizes_and_strides) {
  EXPECT_RULES(
      Fwd, window_fwd,
      {
          {kValue, "k: sizes must not be negative, found -1 in dimension 0",
           [](Fwd& c, Calls&) { c.k.shape[0] = -1; }                                 },
          {kValue, "q: sizes must not be negative, found -4 in dimension 1",
           [](Fwd& c, Calls&) { c.q.shape[1] = -4; }                                 },
          {kValue, "q: must have at most 2^56 elements, found shape [4611686018427387904, 4, 16]",
           [](Fwd& c, Calls&) { c.q.shape[0] = int64_t{1} << 62; }                   },
          {kValue, "k: strides must be between 0 and 2^56 / size, found -32 in dimension 0",
           [](Fwd& c, Calls&) { c.k.stride[0] = -32; }                               },
          {kValue, "k: the last dimension must be contiguous, found stride 2",
           [](Fwd& c, Calls&) { c.k.stride[2] = 2; }                                 },
          {kValue, "lse: the last dimension must be contiguous, found stride 4",
           [](Fwd& c, Calls&) {
             c.lse.stride = {1, 4};
           }                                                    },
          {kValue, "cu_seqlens_q: must be contiguous, found stride 2 in dimension 0",
           [](Fwd& c, Calls&) { c.seq.cu_seqlens_q.stride[0] = 2; }                  },
          {kValue, "v: shape must be [64, 2, *], found [64, 1, 8]",
           [](Fwd& c, Calls&) { c.v.shape[1] = 1; }                                  },
          {kValue, "o: shape must be [8, 4, 8], found [8, 4, 16]",
           [](Fwd& c, Calls& f) { c.o = f.q(); }                                     },
          {kValue, "lse: shape must be [4, 8], found [8, 4]",
           [](Fwd& c, Calls& f) { c.lse = f.arena().make(DType::kFloat32, 8, 4); }   },
          {kValue, "q_offset: shape must be [2], found [3]",
           [](Fwd& c, Calls& f) {
             c.seq.q_offset = index_tensor(f.arena(), {0, 0, 0});
           }                                                    },
          {kValue, "cu_seqlens_k: shape must be [3], found [2]",
           [](Fwd& c, Calls& f) {
             c.seq.cu_seqlens_k = index_tensor(f.arena(), {0, 64});
           }                                                    },
          {kValue, "cu_seqlens_q: must have one element more than there are sequences, found none",
           [](Fwd& c, Calls& f) { c.seq.cu_seqlens_q = index_tensor(f.arena(), {}); }},
  });
}

TEST(dtypes_and_devices) {
  EXPECT_RULES(
      Fwd, window_fwd,
      {
          {kType, "q: dtype must be float64, float32, float16 or bfloat16, found int32",
           [](Fwd& c, Calls&) { c.q.dtype = DType::kInt32; }                                  },
          {kType, "k: dtype must be that of the other tensors, float32, found float64",
           [](Fwd& c, Calls& f) {
             c.k = f.arena().make(DType::kFloat64, kTotalK, kHeadsKv, kDim);
           }                                                             },
          {kType, "lse: dtype must be float32, found float64",
           [](Fwd& c, Calls& f) { c.lse = f.arena().make(DType::kFloat64, kHeadsQ, kTotalQ); }},
          {kType, "cu_seqlens_q: dtype must be int32, found float32",
           [](Fwd& c, Calls&) { c.seq.cu_seqlens_q.dtype = DType::kFloat32; }                 },
          {kType, "q_offset: dtype must be int32, found float32",
           [](Fwd& c, Calls& f) { c.seq.q_offset = f.arena().make(DType::kFloat32, 2); }      },
          {kType, "v: device must be that of q (cpu), found cuda:1",
           [](Fwd& c, Calls&) {
             c.v.device = {DeviceType::kCuda, 1};
           }                                                             },
          {kType, "cu_seqlens_q: device must be that of q (cpu), found cuda:0",
           [](Fwd& c, Calls&) {
             c.seq.cu_seqlens_q.device = {DeviceType::kCuda, 0};
           }                                                             },
  });
  Calls calls(DType::kFloat64);
  Fwd call = calls.window_fwd();
  validate(call, Purpose::kRun);
  call.lse = calls.arena().make(DType::kFloat32, kHeadsQ, kTotalQ);
  EXPECT_THROWS(validate(call, Purpose::kRun), Error, "lse: dtype must be float64, found float32");
}

TEST(memory) {
  EXPECT_RULES(
      Fwd, window_fwd,
      {
          {kValue, "k: data must not be null",                                                       [](Fwd& c, Calls&) { c.k.data = nullptr; }                              },
          {kValue, "cu_seqlens_q: data must not be null",
           [](Fwd& c,                                                                                           Calls&) { c.seq.cu_seqlens_q.data = nullptr; }               },
          {kValue, "v: data must be aligned to its 4-byte elements, found an address 1 bytes past",
           [](Fwd& c,                                                                                           Calls&) { c.v.data = static_cast<char*>(c.v.data) + 1; }     },
          {kValue, "o: elements of an output may not share memory, found stride 0 in dimension 0",
           [](Fwd& c,                                                                                           Calls&) { c.o.stride[0] = 0; }                               },
          {kValue, "o: elements of an output may not share memory, found stride 16 in dimension 0",
           [](Fwd& c,                                                                                           Calls&) { c.o.stride[0] = 16; }                              },
          {kValue, "lse: elements of an output may not share memory, found stride 4 in dimension 0",
           [](Fwd& c,                                                                                           Calls&) { c.lse.stride[0] = 4; }                             },
          {kValue, "o: memory of an output may not overlap an input, found overlap with q",
           [](Fwd& c,                                                                                           Calls&) { c.o.data = c.q.data; }                             },
          {kValue, "lse: memory of an output may not overlap an input, found overlap with v",
           [](Fwd& c,                                                                                           Calls&) { c.lse.data = static_cast<float*>(c.v.data) + 500; }},
          {kValue, "lse: must not start where another output does, found the data of o",
           [](Fwd& c,                                                                                           Calls&) { c.lse.data = c.o.data; }                           },
  });
}

TEST(what_is_allowed) {
  Calls calls;
  Fwd call = calls.window_fwd();
  call.k.stride[0] = 0;  // an input may be broadcast
  call.v.stride = {8, 512, 1};
  validate(call, Purpose::kRun);

  // Outputs that interleave in one packed tensor.
  WindowAttentionBwd bwd = calls.window_bwd();
  const TensorView both = calls.arena().make(DType::kFloat32, kTotalK, 2 * kHeadsKv, kDim);
  bwd.dk = both;
  bwd.dk.shape[1] = kHeadsKv;
  bwd.dv = bwd.dk;
  bwd.dv.shape[2] = kDimV;
  bwd.dv.data = static_cast<float*>(both.data) + kHeadsKv * kDim;
  validate(bwd, Purpose::kRun);

  // Strides of dimensions with one element mean nothing.
  Fwd one = calls.window_fwd();
  one.q = calls.random(kTotalQ, 1, kDim);
  one.k = calls.random(kTotalK, 1, kDim);
  one.v = calls.random(kTotalK, 1, kDimV);
  one.o = calls.random(kTotalQ, 1, kDimV);
  one.lse = calls.arena().make(DType::kFloat32, 1, kTotalQ);
  one.q.stride[1] = 3;
  one.o.stride[1] = -1;
  one.lse.stride[0] = 0;
  validate(one, Purpose::kRun);
}

TEST(planning_needs_no_memory) {
  Calls calls;
  Fwd call = calls.window_fwd();
  for (TensorView* view : {&call.q, &call.k, &call.v, &call.o, &call.lse, &call.seq.cu_seqlens_q,
                           &call.seq.cu_seqlens_k}) {
    view->data = nullptr;
  }
  EXPECT_EQ(validate(call, Purpose::kPlan).problem.total_q, kTotalQ);
  EXPECT_THROWS(validate(call, Purpose::kRun), Error, "q: data must not be null");
}

TEST(empty_tensors_need_no_memory) {
  Calls calls;
  Fwd call = calls.window_fwd();
  for (TensorView* view : {&call.q, &call.o}) {
    view->shape[0] = 0;
    view->data = nullptr;
  }
  call.lse.shape[1] = 0;
  call.lse.data = nullptr;
  call.seq.cu_seqlens_q = index_tensor(calls.arena(), {0, 0, 0});
  call.seq.max_seqlen_q = 0;
  EXPECT_EQ(validate(call, Purpose::kRun).problem.total_q, 0);
}

WindowAttentionFwd cuda_call(Calls& calls) {
  Fwd call = calls.window_fwd();
  for (TensorView* view : {&call.q, &call.k, &call.v, &call.o, &call.lse, &call.seq.cu_seqlens_q,
                           &call.seq.cu_seqlens_k}) {
    move_to_cuda(*view);
  }
  return call;
}

TEST(cuda_dtypes_and_alignment) {
  Calls calls(DType::kBFloat16);
  EXPECT_EQ(validate(cuda_call(calls), Purpose::kRun).problem.num_heads_q, kHeadsQ);

  Fwd call = cuda_call(calls);
  call.k.data = static_cast<char*>(call.k.data) + 8;
  EXPECT_THROWS(validate(call, Purpose::kRun), Error,
                "k: data must be 16-byte aligned on cuda, found an address 8 bytes past");
  call = cuda_call(calls);
  call.v.stride[0] = 20;
  EXPECT_THROWS(validate(call, Purpose::kRun), Error,
                "v: rows must be 16-byte aligned on cuda: strides must be multiples of 8, found 20 "
                "in dimension 0");

  Calls fp32;
  try {
    validate(cuda_call(fp32), Purpose::kRun);
    EXPECT_TRUE(false);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), kType);
    EXPECT_EQ(std::string(error.what()),
              "q: dtype must be float16 or bfloat16 on cuda, found float32");
  }
}

// The values of cu_seqlens lie on the device: reading them here would crash or synchronise.
TEST(cuda_values_are_not_read) {
  Calls calls(DType::kBFloat16);
  Fwd call = cuda_call(calls);
  call.seq.cu_seqlens_q.data = reinterpret_cast<void*>(uintptr_t{4096});
  call.seq.cu_seqlens_k.data = reinterpret_cast<void*>(uintptr_t{8192});
  EXPECT_EQ(validate(call, Purpose::kRun).problem.batch, 2);
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
