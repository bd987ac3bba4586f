#define FSATTN_ISA_NAMESPACE avx512
#include "cpu/row_kernels_isa.h"
