#define FSATTN_VECTOR_BYTES 16
#define FSATTN_GEMM_VECTORS 2
#define FSATTN_TILE_TABLE kTileTableBaseline
#include "cpu/tile_kernels.h"
