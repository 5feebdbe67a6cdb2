// Backward, launch 2: from the gradient of the gate to the gradients of its convolution.
//
//   reads and writes   small maps only ([N, P] accumulators), so its time hardly counts
//   launch             one block for each tile of pixels of each sample
//
// With dl = sa (1 - sa) sum_c g u it takes the transposed convolution, ds = conv^T dl, and the
// tile's part of the weights' gradient. Here the partial results of spans of channels meet.
#pragma once

#include "channel_stats.cuh"
#include "convolution.cuh"

namespace cbam::cuda {

// Where a block works. Kept in shared memory, where it takes no registers.
struct alignas(16) MapPlace {
  Tile tile;
  int64_t sample, index;  // of the tile in the sample
};
static_assert(sizeof(MapPlace) <= kPlaceBytes, "what the plan counts with");

template <class S>
struct MapGrads {
  using A = Acc<S>;
  Tiling tiling;
  int64_t height, width;
  A inverse_channels;  // 1 / C
  int kernel;
  ParameterView conv_weight;
  const A* gate_grads;     // [chunk, spans, P] sum_c g u
  const A* given_dlogits;  // [chunk, P] dl, where it comes from outside; or null
  const A* sa;             // [chunk, P]
  const A* sums;           // [chunk, spans, P] of u
  const A* maxima;         // [chunk, spans, P]
  const int* argmaxima;    // [chunk, spans, P]
  int64_t spans;
  PixelGrad<A>* pixel_grads;  // [chunk, P] or null
  A* conv_grads;              // [chunk, tiles, 2 k k + 1] weights, bias; or null

  __device__ int64_t partials(int64_t sample) const { return sample * spans * height * width; }

  // Where a tile leaves its part of the convolution's gradients; null where they are not wanted.
  __device__ A* conv_grads_of(const MapPlace& at) const {
    if (conv_grads == nullptr) return nullptr;
    return conv_grads + (at.sample * tiling.tiles + at.index) * (2 * kernel * kernel + 1);
  }

  __device__ A gate_at(int64_t index) const { return load(sa + index); }

  // The gradient of the gate's logits.
  __device__ A dlogit(int64_t sample, int64_t pixel) const {
    const int64_t pixels = height * width;
    if (given_dlogits != nullptr) return load(given_dlogits + sample * pixels + pixel);
    A grad = 0;
    for (int64_t i = 0; i < spans; ++i) {
      grad += load(gate_grads + partials(sample) + i * pixels + pixel);
    }
    const A gate = gate_at(sample * pixels + pixel);
    return gate * (1 - gate) * grad;
  }
};

// The tile's part of the bias' gradient, by the first warp.
template <class S, class A>
__device__ void sum_dlogits(const MapGrads<S>& args, int64_t sample, const Tile& tile, A* to) {
  if (threadIdx.x >= kWarp) return;
  A sum = 0;
  each_pixel(tile, static_cast<int>(threadIdx.x), kWarp, [&](int row, int column) {
    sum += args.dlogit(sample, (tile.first_row + row) * args.width + tile.first_column + column);
  });
  sum = warp_sum(sum);
  if (threadIdx.x == 0) store(to, sum);
}

template <class S, class A>
__device__ void map_grads_of_tile(const MapGrads<S>& args, int64_t sample, const Tile& tile,
                                  A* conv_grads) {
  const int kernel = args.kernel, taps = kernel * kernel;
  A* memory = shared_memory<A>(kPlaceBytes);
  const Window<A> dlogits = stage_map(args.tiling, tile, kernel, args.height, args.width, memory,
                                      [&](int64_t pixel) { return args.dlogit(sample, pixel); });
  const A* const weights = stage_weights<S>(args.conv_weight, kernel, memory);
  Window<A> stats[2] = {};
  if (conv_grads != nullptr) {
#pragma unroll
    for (int map = 0; map < 2; ++map) {
      stats[map] =
          stage_map(args.tiling, tile, kernel, args.height, args.width, memory,
                    [&](int64_t pixel) { return channel_stat<A>(args, sample, map, pixel); });
    }
  }
  __syncthreads();

  if (args.pixel_grads != nullptr) {
    each_run(tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
      A ds0[kRun] = {}, ds1[kRun] = {};
      correlate<true>(kernel, weights, dlogits, row, column, ds0);
      correlate<true>(kernel, weights + taps, dlogits, row, column, ds1);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (row + i >= tile.rows) break;
        const int64_t pixel = (tile.first_row + row + i) * args.width + tile.first_column + column;
        keep_pixel_grad(args, sample, pixel, ds0[i], ds1[i]);
      }
    });
  }
  if (conv_grads == nullptr) return;
  sum_dlogits(args, sample, tile, conv_grads + 2 * taps);

  // Units of work for a warp: kRun rows of weights in one column of one map.
  const int rows = (kernel + kRun - 1) / kRun, units = 2 * kernel * rows;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int unit = static_cast<int>(threadIdx.x / kWarp); unit < units; unit += kThreads / kWarp) {
    const int map = unit / (kernel * rows), dx = unit / rows % kernel, dy = unit % rows * kRun;
    const Window<A> stat = {map == 0 ? stats[0].values : stats[1].values, stats[0].stride};
    const A sum = weight_grads(tile, kernel, dy, dx, dlogits, stat);
    constexpr int kShare = kWarp / kRun;  // lanes that hold the same sum
    const int tap = dy + lane / kShare;
    if (lane % kShare == 0 && tap < kernel) {
      store(conv_grads + (map * kernel + tap) * kernel + dx, sum);
    }
  }
}

template <class S, class A>
__device__ void map_grads_of_tile_from_memory(const MapGrads<S>& args, int64_t sample,
                                              const Tile& tile, A* conv_grads) {
  const int kernel = args.kernel;
  if (args.pixel_grads != nullptr) {
    each_pixel(tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
      const int64_t y = tile.first_row + row, x = tile.first_column + column;
      const auto transposed = [&](int map) {
        return correlate_from_memory<true, S>(
            args.conv_weight, map, kernel, args.height, args.width, y, x,
            [&](int64_t pixel) { return args.dlogit(sample, pixel); });
      };
      keep_pixel_grad(args, sample, y * args.width + x, transposed(0), transposed(1));
    });
  }
  if (conv_grads == nullptr) return;
  sum_dlogits(args, sample, tile, conv_grads + 2 * kernel * kernel);
  const int taps = kernel * kernel, lane = static_cast<int>(threadIdx.x % kWarp);
  for (int unit = static_cast<int>(threadIdx.x / kWarp); unit < 2 * taps;
       unit += kThreads / kWarp) {
    const int map = unit / taps, tap = unit % taps;
    const int dy = tap / kernel - kernel / 2, dx = tap % kernel - kernel / 2;
    A sum = 0;
    each_pixel(tile, lane, kWarp, [&](int row, int column) {
      const int64_t y = tile.first_row + row, x = tile.first_column + column;
      const bool in_map = y + dy >= 0 && y + dy < args.height && x + dx >= 0 && x + dx < args.width;
      const A stat =
          in_map ? channel_stat<A>(args, sample, map, (y + dy) * args.width + x + dx) : A{0};
      sum += args.dlogit(sample, y * args.width + x) * stat;
    });
    sum = warp_sum(sum);
    if (lane == 0) store(conv_grads + unit, sum);
  }
}

// Of this kernel fewer blocks fit on a multiprocessor than of the sweeps: it needs the registers
// more than the threads.
template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>> / 2)
    map_grads_kernel(const __grid_constant__ MapGrads<S> args) {
  wait_for_previous_launches();
  MapPlace& at = *shared_memory<MapPlace>();
  if (threadIdx.x == 0) {
    at.sample = blockIdx.x / args.tiling.tiles;
    at.index = blockIdx.x - at.sample * args.tiling.tiles;
    at.tile = tile_at(args.tiling, args.height, args.width, at.index);
  }
  __syncthreads();
  if (args.tiling.staged) {
    map_grads_of_tile(args, at.sample, at.tile, args.conv_grads_of(at));
  } else {
    map_grads_of_tile_from_memory(args, at.sample, at.tile, args.conv_grads_of(at));
  }
}

}  // namespace cbam::cuda
