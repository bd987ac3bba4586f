#define FSATTN_ISA_NAMESPACE baseline
#include "cpu/row_kernels_isa.h"
