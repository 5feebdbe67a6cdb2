// Stands in for CUDA's header of this name: float16 as a storage format.
#pragma once

#include "emulation/half.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return emulation::half_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {emulation::float_to_half(value)}; }
