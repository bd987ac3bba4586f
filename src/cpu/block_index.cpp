#include "cpu/block_index.h"

#include <algorithm>

#include "base/check.h"

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
// visit(block, position in the row) is called in ascending position.
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

// Walks the queries of one chunk in ascending order; visit(slot, entry).
template <class Visit>
void for_each_entry(const IndexJob& job, int64_t head, int64_t chunk, const Visit& visit) {
  const Packing& packing = job.params.packing;
  const SelectedMask& mask = job.params.mask;
  const int64_t begin = chunk * job.chunk_tokens;
  const int64_t end = std::min(begin + job.chunk_tokens, packing.total_q);
  const int32_t* cu_end = packing.cu_q + packing.batch + 1;
  int64_t seq = std::max<int64_t>(
      std::upper_bound(packing.cu_q, cu_end, static_cast<int32_t>(begin)) - packing.cu_q - 1, 0);
  for (; seq < packing.batch && packing.cu_q[seq] < end; ++seq) {
    const int64_t seq_begin = packing.cu_q[seq], seq_end = packing.cu_q[seq + 1];
    const int64_t seqlen_k = packing.cu_k[seq + 1] - packing.cu_k[seq];
    const int64_t offset =
        packing.q_offset != nullptr ? packing.q_offset[seq] : seqlen_k - (seq_end - seq_begin);
    const int64_t first_slot = first_block_slot(packing.cu_k[seq], seq, mask.block_size);
    const int64_t seq_blocks = ceil_div(seqlen_k, mask.block_size);
    for (int64_t token = std::max(begin, seq_begin); token < std::min(end, seq_end); ++token) {
      const int64_t position = token - seq_begin + offset;
      // A query in front of its sequence's first key sees no block.
      const int64_t num_blocks =
          position < 0 ? 0 : std::min(seq_blocks, position / mask.block_size + 1);
      const int32_t* row = mask.topk_idx + head * mask.head_stride + token * mask.token_stride;
      for_each_valid(row, mask.topk, num_blocks, [&](int64_t block, int64_t place) {
        visit(first_slot + block, static_cast<int32_t>(token * mask.topk + place));
      });
    }
  }
}

void count_entries(const IndexJob& job, int64_t head, int64_t chunk) {
  int32_t* counts = job.counts_of(head, chunk);
  std::fill_n(counts, job.params.mask.index.num_slots, 0);
  for_each_entry(job, head, chunk, [&](int64_t slot, int32_t) { ++counts[slot]; });
}

// Slot by slot, inside a slot chunk by chunk: entries of a slot ascend with the token.
void scan_counts(const IndexJob& job, int64_t head) {
  const int64_t num_slots = job.params.mask.index.num_slots;
  int32_t* start = job.params.mask.index.start + head * (num_slots + 1);
  int32_t next = 0;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    start[slot] = next;
    for (int64_t chunk = 0; chunk < job.num_chunks; ++chunk) {
      int32_t& count = job.counts_of(head, chunk)[slot];
      const int32_t here = count;
      count = next;
      next += here;
    }
  }
  start[num_slots] = next;
}

void write_entries(const IndexJob& job, int64_t head, int64_t chunk) {
  int32_t* next = job.counts_of(head, chunk);
  int32_t* entries =
      job.params.mask.index.entry + head * job.params.packing.total_q * job.params.mask.topk;
  for_each_entry(job, head, chunk,
                 [&](int64_t slot, int32_t entry) { entries[next[slot]++] = entry; });
}

}  // namespace

void build_block_index(const BlockIndexParams& params) {
  const int64_t num_slots = params.mask.index.num_slots;
  const int64_t num_chunks = block_index_num_chunks(params.packing.total_q);
  FSATTN_ASSERT(params.scratch.bytes >=
                block_index_scratch_bytes(params.num_heads_kv, params.packing.total_q, num_slots));
  const IndexJob job{params, num_chunks, ceil_div(params.packing.total_q, num_chunks),
                     static_cast<int32_t*>(params.scratch.data)};
  const int64_t num_jobs = params.num_heads_kv * num_chunks;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < num_jobs; ++i) count_entries(job, i / num_chunks, i % num_chunks);
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < params.num_heads_kv; ++head) scan_counts(job, head);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < num_jobs; ++i) write_entries(job, i / num_chunks, i % num_chunks);
}

}  // namespace fsattn::cpu
