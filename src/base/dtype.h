#pragma once
#include "fsattn/tensor.h"

namespace fsattn {

// The instruction set that a kernel is compiled for.
enum class Arch : int { kCpu, kSm80, kSm90a };

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
  }
  return "?";
}

constexpr const char* name_of(DeviceType type) { return type == DeviceType::kCpu ? "cpu" : "cuda"; }

constexpr const char* name_of(Arch arch) {
  switch (arch) {
    case Arch::kCpu:
      return "cpu";
    case Arch::kSm80:
      return "sm_80";
    case Arch::kSm90a:
      return "sm_90a";
  }
  return "?";
}

// Softmax statistics (lse, delta) are kept in fp32, for fp64 inputs in fp64.
constexpr DType stats_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace fsattn
