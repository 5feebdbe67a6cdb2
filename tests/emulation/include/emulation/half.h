// Conversions of the two half types: to nearest, ties to even; a NaN stays a NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_as<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;  // exact
  return bits_as<float>(sign | bits_as<uint32_t>(subnormal));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;   // NaN, the one that CUDA gives
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity: 65520 and more
  if (magnitude >= 0x38800000u) {                       // normal: 2**-14 and more
    const uint32_t odd = magnitude >> 13 & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
  }
  // Added to 0.5, a subnormal of 2**-24 steps ends in the last places of the sum, rounded there.
  const float sum = bits_as<float>(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (bits_as<uint32_t>(sum) - bits_as<uint32_t>(0.5f)));
}

inline float bfloat16_to_float(uint16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // NaN, the one that CUDA gives
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace emulation
