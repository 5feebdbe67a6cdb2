// The functions of csrc/cpu/simd.h on whole arrays, for Python to compare with what it knows of
// them. Compiled once per instruction set, with CBAM_ISA_LEVEL on the command line.
#include "problem.h"

#include "cpu/isa_begin.h"

namespace cbam::cpu::CBAM_ISA {
namespace {

#include "cpu/simd.h"

// For what has no other types than accumulators.
template <class F>
void with_accumulator(DType dtype, F&& f) {
  if (dtype == DType::kFloat64) return f(double{});
  f(float{});
}

// to[i] = f(from[i]...) in vectors, the last of them partial.
template <class F, class... From>
void map(DType dtype, int64_t n, void* to, F&& f, const From*... from) {
  with_accumulator(dtype, [&](auto type) {
    using A = decltype(type);
    each_vector<A>(n, [&](int64_t i, auto part) {
      store(static_cast<A*>(to) + i, f(load(static_cast<const A*>(from) + i, part)...), part);
    });
  });
}

// E: the elements, accumulators or their integers.
template <class Op, class E>
void reduce(int count, const void* from, void* to) {
  Vec<E> v[32];
  std::memcpy(v, from, count * sizeof(v[0]));
  const auto reduced = [&](auto size) {
    const auto results = reduce_lanes<Op, decltype(size)::value>(v);
    std::copy(results.begin(), results.end(), static_cast<E*>(to));
  };
  switch (count) {
    case 1:
      return reduced(std::integral_constant<int, 1>{});
    case 2:
      return reduced(std::integral_constant<int, 2>{});
    case 4:
      return reduced(std::integral_constant<int, 4>{});
    case 8:
      return reduced(std::integral_constant<int, 8>{});
    case 16:
      return reduced(std::integral_constant<int, 16>{});
    case 32:
      return reduced(std::integral_constant<int, 32>{});
  }
}

// The first of the float32 patterns [begin, end) that is not narrowed right, or `end`.
template <class S, class Right>
uint64_t first_wrong(uint64_t begin, uint64_t end, Right&& right) {
  constexpr uint32_t kCount = kLanes<float>;
  const auto all_right = [&](Vec<uint32_t> patterns) {
    const auto wrong = ~right(narrow(bit_cast<Vec<float>>(patterns), S{}));
    const auto words = bit_cast<Raw<uint64_t, kCount / 4>>(wrong);
    uint64_t any = 0;
    for (uint32_t i = 0; i < kCount / 4; ++i) any |= words[i];
    return any == 0;
  };
  const Vec<uint32_t> next = bit_cast<Vec<uint32_t>>(iota<float>());
  uint64_t at = begin;
  while (at + kCount <= end && all_right(next + static_cast<uint32_t>(at))) at += kCount;
  // One by one what is left, or up to what is wrong.
  while (at < end && all_right(Vec<uint32_t>{} + static_cast<uint32_t>(at))) ++at;
  return at;
}

}  // namespace

extern "C" {

int isa_level() { return CBAM_ISA_LEVEL; }
int vector_bytes() { return kVectorBytes; }

// Storage to accumulator, and back.
void widen_all(DType dtype, int64_t n, const void* from, void* to) {
  with_storage<BFloat16, Half>(dtype, [&](auto type) {
    using S = decltype(type);
    each_vector<Acc<S>>(n, [&](int64_t i, auto part) {
      store(static_cast<Acc<S>*>(to) + i, load(static_cast<const S*>(from) + i, part), part);
    });
  });
}
void narrow_all(DType dtype, int64_t n, const void* from, void* to) {
  with_storage<BFloat16, Half>(dtype, [&](auto type) {
    using S = decltype(type);
    each_vector<Acc<S>>(n, [&](int64_t i, auto part) {
      store(static_cast<S*>(to) + i, load(static_cast<const Acc<S>*>(from) + i, part), part);
    });
  });
}

// Whether the half type (else float) rounds the float32 patterns from starts[i] to starts[i + 1],
// that one excluded, to expected[i], for 0 <= i < count. Returns the first that it does not, or -1.
int64_t first_wrong_rounding(DType dtype, int64_t count, const uint64_t* starts,
                             const uint16_t* expected) {
  int64_t found = -1;
  with_storage<BFloat16, Half>(dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr (sizeof(S) == 2) {
      for (int64_t i = 0; i < count && found < 0; ++i) {
        const auto right = [&](auto bits) { return bits == expected[i]; };
        const uint64_t at = first_wrong<S>(starts[i], starts[i + 1], right);
        if (at < starts[i + 1]) found = static_cast<int64_t>(at);
      }
    }
  });
  return found;
}

// The same for patterns of NaN, which have to become some NaN: more than the pattern of infinity.
int64_t first_lost_nan(DType dtype, uint64_t begin, uint64_t end, uint16_t infinity) {
  int64_t found = -1;
  with_storage<BFloat16, Half>(dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr (sizeof(S) == 2) {
      const auto right = [&](auto bits) { return (bits & 0x7fff) > infinity; };
      const uint64_t at = first_wrong<S>(begin, end, right);
      if (at < end) found = static_cast<int64_t>(at);
    }
  });
  return found;
}

void exp_all(DType dtype, int64_t n, const void* from, void* to) {
  map(dtype, n, to, [](auto v) { return exp(v); }, from);
}
void sigmoid_all(DType dtype, int64_t n, const void* from, void* to) {
  map(dtype, n, to, [](auto v) { return sigmoid(v); }, from);
}
void max_all(DType dtype, int64_t n, const void* a, const void* b, void* to) {
  map(dtype, n, to, [](auto v, auto w) { return max(v, w); }, a, b);
}
void min_all(DType dtype, int64_t n, const void* a, const void* b, void* to) {
  map(dtype, n, to, [](auto v, auto w) { return min(v, w); }, a, b);
}

// `count` whole vectors, each to one element.
void add_lanes(DType dtype, int count, const void* from, void* to) {
  with_accumulator(dtype, [&](auto type) { reduce<Add, decltype(type)>(count, from, to); });
}
void max_lanes(DType dtype, int count, const void* from, void* to) {
  with_accumulator(dtype, [&](auto type) { reduce<Max, decltype(type)>(count, from, to); });
}
// Over the integers that the accumulator's indices are.
void min_index_lanes(DType dtype, int count, const void* from, void* to) {
  with_accumulator(dtype, [&](auto type) { reduce<Min, Int<decltype(type)>>(count, from, to); });
}

}  // extern "C"
}  // namespace cbam::cpu::CBAM_ISA

#include "cpu/isa_end.h"
