#include "cuda/side_stream.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

#include "base/cuda_check.h"

namespace fsattn {
namespace {

// Of one stream of the caller's: calls on it are in order, so that its events can be used again.
struct SideStream {
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr;
  cudaEvent_t joined = nullptr;
};

// PyTorch has 64 streams a device. They live as long as the process.
constexpr std::size_t kMaxSideStreams = 256;

// Streams may be made while a graph is captured: nothing that it holds depends on that.
class AllowAllInCapture {
 public:
  AllowAllInCapture() { FSATTN_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~AllowAllInCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowAllInCapture(const AllowAllInCapture&) = delete;
  AllowAllInCapture& operator=(const AllowAllInCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

SideStream make_side_stream() {
  const AllowAllInCapture scope;
  SideStream side;
  FSATTN_CUDA_CHECK(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
  FSATTN_CUDA_CHECK(cudaEventCreateWithFlags(&side.forked, cudaEventDisableTiming));
  FSATTN_CUDA_CHECK(cudaEventCreateWithFlags(&side.joined, cudaEventDisableTiming));
  return side;
}

// Null when there are too many.
const SideStream* find_side_stream(cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, SideStream> known;
  int device = 0;
  FSATTN_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  const auto key = std::make_pair(device, stream);
  const auto found = known.find(key);
  if (found != known.end()) return &found->second;
  if (known.size() == kMaxSideStreams) return nullptr;
  return &known.emplace(key, make_side_stream()).first->second;
}

}  // namespace

Stream fork_stream(Stream stream) {
  const auto from = static_cast<cudaStream_t>(stream);
  // One name for a stream of each thread: their events would mix.
  if (from == cudaStreamPerThread) return stream;
  const SideStream* side = find_side_stream(from);
  if (side == nullptr) return stream;
  FSATTN_CUDA_CHECK(cudaEventRecord(side->forked, from));
  FSATTN_CUDA_CHECK(cudaStreamWaitEvent(side->stream, side->forked, 0));
  return side->stream;
}

void join_stream(Stream side, Stream stream) {
  if (side == stream) return;
  const auto to = static_cast<cudaStream_t>(stream);
  const SideStream* known = find_side_stream(to);
  FSATTN_CUDA_CHECK(cudaEventRecord(known->joined, static_cast<cudaStream_t>(side)));
  FSATTN_CUDA_CHECK(cudaStreamWaitEvent(to, known->joined, 0));
}

}  // namespace fsattn
