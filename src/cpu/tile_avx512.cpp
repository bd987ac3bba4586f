#define FSATTN_VECTOR_BYTES 64
#define FSATTN_GEMM_VECTORS 4
#define FSATTN_TILE_TABLE kTileTableAvx512
#include "cpu/tile_kernels.h"
