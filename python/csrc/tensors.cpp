#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "execute.h"
#include "fsattn/error.h"

namespace fsattn::torch_binding {

namespace {

// The kernels read rows in pieces of 16 bytes.
constexpr uintptr_t kRowAlignment = 16;

constexpr const char* kFloatTypes = "float64, float32, float16 or bfloat16";

std::optional<DType> find_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (dtype == aoti_torch_dtype_int32()) return DType::kInt32;
  return std::nullopt;
}

int32_t torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kInt32:
      return aoti_torch_dtype_int32();
  }
  throw Error(ErrorCode::kInternal, "unknown DType");
}

// Names of the dtypes that a view cannot express, for messages.
std::string name_of_other_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_int16()) return "int16";
  if (dtype == aoti_torch_dtype_int8()) return "int8";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  if (dtype == aoti_torch_dtype_complex64()) return "complex64";
  if (dtype == aoti_torch_dtype_complex128()) return "complex128";
  if (dtype == aoti_torch_dtype_float8_e4m3fn()) return "float8_e4m3fn";
  if (dtype == aoti_torch_dtype_float8_e5m2()) return "float8_e5m2";
  return "another dtype";
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

DType view_dtype(const char* name, const Tensor& tensor, const char* expected) {
  const int32_t dtype = dtype_of(tensor);
  if (const std::optional<DType> known = find_dtype(dtype)) return *known;
  throw Error(ErrorCode::kInvalidType, std::string(name) + ": dtype must be " + expected +
                                           ", found " + name_of_other_dtype(dtype));
}

Device view_device(const char* name, const Tensor& tensor) {
  if (tensor.is_cuda()) return {DeviceType::kCuda, tensor.get_device_index()};
  if (tensor.is_cpu()) return {DeviceType::kCpu, 0};
  throw Error(ErrorCode::kInvalidType,
              std::string(name) + ": device must be cpu or cuda, found another");
}

TensorView make_view(const char* name, const Tensor& tensor, const char* expected_dtype) {
  const int64_t ndim = tensor.dim();
  if (ndim > kMaxDims) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": must have at most " +
                                                 std::to_string(kMaxDims) + " dimensions, found " +
                                                 std::to_string(ndim));
  }
  // A call that is only explained may not look at values: operators before it did not run.
  TensorView view{is_explaining() ? nullptr : tensor.data_ptr(),
                  view_dtype(name, tensor, expected_dtype),
                  view_device(name, tensor),
                  static_cast<int>(ndim),
                  {},
                  {}};
  std::ranges::copy(tensor.sizes(), view.shape.begin());
  std::ranges::copy(tensor.strides(), view.stride.begin());
  return view;
}

Tensor allocate(const std::vector<int64_t>& sizes, int32_t dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    // As PyTorch does it: a dimension of size 0 does not make the strides before it 0.
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

TensorView view(const char* name, const Tensor& tensor) {
  return make_view(name, tensor, kFloatTypes);
}

TensorView index_view(const char* name, const Tensor& tensor) {
  return make_view(name, tensor, "int32");
}

TensorView view(const char* name, const OptionalTensor& tensor) {
  return tensor ? view(name, *tensor) : TensorView{};
}

TensorView index_view(const char* name, const OptionalTensor& tensor) {
  return tensor ? index_view(name, *tensor) : TensorView{};
}

Tensor allocate(std::initializer_list<int64_t> sizes, DType dtype, const Tensor& like) {
  return allocate(std::vector<int64_t>(sizes), torch_dtype(dtype), like);
}

Tensor allocate_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return allocate(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype_of(like), like);
}

Tensor allocate_like(const OptionalTensor& like, const Tensor& device) {
  return like ? allocate_like(*like) : allocate(std::vector<int64_t>{0}, dtype_of(device), device);
}

Tensor readable_rows(const Tensor& tensor) {
  // PyTorch calls any tensor without elements contiguous, whatever its strides.
  if (tensor.numel() == 0) return allocate_like(tensor);
  const int64_t last = tensor.dim() - 1;
  bool readable = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kRowAlignment == 0 &&
                  last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1);
  for (int64_t i = 0; i < last; ++i) {
    const uintptr_t bytes = static_cast<uintptr_t>(tensor.stride(i)) * tensor.element_size();
    readable = readable && (tensor.size(i) <= 1 || bytes % kRowAlignment == 0);
  }
  return readable ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace fsattn::torch_binding
