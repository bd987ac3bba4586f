// Runs a call of the library on PyTorch's memory, device and stream, and turns its errors into
// what PyTorch passes on to Python.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <optional>
#include <string>

#include "fsattn/ops.h"
#include "tensors.h"

namespace fsattn::torch_binding {

// Makes the device of a CUDA tensor current for a scope; nothing for a CPU tensor.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Scratch memory from PyTorch's allocator and the stream that is current for its device. PyTorch
// reuses freed CUDA memory in stream order, so it may go when the call has been enqueued.
class TorchExecution {
 public:
  TorchExecution(size_t workspace_bytes, const Tensor& like);
  const Execution& get() const { return execution_; }

 private:
  Tensor workspace_;
  Execution execution_;
};

// Between fsattn_explain_begin() and fsattn_explain_end(), calls of this thread describe themselves
// instead of running.
bool is_explaining();
void add_explanation(const std::string& text);

// Remembers the error for fsattn_last_error_*() and throws the standard exception nearest to it.
[[noreturn]] void rethrow(const Error& error);

template <class Call>
void execute(const Call& call, const Tensor& like) {
  const DeviceScope scope(like);
  if (is_explaining()) {
    add_explanation(explain(call));
    return;
  }
  const TorchExecution execution(workspace_bytes(call), like);
  run(call, execution.get());
}

// The same for operators whose output `o` is an argument that the caller knows as `out`.
template <class Call>
void execute_into_out(const Call& call, const Tensor& like) {
  try {
    execute(call, like);
  } catch (const Error& error) {
    const std::string text = error.what();
    throw text.starts_with("o: ") ? Error(error.code(), "out" + text.substr(1)) : error;
  }
}

// The boxed form of an operator's implementation, as the dispatcher calls it.
template <auto kFunction>
void boxed(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  try {
    TORCH_BOX(kFunction)(stack, num_inputs, num_outputs);
  } catch (const Error& error) {
    rethrow(error);
  }
}

}  // namespace fsattn::torch_binding
