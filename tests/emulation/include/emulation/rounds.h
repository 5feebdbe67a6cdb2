// Counts the rounds of loads that a thread waits for one after the other. Included before the
// kernels, where it takes the place of double: a number that comes from global memory bears a mark,
// and whoever calculates with it ends the round.
//
// A round are loads that nobody waits for in between. The order is that of the sources; the GPU's
// compiler may move loads up, which joins rounds. Marked numbers, barriers and stores end a round,
// even where the number came with an earlier one: what is counted is rather too much. Integers
// count as loads; using them ends nothing, and they come with numbers.
#pragma once

// All that must see the real double.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace emulation {

// Of the running thread (runtime/rounds.cpp).
void begin_round_of_loads();  // does nothing in a round
void end_round_of_loads();

// Lies in memory as a double does, and has the mark in its last bit.
class Value {
 public:
  Value() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  Value(T value) : bits_(bits_as<uint64_t>(static_cast<double>(value)) & ~uint64_t{1}) {}

  // Waits for it, if it comes from memory.
  double get() const {
    if (bits_ & 1) end_round_of_loads();
    return bits_as<double>(bits_ & ~uint64_t{1});
  }

  Value operator-() const { return -get(); }
  Value& operator+=(Value other) { return *this = *this + other; }
  friend Value operator+(Value a, Value b) { return a.get() + b.get(); }
  friend Value operator-(Value a, Value b) { return a.get() - b.get(); }
  friend Value operator*(Value a, Value b) { return a.get() * b.get(); }
  friend Value operator/(Value a, Value b) { return a.get() / b.get(); }
  friend bool operator<=(Value a, Value b) { return a.get() <= b.get(); }
  friend bool operator>(Value a, Value b) { return a.get() > b.get(); }
  friend bool operator==(Value a, Value b) { return a.get() == b.get(); }
  friend bool operator!=(Value a, Value b) { return a.get() != b.get(); }
  friend Value exp(Value value) { return std::exp(value.get()); }

 private:
  uint64_t bits_;
};
static_assert(sizeof(Value) == sizeof(double) && std::is_trivially_copyable_v<Value>);

template <>
inline constexpr bool is_memory_type<Value> = true;

inline uint64_t marked(uint64_t bits) { return bits | 1; }
inline uint4 marked(uint4 bits) { return {bits.x | 1, bits.y, bits.z | 1, bits.w}; }
inline Value marked(Value value) { return bits_as<Value>(marked(bits_as<uint64_t>(value))); }
template <class T>
inline T marked(T value) {
  return value;
}

template <class T>
inline T load_marked(const T* address, Access access) {
  begin_round_of_loads();
  return marked(load(address, access));
}

}  // namespace emulation

template <>
struct std::is_floating_point<emulation::Value> : std::true_type {};

#define __ldg(...) emulation::load_marked((__VA_ARGS__), emulation::kLdg)
#define __ldca(...) emulation::load_marked((__VA_ARGS__), emulation::kLdca)
#define __ldcs(...) emulation::load_marked((__VA_ARGS__), emulation::kLdcs)
#define __syncthreads() (emulation::end_round_of_loads(), __syncthreads())

inline emulation::Value __shfl_xor_sync(unsigned mask, emulation::Value value, int lane_mask,
                                        const char* file = __builtin_FILE(),
                                        int line = __builtin_LINE()) {
  return __shfl_xor_sync(mask, value.get(), lane_mask, file, line);
}
inline void __stwb(emulation::Value* address, emulation::Value value) {
  emulation::store(address, emulation::Value(value.get()), emulation::kStwb);
}

#define double emulation::Value
