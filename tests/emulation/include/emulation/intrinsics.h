// The device side of the stand-in cuda_runtime.h: indices, barriers, shuffles, memory access.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/half.h"

// Writes of a function into what its caller assigns are not instrumented; inlined into it they are.
#ifdef __SANITIZE_THREAD__
#define __global__ __attribute__((flatten))
#else
#define __global__
#endif
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Left to the compiler: the standard library's headers use the word inside of attributes.
#define __noinline__
#define __align__(n) __attribute__((aligned(n)))

struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// Where in the sources a thread stopped. Threads that meet must have stopped at the same place.
struct Site {
  const char* file;
  int line;
};

// What the running thread may ask of the scheduler (runtime/scheduler.cpp).
unsigned char* shared_memory();
void barrier(Site site);
void warp_barrier(Site site);
uint64_t exchange(uint64_t value, unsigned source_lane, Site site);
void fence(Site site);
void wait_for_previous_launch(Site site);
void let_next_launch_begin();
[[noreturn]] void fault(const char* what);

// The intrinsics that move bytes, an atomic, and what accesses shared memory.
enum Access : uint8_t {
  kLdg,
  kLdca,
  kLdcs,
  kLdcg,
  kStwb,
  kStcs,
  kAccessKinds,
  kAtomic = kAccessKinds,
  kPlainLoad,
  kPlainStore
};

struct Counters {
  uint64_t bytes[kAccessKinds];
  uint64_t wide_loads, wide_stores;  // accesses of 16 bytes
  uint64_t atomics;
  uint64_t rounds;  // of loads, the most of any thread; in the counted build alone (rounds.h)
};
extern Counters counters;  // of the running launch

extern bool tracing;  // whether somebody wants to know of every access
void trace(const void* address, size_t bytes, Access access);
unsigned atomic_add(unsigned* address, unsigned value);

template <class T>
inline constexpr bool is_memory_type =
    std::is_same_v<T, uint4> || std::is_same_v<T, float> || std::is_same_v<T, double> ||
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned short> ||
    std::is_same_v<T, long long>;

template <class T>
inline void count(const T* address, Access access) {
  static_assert(is_memory_type<T>, "a type that the kernels' portable subset does not load");
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fault(sizeof(T) == 16 ? "misaligned access of 16 bytes" : "misaligned access");
  }
  counters.bytes[access] += sizeof(T);
  if (sizeof(T) == 16) ++(access < kStwb ? counters.wide_loads : counters.wide_stores);
  if (__builtin_expect(tracing, false)) trace(address, sizeof(T), access);
}

// Copies, so that one buffer may be read as several types.
template <class T>
inline T load(const T* address, Access access) {
  count(address, access);
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
inline void store(T* address, T value, Access access) {
  count(address, access);
  std::memcpy(address, &value, sizeof(T));
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source_lane, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if (mask != 0xffffffffu) fault("shuffle with a mask other than the whole warp");
  if (source_lane >= 32) fault("shuffle from a lane over 31");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
struct type_identity {
  using type = T;
};
// A parameter from which no type is deduced: __stwb(unsigned_short_pointer, 0) is fine in CUDA.
template <class T>
using as_given = typename type_identity<T>::type;

}  // namespace emulation

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  if (mask != 0xffffffffu) emulation::fault("__syncwarp with a mask other than the whole warp");
  emulation::warp_barrier({file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::shuffle(mask, value, lane ^ static_cast<unsigned>(lane_mask), {file, line});
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, static_cast<unsigned>(lane), {file, line});
}

// Of values these do nothing: one thread runs at a time, in the order in which memory sees it, and
// a launch when the one before has ended.
inline void __threadfence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::fence({file, line});
}
inline void cudaGridDependencySynchronize(const char* file = __builtin_FILE(),
                                          int line = __builtin_LINE()) {
  emulation::wait_for_previous_launch({file, line});
}
inline void cudaTriggerProgrammaticLaunchCompletion() { emulation::let_next_launch_begin(); }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulation::atomic_add(address, value);
}

template <class T>
inline T __ldg(const T* address) {
  return emulation::load(address, emulation::kLdg);
}
template <class T>
inline T __ldca(const T* address) {
  return emulation::load(address, emulation::kLdca);
}
template <class T>
inline T __ldcs(const T* address) {
  return emulation::load(address, emulation::kLdcs);
}
template <class T>
inline T __ldcg(const T* address) {
  return emulation::load(address, emulation::kLdcg);
}
template <class T>
inline void __stwb(T* address, emulation::as_given<T> value) {
  emulation::store(address, value, emulation::kStwb);
}
template <class T>
inline void __stcs(T* address, emulation::as_given<T> value) {
  emulation::store(address, value, emulation::kStcs);
}

inline unsigned __float_as_uint(float value) { return emulation::bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return emulation::bits_as<int>(value); }
inline float __uint_as_float(unsigned bits) { return emulation::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return emulation::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return emulation::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return emulation::bits_as<double>(bits); }
