// Appending to a paged cache: the kernels for few tokens and for many, the composed path and the CPU store the
// same.
#include <array>
#include <string>

#include "fsattn/paged.h"
#include "kernels/paged_case.h"
#include "kernels/skip.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

constexpr int kBatch = 4, kHeads = 2, kDim = 64, kDimV = 40, kPage = 64, kCmpPage = 16;
constexpr int kMaxK = 256, kPages = 20, kCmpPages = 12;
constexpr int kKernelSize = 32, kKernelStride = 16;

struct Options {
  CompressKind kind = CompressKind::kMean;
  bool has_rope = false, has_pos_emb = false, is_hnd = false, has_cmp = true, has_bad_pages = false;
  int raw_size = 32;
  int chunk = 1;  // new tokens are multiplied by it
  DType dtype = DType::kBFloat16;
};

// The same bytes in host and device memory.
template <class T>
struct Mirror {
  std::vector<T> host;
  DeviceArray<T> dev;
  explicit Mirror(std::vector<T> values) : host(std::move(values)), dev(host) {}
  T* data(Device device) { return device.type == DeviceType::kCuda ? dev.data : host.data(); }
};
using Bits = Mirror<uint16_t>;

Bits random_bits(DType dtype, size_t n, uint64_t seed, double scale = 1.0) {
  QuickNormal normal{seed};
  std::vector<uint16_t> x(n);
  for (auto& bits : x) bits = to_bits(dtype, scale * normal());
  return Bits(std::move(x));
}

// A cache that one of the three ways writes. All its bytes are NaN in the beginning.
struct Cache {
  Device device;
  int64_t max_q;  // the bound that is passed: up to 8 are few tokens
  std::vector<Bits> pools;

  Cache(Device where, int64_t bound, const Options& o) : device(where), max_q(bound) {
    for (const int64_t n :
         {kPages * kPage * kDim, kPages * kPage * kDimV, kCmpPages * kCmpPage * kDim,
          kCmpPages * kCmpPage * kDimV, kPages * o.raw_size * kDim}) {
      pools.emplace_back(std::vector<uint16_t>(size_t(n * kHeads), 0xffff));
    }
  }
  TensorView view(const Options& o, size_t pool, int64_t pages, int64_t rows, int64_t dim) {
    void* data = pools[pool].data(device);
    return o.is_hnd ? contiguous_view(data, o.dtype, device, pages, kHeads, rows, dim)
                    : contiguous_view(data, o.dtype, device, pages, rows, kHeads, dim);
  }
  std::vector<uint16_t> contents(size_t pool) {
    return device.type == DeviceType::kCuda ? pools[pool].dev.download() : pools[pool].host;
  }
};

struct Inputs {
  Options o;
  Mirror<int32_t> table, cmp_table;
  Bits weight_k, weight_v, pos_emb, cos, sin;

  static std::vector<int32_t> pages(int columns, int count, bool has_bad) {
    std::vector<int32_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    order.resize(size_t(kBatch * columns));
    if (has_bad) order[1] = -4, order[size_t(columns)] = count + 5;
    return order;
  }
  static size_t weights(CompressKind kind, int dim) {
    return size_t(kHeads) * kKernelSize * (kind == CompressKind::kLinear ? size_t(dim * dim) : 1);
  }
  static Bits angles(DType dtype, bool is_cos) {
    std::vector<uint16_t> x;
    for (int p = 0; p < kMaxK; ++p)
      for (int i = 0; i < kDim / 2; ++i) {
        const double a = p * std::pow(10000.0, -2.0 * i / kDim);
        x.push_back(to_bits(dtype, is_cos ? std::cos(a) : std::sin(a)));
      }
    return Bits(std::move(x));
  }

  explicit Inputs(const Options& options)
      : o(options),
        table(pages(kMaxK / kPage, kPages, o.has_bad_pages)),
        cmp_table(pages(1, kCmpPages, o.has_bad_pages)),
        weight_k(random_bits(o.dtype, weights(o.kind, kDim), 5, 0.02)),
        weight_v(random_bits(o.dtype, weights(o.kind, kDimV), 6, 0.02)),
        pos_emb(random_bits(o.dtype, size_t(kHeads) * kKernelSize * kDim, 7)),
        cos(angles(o.dtype, true)),
        sin(angles(o.dtype, false)) {}

  TensorView weight(Bits& w, Device device, int64_t dim) {
    if (o.kind == CompressKind::kMean) return {};
    void* data = w.data(device);
    if (o.kind == CompressKind::kLinear) {
      return contiguous_view(data, o.dtype, device, kHeads, kKernelSize * dim, dim);
    }
    return contiguous_view(data, o.dtype, device, kHeads, kKernelSize);
  }

  void append(Cache& cache, const std::vector<int32_t>& before, const std::vector<int>& counts,
              uint64_t seed) {
    std::vector<int32_t> cu{0};
    for (int n : counts) cu.push_back(cu.back() + n);
    const Device device = cache.device;
    const int64_t total = cu.back();
    Mirror<int32_t> starts(cu), lengths(before);
    Bits k = random_bits(o.dtype, size_t(total * kHeads * kDim), seed);
    Bits v = random_bits(o.dtype, size_t(total * kHeads * kDimV), seed + 1);
    AppendKv call;
    call.k = contiguous_view(k.data(device), o.dtype, device, total, kHeads, kDim);
    call.v = contiguous_view(v.data(device), o.dtype, device, total, kHeads, kDimV);
    const auto index = [&](Mirror<int32_t>& x, auto... sizes) {
      return contiguous_view(x.data(device), DType::kInt32, device, sizes...);
    };
    call.seq = {index(starts, kBatch + 1), index(lengths, kBatch), cache.max_q, kMaxK};
    call.layout = o.is_hnd ? CacheLayout::kHnd : CacheLayout::kNhd;
    call.cache = {cache.view(o, 0, kPages, kPage, kDim), cache.view(o, 1, kPages, kPage, kDimV),
                  index(table, kBatch, kMaxK / kPage)};
    if (o.has_cmp) {
      call.cmp = {cache.view(o, 2, kCmpPages, kCmpPage, kDim),
                  cache.view(o, 3, kCmpPages, kCmpPage, kDimV), index(cmp_table, kBatch, 1)};
      call.weight_k = weight(weight_k, device, kDim);
      call.weight_v = weight(weight_v, device, kDimV);
      if (o.has_pos_emb) {
        call.pos_emb =
            contiguous_view(pos_emb.data(device), o.dtype, device, kHeads, kKernelSize, kDim);
      }
    }
    if (o.has_rope) {
      if (o.has_cmp) call.k_raw = cache.view(o, 4, kPages, o.raw_size, kDim);
      call.rope_cos = contiguous_view(cos.data(device), o.dtype, device, kMaxK, kDim / 2);
      call.rope_sin = contiguous_view(sin.data(device), o.dtype, device, kMaxK, kDim / 2);
    }
    call.kernel_size = kKernelSize;
    call.kernel_stride = kKernelStride;
    call.kind = o.kind;
    const size_t bytes = workspace_bytes(call);
    std::vector<char> on_host(device.type == DeviceType::kCpu ? bytes + 256 : 0);
    DeviceArray<char> on_device(device.type == DeviceType::kCuda ? bytes : 0);
    if (bytes > 0 && device.type == DeviceType::kCuda) on_device.poison();
    void* workspace = device.type == DeviceType::kCuda ? on_device.data : on_host.data();
    if (device.type == DeviceType::kCpu) {
      workspace =
          reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(workspace), uintptr_t{256}));
    }
    run(call, {nullptr, workspace, bytes});
    FSATTN_CUDA_CHECK(cudaDeviceSynchronize());
  }
};

const char* const kNames[] = {"k", "v", "k_cmp", "v_cmp", "k_raw"};

// Elements of two pools that differ by more than `units` of the last place.
int count_different(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, int units,
                    DType dtype) {
  int wrong = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    const double x = from_bits(dtype, a[i]), y = from_bits(dtype, b[i]);
    const double unit = dtype == DType::kBFloat16 ? 1.0 / 128 : 1.0 / 1024;
    // A rounding may fall the other way before the rotation mixes two columns.
    wrong += !(std::fabs(x - y) <= units * unit * std::max(0.05, std::fabs(x)));
  }
  return wrong;
}

void check(const char* name, const Options& o) {
  const Device cpu{}, cuda{DeviceType::kCuda, 0};
  Inputs inputs(o);
  Cache fused(cuda, 8 * o.chunk, o), composed(cuda, 8 * o.chunk + 1, o), host(cpu, 8 * o.chunk, o);
  const std::vector<std::vector<int>> steps{
      {8, 1, 0, 5},
      {8, 8, 8, 8},
      {1, 8, 0, 3},
      {7, 8, 8, 8},
      {8, 8, 1, 8},
      {8, 8, 8, 8},
      {8, 1, 2, 8},
      {1, 8, 8, 8},
      {8, 8, 3, 8},
      {8, 8, 8, 1}
  };
  std::vector<int32_t> before(kBatch, 0);
  uint64_t seed = 100;
  for (std::vector<int> counts : steps) {
    for (int& n : counts) n *= o.chunk;
    inputs.append(fused, before, counts, seed);
    inputs.append(composed, before, counts, seed);
    if (!o.has_bad_pages) inputs.append(host, before, counts, seed);
    for (int b = 0; b < kBatch; ++b) before[size_t(b)] += counts[size_t(b)];
    seed += 10;
  }
  const int units = o.kind == CompressKind::kLinear ? 2 : 0;
  for (size_t pool = 0; pool < 5; ++pool) {
    const auto got = fused.contents(pool), other = composed.contents(pool);
    const bool is_cmp = pool == 2 || pool == 3;
    const int wrong = count_different(got, other, is_cmp ? units : 0, o.dtype);
    if (wrong != 0) std::printf("  %s: %s, fused and composed\n", name, kNames[pool]);
    EXPECT_EQ(wrong, 0);
    if (o.has_bad_pages) continue;
    const int from_host = count_different(other, host.contents(pool), is_cmp ? 2 : 0, o.dtype);
    if (from_host != 0) std::printf("  %s: %s, composed and CPU\n", name, kNames[pool]);
    EXPECT_EQ(from_host, 0);
  }
  // The test is empty if nothing was stored.
  const auto stored = fused.contents(0);
  EXPECT_TRUE(std::count(stored.begin(), stored.end(), 0xffff) < int64_t(stored.size()));
}

TEST(plain) { check("plain", {}); }

TEST(rope_and_ring) {
  Options o;
  o.has_rope = true;
  check("rope, ring", o);
  o.raw_size = 64;
  check("rope", o);
  o.is_hnd = true;
  o.has_pos_emb = true;
  o.kind = CompressKind::kSoftmax;
  check("rope, softmax, position embedding, HND", o);
}

TEST(weighted_fp16) {
  Options o;
  o.kind = CompressKind::kWeighted;
  o.dtype = DType::kFloat16;
  o.has_pos_emb = true;
  check("weighted, fp16", o);
}

// More tokens than the kernel for few takes: the two differ in nothing but the bound, and the CPU checks them.
TEST(chunks) {
  Options o;
  o.chunk = 3;
  check("chunks", o);
  o.is_hnd = true;
  o.has_pos_emb = true;
  o.kind = CompressKind::kSoftmax;
  check("chunks, softmax, position embedding, HND", o);
  o = {};
  o.chunk = 3;
  o.has_rope = true;
  check("chunks, rope, ring", o);
  o.raw_size = 64;
  check("chunks, rope", o);
  o.kind = CompressKind::kWeighted;
  o.dtype = DType::kFloat16;
  check("chunks, rope, weighted, fp16", o);
}

TEST(linear) {
  Options o;
  o.kind = CompressKind::kLinear;
  o.has_rope = true;
  check("linear, rope", o);
  o.has_pos_emb = true;
  o.is_hnd = true;
  check("linear, rope, position embedding, HND", o);
}

TEST(without_compression) {
  Options o;
  o.has_cmp = false;
  o.has_rope = true;
  check("without compression", o);
}

// Pages that do not exist read as zeros and take nothing: the two ways agree.
TEST(bad_pages) {
  Options o;
  o.has_bad_pages = true;
  check("bad pages", o);
  o.has_rope = true;
  o.kind = CompressKind::kLinear;
  check("bad pages, rope, linear", o);
}

}  // namespace
}  // namespace fsattn::test

int main(int argc, char** argv) {
  if (fsattn::test::is_skipped(argc, argv)) return 0;
  return fsattn::test::run_all(argc, argv);
}
