// The k x k convolution of the spatial gate on a tile of pixels, run by one block: its two maps and
// weights in shared memory, or, for a k so large that they do not fit, in plain loops over global
// memory (the functions *_from_memory).
//
// Work is dealt out in runs: kRun pixels below each other, for which a column of the window is
// loaded once. Where a tile has fewer runs than the block has threads, several threads share a run:
// each takes some of the columns of weights, and their sums meet by shuffles. So neighbouring
// threads read neighbouring values, and a small tile is over quickly.
#pragma once

#include "channel_stats.cuh"

namespace cbam::cuda {

// A block's tile: the part that lies in the map.
struct Tile {
  int64_t sample, first_row, first_column;
  int rows, columns;

  // Of a pixel of the tile in the sample's map.
  __device__ int64_t pixel(int64_t width, int row, int column) const {
    return (first_row + row) * width + first_column + column;
  }
};

inline __device__ Tile tile_of(const Tiling& tiling, int64_t height, int64_t width, int block) {
  const int tiles = static_cast<int>(tiling.tiles);
  const int column_tiles = static_cast<int>(tiling.column_tiles);
  const int sample = block / tiles, tile = block - sample * tiles;
  const int row = tile / column_tiles, column = tile - row * column_tiles;
  const int64_t first_row = int64_t{row} * tiling.rows;
  const int64_t first_column = int64_t{column} * tiling.columns;
  return {sample, first_row, first_column,
          static_cast<int>(smaller<int64_t>(tiling.rows, height - first_row)),
          static_cast<int>(smaller<int64_t>(tiling.columns, width - first_column))};
}

// Calls f(k as a tag): a constant for the sizes that people use, for which loops are unrolled, else
// zero.
template <class F>
__device__ void with_kernel_size(int kernel, F&& f) {
  if (kernel == 7) {
    f(std::integral_constant<int, 7>{});
  } else if (kernel == 3) {
    f(std::integral_constant<int, 3>{});
  } else {
    f(std::integral_constant<int, 0>{});
  }
}

// ---------------------------------------------------------------------------------- staging

// A tile of whole runs with its border of k // 2, as it lies in shared memory: `size` values.
struct Window {
  int stride, size;
  __device__ int at(int row, int column) const { return row * stride + column; }
};

inline __device__ Window window_of(const Tiling& tiling, int kernel) {
  const int stride = tiling.columns + kernel - 1;
  return {stride, (tiling.rows + kernel - 1) * stride};
}

// Fills a window from partial results of spans of channels: T has load(args, sample, span, pixel)
// and combine(), and keep(index in the window, whether it is in the map, total) takes it. Threads
// take neighbouring pixels, with several loads in flight: of several pixels where there is one
// span, else of several spans.
template <class T, class Args, class Keep>
__device__ void stage_window(const Args& args, const Tile& tile, const Window& window,
                             Keep&& keep) {
  const int64_t top = tile.first_row - args.kernel / 2;
  const int64_t left = tile.first_column - args.kernel / 2;
  const auto stage = [&](auto pixels_at_once, auto spans_at_once) {
    constexpr int kPixels = decltype(pixels_at_once)::value;
    for (int first = static_cast<int>(threadIdx.x); first < window.size;
         first += kPixels * kThreads) {
      int64_t pixels[kPixels];
      bool in_map[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const int index = first + i * kThreads;
        const int row = quotient(index, args.tiling.by_window_columns);
        const int64_t y = top + row, x = left + (index - row * window.stride);
        in_map[i] = index < window.size && y >= 0 && y < args.height && x >= 0 && x < args.width;
        pixels[i] = in_map[i] ? y * args.width + x : tile.pixel(args.width, 0, 0);
      }
      T totals[kPixels];
      join_spans<decltype(spans_at_once)::value>(
          static_cast<int>(args.spans), totals,
          [&](int i, int span) { return T::load(args, tile.sample, span, pixels[i]); });
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const int index = first + i * kThreads;
        if (index < window.size) keep(index, in_map[i], totals[i]);
      }
    }
  };
  if (args.spans == 1) {
    stage(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
  } else {
    stage(std::integral_constant<int, 1>{}, std::integral_constant<int, kSpansAtOnce>{});
  }
}

// Elements that a column of weights takes in shared memory: whole accesses of 16 bytes.
__device__ constexpr int padded_column(int kernel) {
  return (kernel + kColumnStep - 1) / kColumnStep * kColumnStep;
}

// The weights in shared memory, by columns: [2, k, padded k]. With
// `flipped` (turned by half a turn) they make it the transposed convolution.
template <class S, bool flipped>
__device__ void stage_weights(const ParameterView& view, int kernel, Acc<S>* to) {
  const int padded = padded_column(kernel);
  with_parameter<S>(view, [&](const auto* weights) {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kernel * padded; i += kThreads) {
      const int column = i / padded, dy = i - column * padded;
      const int map = column >= kernel, dx = column - map * kernel;
      if (dy < kernel) {
        to[i] = widen(load(weights + offset_in(view, map, flipped ? kernel - 1 - dy : dy,
                                               flipped ? kernel - 1 - dx : dx)));
      }
    }
  });
}

// ------------------------------------------------------------------------------ convolution

// A thread's part of a run.
struct Run {
  int row, column;  // of its first pixel in the tile
  int part;         // of the columns of weights: the thread takes this one, and each `parts` on
  bool present;     // all threads of a warp go through the same shuffles
};

// Calls f(run) for the runs of a tile, with some threads side by side for each.
template <class F>
__device__ void each_run(const Tiling& tiling, F&& f) {
  const int runs = tiling.rows / kRun * tiling.columns;
  const int bits = tiling.part_bits, units = runs << bits;
#pragma unroll 1
  for (int base = 0; base < units; base += kThreads) {
    const int unit = base + static_cast<int>(threadIdx.x);
    const int index = smaller(unit >> bits, runs - 1);
    const int row = quotient(index, tiling.by_columns);
    f(Run{row * kRun, index - row * tiling.columns, unit & ((1 << bits) - 1), unit < units});
  }
}

// The pixel of a run whose total a thread has after reduce_rows<kRun>(sums, parts): its distance
// from the first, negative where that is another thread's to keep.
inline __device__ int owned_pixel(const Tiling& tiling, const Tile& tile, const Run& run) {
  const int bits = tiling.part_bits - kRunBits, i = run.part >> bits;
  const bool owns =
      run.present && i << bits == run.part && run.row + i < tile.rows && run.column < tile.columns;
  return owns ? i : -1;
}

// Adds to sums[i] what one column of weights gives pixel i of a run; `values` is where the column
// of the window begins that it meets.
template <int K, class A>
__device__ void correlate(int kernel, const A* weights, const A* values, int stride,
                          A (&sums)[kRun]) {
  if constexpr (K > 0) {
    A factors[padded_column(K)];
    read_shared(weights, factors);
    A window[K + kRun - 1];
#pragma unroll
    for (int i = 0; i < K + kRun - 1; ++i) window[i] = values[i * stride];
#pragma unroll
    for (int dy = 0; dy < K; ++dy) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[i] += factors[dy] * window[dy + i];
    }
  } else {
    A window[kRun];
#pragma unroll
    for (int i = 0; i < kRun - 1; ++i) window[i] = values[i * stride];
#pragma unroll kRun
    for (int dy = 0; dy < kernel; ++dy) {
      window[kRun - 1] = values[(dy + kRun - 1) * stride];
      const A weight = weights[dy];
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[i] += weight * window[i];
#pragma unroll
      for (int i = 0; i < kRun - 1; ++i) window[i] = window[i + 1];
    }
  }
}

// The total of the run's pixel that this thread owns, from what the threads of a run have.
template <class A>
__device__ A sum_run(const A (&sums)[kRun], int parts) {
  Sum<A> rows[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) rows[i].value = sums[i];
  return reduce_rows<kRun>(rows, parts).value;
}

// Calls f(row, column) for the pixels of a tile.
template <class F>
__device__ void each_pixel(const Tile& tile, int first, int step, F&& f) {
#pragma unroll 1
  for (int i = first; i < tile.rows * tile.columns; i += step) {
    f(i / tile.columns, i % tile.columns);
  }
}

// The correlation of a map with its weights [k, k] at one pixel, from global memory; `value` gives
// the map by pixel.
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

// ------------------------------------------------------- gradients of the convolution's weights

// The tile's part of dW[dy, dx] = sum_p dl[p] s[p + (dy, dx) - k // 2] for `count` rows of weights
// from first_dy on, summed over a warp: lane kWarp / U * i ends up with number i, where U is the
// power of two that count fits into.
template <int count, int U, class A>
__device__ A weight_grads(const Tiling& tiling, const Tile& tile, const Window& window, int kernel,
                          int first_dy, int dx, const A* dlogits, const A* stats) {
  Sum<A> sums[U] = {};
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int runs = (tile.rows + kRun - 1) / kRun * tiling.columns;
#pragma unroll 1
  for (int index = lane; index < runs; index += kWarp) {
    const int run = quotient(index, tiling.by_columns);
    const int row = run * kRun, column = index - run * tiling.columns;
    if (column >= tile.columns) continue;
    const A* const values = stats + window.at(row + first_dy, column + dx);
    const A* const factors = dlogits + window.at(row + kernel / 2, column + kernel / 2);
    A below[count + kRun - 1];
#pragma unroll
    for (int i = 0; i < count + kRun - 1; ++i) {
      // Rows past the last weight are not in the window.
      below[i] = first_dy + i < kernel + kRun - 1 ? values[i * window.stride] : A{0};
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (row + i >= tile.rows) break;  // 0 * infinity would be NaN
      const A factor = factors[i * window.stride];
#pragma unroll
      for (int t = 0; t < count; ++t) sums[t].value += factor * below[i + t];
    }
  }
  return reduce_rows<U>(sums, kWarp).value;
}

}  // namespace cbam::cuda
