#include "execute.h"

#include <dlfcn.h>

#include <stdexcept>

#include "fsattn/version.h"

namespace fsattn::torch_binding {

namespace {

constexpr size_t kWorkspaceAlignment = 256;

struct LastError {
  int code = -1;
  std::string message;
};
thread_local LastError last_error;

thread_local bool explaining = false;
thread_local std::string explanation;

using GetCudaStream = AOTITorchError (*)(int32_t, void**);

// Looked up at run time: PyTorch builds without CUDA do not have the function. It lives in
// libtorch_cuda.so, which is not always visible from here, although it is always loaded by then.
GetCudaStream find_get_cuda_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* symbol = dlsym(RTLD_DEFAULT, kName);
  if (symbol == nullptr) {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr) symbol = dlsym(library, kName);
  }
  return reinterpret_cast<GetCudaStream>(symbol);
}

void* current_cuda_stream(int32_t device_index) {
  static const GetCudaStream get_stream = find_get_cuda_stream();
  if (get_stream == nullptr) {
    throw Error(ErrorCode::kUnsupported, "this PyTorch has no CUDA streams");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return stream;
}

void* align_up(void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t aligned = (address + kWorkspaceAlignment - 1) & ~(kWorkspaceAlignment - 1);
  return reinterpret_cast<void*>(aligned);
}

// The allocator hands out bytes through a tensor of the smallest dtype that a view has.
Tensor allocate_bytes(size_t bytes, const Tensor& like) {
  const size_t units = (bytes + size_of(DType::kInt32) - 1) / size_of(DType::kInt32);
  return allocate({static_cast<int64_t>(units)}, DType::kInt32, like);
}

}  // namespace

DeviceScope::DeviceScope(const Tensor& tensor) {
  if (tensor.is_cuda()) guard_.emplace(tensor.get_device_index());
}

// PyTorch aligns less strictly on the CPU than the library asks for, hence the spare bytes.
TorchExecution::TorchExecution(size_t workspace_bytes, const Tensor& like)
    : workspace_(
          allocate_bytes(workspace_bytes == 0 ? 0 : workspace_bytes + kWorkspaceAlignment, like)) {
  execution_.workspace = align_up(workspace_.data_ptr());
  execution_.workspace_bytes = workspace_bytes;
  if (like.is_cuda()) execution_.stream = current_cuda_stream(like.get_device_index());
}

bool is_explaining() { return explaining; }

void add_explanation(const std::string& text) {
  explanation += text;
  if (!text.empty() && text.back() != '\n') explanation += '\n';
}

void rethrow(const Error& error) {
  last_error = {static_cast<int>(error.code()), error.what()};
  // Python's name for the first kind is known to some versions of PyTorch, for the others to none;
  // the Python layer asks fsattn_last_error_code().
  if (error.code() == ErrorCode::kInvalidArgument) throw std::invalid_argument(error.what());
  throw std::runtime_error(error.what());
}

}  // namespace fsattn::torch_binding

// What Python calls through ctypes. Returned strings belong to the thread and stay valid until its
// next call of the same function.
extern "C" {

__attribute__((visibility("default"))) int fsattn_last_error_code() {
  return fsattn::torch_binding::last_error.code;
}

__attribute__((visibility("default"))) const char* fsattn_last_error_message() {
  return fsattn::torch_binding::last_error.message.c_str();
}

__attribute__((visibility("default"))) void fsattn_explain_begin() {
  fsattn::torch_binding::explanation.clear();
  fsattn::torch_binding::explaining = true;
}

__attribute__((visibility("default"))) const char* fsattn_explain_end() {
  fsattn::torch_binding::explaining = false;
  return fsattn::torch_binding::explanation.c_str();
}

__attribute__((visibility("default"))) const char* fsattn_version() { return FSATTN_VERSION; }

__attribute__((visibility("default"))) const char* fsattn_describe_build() {
  thread_local std::string text;
  text = fsattn::describe_build();
  return text.c_str();
}
}
