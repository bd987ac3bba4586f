// Which instruction set the CPU kernels use. Files that are worth it are compiled once per Isa, each
// in a namespace of its own (fsattn_cpu_isa_sources() in CMakeLists.txt); a table of function pointers
// is picked once a call, above all loops.
#pragma once

namespace fsattn::cpu {

enum class Isa : int { kBaseline, kAvx2, kAvx512 };

constexpr const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

// Whether this build and this machine can run it.
bool is_supported(Isa isa);

// The best supported one, or what the environment variable FSATTN_ISA (baseline, avx2, avx512) names.
// Throws Error on another value (kInvalidArgument) and on one that cannot run here (kUnsupported).
Isa active_isa();

}  // namespace fsattn::cpu
