// The SIMD layer: a vector type per accumulator, loads and stores that convert storage to
// accumulator, and the few functions that the kernels need. Written on the vector extensions of GCC
// and Clang, so that one source serves every instruction set; intrinsics stand only where the
// compilers leave speed on the table.
//
// Included once per instruction set, after isa_begin.h and inside the namespace of that set: by
// isa.inl, and by the tests of this file alone.
//
// Ends of rows go through the same vector code as the rest, with loads and stores of the remaining
// lanes: a value never depends on where in a row it stands. That is what keeps exact ties exact.

constexpr int kVectorBytes = CBAM_VECTOR_BYTES;

// ------------------------------------------------------------------------------- vector types

template <class T, int bytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

// The same in memory: aligned like one element, and over elements of any type.
template <class T, int bytes = kVectorBytes>
struct StoredVectorOf {
  typedef T type __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
};

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

// The integer that masks and indices of accumulator A have.
template <class A>
using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

template <class A>
using IntVec = Vec<Int<A>>;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // not +: that would turn -0 into +0
}

template <class A, size_t... I>
inline IntVec<A> iota_impl(std::index_sequence<I...>) {
  return IntVec<A>{static_cast<Int<A>>(I)...};
}
template <class A>
inline IntVec<A> iota() {
  return iota_impl<A>(std::make_index_sequence<kLanes<A>>());
}

// a > b ? a : b in each lane; b where either is NaN, as x86's max does.
template <class V>
inline V max(V a, V b) {
#if CBAM_ISA_LEVEL == 2
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif CBAM_ISA_LEVEL == 1
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}

// --------------------------------------------------------------------------- loads and stores

// How much of a vector is there: all of it, or the first `count` lanes at the end of a row.
struct Full {};
struct Partial {
  int count;
};

// Calls f(offset, Full or Partial) for the vectors that cover [0, n).
template <class A, class F>
inline void each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Full{});
  if (i < n) f(i, Partial{static_cast<int>(n - i)});
}

// Lanes that are not there, replaced by `value` (loads leave zeros in them).
template <class A>
inline Vec<A> fill_absent(Vec<A> v, Full, A) {
  return v;
}
template <class A>
inline Vec<A> fill_absent(Vec<A> v, Partial tail, A value) {
  return iota<A>() < static_cast<Int<A>>(tail.count) ? v : broadcast(value);
}

template <class S, int lanes>
using Raw = typename VectorOf<S, static_cast<int>(sizeof(S)) * lanes>::type;
using StoredRaw = typename StoredVectorOf<uint16_t, kVectorBytes / 2>::type;

inline Vec<float> widen(Raw<uint16_t, kLanes<float>> bits, BFloat16) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

inline Raw<uint16_t, kLanes<float>> narrow(Vec<float> v, BFloat16) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  const Vec<uint32_t> nan = Vec<uint32_t>{} + 0x7fc0u;
  return __builtin_convertvector(v == v ? rounded : nan, Raw<uint16_t, kLanes<float>>);
}

#if CBAM_ISA_LEVEL == 2
inline Vec<float> widen(Raw<uint16_t, 16> bits, Half) {
  return (Vec<float>)_mm512_cvtph_ps(bit_cast<__m256i>(bits));
}
inline Raw<uint16_t, 16> narrow(Vec<float> v, Half) {
  return bit_cast<Raw<uint16_t, 16>>(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif CBAM_ISA_LEVEL == 1
inline Vec<float> widen(Raw<uint16_t, 8> bits, Half) {
  return (Vec<float>)_mm256_cvtph_ps(bit_cast<__m128i>(bits));
}
inline Raw<uint16_t, 8> narrow(Vec<float> v, Half) {
  return bit_cast<Raw<uint16_t, 8>>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// binary16 has 5 bits of exponent (bias 15) and 10 of fraction, binary32 8 (bias 127) and 23.
inline Vec<float> widen(Raw<uint16_t, kLanes<float>> half, Half) {
  const Vec<uint32_t> h = __builtin_convertvector(half, Vec<uint32_t>);
  const Vec<uint32_t> magnitude = h & 0x7fffu;
  const Vec<uint32_t> sign = (h & 0x8000u) << 16;
  const Vec<uint32_t> normal = (magnitude << 13) + ((127u - 15u) << 23);
  const Vec<uint32_t> infinite = (magnitude << 13) | 0x7f800000u;
  // A subnormal is its fraction times 2^-24; integers of 10 bits are exact in float.
  const Vec<float> tiny = __builtin_convertvector(magnitude, Vec<float>) * 0x1p-24f;
  Vec<uint32_t> bits = magnitude >= 0x7c00u ? infinite : normal;
  bits = magnitude < 0x0400u ? bit_cast<Vec<uint32_t>>(tiny) : bits;
  return bit_cast<Vec<float>>(bits | sign);
}
inline Raw<uint16_t, kLanes<float>> narrow(Vec<float> v, Half) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> sign = (bits >> 16) & 0x8000u;
  const Vec<uint32_t> magnitude = bits & 0x7fffffffu;
  // Normal results: move the bias, round the 13 bits that go away to nearest, ties to even. A carry
  // runs into the exponent as it should, up to infinity.
  const Vec<uint32_t> normal =
      (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 makes the hardware round to multiples of 2^-24, which stand in
  // the low bits of the sum.
  const Vec<float> shifted = bit_cast<Vec<float>>(magnitude) + 0.5f;
  const Vec<uint32_t> subnormal = bit_cast<Vec<uint32_t>>(shifted) - 0x3f000000u;
  Vec<uint32_t> half = magnitude < ((127u - 14u) << 23) ? subnormal : normal;
  half = magnitude >= ((127u + 16u) << 23) ? Vec<uint32_t>{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Vec<uint32_t>{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, Raw<uint16_t, kLanes<float>>);
}
#endif

// Storage to accumulator.
template <class S>
inline Vec<Acc<S>> load(const S* p, Full = {}) {
  if constexpr (std::is_same_v<S, Acc<S>>) {
    return *reinterpret_cast<const typename StoredVectorOf<S>::type*>(p);
  } else {
    return widen(*reinterpret_cast<const StoredRaw*>(p), S{});
  }
}

template <class S>
inline Vec<Acc<S>> load(const S* p, Partial tail) {
#if CBAM_ISA_LEVEL == 2
  const uint32_t mask = (1u << tail.count) - 1u;
  if constexpr (std::is_same_v<S, float>) {
    return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else if constexpr (sizeof(S) == 2) {
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
    return widen(bit_cast<Raw<uint16_t, 16>>(raw), S{});
  } else {
    return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  }
#else
  alignas(kVectorBytes) S lanes[kLanes<Acc<S>>] = {};
  for (int i = 0; i < tail.count; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

// Accumulator to storage, rounded once, to nearest even.
template <class S>
inline void store(S* p, Vec<Acc<S>> v, Full = {}) {
  if constexpr (std::is_same_v<S, Acc<S>>) {
    *reinterpret_cast<typename StoredVectorOf<S>::type*>(p) = v;
  } else {
    *reinterpret_cast<StoredRaw*>(p) = narrow(v, S{});
  }
}

template <class S>
inline void store(S* p, Vec<Acc<S>> v, Partial tail) {
#if CBAM_ISA_LEVEL == 2
  const uint32_t mask = (1u << tail.count) - 1u;
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else if constexpr (sizeof(S) == 2) {
    const __m256i raw = bit_cast<__m256i>(narrow(v, S{}));
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), raw);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  }
#else
  alignas(kVectorBytes) S lanes[kLanes<Acc<S>>];
  store(lanes, v);
  for (int i = 0; i < tail.count; ++i) p[i] = lanes[i];
#endif
}

template <class A>
inline IntVec<A> broadcast_index(int64_t value) {
  return IntVec<A>{} + static_cast<Int<A>>(value);
}
template <class A>
inline IntVec<A> load_index(const Int<A>* p) {
  return *reinterpret_cast<const typename StoredVectorOf<Int<A>>::type*>(p);
}
template <class A>
inline void store_index(Int<A>* p, IntVec<A> v) {
  *reinterpret_cast<typename StoredVectorOf<Int<A>>::type*>(p) = v;
}

template <class S>
inline Acc<S> load_scalar(const S* p) {
  if constexpr (std::is_same_v<S, Acc<S>>) {
    return *p;
  } else {
    return load(p, Partial{1})[0];
  }
}
template <class S>
inline void store_scalar(S* p, Acc<S> value) {
  if constexpr (std::is_same_v<S, Acc<S>>) {
    *p = value;
  } else {
    store(p, broadcast(value), Partial{1});
  }
}

// ----------------------------------------------------------------- reductions over the lanes

template <class Pattern, class V, size_t... I>
inline V shuffle_impl(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::at(I)...);
#else
  using Element = std::remove_reference_t<decltype(a[0])>;
  return __builtin_shuffle(a, b, IntVec<Element>{static_cast<Int<Element>>(Pattern::at(I))...});
#endif
}
template <class Pattern, class V>
inline V shuffle(V a, V b) {
  using Element = std::remove_reference_t<decltype(a[0])>;
  return shuffle_impl<Pattern>(a, b, std::make_index_sequence<kLanes<Element>>());
}
struct EvenLanes {
  static constexpr int at(size_t i) { return static_cast<int>(2 * i); }
};
struct OddLanes {
  static constexpr int at(size_t i) { return static_cast<int>(2 * i + 1); }
};

struct Add {
  template <class V>
  static V combine(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <class V>
  static V combine(V a, V b) {
    return max(a, b);
  }
};
struct Min {
  template <class V>
  static V combine(V a, V b) {
    return min(a, b);
  }
};

// Reduces each of `count` vectors (a power of two) over its lanes. Neighbouring lanes meet first,
// whatever the count: the bits of a result do not depend on which vectors were reduced along with
// it.
template <class Op, int count, class V>
inline auto reduce_lanes(const V* v) {
  using Element = std::remove_cv_t<std::remove_reference_t<decltype(v[0][0])>>;
  constexpr int lanes = kLanes<Element>;
  std::array<Element, count> results;
  if constexpr (count > lanes) {
    const auto low = reduce_lanes<Op, count / 2>(v);
    const auto high = reduce_lanes<Op, count / 2>(v + count / 2);
    std::copy(low.begin(), low.end(), results.begin());
    std::copy(high.begin(), high.end(), results.begin() + count / 2);
  } else {
    V level[count];
    for (int i = 0; i < count; ++i) level[i] = v[i];
    int left = count;
    for (int width = lanes; width > 1; width /= 2) {
      const int pairs = left > 1 ? left / 2 : 1;
      for (int i = 0; i < pairs; ++i) {
        const V a = level[left > 1 ? 2 * i : 0];
        const V b = level[left > 1 ? 2 * i + 1 : 0];
        level[i] = Op::combine(shuffle<EvenLanes>(a, b), shuffle<OddLanes>(a, b));
      }
      left = pairs;
    }
    for (int i = 0; i < count; ++i) results[i] = level[0][i];
  }
  return results;
}

template <class Op, class V>
inline auto reduce_lanes(V v) {
  return reduce_lanes<Op, 1>(&v)[0];
}

// One bit for each lane of a comparison's result.
template <class A>
inline uint32_t lane_bits(IntVec<A> mask) {
#if CBAM_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif CBAM_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps((__m256)mask);
  if constexpr (sizeof(A) == 8) return _mm256_movemask_pd((__m256d)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}
template <class A>
inline bool any(IntVec<A> mask) {
  return lane_bits<A>(mask) != 0;
}

// to[c][r] = from[r][c]. Blocks of whole vectors: each level takes the even and the odd lanes of
// neighbours apart, which moves one bit of a lane's number to the number of its row; after as many
// levels as that has bits the two have changed places.
template <class A>
inline void transpose(int64_t rows, int64_t columns, const A* from, int64_t from_stride, A* to,
                      int64_t to_stride) {
  constexpr int L = kLanes<A>;
  int64_t r = 0;
  for (; r + L <= rows; r += L) {
    int64_t c = 0;
    for (; c + L <= columns; c += L) {
      Vec<A> block[L], next[L];
      for (int i = 0; i < L; ++i) block[i] = load(from + (r + i) * from_stride + c);
      for (int bit = 1; bit < L; bit *= 2) {
        for (int i = 0; i < L / 2; ++i) {
          next[i] = shuffle<EvenLanes>(block[2 * i], block[2 * i + 1]);
          next[i + L / 2] = shuffle<OddLanes>(block[2 * i], block[2 * i + 1]);
        }
        std::copy_n(next, L, block);
      }
      for (int i = 0; i < L; ++i) store(to + (c + i) * to_stride + r, block[i]);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < L; ++i) to[c * to_stride + r + i] = from[(r + i) * from_stride + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

// -------------------------------------------------------------------------------------- sigmoid

// exp in about 1 ulp: x = n ln 2 + r, a polynomial for exp(r) (coefficients: Cephes, expf), and 2^n
// in two factors, so that overflow gives infinity and underflow 0 as they should. NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  x = x > 104.0f ? broadcast(104.0f) : x;
  x = x < -104.0f ? broadcast(-104.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504088896341f + round) - round;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<int32_t> exponent = __builtin_convertvector(n == n ? n : Vec<float>{}, Vec<int32_t>);
  const Vec<int32_t> half = exponent >> 1;
  const Vec<float> scale = bit_cast<Vec<float>>((half + 127) << 23);
  return p * scale * bit_cast<Vec<float>>((exponent - half + 127) << 23);
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The one sigmoid of all kernels: equal logits give equal bits.
template <class V>
inline V sigmoid(V x) {
  using Element = std::remove_reference_t<decltype(x[0])>;
  return Element{1} / (Element{1} + exp(-x));
}
