#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "base/check.h"

namespace fsattn::cpu {
namespace {

constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};

Isa named_isa(const char* name) {
  for (const Isa isa : kBestFirst) {
    if (std::strcmp(name, name_of(isa)) != 0) continue;
    FSATTN_CHECK(is_supported(isa), kUnsupported, "FSATTN_ISA: ", name,
                 " is not supported by this machine and build");
    return isa;
  }
  FSATTN_CHECK(false, kInvalidArgument, "FSATTN_ISA: must be baseline, avx2 or avx512, found \"",
               name, "\"");
  return Isa::kBaseline;
}

}  // namespace

bool is_supported([[maybe_unused]] Isa isa) {
#ifdef FSATTN_CPU_X86
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return is_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa active_isa() {
  // Read at every call: a test switches the variable inside one process.
  const char* name = std::getenv("FSATTN_ISA");
  if (name != nullptr && *name != '\0') return named_isa(name);
  for (const Isa isa : kBestFirst) {
    if (is_supported(isa)) return isa;
  }
  return Isa::kBaseline;
}

}  // namespace fsattn::cpu
