// Forward, launch 3: the spatial gate, and y.
//
//   reads and writes   the maps of launch 2, with a halo; x once, for the last time; y once
//   launch             one block for each tile of pixels, span of channels and sample
//
// A block first convolves its tile into gates in shared memory, then multiplies. Where there are
// few tiles, the channels are spread over several blocks, each of which convolves again. The logits
// may come from outside instead (ApplyArgs).
#pragma once

#include "channel_stats.cuh"
#include "convolution.cuh"

namespace cbam::cuda {

template <class S>
struct GateArgs {
  using A = Acc<S>;
  Tiling tiling;
  Gate gate;
  int64_t channels, height, width;
  A inverse_channels;  // 1 / C
  int kernel;
  ParameterView conv_weight, conv_bias;
  const A* sums;    // [chunk, spans, P] of u over the channels of each span
  const A* maxima;  // [chunk, spans, P]
  int64_t spans;
  const A* given_logits;  // [chunk, P]; where it is not null, nothing is convolved
  const A* ca;            // [chunk, C]
  const S* x;             // [chunk, C, H, W]
  S* y;                   // [chunk, C, H, W] or null, as the following are
  A* sa;                  // [chunk, P]
  A* logits;              // [chunk, P]
};

// Where a block works. Kept in shared memory, where it takes no registers.
struct alignas(16) GatePlace {
  Tile tile;
  int64_t sample, first_channel;
  int channels;
  bool writes_maps;  // one of the blocks of a tile does

  // Where a pixel of the tile lies in the maps [chunk, P].
  template <class S>
  __device__ int64_t pixel(const GateArgs<S>& args, int row, int column) const {
    return (sample * args.height + tile.first_row + row) * args.width + tile.first_column + column;
  }
};
static_assert(sizeof(GatePlace) <= kPlaceBytes, "what the plan counts with");

// The gate of one pixel, to shared memory and to the maps that are wanted.
template <class S, class A>
__device__ void keep_gate(const GateArgs<S>& args, const GatePlace& at, int row, int column,
                          A logit, A* gates) {
  const A gate = sigmoid(logit);
  gates[row * args.tiling.columns + column] = gate;
  if (!at.writes_maps) return;
  const int64_t pixel = at.pixel(args, row, column);
  if (args.sa != nullptr) store(args.sa + pixel, gate);
  if (args.logits != nullptr) store(args.logits + pixel, logit);
}

// The gates of a tile; `memory` is shared memory behind them.
template <class S, class A>
__device__ void convolve_tile(const GateArgs<S>& args, const GatePlace& at, A* gates, A* memory) {
  const int kernel = args.kernel;
  Window<A> stats[2];
#pragma unroll
  for (int map = 0; map < 2; ++map) {
    stats[map] =
        stage_map(args.tiling, at.tile, kernel, args.height, args.width, memory,
                  [&](int64_t pixel) { return channel_stat<A>(args, at.sample, map, pixel); });
  }
  const A* const weights = stage_weights<S>(args.conv_weight, kernel, memory);
  __syncthreads();
  each_run(at.tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
    const A bias = load_bias<S>(args.conv_bias, 0);
    A logits[kRun] = {bias, bias, bias, bias};
    correlate<false>(kernel, weights, stats[0], row, column, logits);
    correlate<false>(kernel, weights + kernel * kernel, stats[1], row, column, logits);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (row + i >= at.tile.rows) break;
      keep_gate(args, at, row + i, column, logits[i], gates);
    }
  });
}

template <class S>
__device__ Acc<S> convolve_from_memory(const GateArgs<S>& args, const GatePlace& at, int row,
                                       int column) {
  using A = Acc<S>;
  A logit = load_bias<S>(args.conv_bias, 0);
#pragma unroll 1
  for (int map = 0; map < 2; ++map) {
    logit += correlate_from_memory<false, S>(
        args.conv_weight, map, args.kernel, args.height, args.width, at.tile.first_row + row,
        at.tile.first_column + column,
        [&](int64_t pixel) { return channel_stat<A>(args, at.sample, map, pixel); });
  }
  return logit;
}

// y = sa u on a tile, for the channels of the block.
template <class S, Layout layout, int W>
__device__ void apply_gates(const GateArgs<S>& args, const GatePlace& place, const Acc<S>* gates) {
  using A = Acc<S>;
  constexpr int U = 4;  // accesses of a thread in flight
  constexpr bool kNchw = layout == Layout::kNCHW;
  const int64_t pixels = args.height * args.width;
  const A* const ca = args.ca + place.sample * args.channels + place.first_channel;
  const int tile_pixels = args.tiling.rows * args.tiling.columns;
  const int rows = kNchw ? place.channels : tile_pixels;
  const int columns = kNchw ? tile_pixels : place.channels;
  const int lanes = args.gate.lanes, groups = args.gate.groups;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int group = static_cast<int>(threadIdx.x) / lanes;

  // Where pixel q of the tile lies in the sample; -1 if it is in no tile of the map.
  const auto pixel_of = [&](int q) -> int64_t {
    const int row = row_of(args.tiling, q), column = q - row * args.tiling.columns;
    if (row >= place.tile.rows || column >= place.tile.columns) return -1;
    return (place.tile.first_row + row) * args.width + place.tile.first_column + column;
  };
  for (int column = lane * W; column < columns; column += lanes * W) {
    A column_gates[W];
    int64_t origin;  // of the thread's columns in the feature map
    if constexpr (kNchw) {
      const int64_t pixel = pixel_of(column);
      if (pixel < 0) continue;
      origin = (place.sample * args.channels + place.first_channel) * pixels + pixel;
#pragma unroll
      for (int i = 0; i < W; ++i) column_gates[i] = gates[column + i];
    } else {
      origin = place.sample * pixels * args.channels + place.first_channel + column;
      load_values<W>(ca + column, column_gates);
    }
#pragma unroll 1
    for (int base = group; base < rows; base += groups * U) {
      Packed<S, W> x[U];
      int64_t at[U];
      A row_gates[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int row = base + u * groups;
        at[u] = -1;
        if (row >= rows) continue;
        if constexpr (kNchw) {
          at[u] = origin + row * pixels;
        } else {
          const int64_t pixel = pixel_of(row);
          if (pixel < 0) continue;
          at[u] = origin + pixel * args.channels;
        }
        x[u] = load_packed<S, W, Use::kLast>(args.x + at[u]);
        row_gates[u] = kNchw ? load(ca + row) : gates[row];
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (at[u] < 0) continue;
        A values[W];
        unpack<S, W>(x[u], values);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          // The same order in both layouts: u first.
          values[i] = kNchw ? column_gates[i] * (row_gates[u] * values[i])
                            : row_gates[u] * (column_gates[i] * values[i]);
        }
        store_output<S, W>(args.y + at[u], values);
      }
    }
  }
}

template <class S>
__device__ GatePlace gate_place(const GateArgs<S>& args) {
  const int64_t unit = blockIdx.x / args.tiling.tiles;
  GatePlace at;
  at.tile = tile_at(args.tiling, args.height, args.width, blockIdx.x - unit * args.tiling.tiles);
  at.sample = unit / args.gate.channel_spans;
  const int64_t span = unit - at.sample * args.gate.channel_spans;
  at.first_channel = span * args.gate.channel_span;
  at.channels = static_cast<int>(smaller(args.gate.channel_span, args.channels - at.first_channel));
  at.writes_maps = span == 0;
  return at;
}

template <class S, Layout layout, int W>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    gate_kernel(const __grid_constant__ GateArgs<S> args) {
  using A = Acc<S>;
  wait_for_previous_launches();
  GatePlace& at = *shared_memory<GatePlace>();
  if (threadIdx.x == 0) at = gate_place(args);
  __syncthreads();

  A* const gates = shared_memory<A>(kPlaceBytes);
  if (args.given_logits == nullptr && args.tiling.staged) {
    convolve_tile(args, at, gates, gates + args.tiling.rows * args.tiling.columns);
  } else {
    each_pixel(at.tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
      const A logit = args.given_logits == nullptr
                          ? convolve_from_memory(args, at, row, column)
                          : load(args.given_logits + at.pixel(args, row, column));
      keep_gate(args, at, row, column, logit, gates);
    });
  }
  if (args.y == nullptr) return;
  __syncthreads();
  apply_gates<S, layout, W>(args, at, gates);
}

}  // namespace cbam::cuda
