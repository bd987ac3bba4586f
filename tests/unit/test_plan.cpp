// Plans as text, for devices that need not be there.
#include <algorithm>

#include "base/check.h"
#include "plan/compress_kv_table.h"
#include "plan/cpu_workspace.h"
#include "plan/cuda_plan.h"
#include "plan/dense_attn_table.h"
#include "plan/nsa_plan.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

DeviceInfo cpu_with(int threads) {
  DeviceInfo device;
  device.num_threads = threads;
  return device;
}

DeviceInfo cuda_with(Arch arch, size_t smem_per_cta) {
  DeviceInfo device;
  device.type = DeviceType::kCuda;
  device.arch = arch;
  device.name = "test";
  device.compute_capability = arch == Arch::kSm90a ? 90 : 80;
  device.num_sms = 132;
  device.smem_per_cta = smem_per_cta;
  return device;
}
const DeviceInfo kH200 = cuda_with(Arch::kSm90a, 227 * 1024);
const DeviceInfo kA100 = cuda_with(Arch::kSm80, 163 * 1024);

// The configuration `llama` of the measurements at 8192 tokens.
Problem llama(Op op, Pass pass, DeviceType device) {
  Problem problem;
  problem.op = op;
  problem.pass = pass;
  problem.device = {device, 0};
  problem.dtype = DType::kBFloat16;
  problem.batch = 1;
  problem.total_q = problem.max_q = problem.total_k = problem.max_k = 8192;
  problem.num_heads_q = 32;
  problem.num_heads_kv = 8;
  problem.head_dim = problem.head_dim_v = 128;
  if (op == Op::kCompressedAttn || op == Op::kSelectBlocks || op == Op::kCompressKv) {
    problem.kernel_size = 32;
    problem.kernel_stride = 16;
  }
  if (op == Op::kSelectBlocks || op == Op::kSelectedAttn || op == Op::kBlockIndex) {
    problem.block_size = 64;
    problem.topk = 16;
  }
  if (op == Op::kSelectedAttn) problem.workspace_cap = size_t{1} << 30;
  if (op == Op::kWindowAttn) problem.window_size = 512;
  return problem;
}

const Op kAllOps[] = {Op::kCompressKv,   Op::kCompressedAttn, Op::kSelectBlocks, Op::kBlockIndex,
                      Op::kSelectedAttn, Op::kWindowAttn,     Op::kGate};

bool has_backward(Op op) { return op != Op::kSelectBlocks && op != Op::kBlockIndex; }

TEST(problem_as_text) {
  EXPECT_EQ(to_string(llama(Op::kSelectedAttn, Pass::kFwd, DeviceType::kCuda)),
            "selected_attention fwd: cuda bfloat16 batch=1 total_q=8192 total_k=8192 heads_q=32 "
            "heads_kv=8 head_dim=128 head_dim_v=128 block_size=64 topk=16 max_q=8192 max_k=8192");
  EXPECT_EQ(to_string(llama(Op::kWindowAttn, Pass::kBwd, DeviceType::kCpu)),
            "window_attention bwd: cpu bfloat16 batch=1 total_q=8192 total_k=8192 heads_q=32 "
            "heads_kv=8 head_dim=128 head_dim_v=128 window_size=512 max_q=8192 max_k=8192");
  EXPECT_EQ(to_string(llama(Op::kCompressKv, Pass::kFwd, DeviceType::kCpu)),
            "compress_kv fwd: cpu bfloat16 batch=1 total_k=8192 heads_q=32 heads_kv=8 "
            "head_dim=128 head_dim_v=128 kernel_size=32 kernel_stride=16");
  Problem given = llama(Op::kSelectedAttn, Pass::kBwd, DeviceType::kCpu);
  given.has_block_index = true;
  EXPECT_TRUE(to_string(given).find("topk=16 with block index max_q=") != std::string::npos);
}

TEST(plan_as_text) {
  const Plan cuda{Op::kSelectedAttn, Pass::kFwd, Arch::kSm90a, Algorithm::kBlockMajor, 3, 1024,
                  "because"};
  EXPECT_EQ(to_string(cuda),
            "selected_attention fwd: sm_90a block-major row 3, workspace 1024 bytes (because)");
  const Plan cpu{Op::kGate, Pass::kBwd, Arch::kCpu, Algorithm::kOnly, 0, 0, "cpu, 1 thread"};
  EXPECT_EQ(to_string(cpu), "gate bwd: cpu, workspace 0 bytes (cpu, 1 thread)");
}

TEST(cpu_plans) {
  for (const Op op : kAllOps) {
    for (const Pass pass : {Pass::kFwd, Pass::kBwd}) {
      if (pass == Pass::kBwd && !has_backward(op)) continue;
      const Problem problem = llama(op, pass, DeviceType::kCpu);
      const Plan plan = make_plan(problem, cpu_with(4));
      EXPECT_EQ(plan.op, op);
      EXPECT_EQ(plan.pass, pass);
      EXPECT_EQ(plan.arch, Arch::kCpu);
      EXPECT_EQ(plan.row, 0);
      EXPECT_EQ(plan.reason, "cpu, 4 threads");
      EXPECT_EQ(plan.workspace_bytes, cpu_workspace_bytes(problem, 4));
      EXPECT_TRUE(plan == make_plan(problem, cpu_with(4)));
    }
  }
  EXPECT_EQ(make_plan(llama(Op::kGate, Pass::kFwd, DeviceType::kCpu), cpu_with(1)).reason,
            "cpu, 1 thread");
}

TEST(cuda_plans_of_the_usual_shape) {
  const auto text = [](Op op, Pass pass) {
    const std::string line = to_string(make_plan(llama(op, pass, DeviceType::kCuda), kH200));
    return line.substr(0, line.find(", workspace")) + " " + line.substr(line.find('('));
  };
  EXPECT_EQ(text(Op::kCompressKv, Pass::kFwd), "compress_kv fwd: sm_80 row 0 (bfloat16)");
  EXPECT_EQ(
      text(Op::kCompressedAttn, Pass::kFwd),
      "compressed_attention fwd: sm_90a row 0 (bfloat16, head_dim <= 128, head_dim_v <= 128)");
  EXPECT_EQ(text(Op::kWindowAttn, Pass::kBwd),
            "window_attention bwd: sm_90a row 0 (bfloat16, head_dim <= 128, head_dim_v <= 128)");
  EXPECT_EQ(text(Op::kSelectBlocks, Pass::kFwd),
            "select_blocks fwd: sm_90a row 0 (bfloat16, head_dim <= 128, 96 queries a tile)");
  EXPECT_EQ(text(Op::kBlockIndex, Pass::kFwd),
            "build_block_index fwd: sm_80 row 0 (16 ids a query, windows of 3072 blocks)");
  EXPECT_EQ(text(Op::kSelectedAttn, Pass::kBwd),
            "selected_attention bwd: sm_90a block-major row 1 (bfloat16, head_dim <= 128, "
            "head_dim_v <= 128)");
  EXPECT_EQ(text(Op::kGate, Pass::kBwd), "gate bwd: sm_80 row 0 (bfloat16)");
}

TEST(cuda_plans_exist_for_every_shape_of_the_contract) {
  for (const DeviceInfo& device : {kH200, kA100}) {
    for (const Op op : kAllOps) {
      for (const int64_t head_dim : {8, 64, 72, 96, 128, 192, 200, 256}) {
        for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
          Problem problem = llama(op, Pass::kFwd, DeviceType::kCuda);
          problem.head_dim = problem.head_dim_v = head_dim;
          problem.dtype = dtype;
          const Plan fwd = make_plan(problem, device);
          EXPECT_TRUE(fwd.row >= 0 && fwd.arch != Arch::kCpu && !fwd.reason.empty());
          problem.pass = Pass::kBwd;
          if (has_backward(op)) EXPECT_TRUE(make_plan(problem, device).row >= 0);
        }
      }
    }
  }
}

TEST(attention_over_intervals_fits_99_kib_of_shared_memory) {
  const DeviceInfo small = cuda_with(Arch::kSm80, 99 * 1024);
  for (const Op op : {Op::kCompressedAttn, Op::kWindowAttn}) {
    for (const int64_t head_dim : {8, 64, 96, 128, 192, 256}) {
      Problem problem = llama(op, Pass::kBwd, DeviceType::kCuda);
      problem.head_dim = problem.head_dim_v = head_dim;
      const bool has_smaller_tiles = head_dim != 8 && head_dim != 64;
      EXPECT_EQ(make_plan(problem, small).row != make_plan(problem, kA100).row, has_smaller_tiles);
      problem.pass = Pass::kFwd;
      EXPECT_EQ(make_plan(problem, small).row != make_plan(problem, kA100).row, head_dim > 128);
    }
  }
}

TEST(cuda_plans_of_every_block_size_and_topk) {
  for (const int64_t block_size : {16, 32, 64, 128, 256}) {
    for (const int64_t topk : {1, 16, 128}) {
      for (const Op op : {Op::kSelectBlocks, Op::kBlockIndex, Op::kSelectedAttn}) {
        Problem problem = llama(op, Pass::kFwd, DeviceType::kCuda);
        problem.block_size = block_size;
        problem.topk = topk;
        EXPECT_TRUE(make_plan(problem, kA100).row >= 0);
      }
    }
  }
}

TEST(no_kernel) {
  Problem problem = llama(Op::kSelectBlocks, Pass::kFwd, DeviceType::kCuda);
  problem.kernel_size = 4096;
  try {
    make_plan(problem, kH200);
    EXPECT_TRUE(false);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    const std::string what = error.what();
    EXPECT_TRUE(
        what.rfind("select_blocks fwd: this build has no CUDA kernel for select_blocks fwd: "
                   "cuda bfloat16",
                   0) == 0);
    EXPECT_TRUE(what.find("; nearest: kernel_size / kernel_stride <= 65") != std::string::npos);
  }
}

NsaFwdProblem nsa_fwd(DeviceType device, bool has_select) {
  return {has_select,
          llama(Op::kCompressedAttn, Pass::kFwd, device),
          llama(Op::kSelectBlocks, Pass::kFwd, device),
          llama(Op::kSelectedAttn, Pass::kFwd, device),
          llama(Op::kWindowAttn, Pass::kFwd, device),
          llama(Op::kGate, Pass::kFwd, device)};
}

NsaBwdProblem nsa_bwd(DeviceType device, GateActivation activation = GateActivation::kNone) {
  return {llama(Op::kGate, Pass::kBwd, device), llama(Op::kCompressedAttn, Pass::kBwd, device),
          llama(Op::kSelectedAttn, Pass::kBwd, device), llama(Op::kWindowAttn, Pass::kBwd, device),
          activation};
}

TEST(nsa_forward_plan) {
  const NsaFwdPlan plan = make_plan(nsa_fwd(DeviceType::kCpu, true), cpu_with(2));
  size_t largest = 0;
  for (const Plan* step :
       {&plan.compressed, &plan.select, &plan.selected, &plan.window, &plan.gate}) {
    largest = std::max(largest, step->workspace_bytes);
  }
  EXPECT_TRUE(largest > 0);
  EXPECT_EQ(plan.scratch.bytes, largest);
  EXPECT_EQ(plan.workspace_bytes, round_up(largest, kWorkspaceAlignment));

  const std::string text = to_string(plan);
  const char* steps[] = {"native_sparse_attention fwd: workspace ",
                         "\n  compressed_attention fwd: ",
                         "\n  select_blocks fwd: ",
                         "\n  selected_attention fwd: ",
                         "\n  window_attention fwd: ",
                         "\n  gate fwd: "};
  size_t at = 0;
  for (const char* step : steps) {
    at = text.find(step, at);
    EXPECT_TRUE(at != std::string::npos);
  }
  const NsaFwdPlan brought = make_plan(nsa_fwd(DeviceType::kCpu, false), cpu_with(2));
  EXPECT_TRUE(to_string(brought).find("select_blocks") == std::string::npos);
}

// Where selected attention merges partial results, the gate is part of that.
TEST(nsa_forward_merges_gate) {
  EXPECT_TRUE(!make_plan(nsa_fwd(DeviceType::kCpu, true), cpu_with(2)).merges_gate);
  const NsaFwdPlan plan = make_plan(nsa_fwd(DeviceType::kCuda, true), kH200);
  EXPECT_TRUE(plan.merges_gate && plan.selected.algorithm == Algorithm::kBlockMajor);
  NsaFwdProblem large_group = nsa_fwd(DeviceType::kCuda, true);
  for (Problem* step : {&large_group.compressed, &large_group.select, &large_group.selected,
                        &large_group.window, &large_group.gate}) {
    step->num_heads_q = 64;
    step->num_heads_kv = 1;
  }
  EXPECT_TRUE(!make_plan(large_group, kH200).merges_gate);  // query-major
}

// Of groups of one, whose blocks can be ranked before lse is known.
TEST(nsa_forward_selects_in_the_compressed_pass) {
  NsaFwdProblem one_head = nsa_fwd(DeviceType::kCuda, true);
  one_head.rounds_scores = false;
  EXPECT_EQ(make_plan(one_head, kH200).compressed_select_row, -1);  // groups of four
  for (Problem* step : {&one_head.compressed, &one_head.select, &one_head.selected,
                        &one_head.window, &one_head.gate}) {
    step->num_heads_kv = step->num_heads_q;
  }
  const NsaFwdPlan plan = make_plan(one_head, kH200);
  EXPECT_EQ(plan.compressed_select_row, 0);
  EXPECT_TRUE(to_string(plan).find("with select_blocks in one kernel") != std::string::npos);
  EXPECT_EQ(make_plan(one_head, kA100).compressed_select_row, -1);
  const auto row_of = [&](const auto& change) {
    NsaFwdProblem other = one_head;
    change(other);
    return make_plan(other, kH200).compressed_select_row;
  };
  EXPECT_EQ(row_of([](auto& p) { p.compressed.dtype = p.select.dtype = DType::kFloat16; }), 1);
  EXPECT_EQ(row_of([](auto& p) { p.rounds_scores = true; }), -1);
  EXPECT_EQ(row_of([](auto& p) { p.has_select = false; }), -1);
  EXPECT_EQ(row_of([](auto& p) { p.select.topk = 17; }), -1);
  EXPECT_EQ(row_of([](auto& p) { p.select.block_size = 128; }), -1);
  EXPECT_EQ(row_of([](auto& p) { p.compressed.head_dim = p.select.head_dim = 64; }), -1);
  EXPECT_EQ(row_of([](auto& p) { p.compressed.head_dim_v = 192; }), -1);
}

TEST(nsa_backward_regions_are_disjoint_and_aligned) {
  for (const DeviceType device : {DeviceType::kCpu, DeviceType::kCuda}) {
    const NsaBwdPlan plan =
        make_plan(nsa_bwd(device), device == DeviceType::kCpu ? cpu_with(2) : kH200);
    const Region regions[] = {plan.do_cmp, plan.do_sel, plan.do_win, plan.scratch};
    size_t end = 0;
    for (const Region& region : regions) {
      EXPECT_EQ(region.offset % kWorkspaceAlignment, 0);
      EXPECT_TRUE(region.offset >= end);
      end = region.offset + region.bytes;
    }
    EXPECT_TRUE(plan.workspace_bytes >= end);
    EXPECT_EQ(plan.do_sel.bytes, size_t{8192} * 32 * 128 * 2);
    for (const Plan* step : {&plan.gate, &plan.compressed, &plan.selected, &plan.window}) {
      EXPECT_TRUE(step->workspace_bytes <= plan.scratch.bytes);
    }
  }
}

// Gates of sigmoids need no gradients of the branches on CUDA, only two numbers a row.
TEST(nsa_backward_folds_gates) {
  const NsaBwdPlan on_cpu =
      make_plan(nsa_bwd(DeviceType::kCpu, GateActivation::kSigmoid), cpu_with(2));
  EXPECT_TRUE(!on_cpu.folds_gates && on_cpu.stats_cmp.bytes == 0);
  const NsaBwdPlan ready = make_plan(nsa_bwd(DeviceType::kCuda), kH200);
  EXPECT_TRUE(!ready.folds_gates && ready.stats_cmp.bytes == 0);

  const NsaBwdPlan plan = make_plan(nsa_bwd(DeviceType::kCuda, GateActivation::kSigmoid), kH200);
  EXPECT_TRUE(plan.folds_gates);
  EXPECT_EQ(plan.do_cmp.bytes + plan.do_sel.bytes + plan.do_win.bytes, 0);
  size_t end = 0;
  for (const Region& region : {plan.stats_cmp, plan.stats_sel, plan.stats_win, plan.scratch}) {
    EXPECT_EQ(region.offset % kWorkspaceAlignment, 0);
    EXPECT_TRUE(region.offset >= end);
    end = region.offset + region.bytes;
  }
  EXPECT_TRUE(plan.workspace_bytes >= end);
  EXPECT_EQ(plan.stats_win.bytes, size_t{8192} * 32 * 8);
}

// Where compressed attention leaves its dQ in sums, it runs beside selected attention.
TEST(nsa_backward_shares_dq) {
  const NsaBwdPlan plan = make_plan(nsa_bwd(DeviceType::kCuda), kH200);
  EXPECT_TRUE(plan.shares_dq);
  size_t end = plan.do_win.offset + plan.do_win.bytes;
  for (const Region& region : {plan.index_start, plan.index_entry, plan.scratch_index, plan.dq_sums,
                               plan.turns_win, plan.turns_cmp, plan.scratch_cmp, plan.scratch}) {
    EXPECT_EQ(region.offset % kWorkspaceAlignment, 0);
    EXPECT_TRUE(region.offset >= end && region.bytes > 0);
    end = region.offset + region.bytes;
  }
  EXPECT_TRUE(end <= plan.workspace_bytes);
  EXPECT_TRUE(plan.scratch_cmp.bytes >= plan.compressed.workspace_bytes);
  EXPECT_EQ(plan.dq_sums.bytes, size_t{8192} * 32 * 128 * 4);
  EXPECT_EQ(plan.index_entry.bytes, size_t{8192} * 8 * 16 * 4);
  const std::string text = to_string(plan);
  size_t at = 0;
  for (const char* step :
       {"\n  build_block_index fwd: ", "\n  gate bwd: ", "\n  window_attention bwd: ",
        "\n  compressed_attention bwd: ", "\n  selected_attention bwd: "}) {
    at = text.find(step, at);
    EXPECT_TRUE(at != std::string::npos);
  }

  NsaBwdProblem many_heads = nsa_bwd(DeviceType::kCuda);
  for (Problem* step :
       {&many_heads.gate, &many_heads.compressed, &many_heads.selected, &many_heads.window}) {
    step->num_heads_kv = 2;
  }
  EXPECT_TRUE(make_plan(many_heads, kH200).shares_dq);
  const NsaBwdPlan separate = make_plan(nsa_bwd(DeviceType::kCuda), kA100);
  EXPECT_TRUE(!separate.shares_dq && separate.dq_sums.bytes == 0);
  EXPECT_TRUE(!make_plan(nsa_bwd(DeviceType::kCpu), cpu_with(2)).shares_dq);
}

TEST(workspace_layout) {
  WorkspaceLayout layout;
  EXPECT_EQ(layout.bytes(), 0);
  const Region a = layout.add(1), b = layout.add(0), c = layout.add(256), d = layout.add(300);
  EXPECT_EQ(a.offset, 0);
  EXPECT_EQ(b.offset, 256);
  EXPECT_EQ(c.offset, 256);
  EXPECT_EQ(d.offset, 512);
  EXPECT_EQ(d.bytes, 300);
  EXPECT_EQ(layout.bytes(), 1024);
}

TEST(workspace_cap_holds_a_selected_forward_of_128k_tokens) {
  Problem problem = llama(Op::kSelectedAttn, Pass::kFwd, DeviceType::kCuda);
  problem.total_q = problem.max_q = problem.total_k = problem.max_k = 131072;
  for (const DeviceInfo& device : {kH200, kA100}) {
    EXPECT_TRUE(make_plan(problem, device).workspace_bytes <= problem.workspace_cap);
  }
}

// Linear in the length: four times the tokens, at most four times the workspace.
TEST(workspace_is_linear_in_the_length) {
  const auto scaled = [](Problem problem, int64_t factor) {
    problem.total_q = problem.max_q = problem.total_k = problem.max_k = 65536 * factor;
    return problem;
  };
  for (const Op op : kAllOps) {
    for (const Pass pass : {Pass::kFwd, Pass::kBwd}) {
      if (pass == Pass::kBwd && !has_backward(op)) continue;
      const Problem cpu = llama(op, pass, DeviceType::kCpu);
      const Problem cuda = llama(op, pass, DeviceType::kCuda);
      EXPECT_TRUE(make_plan(scaled(cpu, 4), cpu_with(8)).workspace_bytes <=
                  4 * make_plan(scaled(cpu, 1), cpu_with(8)).workspace_bytes + 65536);
      EXPECT_TRUE(make_plan(scaled(cuda, 4), kH200).workspace_bytes <=
                  4 * make_plan(scaled(cuda, 1), kH200).workspace_bytes + 65536);
    }
  }
}

// 65536 threads of four windows: 64K tokens and 8 heads of 128 have twice as many, 16K half of them.
TEST(pooling_walks_over_windows_of_two_strides_where_threads_are_many) {
  const int64_t vectors = 8 * 128 / 8;
  EXPECT_TRUE(compress_kv_walks(32, 16, 4096, vectors));
  EXPECT_EQ(compress_kv_walkers(4096, vectors), 4096 / 4 * vectors);
  EXPECT_TRUE(!compress_kv_walks(32, 16, 1024, vectors));
  EXPECT_TRUE(!compress_kv_walks(64, 16, 4096, vectors));
}

// Tiles of 128 compressed keys, 132 SMs.
TEST(the_compressed_backward_walks_both_ways_where_runs_fill_the_device) {
  const auto order = [](int64_t num_tiles, int parts) {
    return key_tile_order(true, num_tiles, parts, 132);
  };
  EXPECT_EQ(order(64, 32).width, 4);  // 128K tokens: 256 tiles are 97 % of two runs
  EXPECT_EQ(order(64, 32).run, 132);
  EXPECT_EQ(order(32, 32).width, 4);
  EXPECT_EQ(order(12, 32).run, 132);
  EXPECT_EQ(order(11, 32).run, 0);  // fewer than 384 tiles
  EXPECT_EQ(order(65, 32).run, 0);  // more tiles of a sequence than were measured
  EXPECT_EQ(order(65, 32).width, 8);
  EXPECT_EQ(key_tile_order(false, 512, 8, 132).width, kAllHeads);  // window attention
}

TEST(kernels_are_counted) { EXPECT_TRUE(compiled_cuda_kernels().rfind("compress_kv 2, ", 0) == 0); }

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
