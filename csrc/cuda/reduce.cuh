// What the sweeps add up, and how partial results meet.
//
// An accumulator is a struct with
//   combine(other)         the two together; bitwise the same whichever of them comes first
//   move_index(by)         counts its index, if it has one, from another place
//   shuffle(offset)        the accumulator of the lane at distance `offset` (by xor)
// Nothing is ever added with atomics: partial results meet in a fixed order.
#pragma once

#include "storage.cuh"

namespace cbam::cuda {

constexpr int kNoIndex = 2147483647;  // loses every tie

template <class A>
__device__ A lowest() {
  return -INFINITY;
}

// The larger; NaN wins, as in torch.max.
inline __device__ float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}
inline __device__ double maximum(double a, double b) { return a > b || a != a ? a : b; }

// A maximum and where it is. Ties, and NaNs among themselves, go to the lowest index. Comparisons
// are joined by & and |, which branch nowhere.
template <class A, class Index = int>
struct Argmax {
  A value;
  Index index;

  // Of elements of which `first` is the lowest index: if all are minus infinity, it is there, and
  // who meets no element wins nothing.
  static __device__ Argmax from(Index first) { return {lowest<A>(), first}; }
  __device__ void move_index(int by) { index += by; }

  // Indices come in rising order, so that equals change nothing, nor does anything after a NaN.
  __device__ void take(A next, Index at) {
    const bool better = !(next <= value) & (value == value);
    value = better ? next : value;
    index = better ? at : index;
  }
  __device__ void combine(const Argmax& other) {
    const bool larger = !(other.value <= value) & (value == value);
    const bool tie = (other.value == value) | ((other.value != other.value) & (value != value));
    const bool better = larger | (tie & (other.index < index));
    value = better ? other.value : value;
    index = better ? other.index : index;
  }
  __device__ Argmax shuffle(int offset) const {
    return {shuffle_xor(value, offset), shuffle_xor(index, offset)};
  }
};

// A maximum without its place, with the interface of Argmax.
template <class A>
struct Maximum {
  A value;

  static __device__ Maximum from(int) { return {lowest<A>()}; }
  __device__ void move_index(int) {}
  __device__ void take(A next, int) { value = maximum(next, value); }
  __device__ void combine(const Maximum& other) { value = maximum(value, other.value); }
  __device__ Maximum shuffle(int offset) const { return {shuffle_xor(value, offset)}; }
};

// Where there is none.
struct Nothing {
  static __device__ Nothing from(int) { return {}; }
  __device__ void move_index(int) {}
  __device__ void combine(const Nothing&) {}
  __device__ Nothing shuffle(int) const { return {}; }
};

// A plain sum.
template <class A>
struct Sum {
  A value;
  static __device__ Sum none() { return {0}; }
  __device__ void combine(const Sum& other) { value += other.value; }
  __device__ Sum shuffle(int offset) const { return {shuffle_xor(value, offset)}; }
};

// Some sums, and a maximum (Argmax, Maximum or Nothing).
template <class A, int count, class Extreme>
struct Totals : Extreme {
  A sums[count];

  static __device__ Totals from(int first) { return {Extreme::from(first), {}}; }
  __device__ void combine(const Totals& other) {
    Extreme::combine(other);
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] += other.sums[i];
  }
  __device__ Totals shuffle(int offset) const {
    Totals result = {Extreme::shuffle(offset), {}};
#pragma unroll
    for (int i = 0; i < count; ++i) result.sums[i] = shuffle_xor(sums[i], offset);
    return result;
  }
};

// Calls f(distance) for distances offset, offset / 2, ..., 1; offset is a power of two, or zero.
template <class F>
__device__ void each_distance(int offset, F&& f) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance <= offset) f(distance);
  }
}

// The total over groups of 2 * offset lanes, in all of them.
template <class Accumulator>
__device__ void meet(Accumulator& total, int offset) {
  each_distance(offset, [&](int distance) { total.combine(total.shuffle(distance)); });
}
// First the maximum alone, then the lowest index of lanes that had it: shorter than both at once.
template <class A, int count>
__device__ void meet(Totals<A, count, Argmax<A>>& total, int offset) {
  const A own = total.value;
  each_distance(offset, [&](int distance) {
    total.value = maximum(total.value, shuffle_xor(total.value, distance));
#pragma unroll
    for (int i = 0; i < count; ++i) total.sums[i] += shuffle_xor(total.sums[i], distance);
  });
  if (!((own == total.value) | (own != own))) total.index = kNoIndex;
  each_distance(offset, [&](int distance) {
    total.index = smaller(total.index, shuffle_xor(total.index, distance));
  });
}

// Totals of U rows over groups of `lanes` lanes, U <= lanes <= 32, both powers of two. Lane i of a
// group returns the total of row i / (lanes / U). Rows are dealt out while they are added, which
// takes U - 1 + log2(lanes / U) shuffles where U separate sums would take U log2(lanes).
template <int U, class Accumulator>
__device__ Accumulator reduce_rows(Accumulator (&rows)[U], int lanes) {
  int offset = lanes / 2;
#pragma unroll
  for (int half = U / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      Accumulator kept = upper ? rows[i + half] : rows[i];
      const Accumulator given = upper ? rows[i] : rows[i + half];
      kept.combine(given.shuffle(offset));
      rows[i] = kept;
    }
  }
  meet(rows[0], offset);
  return rows[0];
}

// Totals over groups of `lanes` threads, kThreads / lanes groups: of element i of `values` for each
// lane. `scratch` is shared memory for kThreads / 2 * W accumulators, which nobody else is using.
// Calls keep(element, total) for the elements [0, count), where element i of lane l is l * W + i;
// neighbouring threads have neighbouring elements.
template <int W, class Accumulator, class Keep>
__device__ void reduce_groups(Accumulator (&values)[W], int lanes, int count, Accumulator* scratch,
                              Keep&& keep) {
  constexpr int kSlots = kThreads / 2;
  constexpr int kSerial = 4;  // groups that one thread adds up in the end
  const int thread = static_cast<int>(threadIdx.x);
  const auto put = [&](int slot) {
#pragma unroll
    for (int i = 0; i < W; ++i) scratch[i * kSlots + slot] = values[i];
  };
  // The upper half of the threads that are left hands its values to the lower half. Thread t reads
  // slot t in the first step and is the one to write it later, so a barrier in each step is enough.
  const int last = smaller(kSlots, kSerial * lanes);
#pragma unroll 1
  for (int half = kSlots; half >= last; half /= 2) {
    if (thread >= half && thread < 2 * half) put(half == kSlots ? thread - half : thread);
    __syncthreads();
    if (thread < half) {
      const int from = half == kSlots ? thread : thread + half;
#pragma unroll
      for (int i = 0; i < W; ++i) values[i].combine(scratch[i * kSlots + from]);
    }
  }
  if (thread < last) put(thread);
  __syncthreads();
#pragma unroll 1
  for (int element = thread; element < count; element += kThreads) {
    const Accumulator* const from = scratch + element % W * kSlots + element / W;
    Accumulator total = from[0];
#pragma unroll 1
    for (int slot = lanes; slot < last; slot += lanes) total.combine(from[slot]);
    keep(element, total);
  }
}

// The sum over a warp, in every lane.
template <class A>
__device__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

// The logistic function. Every gate of the library's CUDA kernels comes from here, so that equal
// logits give equal gates.
inline __device__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }
inline __device__ double sigmoid(double logit) { return 1.0 / (1.0 + exp(-logit)); }

inline __device__ float relu(float value) { return value <= 0 ? 0 : value; }  // NaN stays NaN
inline __device__ double relu(double value) { return value <= 0 ? 0 : value; }

}  // namespace cbam::cuda
