// Backward, launch 2: from the gradient of the gate to the gradients of its convolution.
//
//   reads and writes   small maps only ([N, P] accumulators), so its time hardly counts
//   launch             one block for each tile of pixels of each sample
//
// With dl = sa (1 - sa) sum_c g u it takes the transposed convolution, ds = conv^T dl, and the
// tile's part of the weights' gradient. Here the partial results of spans of channels meet, while
// the tile is staged.
#pragma once

#include "channel_stats.cuh"
#include "convolution.cuh"

namespace cbam::cuda {

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

  // Where a tile leaves its part of the convolution's gradients; null where they are not wanted.
  __device__ A* conv_grads_of_block() const {
    if (conv_grads == nullptr) return nullptr;
    return conv_grads + int64_t{blockIdx.x} * (2 * kernel * kernel + 1);
  }
};

// What the launch before leaves of a pixel, in spans of channels.
template <class A>
struct PixelPartials {
  A map;  // of the pixel, not of a span: its dl where that is given, else its gate
  A gate_grad;
  A sum;
  Argmax<A> highest;

  template <class Args>
  static __device__ PixelPartials load(const Args& args, int64_t sample, int span, int64_t pixel) {
    const bool given = args.given_dlogits != nullptr;
    const int64_t at = partial_at(args, sample, span, pixel);
    const A* const map = given ? args.given_dlogits : args.sa;
    return {span == 0 ? cuda::load(map + sample * args.height * args.width + pixel) : A{0},
            given ? A{0} : cuda::load(args.gate_grads + at),
            cuda::load(args.sums + at),
            {cuda::load(args.maxima + at), cuda::load(args.argmaxima + at)}};
  }
  __device__ void combine(const PixelPartials& other) {
    gate_grad += other.gate_grad;
    sum += other.sum;
    highest.combine(other.highest);
  }
  // The gradient of the gate's logits.
  template <class Args>
  __device__ A dlogit(const Args& args) const {
    return args.given_dlogits != nullptr ? map : map * (1 - map) * gate_grad;
  }
};

// The maps of a tile in shared memory.
template <class A>
struct StagedMaps {
  Window window;
  const A* dlogits;
  const A* means;
  const A* maxima;
  const int* argmaxima;
};

// ds, and with it what the later launches need of each pixel. `weights` are flipped.
template <class S, class A>
__device__ void transposed_convolution(const MapGrads<S>& args, const Tile& tile,
                                       const StagedMaps<A>& maps, const A* weights) {
  const int kernel = args.kernel, padded = padded_column(kernel),
            parts = 1 << args.tiling.part_bits;
  const Window window = maps.window;
  with_kernel_size(kernel, [&](auto size) {
    each_run(args.tiling, [&](const Run& run) {
      A ds0[kRun] = {}, ds1[kRun] = {};
#pragma unroll 1
      for (int dx = run.part; dx < kernel; dx += parts) {
        const A* const values = maps.dlogits + window.at(run.row, run.column + dx);
        constexpr int K = decltype(size)::value;
        correlate<K>(kernel, weights + dx * padded, values, window.stride, ds0);
        correlate<K>(kernel, weights + (kernel + dx) * padded, values, window.stride, ds1);
      }
      const A of_mean = sum_run(ds0, parts), of_maximum = sum_run(ds1, parts);
      const int i = owned_pixel(args.tiling, tile, run);
      if (i < 0) return;
      const int64_t at =
          tile.sample * args.height * args.width + tile.pixel(args.width, run.row + i, run.column);
      const int staged = window.at(run.row + i + kernel / 2, run.column + kernel / 2);
      store_struct(args.pixel_grads + at, pixel_grad(load(args.sa + at), args.inverse_channels,
                                                     of_mean, of_maximum, maps.argmaxima[staged]));
    });
  });
}

// The tile's part of the convolution's gradients. A warp takes some rows of weights in one column
// of one map; the last warp takes the bias as well.
template <class S, class A>
__device__ void convolution_grads(const MapGrads<S>& args, const Tile& tile,
                                  const StagedMaps<A>& maps, A* conv_grads) {
  const int kernel = args.kernel, warp = static_cast<int>(threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  with_kernel_size(kernel, [&](auto size) {
    constexpr int K = decltype(size)::value;
    constexpr int kCount = K > 0 ? K : kRun;  // rows of weights
    constexpr int kSums = kCount <= 4 ? 4 : 8, kShare = kWarp / kSums;
    const int pieces = (kernel + kCount - 1) / kCount, units = 2 * kernel * pieces;
#pragma unroll 1
    for (int unit = warp; unit < units; unit += kThreads / kWarp) {
      const int column = unit / pieces, first_dy = unit % pieces * kCount;
      const int map = column >= kernel, dx = column - map * kernel;
      const A sum =
          weight_grads<kCount, kSums>(args.tiling, tile, maps.window, kernel, first_dy, dx,
                                      maps.dlogits, map == 0 ? maps.means : maps.maxima);
      const int i = lane / kShare, dy = first_dy + i;
      if (lane % kShare == 0 && i < kCount && dy < kernel) {
        store(conv_grads + (map * kernel + dy) * kernel + dx, sum);
      }
    }
  });
  if (warp != kThreads / kWarp - 1) return;  // the one with the least to do
  A sum = 0;
  each_pixel(tile, lane, kWarp, [&](int row, int column) {
    sum += maps.dlogits[maps.window.at(row + kernel / 2, column + kernel / 2)];
  });
  sum = warp_sum(sum);
  if (lane == 0) store(conv_grads + 2 * kernel * kernel, sum);
}

// In shared memory: weights [2, k, padded k], then the staged maps.
template <class S>
__device__ void map_grads_of_tile(const MapGrads<S>& args, const Tile& tile, Acc<S>* conv_grads) {
  using A = Acc<S>;
  const int kernel = args.kernel;
  const Window window = window_of(args.tiling, kernel);
  A* const weights = shared_memory<A>();
  A* const dlogits = weights + 2 * kernel * padded_column(kernel);
  A* const means = dlogits + window.size;
  A* const maxima = means + window.size;
  int* const argmaxima = reinterpret_cast<int*>(maxima + window.size);
  stage_weights<S, true>(args.conv_weight, kernel, weights);
  wait_for_previous_launches();
  stage_window<PixelPartials<A>>(
      args, tile, window, [&](int index, bool in_map, const PixelPartials<A>& partials) {
        dlogits[index] = in_map ? partials.dlogit(args) : A{0};
        means[index] = in_map ? partials.sum * args.inverse_channels : A{0};
        maxima[index] = in_map ? partials.highest.value : A{0};
        argmaxima[index] = partials.highest.index;
      });
  __syncthreads();
  const StagedMaps<A> maps{window, dlogits, means, maxima, argmaxima};
  if (args.pixel_grads != nullptr) transposed_convolution(args, tile, maps, weights);
  if (conv_grads != nullptr) convolution_grads(args, tile, maps, conv_grads);
}

template <class S>
__device__ void map_grads_from_memory(const MapGrads<S>& args, const Tile& tile,
                                      Acc<S>* conv_grads) {
  using A = Acc<S>;
  const int kernel = args.kernel;
  const auto partials = [&](int64_t pixel) {
    return join_spans<PixelPartials<A>>(args.spans, [&](int span) {
      return PixelPartials<A>::load(args, tile.sample, span, pixel);
    });
  };
  const auto dlogit = [&](int64_t pixel) { return partials(pixel).dlogit(args); };
  wait_for_previous_launches();
  if (args.pixel_grads != nullptr) {
    each_pixel(tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
      const auto transposed = [&](int map) {
        return correlate_from_memory<true, S>(args.conv_weight, map, kernel, args.height,
                                              args.width, tile.first_row + row,
                                              tile.first_column + column, dlogit);
      };
      const A ds0 = transposed(0), ds1 = transposed(1);
      const int64_t pixel = tile.pixel(args.width, row, column);
      const int64_t at = tile.sample * args.height * args.width + pixel;
      store_struct(args.pixel_grads + at, pixel_grad(load(args.sa + at), args.inverse_channels, ds0,
                                                     ds1, partials(pixel).highest.index));
    });
  }
  if (conv_grads == nullptr) return;
  const int taps = kernel * kernel, lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll 1
  for (int unit = static_cast<int>(threadIdx.x / kWarp); unit <= 2 * taps;
       unit += kThreads / kWarp) {
    const int map = unit / taps, tap = unit % taps;  // one unit more is the bias
    const int dy = tap / kernel - kernel / 2, dx = tap % kernel - kernel / 2;
    A sum = 0;
    each_pixel(tile, lane, kWarp, [&](int row, int column) {
      const A factor = dlogit(tile.pixel(args.width, row, column));
      if (unit == 2 * taps) {
        sum += factor;
        return;
      }
      const int64_t y = tile.first_row + row + dy, x = tile.first_column + column + dx;
      if (y < 0 || y >= args.height || x < 0 || x >= args.width) {
        sum += factor * 0;  // as padding with zeros does: a NaN stays one
        return;
      }
      const auto stats = partials(y * args.width + x);
      sum += factor * (map == 0 ? stats.sum * args.inverse_channels : stats.highest.value);
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
  const Tile tile = tile_of(args.tiling, args.height, args.width, static_cast<int>(blockIdx.x));
  if (args.tiling.staged) {
    map_grads_of_tile(args, tile, args.conv_grads_of_block());
  } else {
    map_grads_from_memory(args, tile, args.conv_grads_of_block());
  }
}

}  // namespace cbam::cuda
