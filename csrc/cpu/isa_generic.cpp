// The CPU kernels for the compiler's baseline (SSE2 on x86-64, NEON on ARM).
#include "kernels.h"
#include "pack.h"
#include "parallel.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#define CBAM_ISA generic
#define CBAM_ISA_LEVEL 0
#define CBAM_VECTOR_BYTES 16
#include "isa.inl"
