// In which order dense_attn_bwd_sm90.cuh takes the tiles of keys, and each CTA its tiles of queries: such
// that CTAs of one head are at the same queries at the same time. They add to the same dQ, 32 KB a tile,
// and read the same Q and dO, which then stay in the L2.
//
// A tile of compressed keys that begins n keys later has n * stride fewer queries. As many tiles as the
// device holds start together and walk from the last query back, side by side: they end one after the
// other, the last tile first, and so the next tiles start one after the other, the first tile first. If
// those walked back, too, they would stay n * stride queries apart. Walking from their first query on,
// each is where the one before it is, and all end together.
//
// Every head walks one way, so that dK and dV depend on nothing else. Runs of tiles of some heads that
// walk back and of as many that walk on take turns.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_dkv_sm80.cuh"
#include "plan/dense_attn_table.h"

namespace fsattn {

// What the CTA that starts as number `ticket` takes. Parts with odd numbers may walk on.
FSATTN_HOST_DEVICE constexpr KeyTileIndex find_key_tile_index(int ticket, int slots, int parts,
                                                              const KeyTileOrder& order) {
  const int most = order.run > 0 ? 2 * order.width : order.width;
  const int wide = most < parts ? most : parts, first = ticket / (slots * wide) * wide;
  const int rest = ticket - first * slots, some = wide < parts - first ? wide : parts - first;
  if (order.run == 0 || some % 2 != 0) return {rest / some, first + rest % some};
  const int width = some / 2, begin = rest / (2 * order.run) * order.run;
  const int left = slots * width - begin, size = order.run < left ? order.run : left;
  const int place = rest - 2 * begin, is_odd = place >= size ? 1 : 0;
  const int tile = begin + place - is_odd * size;
  return {tile / width, first + tile % width * 2 + is_odd};
}

// The tiles of queries of a CTA in the order in which it takes them, once for each head.
struct QueryWalk {
  int first, last;
  int step;  // 1 or -1
};

__device__ __forceinline__ QueryWalk find_walk(const KeyTileWork& work, int part, int parts,
                                               bool is_compressed, int tile_kv, int tile_q) {
  const int first = work.first_query / tile_q, last = work.last_query / tile_q;
  const int64_t num_tiles = (work.first_key + work.num_keys + tile_kv - 1) / tile_kv;
  const bool walks_on = is_compressed && part % 2 != 0 && walks_both_ways(num_tiles, parts);
  return walks_on ? QueryWalk{first, last, 1} : QueryWalk{last, first, -1};
}

}  // namespace fsattn
