// One selected-attention problem on the device, and its launches.
#pragma once
#include <memory>

#include "cuda/block_index/block_index.h"
#include "cuda/selected_attn/selected_attn.h"
#include "kernels/selected_support.cuh"

namespace fsattn::test {

enum class Values {
  kNormal,
  kEqualLogits,  // all logits equal, of the size of the largest floats (fp16: the largest inputs)
  kLargestV,     // v is the largest value of the type, so o is too
  kZeroV,
  kSpecialV,  // infinities in column 5 of every 100th key and NaN in column 77 of every 150th
  // bf16 only, fp16 has no such range:
  kHugeV,          // v times 2^100
  kTinyV,          // v times 2^-110
  kScaledColumns,  // columns of v times 2^-20 to 2^20
  kScaledBlocks,   // every other block of 64 keys times 2^40, every third 2^-60
};

// What `values` multiplies v of a key and column by.
inline __host__ __device__ float value_scale(Values values, int64_t token, int64_t column) {
  if (values == Values::kZeroV) return 0.f;
  if (values == Values::kHugeV) return 0x1p100f;
  if (values == Values::kTinyV) return 0x1p-110f;
  if (values == Values::kScaledColumns) return exp2f(static_cast<float>(column * 40 / 127 - 20));
  if (values == Values::kScaledBlocks) {
    return (token / 64 % 2 == 1 ? 0x1p40f : 1.f) * (token / 64 % 3 == 1 ? 0x1p-60f : 1.f);
  }
  if (values == Values::kSpecialV && column == 5 && token % 100 == 17) return INFINITY;
  if (values == Values::kSpecialV && column == 77 && token % 150 == 149) return NAN;
  return 1.f;
}

template <class Element>
__global__ void scale_values(Element* v, int64_t tokens, int64_t heads, int64_t dim,
                             int64_t token_stride, int64_t head_stride, Values values) {
  const int64_t n = tokens * heads * dim;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t d = i % dim, h = i / dim % heads, t = i / dim / heads;
    Element& x = v[t * token_stride + h * head_stride + d];
    const float scale = value_scale(values, t, d);
    // Infinities of one sign: saturated ones of both could cancel.
    assign(x, isinf(scale) ? scale : static_cast<float>(to_double(x)) * scale);
  }
}

struct Case {
  const char* name;
  std::vector<int> lens_q, lens_k;  // lens_k empty: as lens_q
  std::vector<int> q_offset;        // empty: bottom-right
  int heads_q, heads_kv, dim, dim_v, block_size, topk;
  Pattern pattern = Pattern::kHostile;
  size_t cap = size_t{1} << 30;
  float logit_scale = 1.f;  // of the queries
  bool has_gaps = false;    // strides with gaps
  bool has_index = false;   // the caller brings the block index
  int stride = 1;           // reference rows: every stride-th token
  Values values = Values::kNormal;
  int persistence = 0;  // percent of the random blocks that the next query keeps
};

template <class Element>
constexpr DType kDTypeOf = std::is_same_v<Element, __half> ? DType::kFloat16 : DType::kBFloat16;

inline std::vector<int32_t> prefix_sums(const std::vector<int>& lens) {
  std::vector<int32_t> cu{0};
  for (const int n : lens) cu.push_back(cu.back() + n);
  return cu;
}

template <class Element>
struct SelectedProblem {
  explicit SelectedProblem(const Case& c_)
      : c(c_),
        cu_q_host(prefix_sums(c.lens_q)),
        cu_k_host(prefix_sums(c.lens_k.empty() ? c.lens_q : c.lens_k)),
        total_q(cu_q_host.back()),
        total_k(cu_k_host.back()),
        batch(static_cast<int64_t>(c.lens_q.size())),
        num_slots(total_k / c.block_size + batch),
        cu_q(batch + 1),
        cu_k(batch + 1),
        q_offset(batch),
        topk_idx(c.heads_kv * total_q * c.topk),
        q(total_q, c.heads_q, c.dim, gap(8), gap(16)),
        k(total_k, c.heads_kv, c.dim, gap(16), gap(8)),
        v(total_k, c.heads_kv, c.dim_v, gap(8), gap(32)),
        o(total_q, c.heads_q, c.dim_v, gap(24), gap(8)),
        lse(c.heads_q * total_q),
        dlse(c.heads_q * total_q),
        dout(total_q, c.heads_q, c.dim_v, gap(16), gap(24)) {
    cu_q.upload(cu_q_host);
    cu_k.upload(cu_k_host);
    if (!c.q_offset.empty()) q_offset.upload(c.q_offset);
    topk_host.resize(static_cast<size_t>(topk_idx.size));
    fill_selection();
    topk_idx.upload(topk_host);
    fill(q, 11, c.logit_scale);
    fill(k, 12, 1.f);
    fill(v, 13, 1.f);
    fill(dout, 14, 1.f);
    constexpr bool kIsHalf = std::is_same_v<Element, __half>;
    if (c.values == Values::kEqualLogits) {
      fill_constant(q, kIsHalf ? 0x1p15f : 0x1p60f);
      fill_constant(k, kIsHalf ? 0x1p15f : 0x1p60f);
    }
    if (c.values == Values::kLargestV) fill_constant(v, kIsHalf ? 65504.f : 0x1.fep127f);
    scale_values<<<256, 256>>>(v.buffer.data, v.tokens, v.heads, v.dim, v.token_stride,
                               v.head_stride, c.values);
    fill_floats<<<256, 256>>>(dlse.data, dlse.size, 15);
    if (c.has_index) build_index();
  }

  int gap(int n) const { return c.has_gaps ? n : 0; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(c.dim)); }

  void fill_selection() {
    uint64_t state = 0x5eed0000ull + static_cast<uint64_t>(total_q);
    for (int g = 0; g < c.heads_kv; ++g) {
      for (int64_t b = 0; b < batch; ++b) {
        const auto s = static_cast<size_t>(b);
        const int len_q = cu_q_host[s + 1] - cu_q_host[s], len_k = cu_k_host[s + 1] - cu_k_host[s];
        const int offset = c.q_offset.empty() ? len_k - len_q : c.q_offset[s];
        for (int i = 0; i < len_q; ++i) {
          const int64_t row = g * total_q + cu_q_host[s] + i;
          fill_row(topk_host.data() + row * c.topk, c.topk, int64_t{i} + offset, c.block_size,
                   (len_k + c.block_size - 1) / c.block_size, c.pattern, i == 0 ? 0 : c.persistence,
                   state);
        }
      }
    }
  }

  Packing packing() const {
    return {batch,   cu_q.data, cu_k.data, c.q_offset.empty() ? nullptr : q_offset.data,
            total_q, total_k,   total_q,   total_k};
  }
  SelectedMask mask() const {
    return {
        topk_idx.data,
        total_q * c.topk,
        c.topk,
        c.topk,
        c.block_size,
        index_start ? BlockIndexView{index_start->data, index_entry->data, num_slots}
                    : BlockIndexView{nullptr,           nullptr,           0        }
    };
  }
  Problem problem() const {
    Problem p{};
    p.op = Op::kSelectedAttn;
    p.dtype = kDTypeOf<Element>;
    p.batch = batch;
    p.total_q = p.max_q = total_q;
    p.total_k = p.max_k = total_k;
    p.num_heads_q = c.heads_q;
    p.num_heads_kv = c.heads_kv;
    p.head_dim = c.dim;
    p.head_dim_v = c.dim_v;
    p.block_size = c.block_size;
    p.topk = c.topk;
    p.has_block_index = index_start != nullptr;
    p.workspace_cap = c.cap;
    return p;
  }
  AttnShape shape() const {
    return {kDTypeOf<Element>, c.heads_q, c.heads_kv, c.dim, c.dim_v, scale()};
  }
  static Rows rows(const Strided<Element>& x) {
    return {x.buffer.data, x.token_stride, x.head_stride};
  }

  // From the second call on it launches and nothing else.
  void build_index() {
    const size_t bytes = block_index_workspace(c.heads_kv, total_q, num_slots);
    if (!index_start) {
      index_start = std::make_unique<Buffer<int32_t>>(c.heads_kv * (num_slots + 1));
      index_entry = std::make_unique<Buffer<int32_t>>(c.heads_kv * total_q * c.topk);
      index_scratch = std::make_unique<Buffer<char>>(static_cast<int64_t>(bytes));
    }
    const BlockIndexParams params{
        packing(), c.heads_kv, mask(), {index_scratch->data, bytes}
    };
    launch_block_index(find_block_index_row(c.topk), params, nullptr);
  }

  SelectedAttnFwdParams fwd_params(const Buffer<char>& scratch) const {
    return {
        {packing(), shape(), rows(q), rows(k), rows(v), rows(o), {lse.data, total_q}},
        mask(),
        c.cap,
        {scratch.data,  scratch.bytes() }
    };
  }
  // The caller sets what it wants accumulated, and dlse to null for none.
  SelectedAttnBwdParams bwd_params(const Strided<Element>& dq, const Strided<Element>& dk,
                                   const Strided<Element>& dv, const Buffer<char>& scratch) const {
    return {
        {packing(),
         shape(),
         rows(dout),
         {dlse.data, total_q},
         rows(q),
         rows(k),
         rows(v),
         rows(o),
         {lse.data, total_q},
         rows(dq),
         rows(dk),
         rows(dv),
         false, false},
        mask(),
        c.cap,
        {scratch.data, scratch.bytes()}
    };
  }
  ReferenceArgs<Element> reference_args() const {
    ReferenceArgs<Element> a{};
    a.q = q.buffer.data, a.k = k.buffer.data, a.v = v.buffer.data;
    a.q_token = q.token_stride, a.q_head = q.head_stride, a.k_token = k.token_stride;
    a.k_head = k.head_stride, a.v_token = v.token_stride, a.v_head = v.head_stride;
    a.topk_idx = topk_idx.data, a.cu_q = cu_q.data, a.cu_k = cu_k.data;
    a.q_offset = c.q_offset.empty() ? nullptr : q_offset.data;
    a.batch = static_cast<int>(batch), a.total_q = static_cast<int>(total_q);
    a.heads_q = c.heads_q, a.heads_kv = c.heads_kv, a.dim = c.dim, a.dim_v = c.dim_v;
    a.block_size = c.block_size, a.topk = c.topk, a.stride = c.stride, a.scale = scale();
    return a;
  }
  int64_t samples() const { return (total_q + c.stride - 1) / c.stride; }

  Case c;
  std::vector<int32_t> cu_q_host, cu_k_host, topk_host;
  int64_t total_q, total_k, batch, num_slots;
  Buffer<int32_t> cu_q, cu_k, q_offset, topk_idx;
  Strided<Element> q, k, v, o;
  Buffer<float> lse, dlse;
  Strided<Element> dout;
  std::unique_ptr<Buffer<int32_t>> index_start, index_entry;
  std::unique_ptr<Buffer<char>> index_scratch;
};

// o [samples, Hq, Dv] and lse [samples, Hq] in float64.
struct ForwardReference {
  std::vector<double> o, lse;

  template <class Element>
  explicit ForwardReference(const SelectedProblem<Element>& x) {
    constexpr int kCtas = 1024;
    const int64_t rows = x.samples() * x.c.heads_q;
    Buffer<double> out(rows * x.c.dim_v), stats(rows);
    Buffer<double> scratch(int64_t{kCtas} * 2 * x.c.topk * x.c.block_size);
    ReferenceArgs<Element> a = x.reference_args();
    a.o = out.data, a.lse = stats.data, a.scratch = scratch.data;
    reference_kernel<<<kCtas, kReferenceThreads>>>(a);
    CUDA_OK(cudaDeviceSynchronize());
    o = out.download();
    lse = stats.download();
  }
};

// dq [total_q, Hq, D], dk, dv [total_k, Hkv, D or Dv] in float64.
struct BackwardReference {
  std::vector<double> dq, dk, dv;

  template <class Element>
  BackwardReference(const SelectedProblem<Element>& x, bool has_dlse) {
    constexpr int kCtas = 1024;
    const Case& c = x.c;
    Buffer<double> o(x.total_q * c.heads_q * c.dim_v), lse(x.total_q * c.heads_q);
    Buffer<double> dq_out(x.total_q * c.heads_q * c.dim);
    Buffer<double> dk_out(x.total_k * c.heads_kv * c.dim), dv_out(x.total_k * c.heads_kv * c.dim_v);
    CUDA_OK(cudaMemset(dk_out.data, 0, dk_out.bytes()));
    CUDA_OK(cudaMemset(dv_out.data, 0, dv_out.bytes()));
    Buffer<double> scratch(int64_t{kCtas} * 2 * c.topk * c.block_size);
    ReferenceArgs<Element> a = x.reference_args();
    a.o = o.data, a.lse = lse.data, a.scratch = scratch.data;
    a.dq = dq_out.data, a.dk = dk_out.data, a.dv = dv_out.data,
    a.dlse = has_dlse ? x.dlse.data : nullptr;
    a.dout = x.dout.buffer.data, a.do_token = x.dout.token_stride, a.do_head = x.dout.head_stride;
    reference_kernel<<<kCtas, kReferenceThreads>>>(a);
    CUDA_OK(cudaDeviceSynchronize());
    dq = dq_out.download();
    dk = dk_out.download();
    dv = dv_out.download();
  }
};

inline uint64_t fingerprint(const void* data, size_t bytes) {
  uint64_t h = 1469598103934665603ull;
  const auto* words = static_cast<const uint16_t*>(data);
  for (size_t i = 0; i < bytes / 2; ++i) h = (h ^ words[i]) * 1099511628211ull;
  return h;
}

}  // namespace fsattn::test
