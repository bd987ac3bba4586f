#define FSATTN_ISA_NAMESPACE avx2
#include "cpu/row_kernels_isa.h"
