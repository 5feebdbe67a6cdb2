// Forward, launch 5: the spatial gate.
//
//   reads and writes   small maps only ([N, P] accumulators): the partial results of launch 4 on a
//                      tile with its border, the gate or its logits once
//   launch             one block for each tile of pixels of each sample
//
// The statistics of spans of channels meet while the tile is staged, once for each of its pixels.
//
// Where something stands between forward's phases, logits come from outside, and a small launch of
// its own makes gates of them.
#pragma once

#include "call.cuh"
#include "channel_stats.cuh"
#include "convolution.cuh"

namespace cbam::cuda {

template <class S>
struct SpatialGate {
  using A = Acc<S>;
  Tiling tiling;
  int64_t height, width;
  A inverse_channels;  // 1 / C
  int kernel;
  ParameterView conv_weight, conv_bias;
  const A* sums;    // [chunk, spans, P] of u over the channels of each span
  const A* maxima;  // [chunk, spans, P]
  int64_t spans;
  A* sa;      // [chunk, P] or null
  A* logits;  // [chunk, P] or null

  __device__ void keep(int64_t sample, int64_t pixel, A logit) const {
    const int64_t at = sample * height * width + pixel;
    if (sa != nullptr) store(sa + at, sigmoid(logit));
    if (logits != nullptr) store(logits + at, logit);
  }
};

// In shared memory: weights [2, k, padded k], mean and maximum [2, window].
template <class S>
__device__ void spatial_gate_of_tile(const SpatialGate<S>& args, const Tile& tile) {
  using A = Acc<S>;
  const int kernel = args.kernel, padded = padded_column(kernel);
  const Window window = window_of(args.tiling, kernel);
  A* const weights = shared_memory<A>();
  A* const means = weights + 2 * kernel * padded;
  A* const maxima = means + window.size;
  stage_weights<S, false>(args.conv_weight, kernel, weights);
  const A bias = load_bias<S>(args.conv_bias, 0);
  wait_for_previous_launches();
  stage_window<Stats<A>>(args, tile, window, [&](int index, bool in_map, const Stats<A>& stats) {
    means[index] = in_map ? stats.sum * args.inverse_channels : A{0};
    maxima[index] = in_map ? stats.highest : A{0};
  });
  __syncthreads();
  const int parts = 1 << args.tiling.part_bits;
  with_kernel_size(kernel, [&](auto size) {
    each_run(args.tiling, [&](const Run& run) {
      A sums[kRun] = {};
#pragma unroll 1
      for (int column = run.part; column < 2 * kernel; column += parts) {
        const int dx = column < kernel ? column : column - kernel;
        const A* const map = column < kernel ? means : maxima;
        correlate<decltype(size)::value>(kernel, weights + column * padded,
                                         map + window.at(run.row, run.column + dx), window.stride,
                                         sums);
      }
      const A logit = sum_run(sums, parts) + bias;
      const int i = owned_pixel(args.tiling, tile, run);
      if (i >= 0) args.keep(tile.sample, tile.pixel(args.width, run.row + i, run.column), logit);
    });
  });
}

template <class S>
__device__ void spatial_gate_from_memory(const SpatialGate<S>& args, const Tile& tile) {
  using A = Acc<S>;
  wait_for_previous_launches();
  each_pixel(tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
    A logit = load_bias<S>(args.conv_bias, 0);
#pragma unroll 1
    for (int map = 0; map < 2; ++map) {
      logit += correlate_from_memory<false, S>(
          args.conv_weight, map, args.kernel, args.height, args.width, tile.first_row + row,
          tile.first_column + column, [&](int64_t pixel) {
            const auto stats = join_spans<Stats<A>>(args.spans, [&](int span) {
              return Stats<A>::load(args, tile.sample, span, pixel);
            });
            return map == 0 ? stats.sum * args.inverse_channels : stats.highest;
          });
    }
    args.keep(tile.sample, tile.pixel(args.width, row, column), logit);
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>> / 2)
    spatial_gate_kernel(const __grid_constant__ SpatialGate<S> args) {
  const Tile tile = tile_of(args.tiling, args.height, args.width, static_cast<int>(blockIdx.x));
  if (args.tiling.staged) {
    spatial_gate_of_tile(args, tile);
  } else {
    spatial_gate_from_memory(args, tile);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A>)
    gates_kernel(const A* logits, A* gates, int64_t count) {
  wait_for_previous_launches();
  each_in_grid(count, [&](int64_t i) { store(gates + i, sigmoid(load(logits + i))); });
}

// Gates of the logits of a chunk.
template <class S, Layout layout, int W>
void launch_gates(const Chunk<S, layout, W>& chunk, const Acc<S>* logits, Acc<S>* gates) {
  const int64_t count = chunk.samples * chunk.problem.pixels();
  chunk.launcher.launch_each(gates_kernel<Acc<S>>, count, logits, gates, count);
}

}  // namespace cbam::cuda
