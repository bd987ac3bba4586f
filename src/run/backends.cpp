#include "run/backends.h"

#include "base/check.h"
#include "cpu/backend.h"
#ifdef FSATTN_WITH_CUDA
#include "cuda/backend.h"
#endif

namespace fsattn {

const Backend& backend_of(Arch arch) {
  if (arch == Arch::kCpu) return cpu::cpu_backend();
#ifdef FSATTN_WITH_CUDA
  return cuda_backend();
#else
  // Plans for CUDA are only made for devices that query_device() found.
  FSATTN_ASSERT(arch == Arch::kCpu);
  return cpu::cpu_backend();
#endif
}

const char* cpu_instruction_set() { return cpu::instruction_set(); }

}  // namespace fsattn
