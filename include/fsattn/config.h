#pragma once
#include <cstdint>

namespace fsattn {

// The numbers that define one Native Sparse Attention layer (arXiv 2502.11089, section 3).
struct NsaConfig {
  int64_t kernel_size = 32;    // l: tokens in one compression window
  int64_t kernel_stride = 16;  // d: tokens between the starts of two windows; divides l and S
  int64_t block_size = 64;     // S: tokens in one selection block
  int64_t topk = 16;           // blocks a query attends to, init_blocks + local_blocks included
  int64_t init_blocks = 1;     // always selected: the first blocks of the sequence
  int64_t local_blocks = 2;    // always selected: the query's own block and those before it
  int64_t window_size = 512;   // w: the window reaches from t - w to t, both included
  double softmax_scale = 0.0;  // 0 means head_dim^-0.5
};

// How a compression window of l keys or values becomes one (contract: compress_kv).
enum class CompressKind : int {
  kMean,      // the average; no weight
  kWeighted,  // weight [Hkv, l]
  kSoftmax,   // weight [Hkv, l], softmax over l first
  kLinear,    // weight [Hkv, l * D, D], rows token-major
};

// How the G heads of a group share one score (contract: select_blocks).
enum class GroupReduce : int { kSum, kMax, kFirstHead };

// Rounding of the block scores before the ranking; kBFloat16 matches the published module.
enum class ScoreDType : int { kFloat32, kBFloat16 };

// Whether `gates` holds logits or ready values.
enum class GateActivation : int { kSigmoid, kNone };

}  // namespace fsattn
