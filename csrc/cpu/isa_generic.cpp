// The CPU kernels for the compiler's baseline (SSE2 on x86-64, NEON on ARM).
#include "kernels.h"
#include "pack.h"
#include "parallel.h"

#define CBAM_ISA_LEVEL 0
#include "isa_begin.h"
#include "isa.inl"
#include "isa_end.h"
