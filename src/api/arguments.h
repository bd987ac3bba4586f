// Checks of single tensors. An Arguments object lives for one call: it knows the device and the
// dtype that all tensors must share, and remembers every range of memory for the aliasing check.
#pragma once
#include <initializer_list>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/dtype.h"
#include "fsattn/paged.h"
#include "fsattn/tensor.h"
#include "params/paged.h"

namespace fsattn {

// What a call is validated for. Memory may be missing while a call is only planned: null data
// passes, and what depends on the values of a tensor is skipped.
enum class Purpose { kPlan, kRun };

constexpr int64_t kAnySize = -1;
constexpr int64_t kMaxIndex =
    (int64_t{1} << 31) - 1;  // token counts and lengths are int32 on devices

class Arguments {
 public:
  // `lead` decides the device of the call. It must have `rank` dimensions; `layout` names them.
  Arguments(Purpose purpose, const char* name, const TensorView& lead, int rank,
            const char* layout);

  const Device& device() const { return device_; }
  DType dtype() const { return dtype_; }
  bool is_cuda() const { return device_.type == DeviceType::kCuda; }

  // Makes the dtype of `lead` the one of the call, after checking that the device supports it.
  void use_lead_dtype();

  // Whether the values of a tensor can be read here: it is in host memory and has some.
  bool is_readable(const TensorView& view) const { return !is_cuda() && view.data != nullptr; }

  // Sizes in `shape` may be kAnySize. Each checks presence, rank, sizes, device, dtype, strides and,
  // for outputs, that no two elements share memory.
  Rows input_rows(const char* name, const TensorView& view, std::initializer_list<int64_t> shape);
  Rows output_rows(const char* name, const TensorView& view, std::initializer_list<int64_t> shape);
  Stats input_stats(const char* name, const TensorView& view, std::initializer_list<int64_t> shape);
  Stats output_stats(const char* name, const TensorView& view,
                     std::initializer_list<int64_t> shape);

  // Pages of a cache: [num_pages, page_size, heads, dim], or with heads before page_size (kHnd). `shape`
  // is given in the order of kNhd.
  PagedRows input_pages(const char* name, const TensorView& view, CacheLayout layout,
                        std::initializer_list<int64_t> shape);
  PagedRows output_pages(const char* name, const TensorView& view, CacheLayout layout,
                         std::initializer_list<int64_t> shape);

  // Gates: [tokens, 3] or [tokens, heads, 3]; the head stride of the former is 0.
  Rows input_gates(const char* name, const TensorView& view, int64_t tokens, int64_t heads);
  Rows output_gates(const char* name, const TensorView& view, const TensorView& gates);

  // Without gaps, dtype of the call.
  const void* input_dense(const char* name, const TensorView& view,
                          std::initializer_list<int64_t> shape);
  void* output_dense(const char* name, const TensorView& view,
                     std::initializer_list<int64_t> shape);

  // Without gaps, int32.
  const int32_t* input_index(const char* name, const TensorView& view,
                             std::initializer_list<int64_t> shape);
  int32_t* output_index(const char* name, const TensorView& view,
                        std::initializer_list<int64_t> shape);

  // int32 with a contiguous last dimension and free strides elsewhere.
  const int32_t* input_strided_index(const char* name, const TensorView& view,
                                     std::initializer_list<int64_t> shape);

  // An optional tensor that the other arguments rule out.
  void require_absent(const char* name, const TensorView& view, const char* why) const;

  // Last of all: no output overlaps an input.
  void check_aliasing() const;

 private:
  struct Seen {
    const char* name;
    TensorView view;
  };

  void check_common(const char* name, const TensorView& view, DType dtype, const char* dtype_rule,
                    std::initializer_list<int64_t> shape);
  void check_rows(const char* name, const TensorView& view, DType dtype,
                  std::initializer_list<int64_t> shape);
  void check_stats(const char* name, const TensorView& view, std::initializer_list<int64_t> shape);
  void check_gates(const char* name, const TensorView& view, std::initializer_list<int64_t> shape);
  void check_dense(const char* name, const TensorView& view, DType dtype, const char* dtype_rule,
                   std::initializer_list<int64_t> shape);
  PagedRows check_pages(const char* name, const TensorView& view, CacheLayout layout,
                        std::initializer_list<int64_t> shape);
  void add_input(const char* name, const TensorView& view);
  void add_output(const char* name, const TensorView& view);

  Purpose purpose_;
  std::string lead_name_;
  Device device_;
  DType dtype_;
  std::vector<Seen> inputs_;
  std::vector<Seen> outputs_;
};

// "[2, 3, 64]", with * for kAnySize.
std::string shape_text(std::initializer_list<int64_t> shape);
std::string shape_text(const TensorView& view);
std::string device_text(const Device& device);

// `value` is within low .. high.
void check_range(const char* name, int64_t value, int64_t low, int64_t high);

}  // namespace fsattn
