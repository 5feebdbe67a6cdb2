// What csrc/cpu/simd.h touches: every load and store of it at both ends of a page that has nothing
// beside it, with all numbers of lanes. Compiled once per instruction set, with CBAM_ISA_LEVEL on
// the command line.
//
// Every function check_* is a test of its own: it returns null, or what is wrong.
#include "guarded.h"

#include <string>

#include "dtype.h"

#include "cpu/isa_begin.h"

namespace cbam::cpu::CBAM_ISA {
namespace {

#include "cpu/simd.h"

// ------------------------------------------------------------------------------------ elements

// Calls f(storage type, its name) for all four.
template <class F>
void each_storage(F&& f) {
  f(double{}, "float64");
  f(float{}, "float32");
  f(BFloat16{}, "bfloat16");
  f(Half{}, "float16");
}

// Small integers, which all types have; 0 is none of them.
template <class S>
S element(int64_t i) {
  const int value = static_cast<int>(1 + i % 120);
  if constexpr (std::is_same_v<S, Acc<S>>) {
    return static_cast<S>(value);
  } else {
    // Without a conversion of simd.h: exponent and fraction of an integer below 2^7.
    const int exponent = 31 - __builtin_clz(static_cast<unsigned>(value));
    constexpr int kFraction = std::is_same_v<S, Half> ? 10 : 7;
    constexpr int kBias = std::is_same_v<S, Half> ? 15 : 127;
    const int fraction = (value << kFraction >> exponent) - (1 << kFraction);
    return S{static_cast<uint16_t>(((exponent + kBias) << kFraction) + fraction)};
  }
}
template <class S>
Acc<S> accumulator(int64_t i) {
  return static_cast<Acc<S>>(1 + i % 120);
}

template <class T>
bool same_bytes(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// ---------------------------------------------------------------------------------------- page

// A page full of bytes that no element() has, and the places in it where an array of some length
// may stand: from the page's begin, up to its end, and in between at each distance from a multiple
// of the vector's size.
class Page {
 public:
  Page() { clear(); }

  void clear() { std::fill(page_.begin(), page_.end(), kFill); }

  // Where an array of some length ends with the page.
  template <class S>
  S* at_end(int64_t length) const {
    return reinterpret_cast<S*>(page_.end()) - length;
  }
  template <class S>
  bool fits(int64_t length) const {
    return length * static_cast<int64_t>(sizeof(S)) <= page_.end() - page_.begin();
  }

  template <class S, class F>
  void each_place(int64_t length, F&& f) {
    f(reinterpret_cast<S*>(page_.begin()), "at a page's begin");
    for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(S)); ++i) {
      f(reinterpret_cast<S*>(page_.begin() + 4 * kVectorBytes) + i, "amid a page");
    }
    f(at_end<S>(length), "at a page's end");
  }

  // Whether all bytes but those of [first, first + length) are as they were.
  template <class S>
  bool untouched_beside(const S* first, int64_t length) const {
    const char* begin = reinterpret_cast<const char*>(first);
    const char* end = reinterpret_cast<const char*>(first + length);
    const auto filled = [](char byte) { return byte == kFill; };
    return std::all_of(static_cast<const char*>(page_.begin()), begin, filled) &&
           std::all_of(end, static_cast<const char*>(page_.end()), filled);
  }

 private:
  static constexpr char kFill = static_cast<char>(0xa5);
  GuardedPage page_;
};

template <class S>
void write_elements(S* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = element<S>(i);
}

// Keeps the first complaint, as text that lives until the next check.
class Verdict {
 public:
  template <class... Parts>
  void expect(bool right, const Parts&... parts) {
    if (right || !text_.empty()) return;
    ((text_ += ' ', text_ += as_text(parts)), ...);
    text_.erase(0, 1);
  }
  const char* text() const {
    static std::string kept;
    kept = text_;
    return kept.empty() ? nullptr : kept.c_str();
  }

 private:
  static std::string as_text(const char* part) { return part; }
  static std::string as_text(int64_t part) { return std::to_string(part); }
  std::string text_;
};

// Calls f(part, lanes of it) for every length of a vector: the partial ones, and all of it.
template <class A, class F>
void each_part(F&& f) {
  for (int count = 1; count < kLanes<A>; ++count) f(Partial{count}, count);
  f(Full{}, kLanes<A>);
}

}  // namespace

extern "C" {

// --------------------------------------------------------------------------------------- loads

const char* check_loads() {
  Verdict verdict;
  Page page;
  each_storage([&](auto type, const char* name) {
    using S = decltype(type);
    using A = Acc<S>;
    each_part<A>([&](auto part, int count) {
      page.each_place<S>(count, [&](S* p, const char* place) {
        page.clear();
        write_elements(p, count);
        Vec<A> v = {};
        verdict.expect(stays_inside([&] { v = load(p, part); }), "a load of", count, name, place,
                       "reads beyond them");
        for (int i = 0; i < kLanes<A>; ++i) {
          const A wanted = i < count ? accumulator<S>(i) : A{0};
          verdict.expect(same_bytes<A>(v[i], wanted), "a load of", count, name, place,
                         "has a wrong lane", i);
        }
      });
    });
  });
  return verdict.text();
}

const char* check_loads_of_one() {
  Verdict verdict;
  Page page;
  each_storage([&](auto type, const char* name) {
    using S = decltype(type);
    page.each_place<S>(1, [&](S* p, const char* place) {
      page.clear();
      write_elements(p, 1);
      Acc<S> value = 0;
      verdict.expect(stays_inside([&] { value = load_scalar(p); }), "load_scalar of", name, place,
                     "reads beyond it");
      verdict.expect(value == accumulator<S>(0), "load_scalar of", name, place, "is wrong");
    });
  });
  return verdict.text();
}

const char* check_loads_of_indices() {
  Verdict verdict;
  Page page;
  const auto check = [&](auto type, const char* name) {
    using A = decltype(type);
    constexpr int L = kLanes<A>;
    page.each_place<Int<A>>(L, [&](Int<A>* p, const char* place) {
      page.clear();
      for (int i = 0; i < L; ++i) p[i] = -i;
      IntVec<A> v = {};
      verdict.expect(stays_inside([&] { v = load_index<A>(p); }), "load_index of", name, place,
                     "reads beyond them");
      for (int i = 0; i < L; ++i) {
        verdict.expect(v[i] == -i, "load_index of", name, place, "has a wrong lane", i);
      }
      page.clear();
      verdict.expect(stays_inside([&] { store_index<A>(p, v); }), "store_index of", name, place,
                     "writes beyond them");
      verdict.expect(page.untouched_beside(p, L), "store_index of", name, place,
                     "writes beside them");
      for (int i = 0; i < L; ++i) {
        verdict.expect(p[i] == -i, "store_index of", name, place, "has a wrong lane", i);
      }
    });
  };
  check(double{}, "int64");
  check(float{}, "int32");
  return verdict.text();
}

// -------------------------------------------------------------------------------------- stores

const char* check_stores() {
  Verdict verdict;
  Page page;
  each_storage([&](auto type, const char* name) {
    using S = decltype(type);
    using A = Acc<S>;
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = accumulator<S>(i);
    each_part<A>([&](auto part, int count) {
      page.each_place<S>(count, [&](S* p, const char* place) {
        page.clear();
        verdict.expect(stays_inside([&] { store(p, v, part); }), "a store of", count, name, place,
                       "writes beyond them");
        verdict.expect(page.untouched_beside(p, count), "a store of", count, name, place,
                       "writes beside them");
        for (int i = 0; i < count; ++i) {
          verdict.expect(same_bytes(p[i], element<S>(i)), "a store of", count, name, place,
                         "has a wrong lane", i);
        }
      });
    });
  });
  return verdict.text();
}

const char* check_stores_of_one() {
  Verdict verdict;
  Page page;
  each_storage([&](auto type, const char* name) {
    using S = decltype(type);
    page.each_place<S>(1, [&](S* p, const char* place) {
      page.clear();
      verdict.expect(stays_inside([&] { store_scalar(p, accumulator<S>(6)); }), "store_scalar of",
                     name, place, "writes beyond it");
      verdict.expect(page.untouched_beside(p, 1), "store_scalar of", name, place,
                     "writes beside it");
      verdict.expect(same_bytes(*p, element<S>(6)), "store_scalar of", name, place, "is wrong");
    });
  });
  return verdict.text();
}

// --------------------------------------------------------------------------------- whole arrays

// The idiom of the kernels, at every length up to four vectors and some.
const char* check_copies() {
  Verdict verdict;
  Page from_page, to_page;
  each_storage([&](auto type, const char* name) {
    using S = decltype(type);
    using A = Acc<S>;
    for (int64_t n = 0; n <= 4 * kLanes<A> + 3; ++n) {
      S* to = to_page.at_end<S>(n);
      from_page.each_place<S>(n, [&](S* from, const char* place) {
        to_page.clear();
        write_elements(from, n);
        const bool inside = stays_inside([&] {
          each_vector<A>(n,
                         [&](int64_t i, auto part) { store(to + i, load(from + i, part), part); });
        });
        verdict.expect(inside, "a copy of", n, name, place, "touches what is beyond them");
        verdict.expect(to_page.untouched_beside(to, n), "a copy of", n, name, "writes beside them");
        verdict.expect(std::memcmp(from, to, n * sizeof(S)) == 0, "a copy of", n, name, place,
                       "is no copy");
      });
    }
  });
  return verdict.text();
}

const char* check_vectors_cover_each_element_once() {
  Verdict verdict;
  const auto check = [&](auto type, const char* name) {
    using A = decltype(type);
    for (int64_t n = 0; n <= 5 * kLanes<A>; ++n) {
      int64_t next = 0;
      each_vector<A>(n, [&](int64_t i, auto part) {
        verdict.expect(i == next, "vectors of", n, name, "leave a gap before", i);
        if constexpr (std::is_same_v<decltype(part), Partial>) {
          verdict.expect(part.count >= 1 && part.count < kLanes<A>, "vectors of", n, name,
                         "end with one of", part.count);
          next = i + part.count;
        } else {
          next = i + kLanes<A>;
        }
      });
      verdict.expect(next == n, "vectors of", n, name, "end at", next);
    }
  };
  check(double{}, "float64");
  check(float{}, "float32");
  return verdict.text();
}

const char* check_transposes() {
  Verdict verdict;
  Page from_page, to_page;
  const auto check = [&](auto type, const char* name) {
    using A = decltype(type);
    constexpr int64_t kMost = 2 * kLanes<A> + 3;
    for (int64_t rows = 1; rows <= kMost; ++rows) {
      for (int64_t columns = 1; columns <= kMost; ++columns) {
        const int64_t n = rows * columns;
        if (!to_page.fits<A>(n)) continue;
        A* from = from_page.at_end<A>(n);
        A* to = to_page.at_end<A>(n);
        to_page.clear();
        for (int64_t i = 0; i < n; ++i) from[i] = static_cast<A>(i);
        const bool inside =
            stays_inside([&] { transpose(rows, columns, from, columns, to, rows); });
        verdict.expect(inside, "transpose of", rows, "x", columns, name,
                       "touches what is beyond them");
        verdict.expect(to_page.untouched_beside(to, n), "transpose of", rows, "x", columns, name,
                       "writes beside them");
        for (int64_t i = 0; i < n; ++i) {
          verdict.expect(to[i % columns * rows + i / columns] == from[i], "transpose of", rows, "x",
                         columns, name, "has element", i, "elsewhere");
        }
      }
    }
  };
  check(double{}, "float64");
  check(float{}, "float32");
  return verdict.text();
}

// ---------------------------------------------------------------------------------------- lanes

const char* check_lanes() {
  Verdict verdict;
  const auto check = [&](auto type, const char* name) {
    using A = decltype(type);
    constexpr int L = kLanes<A>;
    verdict.expect(L * sizeof(A) == CBAM_VECTOR_BYTES, "a vector has", L, name);
    const IntVec<A> places = iota<A>(), sevens = broadcast_index<A>(-7);
    const Vec<A> minus_zero = broadcast(-A{0}),
                 nan = broadcast(std::numeric_limits<A>::quiet_NaN());
    const Vec<A> infinite = broadcast(std::numeric_limits<A>::infinity());
    for (int i = 0; i < L; ++i) {
      verdict.expect(places[i] == i, "iota of", name, "is wrong in lane", i);
      verdict.expect(sevens[i] == -7, "broadcast_index of", name, "is wrong in lane", i);
      verdict.expect(same_bytes<A>(minus_zero[i], -A{0}), "broadcast of -0 in", name, "lane", i);
      verdict.expect(nan[i] != nan[i], "broadcast of NaN in", name, "lane", i);
      verdict.expect(infinite[i] == std::numeric_limits<A>::infinity(), "broadcast of inf in", name,
                     "lane", i);
    }
    each_part<A>([&](auto part, int count) {
      const Vec<A> filled = fill_absent(minus_zero, part, A{3});
      for (int i = 0; i < L; ++i) {
        verdict.expect(same_bytes<A>(filled[i], i < count ? -A{0} : A{3}), "fill_absent behind",
                       count, name, "is wrong in lane", i);
      }
    });
    for (uint32_t bits = 0; bits < 1u << L; ++bits) {
      IntVec<A> mask;
      for (int i = 0; i < L; ++i) mask[i] = (bits >> i & 1u) != 0 ? -1 : 0;
      verdict.expect(lane_bits<A>(mask) == bits, "lane_bits of", name, "is wrong for", bits);
      verdict.expect(any<A>(mask) == (bits != 0), "any of", name, "is wrong for", bits);
    }
  };
  check(double{}, "float64");
  check(float{}, "float32");
  return verdict.text();
}

// -------------------------------------------------------------------------- the checks themselves

// A load past the end must be caught here, or nothing above means anything.
const char* check_that_a_step_beyond_is_caught() {
  Verdict verdict;
  Page page;
  each_storage([&](auto type, const char* name) {
    using S = decltype(type);
    using A = Acc<S>;
    S* p = page.at_end<S>(kLanes<A> - 1);
    Vec<A> v = {};
    const bool loaded = stays_inside([&] {
      v = load(p, Full{});
      asm volatile("" : : "r"(&v) : "memory");  // all of it is wanted
    });
    verdict.expect(!loaded, "a load of one", name, "too many is not seen");
    verdict.expect(!stays_inside([&] { store(p, v, Full{}); }), "a store of one", name,
                   "too many is not seen");
    p = page.at_end<S>(kLanes<A>);
    verdict.expect(stays_inside([&] { store(p, v, Full{}); }), "a store of", name,
                   "is not allowed");
    verdict.expect(!page.untouched_beside(p + 1, kLanes<A> - 1), "a store of", name,
                   "leaves no trace");
  });
  return verdict.text();
}

}  // extern "C"
}  // namespace cbam::cpu::CBAM_ISA

#include "cpu/isa_end.h"
