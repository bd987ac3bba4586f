#include "cpu/block_index.h"

#include <algorithm>

#include "base/check.h"
#include "base/math.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"
#include "plan/cpu_workspace.h"

namespace fsattn::cpu {
namespace {

struct IndexJob {
  const BlockIndexParams& params;
  int64_t num_chunks;
  int64_t chunk_tokens;
  int32_t*
      counts;  // [Hkv, num_chunks, num_slots]: first the counts, then where a chunk writes next

  int32_t* counts_of(int64_t head, int64_t chunk) const {
    return counts + (head * num_chunks + chunk) * params.mask.index.num_slots;
  }
};

// One query's ids that count: in the sequence, not behind the query's block, the first of their kind.
// Calls visit(block, position in the row) in ascending position.
template <class Visit>
void for_each_valid(const int32_t* row, int64_t topk, int64_t num_blocks, const Visit& visit) {
  // Rows are usually ascending: an id above every earlier one is new without a search.
  int32_t largest = -1;
  for (int64_t position = 0; position < topk; ++position) {
    const int32_t block = row[position];
    if (block < 0 || block >= num_blocks) continue;
    if (block > largest) {
      largest = block;
    } else if (std::find(row, row + position, block) != row + position) {
      continue;
    }
    visit(block, position);
  }
}

// Walks the queries of one chunk in ascending order; calls visit(slot, entry).
template <class Visit>
void for_each_entry(const IndexJob& job, int64_t head, int64_t chunk, const Visit& visit) {
  const Packing& packing = job.params.packing;
  const SelectedMask& mask = job.params.mask;
  const auto visit_piece = [&](int64_t seq, int64_t begin, int64_t end) {
    const int64_t seq_begin = packing.cu_q[seq];
    const int64_t seqlen_q = packing.cu_q[seq + 1] - seq_begin;
    const int64_t seqlen_k = packing.cu_k[seq + 1] - packing.cu_k[seq];
    const int64_t offset =
        packing.q_offset != nullptr ? packing.q_offset[seq] : seqlen_k - seqlen_q;
    const int64_t first_slot = first_block_slot(packing.cu_k[seq], seq, mask.block_size);
    const int64_t seq_blocks = ceil_div(seqlen_k, mask.block_size);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = token - seq_begin + offset;
      if (position < 0) continue;  // stands in front of the first key: sees no block
      const int64_t num_blocks = std::min(seq_blocks, position / mask.block_size + 1);
      const int32_t* row = mask.topk_idx + head * mask.head_stride + token * mask.token_stride;
      for_each_valid(row, mask.topk, num_blocks, [&](int64_t block, int64_t place) {
        visit(first_slot + block, static_cast<int32_t>(token * mask.topk + place));
      });
    }
  };
  const int64_t begin = chunk * job.chunk_tokens;
  const int64_t end = std::min(begin + job.chunk_tokens, packing.total_q);
  for_each_sequence(packing.cu_q, packing.batch, begin, end, visit_piece);
}

void count_entries(const IndexJob& job, int64_t head, int64_t chunk) {
  int32_t* counts = job.counts_of(head, chunk);
  std::fill_n(counts, job.params.mask.index.num_slots, 0);
  for_each_entry(job, head, chunk, [&](int64_t slot, int32_t) { ++counts[slot]; });
}

// Slot by slot, inside a slot chunk by chunk: the entries of a slot ascend with the token.
void scan_counts(const IndexJob& job, int64_t head) {
  const BlockIndexView& index = job.params.mask.index;
  int32_t* start = index.start + head * (index.num_slots + 1);
  int32_t next = 0;
  for (int64_t slot = 0; slot < index.num_slots; ++slot) {
    start[slot] = next;
    for (int64_t chunk = 0; chunk < job.num_chunks; ++chunk) {
      int32_t& count = job.counts_of(head, chunk)[slot];
      const int32_t here = count;
      count = next;
      next += here;
    }
  }
  start[index.num_slots] = next;
  // The tail is never read, but two runs shall give the same bits in the whole tensor.
  const int64_t capacity = job.params.packing.total_q * job.params.mask.topk;
  std::fill(index.entry + head * capacity + next, index.entry + (head + 1) * capacity, -1);
}

void write_entries(const IndexJob& job, int64_t head, int64_t chunk) {
  int32_t* next = job.counts_of(head, chunk);
  const int64_t capacity = job.params.packing.total_q * job.params.mask.topk;
  int32_t* entries = job.params.mask.index.entry + head * capacity;
  for_each_entry(job, head, chunk,
                 [&](int64_t slot, int32_t entry) { entries[next[slot]++] = entry; });
}

}  // namespace

void block_index(int, const BlockIndexParams& params, Stream) {
  const int64_t total_q = params.packing.total_q;
  const int64_t num_chunks = cpu_index_num_chunks(total_q);
  FSATTN_ASSERT(params.scratch.bytes >=
                cpu_index_counts_bytes(params.num_heads_kv, total_q, params.mask.index.num_slots));
  const IndexJob job{params, num_chunks, ceil_div(total_q, num_chunks),
                     static_cast<int32_t*>(params.scratch.data)};
  const int64_t num_tasks = params.num_heads_kv * num_chunks;
  parallel_for(num_tasks, Schedule::kDynamic,
               [&](int64_t task) { count_entries(job, task / num_chunks, task % num_chunks); });
  parallel_for(params.num_heads_kv, Schedule::kStatic,
               [&](int64_t head) { scan_counts(job, head); });
  parallel_for(num_tasks, Schedule::kDynamic,
               [&](int64_t task) { write_entries(job, task / num_chunks, task % num_chunks); });
}

}  // namespace fsattn::cpu
