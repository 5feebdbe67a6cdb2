// The dtypes, and the types that stand for them where a kernel is compiled.
//
// "Storage" is what a feature map lies in memory as, "accumulator" what is calculated with: double
// for double storage and float for everything else.
#pragma once

#include <cstdint>
#include <type_traits>

namespace cbam {

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Storage of 16 bits. float and double are their own accumulators.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Calls f with a value of the type that stands for a dtype, and returns what it returns; the types
// of 16 bits are the caller's choice. The one switch over dtypes: it has no default, so that
// compilers name a dtype that is forgotten here.
template <class BFloat16Type, class HalfType, class F>
decltype(auto) with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16Type{});
    case DType::kFloat16:
      break;
  }
  return f(HalfType{});
}

inline int64_t element_size(DType dtype) {
  return with_storage<BFloat16, Half>(
      dtype, [](auto value) { return static_cast<int64_t>(sizeof(value)); });
}

inline int64_t accumulator_size(DType dtype) {
  return with_storage<BFloat16, Half>(
      dtype, [](auto value) { return static_cast<int64_t>(sizeof(Acc<decltype(value)>)); });
}

}  // namespace cbam
