// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "kernels.h"
#include "pack.h"
#include "parallel.h"

#define CBAM_ISA_LEVEL 2
#include "isa_begin.h"
#include "isa.inl"
#include "isa_end.h"
#endif
