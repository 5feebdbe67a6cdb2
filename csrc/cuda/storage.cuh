// From storage to accumulators and back, and every access to global memory.
//
// An access moves W elements: 16 bytes where the alignment allows, else one element. Loads say
// whether the data will be used again, stores whether it will be read soon; the cache evicts the
// rest first.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "platform.cuh"

namespace cbam::cuda {

// Elements in 16 bytes.
template <class S>
constexpr int kWide = 16 / static_cast<int>(sizeof(S));

enum class Use { kAgain, kLast };

// ------------------------------------------------------------------------------ conversions

inline __device__ double widen(double value) { return value; }
inline __device__ float widen(float value) { return value; }
inline __device__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
inline __device__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }

template <class S>
__device__ S narrow(Acc<S> value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<S, Half>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return value;
  }
}

// --------------------------------------------------------------------------- one access

// T as the intrinsics know it.
template <class T>
using Raw =
    std::conditional_t<sizeof(T) == 2, unsigned short,
                       std::conditional_t<std::is_floating_point_v<T>, T,
                                          std::conditional_t<sizeof(T) == 8, long long, int>>>;

template <class To, class From>
__device__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Small maps, vectors and parameters, which no block of the running launch writes. (Not by the
// read-only path: that wants data which also the launch before does not write, and with dependent
// launches the two overlap.)
template <class T>
__device__ T load(const T* from) {
  return bit_cast<T>(__ldca(reinterpret_cast<const Raw<T>*>(from)));
}

// Asks the L2 cache for data that will be loaded soon, and waits for nothing.
template <class T>
__device__ void prefetch(const T* from) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#else
  static_cast<void>(from);
#endif
}

template <Use use = Use::kAgain, class T>
__device__ void store(T* to, T value) {
  auto* raw = reinterpret_cast<Raw<T>*>(to);
  if constexpr (use == Use::kAgain) {
    __stwb(raw, bit_cast<Raw<T>>(value));
  } else {
    __stcs(raw, bit_cast<Raw<T>>(value));
  }
}

// ----------------------------------------------------------------------------- W elements

// W elements of a feature map as they come from memory: what is in flight takes few registers.
template <class S, int W>
struct Packed {
  uint4 bits;
};
template <class S>
struct Packed<S, 1> {
  S value;
};

template <class S, int W>
using Access = std::conditional_t<W == 1, Raw<S>, uint4>;

template <class S, int W, Use use>
__device__ Packed<S, W> load_packed(const S* from) {
  const auto* raw = reinterpret_cast<const Access<S, W>*>(from);
  return bit_cast<Packed<S, W>>(use == Use::kAgain ? __ldg(raw) : __ldcs(raw));
}

// W neighbouring elements of a parameter, which like `load` is read through the cache of the
// multiprocessor.
template <int W, class T>
__device__ Packed<T, W> load_weights(const T* from) {
  return bit_cast<Packed<T, W>>(__ldca(reinterpret_cast<const Access<T, W>*>(from)));
}

// Two elements of 16 bits.
inline __device__ void unpack_word(unsigned word, float* to, BFloat16) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
inline __device__ void unpack_word(unsigned word, float* to, Half) {
  to[0] = widen(Half{static_cast<unsigned short>(word & 0xffffu)});
  to[1] = widen(Half{static_cast<unsigned short>(word >> 16)});
}
template <class S>
__device__ unsigned pack_word(const float* from) {
  return narrow<S>(from[0]).bits | static_cast<unsigned>(narrow<S>(from[1]).bits) << 16;
}

template <class S, int W>
__device__ void unpack(const Packed<S, W>& packed, Acc<S> (&to)[W]) {
  if constexpr (W == 1) {
    to[0] = widen(packed.value);
  } else if constexpr (sizeof(S) == 2) {
    unpack_word(packed.bits.x, to, S{});
    unpack_word(packed.bits.y, to + 2, S{});
    unpack_word(packed.bits.z, to + 4, S{});
    unpack_word(packed.bits.w, to + 6, S{});
  } else {
    memcpy(to, &packed.bits, sizeof(packed.bits));
  }
}

// Outputs are not read by the operator that writes them: they leave the cache first.
template <class S, int W>
__device__ void store_output(S* to, const Acc<S> (&values)[W]) {
  if constexpr (W == 1) {
    store<Use::kLast>(to, narrow<S>(values[0]));
  } else {
    uint4 bits;
    if constexpr (sizeof(S) == 2) {
      bits = {pack_word<S>(values), pack_word<S>(values + 2), pack_word<S>(values + 4),
              pack_word<S>(values + 6)};
    } else {
      memcpy(&bits, values, sizeof(bits));
    }
    __stcs(reinterpret_cast<uint4*>(to), bits);
  }
}

// W consecutive values of a small map (accumulators or indices), 16-byte aligned where W > 1.
template <int W, class T>
__device__ void load_values(const T* from, T (&to)[W]) {
  if constexpr (W * sizeof(T) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < W; ++i) to[i] = load(from + i);
  } else {
    const auto* wide = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < static_cast<int>(W * sizeof(T) / 16); ++i) {
      const uint4 bits = __ldca(wide + i);
      memcpy(to + i * (16 / sizeof(T)), &bits, sizeof(bits));
    }
  }
}

// A struct of small values, a multiple of 16 bytes and so aligned.
template <class T>
__device__ T load_struct(const T* from) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) % 16 == 0, "moved in whole accesses");
  T to;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 16); ++i) {
    const uint4 bits = __ldca(reinterpret_cast<const uint4*>(from) + i);
    memcpy(reinterpret_cast<char*>(&to) + 16 * i, &bits, sizeof(bits));
  }
  return to;
}

template <int W, class T>
__device__ void load_structs(const T* from, T (&to)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = load_struct(from + i);
}

template <class T>
__device__ void store_struct(T* to, const T& from) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) % 16 == 0, "moved in whole accesses");
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 16); ++i) {
    uint4 bits;
    memcpy(&bits, reinterpret_cast<const char*>(&from) + 16 * i, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(to) + i, bits);
  }
}

// W consecutive values of shared memory, 16-byte aligned where they are a multiple of that.
template <int W, class T>
__device__ void read_shared(const T* from, T (&to)[W]) {
  if constexpr (W * sizeof(T) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < W; ++i) to[i] = from[i];
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(W * sizeof(T) / 16); ++i) {
      const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
      memcpy(reinterpret_cast<char*>(to) + 16 * i, &bits, sizeof(bits));
    }
  }
}

// ------------------------------------------------------------------------------ parameters

// Parameters have any strides, and x's dtype or the accumulator's. Calls f(pointer to const T) with
// the type that it is.
template <class S, class F>
__device__ void with_parameter(const ParameterView& view, F&& f) {
  using A = Acc<S>;
  if constexpr (std::is_same_v<S, A>) {
    f(static_cast<const A*>(view.data));
  } else if (view.dtype == DType::kFloat32) {
    f(static_cast<const A*>(view.data));
  } else {
    f(static_cast<const S*>(view.data));
  }
}

// The last three indices of an element, right-aligned as in ParameterView.
inline __device__ int64_t offset_in(const ParameterView& view, int64_t i, int64_t j, int64_t k) {
  return i * view.strides[1] + j * view.strides[2] + k * view.strides[3];
}

template <class S>
__device__ Acc<S> load_parameter(const ParameterView& view, int64_t i, int64_t j, int64_t k) {
  Acc<S> value;
  with_parameter<S>(
      view, [&](const auto* data) { value = widen(load(data + offset_in(view, i, j, k))); });
  return value;
}

// Zero where there is no such parameter.
template <class S>
__device__ Acc<S> load_bias(const ParameterView& view, int64_t i) {
  return view.data == nullptr ? Acc<S>{0} : load_parameter<S>(view, 0, 0, i);
}

template <class S>
__device__ void store_parameter(const ParameterView& view, int64_t i, int64_t j, int64_t k,
                                Acc<S> value) {
  const int64_t at = offset_in(view, i, j, k);
  if (std::is_same_v<S, Acc<S>> || view.dtype == DType::kFloat32) {
    store(static_cast<Acc<S>*>(view.data) + at, value);
  } else {
    store(static_cast<S*>(view.data) + at, narrow<S>(value));
  }
}

}  // namespace cbam::cuda
