// The k x k convolution of the spatial gate on a tile of pixels, run by one block.
//
// A thread takes runs of kRun pixels of one column: it slides down the rows, so that a value is
// loaded once for kRun sums, and threads side by side read neighbouring values. The maps with their
// border of k // 2, and the weights, are staged in shared memory. Where k is so large that they do
// not fit, the same code reads them from global memory.
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

// A map around a tile, from k // 2 rows above and columns before it. Outside the map it is zero.
// `value` gives the map at a pixel.
template <bool staged, class A, class Value>
struct Window {
  __device__ Window(const Tiling& tiling, const Tile& tile, int kernel, int64_t height,
                    int64_t width, Value value)
      : value(value),
        top(tile.first_row - kernel / 2),
        left(tile.first_column - kernel / 2),
        height(height),
        width(width),
        rows((tiling.rows + kRun - 1) / kRun * kRun + kernel - 1),
        stride(tiling.columns + kernel - 1) {}

  // Fills shared memory; a barrier is due before it is read. Returns what follows it.
  __device__ A* stage(A* memory) {
    if constexpr (!staged) return memory;
    map = memory;
    for (int i = static_cast<int>(threadIdx.x); i < rows * stride; i += kThreads) {
      map[i] = from_memory(i / stride, i % stride);
    }
    return memory + rows * stride;
  }

  __device__ A at(int row, int column) const {
    if constexpr (staged) return map[row * stride + column];
    return from_memory(row, column);
  }

  __device__ A from_memory(int row, int column) const {
    const int64_t y = top + row, x = left + column;
    return y < 0 || y >= height || x < 0 || x >= width ? A{0} : value(y * width + x);
  }

  Value value;
  int64_t top, left, height, width;
  int rows, stride;
  A* map = nullptr;
};

template <bool staged, class A, class Value>
__device__ Window<staged, A, Value> make_window(const Tiling& tiling, const Tile& tile, int kernel,
                                                int64_t height, int64_t width, Value value) {
  return {tiling, tile, kernel, height, width, value};
}

// The weights [2, k, k] of the convolution.
template <bool staged, class S>
struct Weights {
  using A = Acc<S>;

  __device__ Weights(const ParameterView& view, int kernel) : view(view), kernel(kernel) {}

  __device__ A* stage(A* memory) {
    if constexpr (!staged) return memory;
    values = memory;
    const int taps = kernel * kernel;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * taps; i += kThreads) {
      const int tap = i % taps;
      values[i] = load_parameter<S>(view, i / taps, tap / kernel, tap % kernel);
    }
    return memory + 2 * taps;
  }

  __device__ A at(int map, int row, int column) const {
    if constexpr (staged) return values[(map * kernel + row) * kernel + column];
    return load_parameter<S>(view, map, row, column);
  }

  const ParameterView& view;
  int kernel;
  A* values = nullptr;
};

// Adds to sums[i] the correlation of the window with the weights of one map at pixel (row + i,
// column) of the tile. Turned by half a turn, the weights make it the transposed convolution.
template <bool turned, class A, class W, class V>
__device__ void correlate(const W& weights, int map, const V& window, int row, int column,
                          A (&sums)[kRun]) {
  const int kernel = weights.kernel;
#pragma unroll 1
  for (int dx = 0; dx < kernel; ++dx) {
    A values[kRun];
#pragma unroll
    for (int i = 0; i < kRun - 1; ++i) values[i] = window.at(row + i, column + dx);
#pragma unroll kRun
    for (int dy = 0; dy < kernel; ++dy) {
      values[kRun - 1] = window.at(row + kRun - 1 + dy, column + dx);
      const A weight =
          turned ? weights.at(map, kernel - 1 - dy, kernel - 1 - dx) : weights.at(map, dy, dx);
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[i] += weight * values[i];
#pragma unroll
      for (int i = 0; i < kRun - 1; ++i) values[i] = values[i + 1];
    }
  }
}

// Mean (map 0) and maximum (map 1) of u over all channels at a pixel, from the spans' results.
template <class A, class Args>
__device__ A channel_stat(const Args& args, int64_t sample, int map, int64_t pixel) {
  const int64_t pixels = args.height * args.width;
  const A* const partials = (map == 0 ? args.sums : args.maxima) + sample * args.spans * pixels;
  A total = load(partials + pixel);
  for (int64_t i = 1; i < args.spans; ++i) {
    const A next = load(partials + i * pixels + pixel);
    total = map == 0 ? total + next : maximum(total, next);
  }
  return map == 0 ? total / static_cast<A>(args.channels) : total;
}

// Calls f(first row, column) for the runs of a tile.
template <class F>
__device__ void each_run(const Tile& tile, int first, int step, F&& f) {
  const int runs = (tile.rows + kRun - 1) / kRun * tile.columns;
  for (int i = first; i < runs; i += step) f(i / tile.columns * kRun, i % tile.columns);
}

// ------------------------------------------------------- gradients of the convolution's weights

template <class A>
struct Sum {
  A value;
  __device__ void combine(const Sum& other) { value += other.value; }
  __device__ Sum shuffle(int offset) const { return {shuffle_xor(value, offset)}; }
};

// The tile's part of dW[map, dy, dx] = sum_p dl[p] s_map[p + (dy, dx) - k // 2] for kRun rows of
// weights from `first_dy` on, summed over a warp. Lane kWarp / kRun * i ends up with number i.
template <class A, class L, class V>
__device__ A weight_grads(const Tile& tile, int kernel, int first_dy, int dx, const L& dlogits,
                          const V& stats) {
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
