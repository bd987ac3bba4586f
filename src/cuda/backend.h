// The CUDA backend: the launchers of every operator as one struct. bf16 and fp16, sm_80 and newer.
#pragma once
#include "params/backend.h"

namespace fsattn {

const Backend& cuda_backend();

}  // namespace fsattn
