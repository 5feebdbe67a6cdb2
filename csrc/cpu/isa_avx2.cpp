// The CPU kernels for AVX2, FMA and F16C.
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

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define CBAM_ISA avx2
#define CBAM_ISA_LEVEL 1
#define CBAM_VECTOR_BYTES 32
#include "isa.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
