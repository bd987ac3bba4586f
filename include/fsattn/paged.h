// Inference over a paged KV cache: append new tokens, attend to everything that was stored. The same
// numbers as the last rows of a full forward pass. Calls as in fsattn/ops.h: a struct,
// workspace_bytes(), explain(), run().
//
// Cache   K and V are separate tensors of pages, [num_pages, page_size, Hkv, D] (NHD) or
//         [num_pages, Hkv, page_size, D] (HND); every stride but the last is free. Token p of sequence
//         b lies in page block_table[b, p / page_size]. Compressed tokens lie in a cache of the same
//         form with a block table and a page size of their own: token i of them is window i.
// Lengths cache_seqlens[b] is the number of tokens before the new ones, in every call of one step. New
//         token i stands at position cache_seqlens[b] + i. The tensors are read on the device by run(),
//         the bounds max_seqlen_q and max_seqlen_k on the host: a captured CUDA graph keeps working
//         while the lengths grow up to the bounds.
// Safety  Where the host can read a table or a length (CPU tensors) wrong ones throw. On CUDA a page id
//         outside the cache is never dereferenced: it reads as zeros and drops what is written to it. A
//         negative length counts as 0; tokens at or behind min(max_seqlen_k, max_pages * page_size) are
//         not stored and not seen.
#pragma once
#include "fsattn/ops.h"

namespace fsattn {

enum class CacheLayout : int { kNhd, kHnd };

// Pages of keys and values and the table that says whose they are. Entries behind the last used page
// of a row are not looked at. Sequences may share pages, but not append to a shared one.
struct PagedKv {
  TensorView k, v;         // Dv may differ from D
  TensorView block_table;  // int32 [B, max_pages]
};

struct PagedSequences {
  TensorView cu_seqlens_q;   // int32 [B + 1], the new tokens
  TensorView cache_seqlens;  // int32 [B], tokens before them
  int64_t max_seqlen_q = 0;  // bounds of the new tokens of a sequence
  int64_t max_seqlen_k = 0;  // and of all its tokens, the new ones included
};

// Stores new keys and values, and the compressed tokens whose window they complete: window i of a
// sequence is stored by the call that brings its last token, i * d + l - 1.
//
// With rope_cos, rope_sin, keys are stored rotated by their position (half-split, as in the published
// modules) and compressed keys, made from keys before their rotation, rotated by the position of the
// first token of their window, i * d. Keys before their rotation are kept for that in k_raw: token p in
// row p % R of its page, so that each page remembers its last R tokens. R divides page_size, and is
// page_size or at least l. Up to R - l tokens can be taken back by passing a smaller cache_seqlens
// later (rejected speculative tokens), any number where R is page_size.
struct AppendKv {
  TensorView k, v;  // [total_q, Hkv, D], [total_q, Hkv, Dv]; k before its rotation
  PagedSequences seq;
  PagedKv cache;
  PagedKv cmp;  // optional: nothing is compressed without
  CacheLayout layout = CacheLayout::kNhd;
  TensorView k_raw;               // [num_pages, R, Hkv, D] or HND; with rope and cmp, else absent
  TensorView rope_cos, rope_sin;  // [positions, D / 2], dtype of k; both or none
  int64_t kernel_size = 32, kernel_stride = 16;
  CompressKind kind = CompressKind::kMean;
  TensorView weight_k, weight_v;  // by kind, see CompressKind
  TensorView pos_emb;             // [Hkv, l, D], added to keys; optional
};

// native_sparse_attention of the new queries over the cache, which already holds the new tokens.
// q is rotated by the caller. With batch_invariant the bits of a sequence depend neither on the other
// sequences nor on the bounds of the lengths.
struct PagedNativeSparseAttention {
  TensorView q, gates;  // [total_q, Hq, D]; [total_q, 3] or [total_q, Hq, 3]
  PagedSequences seq;
  PagedKv cache, cmp;
  CacheLayout layout = CacheLayout::kNhd;
  NsaConfig config;
  GroupReduce group_reduce = GroupReduce::kSum;
  ScoreDType score_dtype = ScoreDType::kFloat32;
  GateActivation activation = GateActivation::kSigmoid;
  bool batch_invariant = false;
  size_t workspace_cap = size_t{1} << 30;  // as in NativeSparseAttentionFwd
  TensorView o;                            // out, [total_q, Hq, Dv]
  TensorView topk_idx;                     // out, optional: int32 [Hkv, total_q, topk]
};

// Selected attention alone, with the selection of the caller's own indexer.
struct PagedSelectedAttention {
  TensorView q,
      topk_idx;  // [total_q, Hq, D]; int32 [Hkv, total_q, topk], as in SelectedAttentionFwd
  PagedSequences seq;
  PagedKv cache;
  CacheLayout layout = CacheLayout::kNhd;
  int64_t block_size = 64;
  double softmax_scale = 0.0;
  bool batch_invariant = false;
  size_t workspace_cap = size_t{1} << 30;
  TensorView o, lse;  // out: [total_q, Hq, Dv], [Hq, total_q]
};

size_t workspace_bytes(const AppendKv& call);
std::string explain(const AppendKv& call);
void run(const AppendKv& call, const Execution& execution);

size_t workspace_bytes(const PagedNativeSparseAttention& call);
std::string explain(const PagedNativeSparseAttention& call);
void run(const PagedNativeSparseAttention& call, const Execution& execution);

size_t workspace_bytes(const PagedSelectedAttention& call);
std::string explain(const PagedSelectedAttention& call);
void run(const PagedSelectedAttention& call, const Execution& execution);

}  // namespace fsattn
