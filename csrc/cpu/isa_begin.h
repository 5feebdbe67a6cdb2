// Switches the compiler to the instruction set CBAM_ISA_LEVEL, which the including file defines
// first; isa_end.h switches back.
//
//   level  CBAM_ISA   beyond the compiler's baseline (SSE2 on x86-64, NEON on ARM)
//   0      generic    nothing
//   1      avx2       AVX2, FMA, F16C
//   2      avx512     AVX-512 F, BW, DQ, VL, and what avx2 has
//
// The one place that says what a set may use, for the kernels (isa_*.cpp) and for the tests of
// simd.h. Standard headers are included before the switch: their inline functions must stay code
// that every machine can run, because the linker keeps one copy. For the same reason every other
// header with such functions has to come before this one.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if CBAM_ISA_LEVEL == 0
#define CBAM_ISA generic
#define CBAM_VECTOR_BYTES 16

#elif CBAM_ISA_LEVEL == 1
#include <immintrin.h>
#define CBAM_ISA avx2
#define CBAM_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#elif CBAM_ISA_LEVEL == 2
#include <immintrin.h>
#define CBAM_ISA avx512
#define CBAM_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12 and older warn about their own immintrin.h (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif
