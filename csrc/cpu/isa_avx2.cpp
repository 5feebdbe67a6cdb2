// The CPU kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "kernels.h"
#include "pack.h"
#include "parallel.h"

#define CBAM_ISA_LEVEL 1
#include "isa_begin.h"
#include "isa.inl"
#include "isa_end.h"
#endif
