// The CPU backend: every operator, multi-threaded, in fp64, fp32, bf16 and fp16.
#pragma once
#include "params/backend.h"

namespace fsattn::cpu {

const Backend& cpu_backend();

// The instruction set that the next call uses: "baseline", "avx2", "avx512". Throws as active_isa()
// does when FSATTN_ISA asks for one that is not there.
const char* instruction_set();

}  // namespace fsattn::cpu
