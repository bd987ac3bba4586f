// Tokens in pages: where a sequence stands, where a token lies, copies of rows with their rotation.
//
// Nothing that the device alone knows is trusted: a token without a page has no row, and one at or behind
// max_k does not exist.
#pragma once
#include <algorithm>

#include "base/cuda_check.h"
#include "base/math.h"
#include "cuda/device/packing.cuh"
#include "cuda/device/page_table.cuh"
#include "cuda/device/scan.cuh"
#include "cuda/device/vector.cuh"
#include "params/paged.h"

namespace fsattn::device {

// The tokens of a sequence: positions 0 .. before - 1 are stored, before .. total - 1 are new.
struct PagedSpan {
  int first_row;  // of the new tokens
  int before, total;

  __device__ int num_new() const { return total - before; }
};

__device__ __forceinline__ PagedSpan find_span(const PagedPacking& packing, int seq) {
  const int rows = static_cast<int>(packing.total_q);
  const int begin = min(max(__ldg(packing.cu_q + seq), 0), rows);
  const int end = min(max(__ldg(packing.cu_q + seq + 1), begin), rows);
  const int64_t before =
      min(static_cast<int64_t>(max(__ldg(packing.cache_seqlens + seq), 0)), packing.max_k);
  return {begin, static_cast<int>(before),
          static_cast<int>(min(before + (end - begin), packing.max_k))};
}

// num_windows() without the 64-bit division, which is a call and costs registers.
__device__ __forceinline__ int count_windows(int length, int64_t size, int64_t stride) {
  const int l = static_cast<int>(size);
  return length < l ? 0 : (length - l) / static_cast<int>(stride) + 1;
}

template <class Element>
__device__ __forceinline__ Element* page_row(const PagedRows& rows, int64_t page, int row,
                                             int head) {
  return static_cast<Element*>(rows.data) + page * rows.page_stride + row * rows.token_stride +
         head * rows.head_stride;
}

// Copies 8 elements of a row; a null source stands for zeros, a null target takes nothing.
template <class Element>
__device__ __forceinline__ void copy_vector(const Element* from, Element* to, int column) {
  if (to == nullptr) return;
  *reinterpret_cast<uint4*>(to + column) =
      from == nullptr ? uint4{} : *reinterpret_cast<const uint4*>(from + column);
}

// y0 = x0 cos - x1 sin, y1 = x1 cos + x0 sin in fp32, rounded once; x1 stands half a row behind x0.
// Lane i < dim / 8 takes four pairs.
template <class Element>
__device__ __forceinline__ void copy_rotated(const Element* from, Element* to, int dim,
                                             const RopeTables& rope, int position, int lane) {
  if (to == nullptr || lane >= dim / 8) return;
  if (rope.cos == nullptr || position >= rope.num_positions) {
    copy_vector(from, to, lane * 8);
    return;
  }
  const int half = dim / 2, column = lane * 4;
  const int64_t at = static_cast<int64_t>(position) * half + column;
  const auto load = [](const void* p, int64_t i) {
    return *reinterpret_cast<const uint2*>(static_cast<const Element*>(p) + i);
  };
  const uint2 low = load(from, column), high = load(from, half + column);
  const uint2 cosines = load(rope.cos, at), sines = load(rope.sin, at);
  const auto rotate = [](uint32_t pair0, uint32_t pair1, uint32_t cosine, uint32_t sine,
                         uint32_t& out0, uint32_t& out1) {
    const float2 x0 = unpack_pair<Element>(pair0), x1 = unpack_pair<Element>(pair1);
    const float2 c = unpack_pair<Element>(cosine), s = unpack_pair<Element>(sine);
    out0 = pack_pair<Element>(x0.x * c.x - x1.x * s.x, x0.y * c.y - x1.y * s.y);
    out1 = pack_pair<Element>(x1.x * c.x + x0.x * s.x, x1.y * c.y + x0.y * s.y);
  };
  uint2 out0, out1;
  rotate(low.x, high.x, cosines.x, sines.x, out0.x, out1.x);
  rotate(low.y, high.y, cosines.y, sines.y, out0.y, out1.y);
  *reinterpret_cast<uint2*>(to + column) = out0;
  *reinterpret_cast<uint2*>(to + half + column) = out1;
}

// Stores new token `token` of a sequence that has `total` tokens now: K rotated, V, and K as it came
// among the raw keys, where it stays the last of the tokens that share its row.
template <class Element>
__device__ __forceinline__ void store_token(const PagedWriteParams& p, int seq, int token,
                                            int total, int64_t source, int head, int lane) {
  const PagePlace place = find_page(p.cache.table, seq, token);
  if (place.page < 0) return;
  const int dim = static_cast<int>(p.shape.head_dim), dim_v = static_cast<int>(p.shape.head_dim_v);
  const Element* key = row_pointer<Element>(p.k, source, head);
  copy_rotated(key, page_row<Element>(p.cache.k, place.page, place.row, head), dim, p.rope, token,
               lane);
  if (lane < dim_v / 8) {
    copy_vector(row_pointer<Element>(p.v, source, head),
                page_row<Element>(p.cache.v, place.page, place.row, head), lane * 8);
  }
  if (p.raw.rows.data == nullptr || lane >= dim / 8) return;
  const int size = static_cast<int>(p.raw.size),
            page_size = static_cast<int>(p.cache.table.page_size);
  if (token + size < total && place.row + size < page_size) return;
  copy_vector(key, page_row<Element>(p.raw.rows, place.page, place.row % size, head), lane * 8);
}

// Key `token`, stored by an earlier call, as it was before its rotation; null where it has no page.
template <class Element>
__device__ __forceinline__ const Element* stored_raw_key(const PagedWriteParams& p,
                                                         const PagePlace& place, int head) {
  if (place.page < 0) return nullptr;
  if (p.raw.rows.data == nullptr) {
    return page_row<Element>(p.cache.k, place.page, place.row, head);
  }
  return page_row<Element>(p.raw.rows, place.page, place.row % static_cast<int>(p.raw.size), head);
}

}  // namespace fsattn::device
