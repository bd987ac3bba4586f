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

namespace fsattn {

inline constexpr int kAllHeads = 1 << 30;

// `width` heads at a time, all their tiles one after the other. With a run, as many more that walk on:
// `run` tiles of the ones, then `run` of the others.
struct KeyTileOrder {
  int width;
  int run;  // CTAs that the device holds; 0: one width after the other
};

// Sequences of so many tiles of compressed keys, over all parts, have parts that walk on: fewer start
// together, and those that walk on would wait for the first one.
inline constexpr int kTwoWayTiles = 384;

// `num_tiles`: of a sequence. Narrow runs take less of the L2, but no run should leave much of the
// device to the next one, which starts too early then.
constexpr KeyTileOrder key_tile_order(bool is_compressed, int64_t num_tiles, int parts,
                                      int num_sms) {
  if (!is_compressed) return {kAllHeads, 0};
  if (num_tiles * parts < kTwoWayTiles) return {8, 0};
  const int half = parts > 1 ? parts / 2 : 1;
  KeyTileOrder best{half, num_sms};
  int64_t best_share = 0;
  for (int width = half < 4 ? half : 4; best_share < 90; width *= 2) {
    if (width > half) width = half;
    const int64_t tiles = num_tiles * width;
    const int64_t share = tiles * 100 / (ceil_div(tiles, int64_t{num_sms}) * num_sms);
    if (parts % (2 * width) == 0 && share >= best_share) {
      best.width = width;
      best_share = share;
    }
    if (width == half) break;
  }
  return best;
}

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
  const bool walks_on = is_compressed && part % 2 != 0 && num_tiles * parts >= kTwoWayTiles;
  return walks_on ? QueryWalk{first, last, 1} : QueryWalk{last, first, -1};
}

}  // namespace fsattn
