#define FSATTN_VECTOR_BYTES 32
#define FSATTN_GEMM_VECTORS 2
#define FSATTN_TILE_TABLE kTileTableAvx2
#include "cpu/tile_kernels.h"
