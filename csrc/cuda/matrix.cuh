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

// W neighbouring values of shared memory, those behind the first `present` as zero.
template <int W, class A>
__device__ void read_present(const A* from, int present, A (&to)[W]) {
  read_shared(from, to);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i >= present) to[i] = 0;
  }
}

// How the threads of a block share a part of a matrix.
template <bool wide, class T>
struct Share {
  static constexpr int W = kWide<T>;                 // columns of a thread
  static constexpr int kRows = (wide ? 16 : 8) / W;  // that are in flight
  const T* weights;
  int64_t row_stride, column_stride;
  int rows, columns;  // of the part
  int lanes, groups;  // of lanes: each has rows of its own
  int lane, group;    // of the thread

  __device__ Share(const T* weights, const Matrix& matrix, const Part& part)
      : weights(weights),
        row_stride(matrix.weights.strides[2]),
        column_stride(matrix.weights.strides[3]),
        rows(part.rows),
        columns(part.columns),
        lanes(matrix.lanes),
        groups(kThreads / matrix.lanes),
        lane(static_cast<int>(threadIdx.x) & (matrix.lanes - 1)),
        group(static_cast<int>(threadIdx.x) / matrix.lanes) {}

  // The thread's columns of the tile at `first`; those of another thread where there are none, so
  // that no branch stands between loads.
  __device__ bool has(int first) const { return first + lane * W < columns; }
  __device__ int column(int first) const { return has(first) ? first + lane * W : 0; }
  // How many of them there are; in the other case all, and no question for the compiler.
  __device__ int present(int column) const { return wide ? W : columns - column; }

  __device__ const T* at(int row, int column) const {
    return weights + row * row_stride + column * column_stride;
  }
  // U rows of the group, from `row` on.
  template <int U>
  __device__ void fetch(int row, int column, Weights<T, wide> (&to)[U]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const T* const from = at(smaller(row + u * groups, rows - 1), column);
      to[u].fetch(from, column_stride, present(column));
    }
  }
};

// A kernel that multiplies later begins with this: parameters are not written by launches, so it
// need not wait for those before.
template <class S>
__device__ void prefetch_weights(const Matrix& matrix, const Part& part) {
  with_weights<S>(matrix, part, [&](const auto* weights, auto wide) {
    const Share<decltype(wide)::value, std::remove_cv_t<std::remove_pointer_t<decltype(weights)>>>
        share(weights, matrix, part);
#pragma unroll 1
    for (int row = share.group; row < share.rows; row += share.groups) {
#pragma unroll 1
      for (int first = 0; first < share.columns; first += share.lanes * share.W) {
        if (share.has(first)) prefetch(share.at(row, share.column(first)));
      }
    }
  });
}

// U rows of each group of multiply_rows, from `base` on.
template <int U, int V, bool wide, class T, class Keep>
__device__ void multiply_some_rows(const Share<wide, T>& share, int base, const Acc<T>* vectors,
                                   int pitch, Keep&& keep) {
  using A = Acc<T>;
  constexpr int W = kWide<T>;
  A sums[U][V] = {};
#pragma unroll 1
  for (int first = 0; first < share.columns; first += share.lanes * W) {
    const int column = share.column(first), present = share.present(column);
    Weights<T, wide> weights[U];
    share.fetch(base + share.group, column, weights);
    A values[V][W];
#pragma unroll
    for (int v = 0; v < V; ++v) read_present(vectors + v * pitch + column, present, values[v]);
    if (!share.has(first)) continue;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A factors[W];
      weights[u].widened(present, factors);
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < W; ++i) sums[u][v] += factors[i] * values[v][i];
      }
    }
  }
  for (int offset = share.lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[u][v] += shuffle_xor(sums[u][v], offset);
    }
  }
  if (share.lane != 0) return;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int row = base + u * share.groups + share.group;
    if (row < share.rows) keep(row, sums[u]);
  }
}

// sum_j matrix[i][j] vectors[v][j] for the rows i of a part and V vectors, which lie `pitch` apart.
// Lanes share a row. keep(row, sums) is called by one of them; rows count from the part's first.
template <class S, int V, class Keep>
__device__ void multiply_rows(const Matrix& matrix, const Part& part, const Acc<S>* vectors,
                              int pitch, Keep&& keep) {
  with_weights<S>(matrix, part, [&](const auto* weights, auto wide) {
    const Share<decltype(wide)::value, std::remove_cv_t<std::remove_pointer_t<decltype(weights)>>>
        share(weights, matrix, part);
    constexpr int kRows = decltype(share)::kRows;
    // All threads take the same turns, for they meet in shuffles.
    int base = 0;
#pragma unroll 1
    for (; base + share.groups < share.rows; base += kRows * share.groups) {
      multiply_some_rows<kRows, V>(share, base, vectors, pitch, keep);
    }
    if (base < share.rows) multiply_some_rows<1, V>(share, base, vectors, pitch, keep);
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
                                 int pitch, Sum<Acc<S>>* scratch, Keep&& keep) {
  using A = Acc<S>;
  with_weights<S>(matrix, part, [&](const auto* weights, auto wide) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(weights)>>;
    constexpr bool kIsWide = decltype(wide)::value;
    constexpr int W = kWide<T>;
    const Share<kIsWide, T> share(weights, matrix, part);
    constexpr int U = Share<kIsWide, T>::kRows;
#pragma unroll 1
    for (int first = 0; first < share.columns; first += share.lanes * W) {
      const int column = share.column(first), present = share.present(column);
      Sum<A> sums[V * W] = {};
#pragma unroll 1
      for (int base = share.group; base < share.rows; base += U * share.groups) {
        Weights<T, kIsWide> loaded[U];
        share.fetch(base, column, loaded);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int row = base + u * share.groups;
          if (row >= share.rows) continue;
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
      if (first > 0) __syncthreads();  // scratch may still be read
      meet_in_block(sums, share.lanes, smaller(share.rows, share.groups) * share.lanes, scratch);
      if (share.group > 0 || !share.has(first)) continue;
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
