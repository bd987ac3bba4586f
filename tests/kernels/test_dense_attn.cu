// Compressed attention and window attention against their definition in fp64.
#include <cstdio>
#include <cstring>

#include "cuda/dense_attn/dense_attn.h"
#include "cuda/dense_attn/dense_attn_bwd_order_sm90.cuh"
#include "kernels/dense_attn_case.h"
#include "kernels/skip.h"

namespace fsattn::test {
namespace {

int num_failed = 0, num_cases = 0;
Arch arch = Arch::kSm80;  // the rows under test
int64_t smem_kib = 163;

void check(bool ok, const char* what, const Shape& s, double value) {
  if (ok) return;
  ++num_failed;
  std::printf("FAIL %s = %g: %s D %d Dv %d heads %d/%d l %d d %d w %d seqs %zu gap %d logit %g\n",
              what, value, name_of(s.dtype), s.dim, s.dim_v, s.heads_q, s.heads_kv, s.size,
              s.stride, s.window, s.len_q.size(), s.gap, s.logit);
}

int fwd_row(const Shape& s) {
  return find_dense_attn_row(Pass::kFwd, arch, smem_kib * 1024, s.dtype, s.dim, s.dim_v);
}

int bwd_row(const Shape& s) {
  return find_dense_attn_row(Pass::kBwd, arch, smem_kib * 1024, s.dtype, s.dim, s.dim_v);
}

double rms_limit(DType dtype) { return dtype == DType::kBFloat16 ? 6e-3 : 8e-4; }

struct Device {
  DeviceArray<int32_t> cu_q, cu_k, cu_keys, offset;
  Tensor q, k, v, o, dout, dq, dk, dv;
  DeviceArray<float> lse, dlse;
  Device(const Shape& s, const Batch& b)
      : cu_q(b.cu_q),
        cu_k(b.cu_k),
        cu_keys(b.cu_keys),
        offset(std::vector<int32_t>(s.offset.begin(), s.offset.end())),
        q(b.total_q, s.heads_q, s.dim, s.gap),
        k(b.total_keys, s.heads_kv, s.dim, s.gap),
        v(b.total_keys, s.heads_kv, s.dim_v, s.gap),
        o(b.total_q, s.heads_q, s.dim_v, s.gap),
        dout(b.total_q, s.heads_q, s.dim_v, s.gap),
        dq(b.total_q, s.heads_q, s.dim, s.gap),
        dk(b.total_keys, s.heads_kv, s.dim, s.gap),
        dv(b.total_keys, s.heads_kv, s.dim_v, s.gap),
        lse(size_t(s.heads_q * b.total_q)),
        dlse(size_t(s.heads_q * b.total_q)) {}
};

void fill_common(auto& attn, const Shape& s, const Batch& b, Device& d, double scale) {
  attn.packing = {int64_t(s.len_q.size()),
                  d.cu_q.data,
                  d.cu_k.data,
                  d.offset.data,
                  b.total_q,
                  b.total_k,
                  b.max_q,
                  b.max_k};
  attn.shape = {s.dtype, s.heads_q, s.heads_kv, s.dim, s.dim_v, scale};
  attn.q = d.q.rows();
  attn.k = d.k.rows();
  attn.v = d.v.rows();
  attn.o = d.o.rows();
  attn.lse = {d.lse.data, b.total_q};
}

void run_fwd(const Shape& s, const Batch& b, Device& d, double scale) {
  AttnFwdTensors attn{};
  fill_common(attn, s, b, d, scale);
  const int row = fwd_row(s);
  if (s.window >= 0) {
    launch_window_attn_fwd(row, {attn, {s.window}, 0, {}}, nullptr);
  } else {
    launch_compressed_attn_fwd(row,
                               {
                                   attn, {d.cu_keys.data,                           b.total_keys, s.size, s.stride},
                                    0, {}
    },
                               nullptr);
  }
}

void run_bwd(const Shape& s, const Batch& b, Device& d, double scale, bool accumulate,
             Scratch scratch, bool with_dlse) {
  AttnBwdTensors attn{};
  fill_common(attn, s, b, d, scale);
  attn.dout = d.dout.rows();
  attn.dlse = {with_dlse ? d.dlse.data : nullptr, b.total_q};
  attn.dq = d.dq.rows();
  attn.dk = d.dk.rows();
  attn.dv = d.dv.rows();
  attn.accumulate_dq = attn.accumulate_dkv = accumulate;
  const int row = bwd_row(s);
  if (s.window >= 0) {
    launch_window_attn_bwd(row, {attn, {s.window}, 0, scratch}, nullptr);
  } else {
    launch_compressed_attn_bwd(
        row,
        {
            attn, {d.cu_keys.data, b.total_keys, s.size, s.stride},
             0, scratch
    },
        nullptr);
  }
}

size_t scratch_bytes(const Shape& s, const Batch& b) {
  Problem p;
  p.op = s.window >= 0 ? Op::kWindowAttn : Op::kCompressedAttn;
  p.pass = Pass::kBwd;
  p.batch = int64_t(s.len_q.size());
  p.total_q = b.total_q;
  p.total_k = b.total_k;
  p.num_heads_q = s.heads_q;
  p.num_heads_kv = s.heads_kv;
  p.head_dim = s.dim;
  p.head_dim_v = s.dim_v;
  p.kernel_stride = s.stride;
  return dense_attn_workspace(p, kDenseAttnBwdTable[size_t(bwd_row(s))].arch);
}

void sync() { FSATTN_CUDA_CHECK(cudaDeviceSynchronize()); }

void check_tensor(const char* what, const Shape& s, Tensor& got, const std::vector<double>& exact,
                  double limit) {
  got.fetch();
  double rms = 0;
  const double worst = worst_error(got.values(s.dtype), exact, &rms);
  check(rms < limit && worst < 20 * limit, what, s, worst == INFINITY ? worst : rms);
}

void test_case(const Shape& s) {
  ++num_cases;
  const Batch b(s);
  Device d(s, b);
  d.q.randomize(s.dtype, 1, s.logit);
  d.k.randomize(s.dtype, 2, 1);
  d.v.randomize(s.dtype, 3, 1);
  d.dout.randomize(s.dtype, 4, 1);
  const double scale = 1 / std::sqrt(double(s.dim));
  std::vector<float> dlse(d.dlse.size);
  for (size_t i = 0; i < dlse.size(); ++i) dlse[i] = float(i % 7) * 0.3f - 1.f;
  d.dlse.upload(dlse);
  Inputs in{d.q.values(s.dtype), d.k.values(s.dtype), d.v.values(s.dtype), d.dout.values(s.dtype),
            std::vector<double>(dlse.begin(), dlse.end())};
  const Reference ref = reference(s, b, in, scale, true);

  std::vector<uint16_t> first;
  std::vector<float> first_lse;
  for (int run = 0; run < 2; ++run) {
    d.o.poison();
    d.lse.poison();
    run_fwd(s, b, d, scale);
    sync();
    d.o.fetch();
    const auto lse = d.lse.download();
    if (run == 0) {
      first = d.o.host;
      first_lse = lse;
    } else {
      check(first == d.o.host &&
                (lse.empty() || !std::memcmp(lse.data(), first_lse.data(), lse.size() * 4)),
            "two forward runs differ", s, 0);
    }
  }
  check_tensor("o", s, d.o, ref.o, rms_limit(s.dtype));
  double worst = 0;
  for (size_t i = 0; i < first_lse.size(); ++i) {
    const double got = first_lse[i], exact = ref.lse[i];
    if (got == exact) continue;  // both -inf
    const double e = std::abs(got - exact) / (1 + std::abs(exact));
    worst = e <= 1e300 ? std::max(worst, e) : INFINITY;
  }
  check(worst < 1e-5, "lse", s, worst);
  DeviceArray<char> scratch(std::max<size_t>(256, scratch_bytes(s, b)));
  std::vector<uint16_t> dq, dk, dv;
  for (int run = 0; run < 2; ++run) {
    d.dq.poison();
    d.dk.poison();
    d.dv.poison();
    scratch.poison();
    run_bwd(s, b, d, scale, false, {scratch.data, scratch.size}, true);
    sync();
    d.dq.fetch();
    d.dk.fetch();
    d.dv.fetch();
    if (run == 1) {
      check(dq == d.dq.host && dk == d.dk.host && dv == d.dv.host, "two backward runs differ", s,
            0);
    }
    dq = d.dq.host;
    dk = d.dk.host;
    dv = d.dv.host;
  }
  const double limit = 1.5 * rms_limit(s.dtype);
  check_tensor("dq", s, d.dq, ref.dq, limit);
  check_tensor("dk", s, d.dk, ref.dk, limit);
  check_tensor("dv", s, d.dv, ref.dv, limit);
  // A second run on top of the first doubles the gradients.
  run_bwd(s, b, d, scale, true, {scratch.data, scratch.size}, true);
  sync();
  auto twice = [](std::vector<double> x) {
    for (double& e : x) e *= 2;
    return x;
  };
  check_tensor("accumulated dq", s, d.dq, twice(ref.dq), limit);
  check_tensor("accumulated dk", s, d.dk, twice(ref.dk), limit);
  check_tensor("accumulated dv", s, d.dv, twice(ref.dv), limit);
}

std::vector<Shape> all_shapes() {
  std::vector<Shape> list;
  auto both = [&](Shape s, int window) {
    s.window = -1;
    list.push_back(s);
    s.window = window;
    list.push_back(s);
  };
  const std::vector<int> mixed{0, 1, 2, 3, 6, 7, 11, 31, 32, 47, 48, 63, 64, 65, 129, 0, 1000, 0};
  const int dims[][2] = {
      {64,  64 },
      {128, 128},
      {96,  96 },
      {192, 128},
      {256, 256},
      {72,  72 },
      {64,  128},
      {8,   8  }
  };
  for (DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (const auto& dim : dims) {
      Shape s;
      s.dtype = dtype;
      s.dim = dim[0];
      s.dim_v = dim[1];
      s.len_q = s.len_k = mixed;
      s.extra_keys = 5;
      both(s, 100);
    }
  for (int g : {1, 3, 8, 12, 16, 64}) {
    Shape s;
    s.heads_q = g * 2;
    s.len_q = s.len_k = {130, 333};
    s.gap = 8;
    both(s, 64);
  }
  {
    Shape s;  // seqlen_q != seqlen_k, both ways
    s.len_q = {1, 5, 100, 300, 64, 10};
    s.len_k = {700, 64, 1000, 200, 0, 31};
    both(s, 77);
    s.offset = {0, 100, 500, -50, 3, 40};
    both(s, 512);
  }
  for (int len : {16, 33, 127, 128, 191, 192, 256, 257, 2100}) {
    Shape s;
    s.heads_q = 2;
    s.heads_kv = 1;
    s.len_q = s.len_k = {len};
    both(s, 0);
    both(s, 63);
    both(s, 1 << 30);
  }
  for (const auto& c : {
           std::pair{16, 16},
           std::pair{64, 16},
           std::pair{8,  4 },
           std::pair{1,  1 }
  }) {
    Shape s;
    s.size = c.first;
    s.stride = c.second;
    s.len_q = s.len_k = {300, 45};
    list.push_back(s);
  }
  {
    Shape s;  // so many tiles of keys that heads walk both ways over the queries in the backward
    s.dim = s.dim_v = 72;
    s.heads_q = 64;
    s.heads_kv = 8;
    s.size = s.stride = 1;
    s.len_q = s.len_k = {kTwoWayTiles / 64 * 128 - 1, 150};
    list.push_back(s);
  }
  {
    Shape s;  // logits of a few hundred
    s.dtype = DType::kFloat16;
    s.logit = 100;
    s.len_q = s.len_k = {500, 20};
    both(s, 200);
  }
  return list;
}

// Every tile of keys is taken once, and those of a part in order: each waits for the one before.
void test_order_of_tiles() {
  ++num_cases;
  for (int parts : {1, 2, 3, 5, 8, 16, 32, 64})
    for (int slots : {1, 2, 33, 66})
      for (const KeyTileOrder order : {
               KeyTileOrder{kAllHeads, 0  },
               KeyTileOrder{8,         0  },
               KeyTileOrder{4,         7  },
               KeyTileOrder{8,         132}
      }) {
        std::vector<int> next(static_cast<size_t>(parts), 0);
        bool is_right = true;
        for (int ticket = 0; ticket < parts * slots; ++ticket) {
          const KeyTileIndex index = find_key_tile_index(ticket, slots, parts, order);
          is_right = is_right && index.part >= 0 && index.part < parts &&
                     index.slot == next[static_cast<size_t>(index.part)]++;
        }
        check(is_right, "wrong order of tiles", Shape{}, order.run);
      }
}

// Averages of the largest bf16 value are finite, though sums of P V before the division are not.
void test_largest_values(int window) {
  ++num_cases;
  Shape s;
  s.len_q = s.len_k = {700};
  s.window = window;
  const Batch b(s);
  Device d(s, b);
  d.q.randomize(s.dtype, 1, 1);
  d.k.randomize(s.dtype, 2, 1);
  for (auto& x : d.v.host) x = 0x7f7f;  // the largest finite bf16
  d.v.dev.upload(d.v.host);
  run_fwd(s, b, d, 0.1);
  sync();
  d.o.fetch();
  const int first = window >= 0 ? 0 : s.size - 1;  // the first query that sees a key
  // P is rounded by less than half an ulp of the largest value, so that no output becomes infinite.
  int num_bad = 0;
  for (int64_t t = first; t < b.total_q; ++t)
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t i = 0; i < s.dim_v; ++i) {
        const double x = from_bits(s.dtype, d.o.at(t, h, i));
        num_bad += !(x > 3.3e38 && x < INFINITY);
      }
  check(num_bad == 0, "wrong outputs of the largest values", s, num_bad);
}

template <class F>
double time_ms(const F& f) {
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  std::vector<float> ms;
  for (int i = 0; i < 7; ++i) {
    cudaEventRecord(a);
    f();
    cudaEventRecord(b);
    FSATTN_CUDA_CHECK(cudaEventSynchronize(b));
    float t = 0;
    cudaEventElapsedTime(&t, a, b);
    if (i >= 2) ms.push_back(t);
  }
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}

void time_shape(int heads_q, int heads_kv, int dim, int dim_v, int tokens, int window) {
  Shape s;
  s.heads_q = heads_q;
  s.heads_kv = heads_kv;
  s.dim = dim;
  s.dim_v = dim_v;
  s.len_q = s.len_k = {tokens};
  s.window = window;
  const Batch b(s);
  Device d(s, b);
  // A million different values, repeated: the host has no time for more.
  auto quick = [&](Tensor& t, uint64_t seed) {
    uint64_t x = seed * 0x9e3779b97f4a7c15ull + 1;
    const size_t period = std::min(t.host.size(), (size_t{1} << 20) + 7);
    for (size_t j = 0; j < period; ++j) {
      double sum = 0;
      for (int i = 0; i < 2; ++i) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        sum += double(x >> 40) / double(1 << 24) - 0.5;
      }
      t.host[j] = to_bits(s.dtype, sum * 2.45);
    }
    for (size_t j = period; j < t.host.size(); j += period) {
      std::memcpy(&t.host[j], &t.host[0], std::min(period, t.host.size() - j) * 2);
    }
    t.dev.upload(t.host);
  };
  quick(d.q, 1);
  quick(d.k, 2);
  quick(d.v, 3);
  quick(d.dout, 4);
  const double scale = 1 / std::sqrt(double(dim));
  double pairs = 0;
  for (int64_t t = 0; t < tokens; ++t)
    pairs +=
        window >= 0 ? double(std::min<int64_t>(t, window) + 1) : double(num_windows(t + 1, 32, 16));
  const double flop = 2.0 * (dim + dim_v) * pairs * heads_q;
  const double fwd = time_ms([&] { run_fwd(s, b, d, scale); });
  std::printf("%-10s %2d/%2d D %3d/%3d T %6d  fwd %7.3f ms %5.0f TF/s",
              window >= 0 ? "window" : "compressed", heads_q, heads_kv, dim, dim_v, tokens, fwd,
              flop / fwd * 1e-9);
  DeviceArray<char> scratch(std::max<size_t>(256, scratch_bytes(s, b)));
  const double bwd = time_ms([&] {
    run_bwd(s, b, d, scale, false, {scratch.data, scratch.size}, false);
  });
  std::printf("   bwd %7.3f ms %5.0f TF/s", bwd, 2.5 * flop / bwd * 1e-9);
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace
}  // namespace fsattn::test

// test_dense_attn [sm90 | small] [tiny | time [tokens]]
int main(int argc, char** argv) {
  using namespace fsattn::test;
  if (is_skipped(argc, argv)) return 0;
  if (argc > 1 && !std::strcmp(argv[1], "sm90")) {
    arch = fsattn::Arch::kSm90a;
    smem_kib = 227;
    --argc;
    ++argv;
  } else if (argc > 1 && !std::strcmp(argv[1], "small")) {
    smem_kib = 99;
    --argc;
    ++argv;
  }
  if (argc > 1 && !std::strcmp(argv[1], "time")) {
    const int tokens = argc > 2 ? std::atoi(argv[2]) : 65536;
    for (int window : {-1, 512}) {
      time_shape(32, 8, 128, 128, tokens, window);
      time_shape(32, 32, 128, 128, tokens, window);
      time_shape(64, 4, 128, 128, tokens, window);
      if (arch == fsattn::Arch::kSm90a) continue;  // the other rows are the same
      time_shape(32, 2, 64, 64, tokens, window);
      time_shape(64, 4, 192, 128, tokens, window);
      time_shape(24, 2, 256, 256, tokens, window);
    }
    return 0;
  }
  const bool tiny = argc > 1 && !std::strcmp(argv[1], "tiny");
  for (const Shape& s : all_shapes()) {
    if (tiny && (s.len_q.size() != 2 || s.heads_q > 6)) continue;
    test_case(s);
  }
  test_order_of_tiles();
  test_largest_values(-1);
  test_largest_values(300);
  std::printf("%d cases, %d failed\n", num_cases, num_failed);
  return num_failed != 0;
}
