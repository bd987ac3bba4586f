// Which calls over a paged cache the fused CUDA kernels serve, and the memory that they ask for.
#include "plan/paged_cuda.h"
#include "plan/paged_table.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

DeviceInfo cuda_with(Arch arch, size_t smem_per_cta) {
  DeviceInfo device;
  device.type = DeviceType::kCuda;
  device.arch = arch;
  device.smem_per_cta = smem_per_cta;
  return device;
}
DeviceInfo h200() {
  DeviceInfo device = cuda_with(Arch::kSm90a, 227 * 1024);
  device.compute_capability = 90;
  device.num_sms = 132;
  return device;
}
const DeviceInfo kH200 = h200();
const DeviceInfo kRtx = cuda_with(Arch::kSm80, 99 * 1024);

// One token a sequence, 64K tokens of context.
PagedProblem llama(PagedOp op) {
  PagedProblem p;
  p.op = op;
  p.device = {DeviceType::kCuda, 0};
  p.dtype = DType::kBFloat16;
  p.batch = p.total_q = 16;
  p.max_q = p.max_seqlen_q = 1;
  p.max_k = 65536;
  p.num_heads_q = op == PagedOp::kAppend ? 0 : 32;
  p.num_heads_kv = 8;
  p.head_dim = p.head_dim_v = 128;
  p.page_size = 64;
  if (op != PagedOp::kSelected) {
    p.cmp_page_size = 16;
    p.kernel_size = 32;
    p.kernel_stride = 16;
  }
  if (op != PagedOp::kAppend) {
    p.block_size = 64;
    p.topk = 16;
  }
  if (op == PagedOp::kAttn) p.window_size = 512;
  return p;
}

TEST(the_first_row_that_fits_serves) {
  PagedProblem p = llama(PagedOp::kAttn);
  EXPECT_EQ(choose_paged_fused(p, kH200).row, 1);
  p.head_dim = 192;
  EXPECT_EQ(choose_paged_fused(p, kH200).row, 2);
  p.head_dim_v = 192;
  EXPECT_EQ(choose_paged_fused(p, kH200).row, 3);
  p.dtype = DType::kFloat16;
  EXPECT_EQ(choose_paged_fused(p, kH200).row, 7);
  EXPECT_EQ(choose_paged_fused(llama(PagedOp::kSelected), kH200).row, 1);
  EXPECT_EQ(choose_paged_fused(llama(PagedOp::kAppend), kH200).row, 0);
}

// Asked for, splits are constants: results do not depend on the batch or on the bounds.
TEST(splits_do_not_depend_on_the_batch) {
  PagedProblem p = llama(PagedOp::kAttn);
  p.batch_invariant = true;
  for (const int64_t max_k : {1 << 16, 1 << 20}) {
    p.max_k = max_k;
    for (const int64_t batch : {1, 8, 16}) {
      p.batch = p.total_q = batch;
      const PagedTuning tuning = choose_paged_fused(p, kH200).tuning;
      EXPECT_EQ(tuning.cmp_split, kDecodeSplit);
      EXPECT_EQ(tuning.cmp_long, kDecodeNeverLong);
      EXPECT_EQ(tuning.finish.ctas, 0);
    }
  }
}

DecodeFinish finish_of(int64_t batch, int64_t context, int64_t heads_q, int64_t heads_kv) {
  PagedProblem p = llama(PagedOp::kAttn);
  p.batch = p.total_q = batch;
  p.max_k = context;
  p.num_heads_q = heads_q;
  p.num_heads_kv = heads_kv;
  return choose_paged_fused(p, kH200).tuning.finish;
}

TEST(clusters_follow_the_compressed_branch_while_they_find_room) {
  const DecodeFinish none{}, wide{2, true};
  EXPECT_TRUE(finish_of(1, 131072, 32, 8) == DecodeFinish(8, false));
  EXPECT_TRUE(finish_of(4, 65536, 32, 8) == DecodeFinish(4, false));
  EXPECT_TRUE(finish_of(16, 65536, 64, 4) == wide);
  EXPECT_TRUE(finish_of(16, 65536, 32, 8) == none);   // 128 queries
  EXPECT_TRUE(finish_of(1, 1 << 20, 32, 8) == none);  // more blocks than a cluster ranks
  EXPECT_TRUE(finish_of(1, 131072, 32, 1) == none);   // two tiles of rows a query
}

TEST(scores_are_pooled_for_a_cluster_where_chunks_are_whole_blocks) {
  const DecodeFinish cluster{2, true};
  EXPECT_TRUE(pools_scores(cluster, GroupReduce::kSum, 32, 16, 64));
  EXPECT_TRUE(pools_scores(cluster, GroupReduce::kFirstHead, 16, 8, 32));
  EXPECT_TRUE(!pools_scores(cluster, GroupReduce::kMax, 32, 16, 64));
  EXPECT_TRUE(!pools_scores(cluster, GroupReduce::kSum, 32, 16, 128));
  EXPECT_TRUE(!pools_scores(cluster, GroupReduce::kSum, 32, 32, 128));
  EXPECT_TRUE(!pools_scores(DecodeFinish{}, GroupReduce::kSum, 32, 16, 64));
}

TEST(splits_are_large_where_they_fill_the_device) {
  EXPECT_EQ(choose_cmp_long(64, 1, 132), 3 * 1024 + 1);  // 256 splits of 4095 keys
  EXPECT_EQ(choose_cmp_long(237, 1, 132), 1);
  EXPECT_EQ(choose_cmp_long(8, 1, 132), 29 * 1024 + 1);
  EXPECT_EQ(choose_paged_fused(llama(PagedOp::kAttn), kH200).tuning.cmp_long, 1025);
}

TEST(a_cluster_keeps_its_window_in_memory) {
  PagedProblem p = llama(PagedOp::kAttn);
  p.num_heads_q = 64;
  p.num_heads_kv = 4;
  const size_t rows = 64 * 16;
  // 8 splits of 512 keys at most; nothing, and two results of the window.
  EXPECT_EQ(choose_paged_fused(p, kH200).scratch_bytes,
            rows * (4096 + 8 * 129 + 3 * 129) * 4 + 64 * 4);
}

// 128 units of 4 rows; 4095 windows in 8 splits; 1 + 2 + 4 partial results a row.
TEST(scratch_is_the_documented_sum) {
  const size_t rows = 128 * 4;
  const size_t want = rows * (4096 + 8 * 129 + 7 * 129) * 4 + 128 * 4;
  EXPECT_EQ(choose_paged_fused(llama(PagedOp::kAttn), kH200).scratch_bytes, want);
  EXPECT_EQ(choose_paged_fused(llama(PagedOp::kSelected), kH200).scratch_bytes,
            rows * 4 * 129 * 4 + 128 * 4);
}

TEST(long_sequences_keep_block_scores) {
  PagedProblem p = llama(PagedOp::kAttn);
  const DecodeSplits splits = decode_splits(16, 512, 64, 16, 512);
  EXPECT_EQ(decode_scratch(1, 2, 4, 128, 16, 1024, splits, true).block_scores_pitch, 0);
  EXPECT_EQ(decode_scratch(1, 2, 4, 128, 16, 1025, splits, true).block_scores_pitch, 1056);
  p.batch = p.total_q = 1;
  p.max_k = 1 << 20;
  EXPECT_EQ(choose_paged_fused(p, kH200).row, 1);
}

TEST(clusters_rank_blocks_while_they_leave_sms_free) {
  constexpr int kSms = 132;
  EXPECT_EQ(decode_rank_ctas(1024, 16 * 4, kSms), 8);  // 16 x 64K, 4 heads
  EXPECT_EQ(decode_rank_ctas(1024, 16 * 8, kSms), 0);  // 16 x 64K, 8 heads
  EXPECT_EQ(decode_rank_ctas(128, 16 * 8, kSms), 4);   // 16 x 8K, 8 heads
  EXPECT_EQ(decode_rank_ctas(2048, 8, kSms), 8);       // 1 x 128K, 8 heads
  EXPECT_EQ(decode_rank_ctas(2049, 8, kSms), 0);       // more blocks than a cluster holds
}

TEST(small_gpus_take_head_dims_up_to_192) {
  PagedProblem p = llama(PagedOp::kAttn);
  EXPECT_EQ(choose_paged_fused(p, kRtx).row, 1);
  p.head_dim = 192;
  EXPECT_EQ(choose_paged_fused(p, kRtx).row, 2);
}

TEST(many_new_tokens_have_a_kernel_of_their_own) {
  PagedProblem p = llama(PagedOp::kAppend);
  EXPECT_TRUE(!choose_paged_fused(p, kH200).tuning.has_chunks);
  p.max_seqlen_q = 9;  // the bound alone decides: max_q depends on the batch
  const PagedChoice choice = choose_paged_fused(p, kH200);
  EXPECT_EQ(choice.row, 0);
  EXPECT_TRUE(choice.tuning.has_chunks);
  EXPECT_EQ(choice.reason, std::string("many new tokens a sequence"));
}

TEST(what_is_not_fused) {
  const auto expect_refusal = [](PagedProblem p, const DeviceInfo& device, const char* reason) {
    const PagedChoice choice = choose_paged_fused(p, device);
    EXPECT_EQ(choice.row, -1);
    EXPECT_EQ(choice.reason, std::string(reason));
  };
  PagedProblem p = llama(PagedOp::kAttn);
  p.max_q = p.max_seqlen_q = 9;
  expect_refusal(p, kH200, "more new tokens than the fused kernels take");
  p = llama(PagedOp::kAttn);
  p.block_size = 16;
  p.max_k = 1 << 20;
  expect_refusal(p, kH200, "more blocks in a sequence than the fused kernels rank");
  p = llama(PagedOp::kAttn);
  p.num_heads_q = 8 * 65;
  expect_refusal(p, kH200, "a larger group than the fused kernels take");
  p = llama(PagedOp::kAttn);
  p.head_dim = p.head_dim_v = 256;
  expect_refusal(p, kRtx, "the device has too little shared memory");
  PagedProblem many = llama(PagedOp::kAppend);
  many.max_q = many.max_seqlen_q = 9;
  p = many;
  p.overwrites_raw_keys = true;
  expect_refusal(p, kH200, "more new tokens than the fused kernels take");
  p = many;
  p.compress_kind = CompressKind::kLinear;
  expect_refusal(p, kH200, "more new tokens than the fused kernels take");
  p = many;
  p.cmp_page_size = 0;
  expect_refusal(p, kH200, "more new tokens than the fused kernels take");
  p = llama(PagedOp::kAppend);
  p.compress_kind = CompressKind::kLinear;
  p.kernel_size = 512;
  expect_refusal(p, kH200, "the device has too little shared memory for a window");
}

TEST(copies_have_a_row_a_dtype) {
  EXPECT_EQ(find_paged_copy_row(DType::kBFloat16), 0);
  EXPECT_EQ(find_paged_copy_row(DType::kFloat16), 1);
  EXPECT_EQ(find_paged_copy_row(DType::kFloat32), -1);
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
