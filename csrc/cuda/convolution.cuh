// The k x k convolution of the spatial gate on a tile of pixels, run by one block.
//
// A thread takes runs of kRun pixels of one column: it slides down the rows, so that a value is
// loaded once for kRun sums, and threads side by side read neighbouring values. The maps with their
// border of k // 2, and the weights, are staged in shared memory. Where k is so large that they do
// not fit, plain loops read them from global memory (the functions *_from_memory).
#pragma once

#include "reduce.cuh"

namespace cbam::cuda {

// The part of a tile that lies in the map.
struct Tile {
  int64_t first_row, first_column;
  int rows, columns;
};

inline __device__ Tile tile_at(const Tiling& tiling, int64_t height, int64_t width, int64_t index) {
  const int64_t row = index / tiling.column_tiles, column = index - row * tiling.column_tiles;
  const int64_t first_row = row * tiling.rows, first_column = column * tiling.columns;
  return {first_row, first_column,
          static_cast<int>(smaller<int64_t>(tiling.rows, height - first_row)),
          static_cast<int>(smaller<int64_t>(tiling.columns, width - first_column))};
}

// Row of the tile's pixel q, counted along the rows of the whole tile.
inline __device__ int row_of(const Tiling& tiling, int q) {
  return static_cast<int>((static_cast<uint64_t>(q) * tiling.reciprocal) >> 32);
}

// ---------------------------------------------------------------------------------- staging

// A map around a tile in shared memory, from k // 2 rows above and columns before it. Outside the
// map it is zero.
template <class A>
struct Window {
  const A* values;
  int stride;
  __device__ A at(int row, int column) const { return values[row * stride + column]; }
};

// Stages a map, which `value` gives by pixel, and moves `memory` behind it. A barrier is due before
// it is read.
template <class A, class Value>
__device__ Window<A> stage_map(const Tiling& tiling, const Tile& tile, int kernel, int64_t height,
                               int64_t width, A*& memory, Value&& value) {
  const int rows = (tiling.rows + kRun - 1) / kRun * kRun + kernel - 1;
  const int stride = tiling.columns + kernel - 1;
  const int64_t top = tile.first_row - kernel / 2, left = tile.first_column - kernel / 2;
  A* const values = memory;
  memory += rows * stride;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x / kWarp); row < rows; row += kThreads / kWarp) {
    const int64_t y = top + row;
    const bool in_map = y >= 0 && y < height;
#pragma unroll 1
    for (int column = lane; column < stride; column += kWarp) {
      const int64_t x = left + column;
      values[row * stride + column] = in_map && x >= 0 && x < width ? value(y * width + x) : A{0};
    }
  }
  return {values, stride};
}

// Stages the weights [2, k, k], likewise.
template <class S>
__device__ const Acc<S>* stage_weights(const ParameterView& view, int kernel, Acc<S>*& memory) {
  Acc<S>* const values = memory;
  const int taps = kernel * kernel;
  memory += 2 * taps;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < 2 * taps; i += kThreads) {
    const int tap = i % taps;
    values[i] = load_parameter<S>(view, i / taps, tap / kernel, tap % kernel);
  }
  return values;
}

// ------------------------------------------------------------------------------ convolution

// Adds to sums[i] the correlation of the window with the weights [k, k] of one map at pixel
// (row + i, column) of the tile. Flipped (turned by half a turn), the weights make it the
// transposed convolution.
template <bool flipped, class A>
__device__ void correlate(int kernel, const A* weights, const Window<A>& window, int row,
                          int column, A (&sums)[kRun]) {
#pragma unroll 1
  for (int dx = 0; dx < kernel; ++dx) {
    A values[kRun];
#pragma unroll
    for (int i = 0; i < kRun - 1; ++i) values[i] = window.at(row + i, column + dx);
#pragma unroll kRun
    for (int dy = 0; dy < kernel; ++dy) {
      values[kRun - 1] = window.at(row + kRun - 1 + dy, column + dx);
      const A weight = flipped ? weights[(kernel - 1 - dy) * kernel + kernel - 1 - dx]
                               : weights[dy * kernel + dx];
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[i] += weight * values[i];
#pragma unroll
      for (int i = 0; i < kRun - 1; ++i) values[i] = values[i + 1];
    }
  }
}

// The same for one pixel of the map, from global memory.
template <bool flipped, class S, class Value>
__device__ Acc<S> correlate_from_memory(const ParameterView& weights, int map, int kernel,
                                        int64_t height, int64_t width, int64_t row, int64_t column,
                                        Value&& value) {
  Acc<S> sum = 0;
#pragma unroll 1
  for (int dy = 0; dy < kernel; ++dy) {
    const int64_t y = row + dy - kernel / 2;
    if (y < 0 || y >= height) continue;
#pragma unroll 1
    for (int dx = 0; dx < kernel; ++dx) {
      const int64_t x = column + dx - kernel / 2;
      if (x < 0 || x >= width) continue;
      sum += load_parameter<S>(weights, map, flipped ? kernel - 1 - dy : dy,
                               flipped ? kernel - 1 - dx : dx) *
             value(y * width + x);
    }
  }
  return sum;
}

// Calls f(row, column) for the pixels of a tile.
template <class F>
__device__ void each_pixel(const Tile& tile, int first, int step, F&& f) {
#pragma unroll 1
  for (int i = first; i < tile.rows * tile.columns; i += step) {
    f(i / tile.columns, i % tile.columns);
  }
}

// Calls f(first row, column) for the runs of a tile.
template <class F>
__device__ void each_run(const Tile& tile, int first, int step, F&& f) {
  const int runs = (tile.rows + kRun - 1) / kRun * tile.columns;
#pragma unroll 1
  for (int i = first; i < runs; i += step) f(i / tile.columns * kRun, i % tile.columns);
}

// ------------------------------------------------------- gradients of the convolution's weights

template <class A>
struct Sum {
  A value;
  __device__ void combine(const Sum& other) { value += other.value; }
  __device__ Sum shuffle(int offset) const { return {shuffle_xor(value, offset)}; }
};

// The tile's part of dW[dy, dx] = sum_p dl[p] s[p + (dy, dx) - k // 2] for kRun rows of weights
// from `first_dy` on, summed over a warp. Lane kWarp / kRun * i ends up with number i.
template <class A>
__device__ A weight_grads(const Tile& tile, int kernel, int first_dy, int dx,
                          const Window<A>& dlogits, const Window<A>& stats) {
  Sum<A> sums[kRun] = {};
  each_run(tile, static_cast<int>(threadIdx.x % kWarp), kWarp, [&](int row, int column) {
    A values[2 * kRun - 1];
#pragma unroll
    for (int i = 0; i < 2 * kRun - 1; ++i) {
      // Rows past the last weight are not in the window.
      values[i] = first_dy + i < kernel + kRun - 1 ? stats.at(row + first_dy + i, column + dx) : 0;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (row + i >= tile.rows) break;  // 0 * infinity would be NaN
      const A weight = dlogits.at(row + i + kernel / 2, column + kernel / 2);
#pragma unroll
      for (int t = 0; t < kRun; ++t) sums[t].value += weight * values[i + t];
    }
  });
  return reduce_rows<kRun>(sums, kWarp).value;
}

}  // namespace cbam::cuda
