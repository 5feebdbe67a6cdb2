// What the sweeps add up, and how partial results meet.
//
// An accumulator is a struct with
//   combine(other)         the two together; bitwise the same whichever of them comes first
//   retire()               it will meet no element, and must not win a tie
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

// A maximum and where it is. Ties, and NaNs among themselves, go to the lowest index.
template <class A, class Index = int>
struct Argmax {
  A value;
  Index index;

  // `first` is the first index that will be taken: a row of minus infinities has its maximum
  // there.
  static __device__ Argmax from(Index first) { return {lowest<A>(), first}; }
  __device__ void retire() { index = kNoIndex; }
  __device__ void move_index(int by) { index += by; }

  // Indices come in rising order, so that equals change nothing, nor does anything after a NaN.
  __device__ void take(A next, Index at) {
    if (!(next <= value) && value == value) {
      value = next;
      index = at;
    }
  }
  __device__ void combine(const Argmax& other) {
    bool better = other.value > value || (other.value == value && other.index < index);
    if (value != value || other.value != other.value) {
      better = other.value != other.value && (value == value || other.index < index);
    }
    if (better) *this = other;
  }
  __device__ Argmax shuffle(int offset) const {
    return {shuffle_xor(value, offset), shuffle_xor(index, offset)};
  }
};

// Where a sweep needs nothing of one kind.
struct Nothing {
  __device__ void retire() {}
  __device__ void move_index(int) {}
  __device__ void combine(const Nothing&) {}
  __device__ Nothing shuffle(int) const { return {}; }
};

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
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (step <= offset) rows[0].combine(rows[0].shuffle(step));
  }
  return rows[0];
}

// Totals over groups of threads: element i of `values` for each of `lanes` threads that make up a
// group, kThreads / lanes groups. They end up in `scratch`, shared memory for kThreads / 2 * W
// accumulators: element i of lane l at scratch[i * (kThreads / 2) + l].
template <int W, class Accumulator>
__device__ void reduce_groups(Accumulator (&values)[W], int lanes, Accumulator* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto share = [&](int begin, int end) {
    __syncthreads();
    if (thread >= begin && thread < end) {
#pragma unroll
      for (int i = 0; i < W; ++i) scratch[i * (kThreads / 2) + thread - begin] = values[i];
    }
    __syncthreads();
  };
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    share(half, 2 * half);
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < W; ++i) values[i].combine(scratch[i * (kThreads / 2) + thread]);
    }
  }
  share(0, lanes);
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
