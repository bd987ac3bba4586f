// The CPU backend: every operator, multi-threaded, in fp64, fp32, bf16 and fp16.
#pragma once
#include "params/backend.h"

namespace fsattn::cpu {

const Backend& cpu_backend();

}  // namespace fsattn::cpu
