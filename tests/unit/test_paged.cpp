// The calls over a paged cache from C++: plans as text, regions, and one decode by hand.
#include <cmath>
#include <utility>

#include "api/validate_paged.h"
#include "fsattn/paged.h"
#include "plan/paged_plan.h"
#include "support/host_tensor.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

DeviceInfo device_of(DeviceType type) {
  DeviceInfo device;
  device.type = type;
  if (type == DeviceType::kCpu) return device;
  device.arch = Arch::kSm90a;
  device.name = "test";
  device.compute_capability = 90;
  device.num_sms = 132;
  device.smem_per_cta = 227 * 1024;
  return device;
}

// The configuration `llama` with 16 sequences of up to 64 Ki tokens.
PagedProblem llama(PagedOp op, DeviceType device, int64_t new_tokens) {
  PagedProblem problem;
  problem.op = op;
  problem.device = {device, 0};
  problem.dtype = DType::kBFloat16;
  problem.batch = 16;
  problem.total_q = 16 * new_tokens;
  problem.max_q = problem.max_seqlen_q = new_tokens;
  problem.max_k = 65536;
  problem.num_heads_q = op == PagedOp::kAppend ? 0 : 32;
  problem.num_heads_kv = 8;
  problem.head_dim = problem.head_dim_v = 128;
  problem.page_size = 64;
  problem.workspace_cap = size_t{1} << 30;
  if (op != PagedOp::kAppend) {
    problem.block_size = 64;
    problem.topk = 16;
  }
  if (op != PagedOp::kSelected) {
    problem.cmp_page_size = 64;
    problem.kernel_size = 32;
    problem.kernel_stride = 16;
  }
  if (op == PagedOp::kAttn) problem.window_size = 512;
  return problem;
}

bool holds(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

TEST(problems_as_text) {
  EXPECT_EQ(to_string(llama(PagedOp::kAttn, DeviceType::kCuda, 1)),
            "paged_native_sparse_attention: cuda bfloat16 batch=16 total_q=16 max_q=1 max_k=65536 "
            "heads_q=32 heads_kv=8 head_dim=128 head_dim_v=128 page_size=64 cmp_page_size=64 "
            "kernel_size=32 kernel_stride=16 block_size=64 topk=16 window_size=512");
  PagedProblem append = llama(PagedOp::kAppend, DeviceType::kCpu, 2);
  append.has_rope = true;
  EXPECT_EQ(to_string(append),
            "append_kv: cpu bfloat16 batch=16 total_q=32 max_q=2 max_k=65536 heads_kv=8 "
            "head_dim=128 head_dim_v=128 page_size=64 cmp_page_size=64 kernel_size=32 "
            "kernel_stride=16 with rotation");
  PagedProblem selected = llama(PagedOp::kSelected, DeviceType::kCpu, 1);
  selected.batch_invariant = true;
  EXPECT_TRUE(holds(to_string(selected), "block_size=64 topk=16 batch invariant"));
}

TEST(the_cpu_composes) {
  const DeviceInfo cpu = device_of(DeviceType::kCpu);
  const PagedAttnPlan attn = make_paged_attn_plan(llama(PagedOp::kAttn, DeviceType::kCpu, 1), cpu);
  EXPECT_TRUE(!attn.kernel.is_fused);
  const std::string text = to_string(attn);
  EXPECT_TRUE(holds(text, "paged_native_sparse_attention: cpu, workspace "));
  EXPECT_TRUE(holds(text, "select_blocks fwd: cpu"));
  const PagedAppendPlan append =
      make_append_plan(llama(PagedOp::kAppend, DeviceType::kCpu, 1), cpu);
  EXPECT_TRUE(holds(to_string(append), "compress_kv fwd: cpu"));
  EXPECT_EQ(append.x_k.bytes, size_t{16 + 16 * 31} * 8 * 128 * 2);
}

TEST(cuda_fuses_few_queries_and_composes_chunks) {
  const DeviceInfo cuda = device_of(DeviceType::kCuda);
  for (const PagedOp op : {PagedOp::kAttn, PagedOp::kSelected}) {
    for (const int64_t new_tokens : {1, 8}) {
      const PagedProblem few = llama(op, DeviceType::kCuda, new_tokens);
      const bool is_fused = op == PagedOp::kAttn
                                ? make_paged_attn_plan(few, cuda).kernel.is_fused
                                : make_paged_selected_plan(few, cuda).kernel.is_fused;
      EXPECT_TRUE(is_fused);
    }
  }
  PagedProblem chunk = llama(PagedOp::kAttn, DeviceType::kCuda, 8192);
  chunk.batch = 1;
  chunk.total_q = 8192;
  const PagedAttnPlan plan = make_paged_attn_plan(chunk, cuda);
  EXPECT_TRUE(!plan.kernel.is_fused);
  EXPECT_EQ(plan.copies.k.bytes, size_t{65536} * 8 * 128 * 2);
  EXPECT_EQ(plan.copies.k_cmp.bytes, size_t{4095} * 8 * 128 * 2);
  EXPECT_TRUE(!plan.reads_pages);
  EXPECT_TRUE(
      make_append_plan(llama(PagedOp::kAppend, DeviceType::kCuda, 1), cuda).kernel.is_fused);
}

TEST(kernels_of_hopper_read_even_pages) {
  DeviceInfo cuda = device_of(DeviceType::kCuda);
  PagedProblem chunk = llama(PagedOp::kAttn, DeviceType::kCuda, 8192);
  chunk.batch = 1;
  chunk.total_q = 8192;
  chunk.has_key_rows = true;
  PagedAttnPlan plan = make_paged_attn_plan(chunk, cuda);
  EXPECT_TRUE(plan.reads_pages && !plan.reads_cmp_pages);
  EXPECT_TRUE(holds(to_string(plan), "(composed, copies compressed tokens)"));
  EXPECT_EQ(plan.copies.k.bytes, size_t{0});
  EXPECT_EQ(plan.copies.k_cmp.bytes, size_t{4095} * 8 * 128 * 2);
  chunk.has_cmp_key_rows = true;
  plan = make_paged_attn_plan(chunk, cuda);
  EXPECT_EQ(chunk.cmp_page_size % 64 == 0, plan.reads_cmp_pages);
  chunk.cmp_page_size = 64;
  plan = make_paged_attn_plan(chunk, cuda);
  EXPECT_TRUE(plan.reads_pages && plan.reads_cmp_pages);
  EXPECT_TRUE(holds(to_string(plan), "(composed, copies nothing)"));
  EXPECT_EQ(plan.copies.v_cmp.bytes, size_t{0});
  chunk.cmp_page_size = 32;  // a box of keys would cross a page
  EXPECT_TRUE(!make_paged_attn_plan(chunk, cuda).reads_cmp_pages);
  chunk.has_key_rows = false;
  EXPECT_TRUE(holds(to_string(make_paged_attn_plan(chunk, cuda)), "(composed, copies all tokens)"));
  chunk.has_key_rows = true;
  PagedProblem selected = llama(PagedOp::kSelected, DeviceType::kCuda, 100);
  selected.has_key_rows = true;
  EXPECT_EQ(make_paged_selected_plan(selected, cuda).copies.k.bytes, size_t{0});
  chunk.head_dim = 120;  // no row of selected attention of Hopper's own
  EXPECT_TRUE(!make_paged_attn_plan(chunk, cuda).reads_pages);
  cuda.arch = Arch::kSm80;
  EXPECT_TRUE(!make_paged_selected_plan(selected, cuda).reads_pages);
}

TEST(keys_in_pages_are_rows_of_one_stride) {
  PagedKvView cache{};
  cache.table.num_pages = 10;
  cache.table.page_size = 64;
  const auto keys = [&](int64_t page, int64_t token, int64_t head, int64_t heads) {
    cache.k = cache.v = {nullptr, page, token, head};
    const PagedKeys found = keys_in_pages(cache, heads);
    if (found.page_rows > 0) {
      EXPECT_EQ(found.total_rows, 9 * found.page_rows + (heads - 1) * found.head_rows + 64);
    }
    return std::pair(found.page_rows, found.head_rows);
  };
  using Found = std::pair<int64_t, int64_t>;
  EXPECT_TRUE(keys(64 * 256, 256, 128, 2) == Found(64, 0));       // [pages, tokens, heads, dim]
  EXPECT_TRUE(keys(2 * 64 * 256, 256, 128, 2) == Found(128, 0));  // every other page
  EXPECT_TRUE(keys(2 * 64 * 128, 128, 64 * 128, 2) ==
              Found(128, 64));                                       // [pages, heads, tokens, dim]
  EXPECT_TRUE(keys(64 * 128, 128, 640 * 128, 2) == Found(64, 640));  // [heads, pages, tokens, dim]
  EXPECT_TRUE(keys(64 * 128, 128, 7, 1) == Found(64, 0));
  EXPECT_EQ(keys(64 * 256 + 8, 256, 128, 2).first, 0);
  EXPECT_EQ(keys(2 * 64 * 128 + 128, 128, 64 * 128 + 8, 2).first, 0);
  cache.table.num_pages = int64_t{1} << 25;
  EXPECT_EQ(keys(64 * 256, 256, 128, 2).first, 0);  // 2^31 rows
  cache.table.num_pages = 0;
  EXPECT_EQ(keys(64 * 256, 256, 128, 2).first, 0);
}

TEST(a_batch_invariant_plan_does_not_depend_on_the_batch) {
  const DeviceInfo cuda = device_of(DeviceType::kCuda);
  PagedProblem problem = llama(PagedOp::kAttn, DeviceType::kCuda, 1);
  problem.batch_invariant = true;
  const PagedKernel full = make_paged_attn_plan(problem, cuda).kernel;
  problem.batch = problem.total_q = problem.max_q = 1;
  problem.max_k = 4096;
  const PagedKernel alone = make_paged_attn_plan(problem, cuda).kernel;
  EXPECT_EQ(full.is_fused, alone.is_fused);
  EXPECT_EQ(full.row, alone.row);
  EXPECT_EQ(full.tuning.cmp_split, alone.tuning.cmp_split);
  // A chunk beside longer ones, and alone: total_q shrinks, the bound stays.
  problem.max_seqlen_q = 100;
  problem.max_q = problem.total_q = 5;
  EXPECT_TRUE(!make_paged_attn_plan(problem, cuda).kernel.is_fused);
}

TEST(regions_are_disjoint_and_aligned) {
  for (const DeviceType device : {DeviceType::kCpu, DeviceType::kCuda}) {
    PagedProblem problem = llama(PagedOp::kAttn, device, 300);
    problem.batch = 2;
    problem.total_q = 450;
    const PagedAttnPlan plan = make_paged_attn_plan(problem, device_of(device));
    const PagedCopies& copies = plan.copies;
    const Region regions[] = {plan.topk_idx, copies.k,    copies.v,      copies.k_cmp,
                              copies.v_cmp,  copies.cu_k, copies.cu_cmp, copies.q_offset,
                              plan.o_cmp,    plan.o_win,  plan.lse_cmp,  plan.lse_sel,
                              plan.lse_win,  plan.scratch};
    size_t end = 0;
    for (const Region& region : regions) {
      EXPECT_EQ(region.offset % kWorkspaceAlignment, 0);
      EXPECT_TRUE(region.offset >= end);
      end = region.offset + region.bytes;
    }
    EXPECT_TRUE(plan.workspace_bytes >= end);
    EXPECT_TRUE(plan.steps.workspace_bytes <= plan.scratch.bytes);
  }
}

TEST(copies_that_cu_seqlens_cannot_count_are_refused) {
  PagedProblem problem = llama(PagedOp::kSelected, DeviceType::kCuda, 100);
  problem.max_k = int64_t{1} << 28;
  EXPECT_THROWS(make_paged_selected_plan(problem, device_of(DeviceType::kCuda)), Error,
                "paged_selected_attention: without a fused kernel");
}

// One head, D = 8, pages of 16 in the order 2, 0; one token a call.
struct Tiny {
  Arena arena;
  TensorView k_pages = arena.make(DType::kFloat64, 3, 16, 1, 8);
  TensorView v_pages = arena.make(DType::kFloat64, 3, 16, 1, 8);
  TensorView table = index_table({2, 0});

  TensorView index_table(const std::vector<int32_t>& values) {
    TensorView view = index_tensor(arena, values);
    view.ndim = 2;
    view.shape = {1, static_cast<int64_t>(values.size())};
    view.stride = {static_cast<int64_t>(values.size()), 1};
    return view;
  }

  PagedSequences sequences(int32_t before) {
    return {index_tensor(arena, {0, 1}), index_tensor(arena, {before}), 1, before + 1};
  }

  template <class Call>
  void execute(const Call& call) {
    const size_t bytes = workspace_bytes(call);
    run(call, {.workspace = arena.allocate(bytes), .workspace_bytes = bytes});
  }

  void append(int32_t position) {
    AppendKv call;
    call.k = arena.make(DType::kFloat64, 1, 1, 8);
    call.v = arena.make(DType::kFloat64, 1, 1, 8);
    for (int64_t i = 0; i < 8; ++i) {
      set(call.k, 0.0, 0, 0, i);
      set(call.v, position + 0.125 * static_cast<double>(i), 0, 0, i);
    }
    call.seq = sequences(position);
    call.cache = {k_pages, v_pages, table};
    execute(call);
  }
};

TEST(decode_by_hand) {
  Tiny tiny;
  for (int32_t position = 0; position < 20; ++position) tiny.append(position);
  // Token 17 is row 1 of page 0, the second of the sequence.
  EXPECT_EQ(static_cast<const double*>(tiny.v_pages.data)[8 + 3], 17.375);
  PagedSelectedAttention call;
  call.q = tiny.arena.make(DType::kFloat64, 1, 1, 8);
  for (int64_t i = 0; i < 8; ++i) set(call.q, 1.0, 0, 0, i);
  call.topk_idx = index_tensor(tiny.arena, {1, -1});
  call.topk_idx.ndim = 3;
  call.topk_idx.shape = {1, 1, 2};
  call.topk_idx.stride = {2, 2, 1};
  call.seq = tiny.sequences(19);
  call.cache = {tiny.k_pages, tiny.v_pages, tiny.table};
  call.block_size = 16;
  call.o = tiny.arena.make(DType::kFloat64, 1, 1, 8);
  call.lse = tiny.arena.make(DType::kFloat64, 1, 1);
  tiny.execute(call);
  // Keys are 0, so that tokens 16 .. 19 weigh the same.
  EXPECT_NEAR(get(call.o, 0, 0, 2), 17.75, 1e-12);
  EXPECT_NEAR(get(call.lse, 0, 0), std::log(4.0), 1e-12);
}

TEST(planning_needs_no_memory) {
  Tiny tiny;
  PagedSelectedAttention call;
  call.q = contiguous_view(nullptr, DType::kFloat32, {}, 5, 2, 16);
  call.topk_idx = contiguous_view(nullptr, DType::kInt32, {}, 1, 5, 3);
  call.seq = {contiguous_view(nullptr, DType::kInt32, {}, 3),
              contiguous_view(nullptr, DType::kInt32, {}, 2), 5, 100};
  const TensorView pages = contiguous_view(nullptr, DType::kFloat32, {}, 4, 64, 1, 16);
  call.cache = {pages, pages, contiguous_view(nullptr, DType::kInt32, {}, 2, 2)};
  call.o = contiguous_view(nullptr, DType::kFloat32, {}, 5, 2, 16);
  call.lse = contiguous_view(nullptr, DType::kFloat32, {}, 2, 5);
  EXPECT_TRUE(workspace_bytes(call) > size_t{2} * 2 * 100 * 16 * 4);
  EXPECT_TRUE(holds(explain(call), "selected_attention fwd: cpu"));
  call.block_size = 128;
  EXPECT_THROWS(workspace_bytes(call), Error,
                "k_cache: page_size must be a multiple of block_size (128), found 64");
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
