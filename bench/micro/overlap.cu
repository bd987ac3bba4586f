// Question  Should the merge of block-major selected attention run after the main pass, beside it
//           on a second stream, or inside it, and over how many queries at a time?
// Method    Traffic only: gather query rows, write partial rows, merge them. 65536 tokens, 1024
//           blocks of 64, 13 free slots a query. Main passes: bulk (4 warps a CTA, each its own
//           ring of bulk copies), lsu (16 warps of 16-byte loads and stores), simple (no K, V, no
//           lse). Backward: two rows gathered a query, 64 KB of fp32 dK, dV reduce-added an item,
//           then bf16 partial dQ rows (merged) or fp32 reduce-adds (zeroed before, converted
//           after).
// Read      Milliseconds and picoseconds a row-block (one query row of one head times one block),
//           for several ranges R of queries a chunk. "wrong" counts outputs that differ and must be
//           0; merge-only and main-only lines are not checked.
#include "overlap_kernels.cuh"

enum { kSerial, kStreams, kStreamsSplit, kFused, kSplit, kMain, kMerge };
template <int W>
using WH = std::integral_constant<int, W>;
template <int kGroup>
static void shape(int H, std::vector<int> ranges) {
  constexpr int kRowBytes = kGroup * 256;
  size_t qb = (size_t)kTokens * H * kRowBytes;
  double rb = (double)kTokens * kSlots * H * kGroup;
  char *q, *dO, *kv, *out;
  float *acc, *dkv;
  uint32_t* list;
  unsigned long long* bad;
  CUDA_OK(cudaMalloc(&q, qb));
  CUDA_OK(cudaMalloc(&dO, qb));
  CUDA_OK(cudaMalloc(&out, qb));
  CUDA_OK(cudaMalloc(&acc, qb * 2));
  CUDA_OK(cudaMalloc(&dkv, (size_t)H * kBlocks * 65536));
  CUDA_OK(cudaMalloc(&kv, (size_t)H * kBlocks * 32768));
  CUDA_OK(cudaMalloc(&list, 4ull * kTokens * kSlots));
  CUDA_OK(cudaMalloc(&bad, 8));
  fill_bf16<<<1056, 256>>>((__nv_bfloat162*)q, qb / 4, 3);
  fill_bf16<<<1056, 256>>>((__nv_bfloat162*)dO, qb / 4, 9);
  fill_bf16<<<1056, 256>>>((__nv_bfloat162*)kv, (size_t)H * kBlocks * 8192, 5);
  cudaStream_t sa, sb;
  CUDA_OK(cudaStreamCreateWithFlags(&sa, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamCreateWithFlags(&sb, cudaStreamNonBlocking));
  static cudaEvent_t ev[2100];
  if (!ev[0])
    for (auto& e : ev) CUDA_OK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
  printf("g %d Hkv %d: %.1f M row-blocks, %.2f GB of rows one way\n", kGroup, H, rb / 1e6,
         rb * 256 / 1e9);
  for (int R : ranges) {
    int rph = kTokens / R, nch = rph * H;
    std::vector<uint32_t> hl;
    std::vector<int4> hi[2];
    std::vector<int> hn[2], first[2];
    int4* items[2];
    int *nit[2], *cnt;
    std::vector<int4> one[2];
    std::vector<int> loff{0};
    for (int r = 0; r < rph; r++) {  // one selection for all heads: uniform over the causal blocks
      std::vector<std::vector<uint32_t>> bl(kBlocks);
      for (int t = r * R; t < (r + 1) * R; t++)
        for (int s = 0; s < kSlots; s++)
          bl[hash32(t * 16 + s) % (t / 64 + 1)].push_back(t << 4 | s);
      for (int b = 0; b < kBlocks; b++) {
        int len = (int)bl[b].size(), tq = std::max(1, 16 / kGroup);  // quarters in whole tiles
        for (int v = 0; v < 2; v++)
          for (int p = 0, cap = (v ? 2048 : 1024) / kGroup; p < len; p += cap) {
            int n = std::min(cap, len - p), nt = (n + tq - 1) / tq;
            for (int c = 0; c < 4; c++) {
              int x0 = nt * c / 4 * tq, x1 = std::min(n, nt * (c + 1) / 4 * tq);
              if (x1 > x0) one[v].push_back({(int)(hl.size() + p + x0), x1 - x0, r, b * 4 + c});
            }
          }
        hl.insert(hl.end(), bl[b].begin(), bl[b].end());
      }
      loff.push_back((int)hl.size());
    }
    CUDA_OK(cudaMemcpy(list, hl.data(), 4 * hl.size(), cudaMemcpyHostToDevice));
    CUDA_OK(cudaMalloc(&cnt, 12 * nch));
    for (int v = 0; v < 2; v++) {
      hn[v].assign(nch, 0);
      first[v].assign(nch + 1, 0);
      for (int h = 0; h < H; h++)
        for (int4 x : one[v]) {
          x.z += h * rph;
          if (!hn[v][x.z]++) first[v][x.z] = (int)hi[v].size();
          hi[v].push_back(x);
        }
      first[v][nch] = (int)hi[v].size();
      CUDA_OK(cudaMalloc(&items[v], 16 * hi[v].size()));
      CUDA_OK(cudaMalloc(&nit[v], 4 * nch));
      CUDA_OK(cudaMemcpy(items[v], hi[v].data(), 16 * hi[v].size(), cudaMemcpyHostToDevice));
      CUDA_OK(cudaMemcpy(nit[v], hn[v].data(), 4 * nch, cudaMemcpyHostToDevice));
    }
    int maxbuf = R >= kTokens / 2 ? 2 : 4;
    char* part;
    float* lse;
    size_t pb = (size_t)maxbuf * R * kSlots * kRowBytes;
    CUDA_OK(cudaMalloc(&part, pb));
    CUDA_OK(cudaMalloc(&lse, pb / 64));
    auto bench = [&](const char* name, auto what, int mode, int mw, int x, int nbuf, int kvload,
                     int lseon) {
      constexpr int W = decltype(what)::value, kSmemBytes = Config<W>::kSmemBytes,
                    kMainWarps = Config<W>::kMainWarps, V = Config<W>::kIsBackward;
      Args a{q,         dO,
             kv,        part,
             out,       lse,
             acc,       dkv,
             list,      items[V],
             nit[V],    cnt,
             cnt + nch, cnt + 2 * nch,
             0,         (int)hi[V].size(),
             0,         nch,
             R,         H,
             rph,       std::min(nbuf, maxbuf),
             0,         0,
             kvload,    lseon,
             0};
      auto k = run_kernel<kGroup, W>;
      CUDA_OK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   std::max(kSmemBytes, 102400)));
      auto part_of = [&](int c, int split, int grid, int threads, int smem, cudaStream_t s) {
        Args b = a;
        b.split = split;
        b.c0 = c;
        b.c1 = c + 1;
        b.i0 = first[V][c];
        b.i1 = first[V][c + 1];
        b.work = cnt + c;
        k<<<grid, threads, smem, s>>>(b);
      };
      auto go = [&] {
        cudaMemsetAsync(cnt, 0, 12 * nch, 0);
        if (W == kReduce) {  // zero, accumulate everything in one launch, convert
          Args b = a;
          b.split = -1;
          if (mode != kMain) cudaMemsetAsync(acc, 0, qb * 2, 0);
          k<<<132, 32 * kMainWarps, kSmemBytes>>>(b);
          if (mode != kMain)
            convert_kernel<<<132 * 8, 256>>>((float4*)acc, (__nv_bfloat162*)out, qb / 8);
          return;
        }
        if (mode == kFused || mode == kSplit) {
          Args b = a;
          b.gate = 1;
          b.split = mode == kFused ? 0 : x;
          b.wg_merge = (mode == kFused ? 132 : x) * mw;
          k<<<132, 32 * (kMainWarps + mw), std::max(kSmemBytes, 102400)>>>(b);
          return;  // one CTA per SM
        }
        cudaEventRecord(ev[0], 0);
        cudaStreamWaitEvent(sa, ev[0], 0);
        cudaStreamWaitEvent(sb, ev[0], 0);
        bool two = mode == kStreams || mode == kStreamsSplit, own = mode == kStreamsSplit;
        for (int c = 0; c < nch; c++) {
          if (two && c >= a.nbuf) cudaStreamWaitEvent(sa, ev[1001 + (c - a.nbuf) % 1000], 0);
          if (mode != kMerge && mw == 0) {
            int l0 = loff[c % rph], l1 = loff[c % rph + 1];
            simple_kernel<kGroup><<<(l1 - l0 + 31) / 32, 256, 0, sa>>>(a, l0, l1, c);
          } else if (mode != kMerge)
            part_of(c, -1, own ? 132 - x : 132, 32 * kMainWarps, kSmemBytes, sa);
          if (two) {
            cudaEventRecord(ev[1 + c % 1000], sa);
            cudaStreamWaitEvent(sb, ev[1 + c % 1000], 0);
          }
          // kStreamsSplit: 100 KB of shared memory keeps merge CTAs off the SMs that run main, as a
          // real main kernel's registers would
          if (mode != kMain)
            part_of(c, -2, own ? x * 2 : 132 * 2, 32 * (kMainWarps + 8), own ? 102400 : 0,
                    two ? sb : sa);
          if (two) cudaEventRecord(ev[1001 + c % 1000], sb);
        }
        cudaEventRecord(ev[2001], sa);
        cudaEventRecord(ev[2002], sb);
        cudaStreamWaitEvent(0, ev[2001], 0);
        cudaStreamWaitEvent(0, ev[2002], 0);
      };
      unsigned long long hb = 0;
      if (mode != kMain && mode != kMerge) {
        CUDA_OK(cudaMemset(part, 0xff, pb));
        CUDA_OK(cudaMemset(lse, 0xff, pb / 64));
        CUDA_OK(cudaMemset(out, 0xff, qb));
        CUDA_OK(cudaMemset(acc, 0xff, qb * 2));
        CUDA_OK(cudaMemset(bad, 0, 8));
        go();
        check_kernel<<<1056, 256>>>((__nv_bfloat16*)q, (__nv_bfloat16*)out, qb / 2, kGroup,
                                    W == kReduce, bad);
        CUDA_OK(cudaMemcpy(&hb, bad, 8, cudaMemcpyDeviceToHost));
      }
      float ms = median_ms(go, 5);
      printf(
          "  R %5d (%6.1f MB/chunk) %-16s mw %2d x %2d nbuf %d kv %d lse %d: %7.3f ms %6.1f "
          "ps/row-block, wrong %llu\n",
          R, (double)R * kSlots * kRowBytes / 1e6, name, mw, x, a.nbuf, kvload, lseon, ms,
          ms * 1e9 / rb, hb);
      fflush(stdout);
    };
    WH<kForward> fwd;
    WH<kLoadStore> lsu;
    WH<kPartial> par;
    WH<kReduce> rd;
    bench("merge only", fwd, kMerge, 8, 0, 2, 1, 1);  // mw 0: the simple main
    bench("main simple", fwd, kMain, 0, 0, 2, 0, 0);
    bench("serial simple", fwd, kSerial, 0, 0, 2, 0, 0);
    bench("streams simple", fwd, kStreams, 0, 0, 2, 0, 0);
    bench("main bulk", fwd, kMain, 8, 0, 2, 1, 1);
    bench("main bulk", fwd, kMain, 8, 0, 2, 1, 0);
    bench("main bulk", fwd, kMain, 8, 0, 2, 0, 0);
    bench("main lsu", lsu, kMain, 8, 0, 2, 1, 1);
    bench("main lsu", lsu, kMain, 8, 0, 2, 1, 0);
    bench("main lsu", lsu, kMain, 8, 0, 2, 0, 0);
    bench("serial bulk", fwd, kSerial, 8, 0, 2, 1, 1);
    bench("serial lsu", lsu, kSerial, 8, 0, 2, 1, 1);
    bench("serial lsu", lsu, kSerial, 8, 0, 2, 0, 0);
    bench("streams bulk", fwd, kStreams, 8, 0, 2, 1, 1);
    bench("streams lsu", lsu, kStreams, 8, 0, 2, 1, 1);
    for (int x : {32, 44}) bench("streams split", fwd, kStreamsSplit, 8, x, 2, 1, 1);
    for (int mw : {2, 4, 8}) bench("fused bulk", fwd, kFused, mw, 0, 4, 1, 1);
    for (int mw : {4, 8}) bench("fused lsu", lsu, kFused, mw, 0, 4, 1, 1);
    bench("fused bulk", fwd, kFused, 4, 0, 4, 0, 0);
    bench("fused lsu", lsu, kFused, 8, 0, 4, 0, 0);
    bench("fused bulk", fwd, kFused, 4, 0, 2, 1, 1);
    for (int x : {20, 32}) bench("split CTAs", fwd, kSplit, 16, x, 4, 1, 1);
    bench("bwd part main", par, kMain, 8, 0, 2, 1, 0);
    bench("bwd part serial", par, kSerial, 8, 0, 2, 1, 0);
    bench("bwd part fused", par, kFused, 4, 0, 4, 1, 0);
    bench("bwd red main", rd, kMain, 8, 0, 2, 1, 0);
    bench("bwd red total", rd, kSerial, 8, 0, 2, 1, 0);
    for (int v = 0; v < 2; v++) {
      CUDA_OK(cudaFree(items[v]));
      CUDA_OK(cudaFree(nit[v]));
    }
    CUDA_OK(cudaFree(cnt));
    CUDA_OK(cudaFree(part));
    CUDA_OK(cudaFree(lse));
  }
  CUDA_OK(cudaFree(q));
  CUDA_OK(cudaFree(dO));
  CUDA_OK(cudaFree(out));
  CUDA_OK(cudaFree(acc));
  CUDA_OK(cudaFree(dkv));
  CUDA_OK(cudaFree(kv));
  CUDA_OK(cudaFree(list));
}
int main() {
  shape<4>(8, {65536, 16384, 8192, 4096, 2048});
  shape<16>(4, {65536, 16384, 8192, 4096, 2048, 1024});
}
