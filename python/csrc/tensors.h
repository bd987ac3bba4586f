// Between PyTorch's tensors and the library's views. Everything goes through the LibTorch stable
// ABI, so that one build loads under every supported PyTorch.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "fsattn/tensor.h"

namespace fsattn::torch_binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The view of a tensor. Throws kInvalidType for a dtype or device that a view cannot express and
// kInvalidArgument for too many dimensions; every other rule is checked by the library.
TensorView view(const char* name, const Tensor& tensor);

// The same of an index tensor, for which the message asks for int32.
TensorView index_view(const char* name, const Tensor& tensor);

// Absent tensors become undefined views.
TensorView view(const char* name, const OptionalTensor& tensor);
TensorView index_view(const char* name, const OptionalTensor& tensor);

// A contiguous, uninitialised tensor on the device of `like`, from PyTorch's allocator.
Tensor allocate(std::initializer_list<int64_t> sizes, DType dtype, const Tensor& like);
Tensor allocate_like(const Tensor& like);  // same shape and dtype, contiguous
Tensor allocate_like(const OptionalTensor& like, const Tensor& device);  // no elements if absent

// `tensor` itself when the kernels can read its rows in place, otherwise a contiguous copy. For
// gradients alone: autograd chooses their strides (an expanded scalar, a slice), not the caller.
Tensor readable_rows(const Tensor& tensor);

}  // namespace fsattn::torch_binding
