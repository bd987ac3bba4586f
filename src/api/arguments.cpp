#include "api/arguments.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <utility>

namespace fsattn {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 56;  // byte counts of one tensor fit 64 bits
constexpr uintptr_t kCudaAlignment = 16;            // the widest load of a thread

size_t idx(int dim) { return static_cast<size_t>(dim); }

template <class Sizes>
std::string join(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator;
    if (size == kAnySize) {
      text << "*";
    } else {
      text << size;
    }
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "[]" : "]");
  return text.str();
}

void check_sizes(const char* name, const TensorView& view) {
  int64_t numel = 1;
  for (int dim = 0; dim < view.ndim; ++dim) {
    const int64_t size = view.shape[idx(dim)];
    FSATTN_CHECK(size >= 0, kInvalidArgument, name, ": sizes must not be negative, found ", size,
                 " in dimension ", dim);
    FSATTN_CHECK(size == 0 || numel <= kMaxElements / size, kInvalidArgument, name,
                 ": must have at most 2^56 elements, found shape ", shape_text(view));
    numel *= size;
    const int64_t stride = view.stride[idx(dim)];
    FSATTN_CHECK(size < 2 || (stride >= 0 && stride <= kMaxElements / size), kInvalidArgument, name,
                 ": strides must be between 0 and 2^56 / size, found ", stride, " in dimension ",
                 dim);
  }
}

void check_rank(const char* name, const TensorView& view, size_t rank, const std::string& layout) {
  FSATTN_CHECK(view.defined(), kInvalidArgument, name, ": must be given, found none");
  FSATTN_CHECK(std::cmp_equal(view.ndim, rank), kInvalidArgument, name, ": must have ", rank,
               " dimensions ", layout, ", found ", view.ndim);
}

void check_last_contiguous(const char* name, const TensorView& view) {
  const size_t last = idx(view.ndim - 1);
  FSATTN_CHECK(view.shape[last] < 2 || view.stride[last] == 1, kInvalidArgument, name,
               ": the last dimension must be contiguous, found stride ", view.stride[last]);
}

void check_cuda_pointer(const char* name, const TensorView& view) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(view.data) % kCudaAlignment;
  FSATTN_CHECK(past == 0, kInvalidArgument, name,
               ": data must be 16-byte aligned on cuda, found an address ", past,
               " bytes past a multiple of 16");
}

// 16-byte loads need aligned rows. Strides of dimensions with one element are never used.
void check_cuda_rows(const char* name, const TensorView& view) {
  check_cuda_pointer(name, view);
  const int64_t elements = static_cast<int64_t>(kCudaAlignment / size_of(view.dtype));
  for (int dim = 0; dim + 1 < view.ndim; ++dim) {
    const int64_t stride = view.stride[idx(dim)];
    FSATTN_CHECK(view.shape[idx(dim)] < 2 || stride % elements == 0, kInvalidArgument, name,
                 ": rows must be 16-byte aligned on cuda: strides must be multiples of ", elements,
                 ", found ", stride, " in dimension ", dim);
  }
}

// Dimensions with more than one element, the smallest stride first.
int sort_by_stride(const TensorView& view, std::array<int, kMaxDims>& dims) {
  int count = 0;
  for (int dim = 0; dim < view.ndim; ++dim) {
    if (view.shape[idx(dim)] < 2) continue;
    int at = count++;
    for (; at > 0 && view.stride[idx(dims[idx(at - 1)])] > view.stride[idx(dim)]; --at) {
      dims[idx(at)] = dims[idx(at - 1)];
    }
    dims[idx(at)] = dim;
  }
  return count;
}

// No two elements share memory: sorted by stride, each dimension steps over all those within it.
void check_distinct_elements(const char* name, const TensorView& view) {
  if (view.numel() == 0) return;
  std::array<int, kMaxDims> dims{};
  const int count = sort_by_stride(view, dims);
  int64_t extent = 1;
  for (int i = 0; i < count; ++i) {
    const int dim = dims[idx(i)];
    const int64_t stride = view.stride[idx(dim)];
    FSATTN_CHECK(stride >= extent, kInvalidArgument, name,
                 ": elements of an output may not share memory, found stride ", stride,
                 " in dimension ", dim, " of size ", view.shape[idx(dim)]);
    extent += stride * (view.shape[idx(dim)] - 1);
  }
}

struct Range {
  uintptr_t begin;
  uintptr_t end;
};

Range memory_of(const TensorView& view) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(view.data);
  if (view.data == nullptr || view.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int dim = 0; dim < view.ndim; ++dim) {
    if (view.shape[idx(dim)] > 1) last += view.stride[idx(dim)] * (view.shape[idx(dim)] - 1);
  }
  return {begin, begin + (static_cast<uintptr_t>(last) + 1) * size_of(view.dtype)};
}

bool overlap(const Range& a, const Range& b) {
  return a.begin != a.end && b.begin != b.end && a.begin < b.end && b.begin < a.end;
}

}  // namespace

std::string shape_text(std::initializer_list<int64_t> shape) { return join(shape); }

std::string shape_text(const TensorView& view) {
  const int ndim = std::clamp(view.ndim, 0, kMaxDims);
  return join(std::vector<int64_t>(view.shape.begin(), view.shape.begin() + ndim));
}

std::string device_text(const Device& device) {
  if (device.type == DeviceType::kCpu) return "cpu";
  return "cuda:" + std::to_string(device.index);
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  FSATTN_CHECK(value >= low && value <= high, kInvalidArgument, name, ": must be between ", low,
               " and ", high, ", found ", value);
}

Arguments::Arguments(Purpose purpose, const char* name, const TensorView& lead, int rank,
                     const char* layout)
    : purpose_(purpose), lead_name_(name), device_(lead.device), dtype_(lead.dtype) {
  check_rank(name, lead, static_cast<size_t>(rank), layout);
  check_sizes(name, lead);
}

void Arguments::use_lead_dtype() {
  const bool is_half = dtype_ == DType::kFloat16 || dtype_ == DType::kBFloat16;
  if (is_cuda()) {
    FSATTN_CHECK(is_half, kInvalidType, lead_name_,
                 ": dtype must be float16 or bfloat16 on cuda, found ", name_of(dtype_));
    return;
  }
  FSATTN_CHECK(is_half || dtype_ == DType::kFloat32 || dtype_ == DType::kFloat64, kInvalidType,
               lead_name_, ": dtype must be float64, float32, float16 or bfloat16, found ",
               name_of(dtype_));
}

void Arguments::check_common(const char* name, const TensorView& view, DType dtype,
                             const char* dtype_rule, std::initializer_list<int64_t> shape) {
  check_rank(name, view, shape.size(), shape_text(shape));
  check_sizes(name, view);
  FSATTN_CHECK(view.device == device_, kInvalidType, name, ": device must be that of ", lead_name_,
               " (", device_text(device_), "), found ", device_text(view.device));
  FSATTN_CHECK(view.dtype == dtype, kInvalidType, name, ": dtype must be ", dtype_rule,
               name_of(dtype), ", found ", name_of(view.dtype));
  int dim = 0;
  for (const int64_t size : shape) {
    FSATTN_CHECK(size == kAnySize || size == view.shape[idx(dim)], kInvalidArgument, name,
                 ": shape must be ", shape_text(shape), ", found ", shape_text(view));
    ++dim;
  }
  const bool needs_data = purpose_ == Purpose::kRun && view.numel() > 0;
  FSATTN_CHECK(!needs_data || view.data != nullptr, kInvalidArgument, name,
               ": data must not be null");
  const uintptr_t past = reinterpret_cast<uintptr_t>(view.data) % size_of(dtype);
  FSATTN_CHECK(past == 0, kInvalidArgument, name, ": data must be aligned to its ", size_of(dtype),
               "-byte elements, found an address ", past, " bytes past a multiple");
}

void Arguments::check_rows(const char* name, const TensorView& view, DType dtype,
                           std::initializer_list<int64_t> shape) {
  check_common(name, view, dtype, "that of the other tensors, ", shape);
  check_last_contiguous(name, view);
  if (is_cuda()) check_cuda_rows(name, view);
}

void Arguments::check_stats(const char* name, const TensorView& view,
                            std::initializer_list<int64_t> shape) {
  check_common(name, view, stats_dtype(dtype_), "", shape);
  check_last_contiguous(name, view);
}

void Arguments::check_gates(const char* name, const TensorView& view,
                            std::initializer_list<int64_t> shape) {
  check_common(name, view, dtype_, "that of the other tensors, ", shape);
  check_last_contiguous(name, view);
}

void Arguments::check_dense(const char* name, const TensorView& view, DType dtype,
                            const char* dtype_rule, std::initializer_list<int64_t> shape) {
  check_common(name, view, dtype, dtype_rule, shape);
  int64_t expected = 1;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    FSATTN_CHECK(view.shape[idx(dim)] < 2 || view.stride[idx(dim)] == expected, kInvalidArgument,
                 name, ": must be contiguous, found stride ", view.stride[idx(dim)],
                 " in dimension ", dim);
    expected *= std::max<int64_t>(view.shape[idx(dim)], 1);
  }
}

void Arguments::add_input(const char* name, const TensorView& view) {
  inputs_.push_back({name, view});
}

void Arguments::add_output(const char* name, const TensorView& view) {
  check_distinct_elements(name, view);
  outputs_.push_back({name, view});
}

Rows Arguments::input_rows(const char* name, const TensorView& view,
                           std::initializer_list<int64_t> shape) {
  check_rows(name, view, dtype_, shape);
  add_input(name, view);
  return {view.data, view.stride[0], view.stride[1]};
}

Rows Arguments::output_rows(const char* name, const TensorView& view,
                            std::initializer_list<int64_t> shape) {
  check_rows(name, view, dtype_, shape);
  add_output(name, view);
  return {view.data, view.stride[0], view.stride[1]};
}

Stats Arguments::input_stats(const char* name, const TensorView& view,
                             std::initializer_list<int64_t> shape) {
  check_stats(name, view, shape);
  add_input(name, view);
  return {view.data, view.stride[0]};
}

Stats Arguments::output_stats(const char* name, const TensorView& view,
                              std::initializer_list<int64_t> shape) {
  check_stats(name, view, shape);
  add_output(name, view);
  return {view.data, view.stride[0]};
}

PagedRows Arguments::check_pages(const char* name, const TensorView& view, CacheLayout layout,
                                 std::initializer_list<int64_t> shape) {
  const int64_t* nhd = shape.begin();
  if (layout == CacheLayout::kNhd) {
    check_rows(name, view, dtype_, shape);
    return {view.data, view.stride[0], view.stride[1], view.stride[2]};
  }
  check_rows(name, view, dtype_, {nhd[0], nhd[2], nhd[1], nhd[3]});
  return {view.data, view.stride[0], view.stride[2], view.stride[1]};
}

PagedRows Arguments::input_pages(const char* name, const TensorView& view, CacheLayout layout,
                                 std::initializer_list<int64_t> shape) {
  const PagedRows pages = check_pages(name, view, layout, shape);
  add_input(name, view);
  return pages;
}

PagedRows Arguments::output_pages(const char* name, const TensorView& view, CacheLayout layout,
                                  std::initializer_list<int64_t> shape) {
  const PagedRows pages = check_pages(name, view, layout, shape);
  add_output(name, view);
  return pages;
}

Rows Arguments::input_gates(const char* name, const TensorView& view, int64_t tokens,
                            int64_t heads) {
  FSATTN_CHECK(view.defined(), kInvalidArgument, name, ": must be given, found none");
  FSATTN_CHECK(view.ndim == 2 || view.ndim == 3, kInvalidArgument, name,
               ": must have 2 or 3 dimensions [tokens, 3] or [tokens, heads, 3], found ",
               view.ndim);
  if (view.ndim == 2) {
    check_gates(name, view, {tokens, 3});
  } else {
    check_gates(name, view, {tokens, heads, 3});
  }
  add_input(name, view);
  return {view.data, view.stride[0], view.ndim == 2 ? 0 : view.stride[1]};
}

Rows Arguments::output_gates(const char* name, const TensorView& view, const TensorView& gates) {
  if (gates.ndim == 2) {
    check_gates(name, view, {gates.shape[0], 3});
  } else {
    check_gates(name, view, {gates.shape[0], gates.shape[1], 3});
  }
  add_output(name, view);
  return {view.data, view.stride[0], view.ndim == 2 ? 0 : view.stride[1]};
}

const void* Arguments::input_dense(const char* name, const TensorView& view,
                                   std::initializer_list<int64_t> shape) {
  check_dense(name, view, dtype_, "that of the other tensors, ", shape);
  if (is_cuda()) check_cuda_pointer(name, view);
  add_input(name, view);
  return view.data;
}

void* Arguments::output_dense(const char* name, const TensorView& view,
                              std::initializer_list<int64_t> shape) {
  check_dense(name, view, dtype_, "that of the other tensors, ", shape);
  if (is_cuda()) check_cuda_pointer(name, view);
  add_output(name, view);
  return view.data;
}

const int32_t* Arguments::input_index(const char* name, const TensorView& view,
                                      std::initializer_list<int64_t> shape) {
  check_dense(name, view, DType::kInt32, "", shape);
  add_input(name, view);
  return static_cast<const int32_t*>(view.data);
}

int32_t* Arguments::output_index(const char* name, const TensorView& view,
                                 std::initializer_list<int64_t> shape) {
  check_dense(name, view, DType::kInt32, "", shape);
  add_output(name, view);
  return static_cast<int32_t*>(view.data);
}

const int32_t* Arguments::input_strided_index(const char* name, const TensorView& view,
                                              std::initializer_list<int64_t> shape) {
  check_common(name, view, DType::kInt32, "", shape);
  check_last_contiguous(name, view);
  add_input(name, view);
  return static_cast<const int32_t*>(view.data);
}

void Arguments::require_absent(const char* name, const TensorView& view, const char* why) const {
  FSATTN_CHECK(!view.defined(), kInvalidArgument, name, ": must be absent ", why,
               ", found a tensor of shape ", shape_text(view));
}

void Arguments::check_aliasing() const {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Range out = memory_of(outputs_[i].view);
    for (const Seen& input : inputs_) {
      FSATTN_CHECK(!overlap(out, memory_of(input.view)), kInvalidArgument, outputs_[i].name,
                   ": memory of an output may not overlap an input, found overlap with ",
                   input.name);
    }
    // Outputs may interleave (slices of one packed tensor), but not be the same tensor.
    for (size_t j = 0; j < i; ++j) {
      const Range other = memory_of(outputs_[j].view);
      FSATTN_CHECK(
          !overlap(out, other) || out.begin != other.begin, kInvalidArgument, outputs_[i].name,
          ": must not start where another output does, found the data of ", outputs_[j].name);
    }
  }
}

}  // namespace fsattn
