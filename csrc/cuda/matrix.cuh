// Products of a weight matrix of the MLP with vectors in shared memory, by one block. A lane takes
// as many neighbouring columns of a row as 16 bytes hold, in one access where strides and alignment
// allow it: these decide nothing else, so sums have the same bits however a parameter lies in
// memory. Several rows are in flight.
#pragma once

#include <algorithm>

#include "spans.cuh"

namespace cbam::cuda {

// A parameter [rows, columns] of any strides.
struct Matrix {
  ParameterView weights;
  bool wide;  // whether accesses of 16 bytes fit into its rows
  int lanes;  // side by side along a row: a power of two up to kWarp
};

// Host side. A block works on up to `columns` of its columns, beginning at a multiple of that,
// which is a power of two; or on all, where these are fewer.
inline Matrix matrix_of(const ParameterView& weights, int64_t columns) {
  const int64_t width = 16 / element_size(weights.dtype);
  const int64_t all = weights.sizes[3];
  Matrix matrix{weights, false, 0};
  matrix.wide = weights.strides[3] == 1 && weights.strides[2] % width == 0 && all % width == 0 &&
                reinterpret_cast<uintptr_t>(weights.data) % 16 == 0;
  const int64_t pieces = power_of_two_from(divide_up(std::min(columns, all), width));
  matrix.lanes = static_cast<int>(std::min<int64_t>(pieces, kWarp));
  return matrix;
}

// A part of a matrix.
struct Part {
  int64_t first_row, first_column;
  int rows, columns;
};

// A lane's weights of a row, the first `present` of W: as they come from memory, so that what is in
// flight takes few registers, and as accumulators.
template <class T, bool wide>
struct Weights {
  static constexpr int W = kWide<T>;
  Packed<T, W> packed;
  __device__ void fetch(const T* from, int64_t, int) { packed = load_weights<W>(from); }
  __device__ void widened(int, Acc<T> (&to)[W]) const { unpack<T, W>(packed, to); }
};
template <class T>
struct Weights<T, false> {
  static constexpr int W = kWide<T>;
  T values[W];
  __device__ void fetch(const T* from, int64_t stride, int present) {
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = load(from + smaller(i, present - 1) * stride);
  }
  __device__ void widened(int present, Acc<T> (&to)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) to[i] = i < present ? widen(values[i]) : Acc<T>{0};
  }
};

// Calls f(pointer to the weights of the part, whether accesses are wide as a tag).
template <class S, class F>
__device__ void with_weights(const Matrix& matrix, const Part& part, F&& f) {
  with_parameter<S>(matrix.weights, [&](const auto* weights) {
    weights += offset_in(matrix.weights, 0, part.first_row, part.first_column);
    if (matrix.wide) {
      f(weights, std::true_type{});
    } else {
      f(weights, std::false_type{});
    }
  });
}

// The first `present` of W neighbouring values of shared memory, 16-byte aligned; zero behind them.
template <int W, class A>
__device__ void read_shared(const A* from, int present, A (&to)[W]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(W * sizeof(A) / 16); ++i) {
    const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
    memcpy(to + i * (16 / sizeof(A)), &bits, sizeof(bits));
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i >= present) to[i] = 0;
  }
}

// sum_j matrix[i][j] vectors[v][j] for the rows i of a part and V vectors, which lie `pitch` apart.
// Lanes share a row. keep(row, sums) is called by one of them; rows count from the part's first.
template <class S, int V, class Keep>
__device__ void multiply_rows(const Matrix& matrix, const Part& part, const Acc<S>* vectors,
                              int pitch, Keep&& keep) {
  using A = Acc<S>;
  with_weights<S>(matrix, part, [&](const auto* weights, auto wide) {
    using Weight = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
    using Some = Weights<Weight, decltype(wide)::value>;
    constexpr int W = Some::W;
    constexpr int U = decltype(wide)::value ? 4 : 8 / W;  // rows in flight
    const int64_t row_stride = matrix.weights.strides[2];
    const int64_t column_stride = matrix.weights.strides[3];
    const int lanes = matrix.lanes, groups = kThreads / lanes;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const int group = static_cast<int>(threadIdx.x) / lanes;
    // All threads make the same number of turns, for they meet in shuffles.
#pragma unroll 1
    for (int base = 0; base < part.rows; base += groups * U) {
      A sums[U][V] = {};
#pragma unroll 1
      for (int first = 0; first < part.columns; first += lanes * W) {
        // Those without a row or a column load another's: no branch stands between loads.
        const int own = first + lane * W;
        const int column = own < part.columns ? own : 0, present = part.columns - column;
        Some loaded[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int row = smaller(base + u * groups + group, part.rows - 1);
          loaded[u].fetch(weights + row * row_stride + column * column_stride, column_stride,
                          present);
        }
        A values[V][W];
#pragma unroll
        for (int v = 0; v < V; ++v) read_shared(vectors + v * pitch + column, present, values[v]);
        if (own >= part.columns) continue;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          A factors[W];
          loaded[u].widened(present, factors);
#pragma unroll
          for (int v = 0; v < V; ++v) {
#pragma unroll
            for (int i = 0; i < W; ++i) sums[u][v] += factors[i] * values[v][i];
          }
        }
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[u][v] += shuffle_xor(sums[u][v], offset);
        }
      }
      if (lane != 0) continue;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int row = base + u * groups + group;
        if (row < part.rows) keep(row, sums[u]);
      }
    }
  });
}

// Sums of a block in multiply_columns: each thread has W for each vector.
template <class S, int V>
constexpr int kColumnSums = V * kWide<S> * kThreads;

// sum_i matrix[i][j] vectors[v][i] for the columns j of a part and V vectors, which lie `pitch`
// apart. Groups of lanes share the rows. keep(column, sums) is called by one thread, always the
// same for a column; columns count from the part's first. `scratch` is shared memory for
// kColumnSums<S, V>.
template <class S, int V, class Keep>
__device__ void multiply_columns(const Matrix& matrix, const Part& part, const Acc<S>* vectors,
                                 int pitch, Total<Acc<S>>* scratch, Keep&& keep) {
  using A = Acc<S>;
  with_weights<S>(matrix, part, [&](const auto* weights, auto wide) {
    using Weight = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
    using Some = Weights<Weight, decltype(wide)::value>;
    constexpr int W = Some::W;
    constexpr int U = decltype(wide)::value ? 4 : 8 / W;  // rows in flight
    const int64_t row_stride = matrix.weights.strides[2];
    const int64_t column_stride = matrix.weights.strides[3];
    const int lanes = matrix.lanes, groups = kThreads / lanes;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const int group = static_cast<int>(threadIdx.x) / lanes;
#pragma unroll 1
    for (int first = 0; first < part.columns; first += lanes * W) {
      const int own = first + lane * W;
      const int column = own < part.columns ? own : 0, present = part.columns - column;
      Total<A> sums[V * W] = {};
#pragma unroll 1
      for (int base = group; base < part.rows; base += groups * U) {
        Some loaded[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int row = smaller(base + u * groups, part.rows - 1);
          loaded[u].fetch(weights + row * row_stride + column * column_stride, column_stride,
                          present);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int row = base + u * groups;
          if (row >= part.rows) continue;
          A factors[W];
          loaded[u].widened(present, factors);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A value = vectors[v * pitch + row];
#pragma unroll
            for (int i = 0; i < W; ++i) sums[v * W + i].value += factors[i] * value;
          }
        }
      }
      meet(sums, lanes, scratch);
      if (group > 0 || own >= part.columns) continue;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (i >= present) continue;
        A totals[V];
#pragma unroll
        for (int v = 0; v < V; ++v) totals[v] = sums[v * W + i].value;
        keep(column + i, totals);
      }
    }
  });
}

}  // namespace cbam::cuda
