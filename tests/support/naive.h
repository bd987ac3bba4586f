// The operators as nested loops in fp64, written from the contract and sharing no code with src/.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <vector>

#include "fsattn/ops.h"
#include "support/host_tensor.h"

namespace fsattn::test {

// One query of one head: which tokens, which keys.
struct QueryPlace {
  int64_t sequence;
  int64_t token;     // row of q
  int64_t position;  // inside its sequence
  int64_t seqlen_k;
};

inline std::vector<QueryPlace> places_of(const Sequences& seq) {
  std::vector<QueryPlace> places;
  for (int64_t b = 0; b + 1 < seq.cu_seqlens_q.shape[0]; ++b) {
    const int64_t q_begin = index_at(seq.cu_seqlens_q, b),
                  q_end = index_at(seq.cu_seqlens_q, b + 1);
    const int64_t length =
        int64_t{index_at(seq.cu_seqlens_k, b + 1)} - index_at(seq.cu_seqlens_k, b);
    const int64_t offset =
        seq.q_offset.defined() ? index_at(seq.q_offset, b) : length - (q_end - q_begin);
    for (int64_t t = q_begin; t < q_end; ++t)
      places.push_back({b, t, t - q_begin + offset, length});
  }
  return places;
}

// Rows of k that a query of a KV head sees.
using VisibleKeys = std::function<std::vector<int64_t>(const QueryPlace&, int64_t head_kv)>;

inline VisibleKeys window_keys(const Sequences& seq, int64_t window_size) {
  return [=](const QueryPlace& place, int64_t) {
    std::vector<int64_t> rows;
    for (int64_t j = 0; j < place.seqlen_k; ++j) {
      if (j >= place.position - window_size && j <= place.position) {
        rows.push_back(index_at(seq.cu_seqlens_k, place.sequence) + j);
      }
    }
    return rows;
  };
}

inline VisibleKeys compressed_keys(const TensorView& cu_cmp, int64_t kernel_size, int64_t stride) {
  return [=](const QueryPlace& place, int64_t) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i * stride + kernel_size <= place.seqlen_k; ++i) {
      if (place.position >= i * stride + kernel_size - 1) {
        rows.push_back(index_at(cu_cmp, place.sequence) + i);
      }
    }
    return rows;
  };
}

inline VisibleKeys selected_keys(const Sequences& seq, const TensorView& topk_idx,
                                 int64_t block_size) {
  return [=](const QueryPlace& place, int64_t head_kv) {
    std::set<int64_t> blocks;
    for (int64_t n = 0; n < topk_idx.shape[2]; ++n) {
      blocks.insert(index_at(topk_idx, head_kv, place.token, n));
    }
    std::vector<int64_t> rows;
    for (int64_t j = 0; j < place.seqlen_k; ++j) {
      if (j <= place.position && blocks.count(j / block_size) > 0) {
        rows.push_back(index_at(seq.cu_seqlens_k, place.sequence) + j);
      }
    }
    return rows;
  };
}

struct NaiveQkv {
  TensorView q, k, v;
  Sequences seq;
  double scale;  // 0: head_dim^-0.5
  VisibleKeys visible;

  double resolved_scale() const {
    return scale != 0.0 ? scale : 1.0 / std::sqrt(static_cast<double>(q.shape[2]));
  }
  int64_t head_kv(int64_t head) const { return head * k.shape[1] / q.shape[1]; }
  double score(int64_t token, int64_t head, int64_t row) const {
    double sum = 0.0;
    for (int64_t d = 0; d < q.shape[2]; ++d) {
      sum += get(q, token, head, d) * get(k, row, head_kv(head), d);
    }
    return sum * resolved_scale();
  }
};

inline double log_sum_exp(const std::vector<double>& scores) {
  if (scores.empty()) return -std::numeric_limits<double>::infinity();
  const double most = *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  for (const double score : scores) sum += std::exp(score - most);
  return most + std::log(sum);
}

// The probabilities of one query over its visible rows, and their lse.
struct NaiveRow {
  std::vector<int64_t> rows;
  std::vector<double> p;
  double lse;
};

inline NaiveRow naive_row(const NaiveQkv& in, const QueryPlace& place, int64_t head) {
  NaiveRow row{in.visible(place, in.head_kv(head)), {}, 0.0};
  for (const int64_t key : row.rows) row.p.push_back(in.score(place.token, head, key));
  row.lse = log_sum_exp(row.p);
  for (double& value : row.p) value = std::exp(value - row.lse);
  return row;
}

inline void naive_attention_fwd(const NaiveQkv& in, const TensorView& o, const TensorView& lse) {
  for (const QueryPlace& place : places_of(in.seq)) {
    for (int64_t head = 0; head < in.q.shape[1]; ++head) {
      const NaiveRow row = naive_row(in, place, head);
      set(lse, row.lse, head, place.token);
      for (int64_t d = 0; d < o.shape[2]; ++d) {
        double sum = 0.0;
        for (size_t i = 0; i < row.rows.size(); ++i) {
          sum += row.p[i] * get(in.v, row.rows[i], in.head_kv(head), d);
        }
        set(o, sum, place.token, head, d);
      }
    }
  }
}

inline void set_zero(const TensorView& view) {
  for_each(view, [&](int64_t i, int64_t j, int64_t k) { set(view, 0.0, i, j, k); });
}
inline void add(const TensorView& view, double value, int64_t i, int64_t j, int64_t k) {
  set(view, get(view, i, j, k) + value, i, j, k);
}

struct NaiveGradients {
  TensorView dout, dlse;  // dlse may be absent
  TensorView dq, dk, dv;  // out
};

inline void naive_attention_bwd(const NaiveQkv& in, const NaiveGradients& grads) {
  for (const TensorView* view : {&grads.dq, &grads.dk, &grads.dv}) set_zero(*view);
  const double scale = in.resolved_scale();
  for (const QueryPlace& place : places_of(in.seq)) {
    for (int64_t head = 0; head < in.q.shape[1]; ++head) {
      const NaiveRow row = naive_row(in, place, head);
      const int64_t kv = in.head_kv(head);
      std::vector<double> dp(row.rows.size());
      double delta = 0.0;
      for (size_t i = 0; i < row.rows.size(); ++i) {
        for (int64_t d = 0; d < in.v.shape[2]; ++d) {
          const double g = get(grads.dout, place.token, head, d);
          dp[i] += g * get(in.v, row.rows[i], kv, d);
          add(grads.dv, row.p[i] * g, row.rows[i], kv, d);
        }
        delta += row.p[i] * dp[i];
      }
      const double dlse = grads.dlse.defined() ? get(grads.dlse, head, place.token) : 0.0;
      for (size_t i = 0; i < row.rows.size(); ++i) {
        const double ds = row.p[i] * (dp[i] - delta + dlse) * scale;
        for (int64_t d = 0; d < in.q.shape[2]; ++d) {
          add(grads.dq, ds * get(in.k, row.rows[i], kv, d), place.token, head, d);
          add(grads.dk, ds * get(in.q, place.token, head, d), row.rows[i], kv, d);
        }
      }
    }
  }
}

// Tokens that window i and block b have in common, over d: the weight of p_i in the block's score.
inline double block_weight(const SelectBlocks& call, int64_t window, int64_t block) {
  int64_t common = 0;
  for (int64_t token = window * call.kernel_stride;
       token < window * call.kernel_stride + call.kernel_size; ++token) {
    common += token / call.block_size == block;
  }
  return static_cast<double>(common) / static_cast<double>(call.kernel_stride);
}

// The selection of one query and KV head (group_reduce = sum, fp32 scores are not rounded here).
inline std::vector<int32_t> naive_selection(const SelectBlocks& call, const QueryPlace& place,
                                            int64_t head_kv) {
  const NaiveQkv in{call.q,
                    call.k_cmp,
                    {},
                    call.seq,
                    call.softmax_scale,
                    compressed_keys(call.cu_seqlens_cmp, call.kernel_size, call.kernel_stride)};
  const int64_t group = call.q.shape[1] / call.k_cmp.shape[1];
  const int64_t own = place.position < 0 ? -1 : place.position / call.block_size;
  const int64_t last = (place.seqlen_k - 1) / call.block_size;
  const int64_t num_blocks = std::min(own, place.seqlen_k == 0 ? -1 : last) + 1;
  std::vector<double> scores(static_cast<size_t>(std::max<int64_t>(num_blocks, 0)));
  for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
    const NaiveRow row = naive_row(in, place, head);
    for (size_t i = 0; i < row.rows.size(); ++i) {
      for (size_t b = 0; b < scores.size(); ++b) {
        scores[b] +=
            row.p[i] * block_weight(call, static_cast<int64_t>(i), static_cast<int64_t>(b));
      }
    }
  }
  std::vector<int32_t> order(scores.size());
  for (size_t b = 0; b < scores.size(); ++b) {
    order[b] = static_cast<int32_t>(b);
    const int64_t block = static_cast<int64_t>(b);
    if (block < call.init_blocks || block > own - call.local_blocks) {
      scores[b] = std::numeric_limits<double>::infinity();
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  order.resize(std::min(order.size(), static_cast<size_t>(call.topk)));
  std::sort(order.begin(), order.end());
  order.resize(static_cast<size_t>(call.topk), -1);
  return order;
}

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace fsattn::test
