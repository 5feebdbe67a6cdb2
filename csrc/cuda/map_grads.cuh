// Backward, launch 2: from the gradient of the gate to the gradients of its convolution.
//
//   reads and writes   small maps only ([N, P] accumulators), so its time hardly counts
//   launch             one block for each tile of pixels of each sample
//
// With dl = sa (1 - sa) sum_c g u it takes the transposed convolution, ds = conv^T dl, and the
// tile's part of the weights' gradient. Here the partial results of spans of channels meet.
#pragma once

#include "convolution.cuh"
#include "grads.cuh"

namespace cbam::cuda {

template <class S>
struct MapGrads {
  using A = Acc<S>;
  Tiling tiling;
  int64_t channels, height, width;
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

  // The gradient of the gate's logits.
  __device__ A dlogit(int64_t sample, int64_t pixel) const {
    const int64_t pixels = height * width;
    if (given_dlogits != nullptr) return load(given_dlogits + sample * pixels + pixel);
    A grad = 0;
    for (int64_t i = 0; i < spans; ++i) {
      grad += load(gate_grads + partials(sample) + i * pixels + pixel);
    }
    const A gate = load(sa + sample * pixels + pixel);
    return gate * (1 - gate) * grad;
  }

  __device__ int channel_argmax(int64_t sample, int64_t pixel) const {
    const int64_t pixels = height * width, at = partials(sample) + pixel;
    Argmax<A> best = {load(maxima + at), load(argmaxima + at)};
    for (int64_t i = 1; i < spans; ++i) {
      best.combine({load(maxima + at + i * pixels), load(argmaxima + at + i * pixels)});
    }
    return best.index;
  }
};

template <bool staged, class S>
__device__ __noinline__ void map_grads_of_tile(const MapGrads<S>& args, int64_t sample,
                                               int64_t tile_index) {
  using A = Acc<S>;
  const Tile tile = tile_at(args.tiling, args.height, args.width, tile_index);
  auto dlogits =
      make_window<staged, A>(args.tiling, tile, args.kernel, args.height, args.width,
                             [&args, sample](int64_t p) { return args.dlogit(sample, p); });
  const auto stat = [&](int map) {
    return make_window<staged, A>(
        args.tiling, tile, args.kernel, args.height, args.width,
        [&args, sample, map](int64_t p) { return channel_stat<A>(args, sample, map, p); });
  };
  auto mean = stat(0);
  auto highest = stat(1);
  Weights<staged, S> weights(args.conv_weight, args.kernel);
  A* memory = weights.stage(dlogits.stage(shared_memory<A>()));
  if (args.conv_grads != nullptr) highest.stage(mean.stage(memory));
  __syncthreads();

  const int64_t first_pixel =
      (sample * args.height + tile.first_row) * args.width + tile.first_column;
  if (args.pixel_grads != nullptr) {
    each_run(tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
      A of_mean[kRun] = {}, of_maximum[kRun] = {};
      correlate<true>(weights, 0, dlogits, row, column, of_mean);
      correlate<true>(weights, 1, dlogits, row, column, of_maximum);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (row + i >= tile.rows) break;
        const int64_t pixel = first_pixel + (row + i) * args.width + column;
        const int64_t in_sample = pixel - sample * args.height * args.width;
        const PixelGrad<A> grad{load(args.sa + pixel), of_mean[i] / static_cast<A>(args.channels),
                                of_maximum[i], args.channel_argmax(sample, in_sample)};
        store_struct(args.pixel_grads + pixel, grad);
      }
    });
  }
  if (args.conv_grads == nullptr) return;

  const int kernel = args.kernel, taps = kernel * kernel;
  A* const grads = args.conv_grads + (sample * args.tiling.tiles + tile_index) * (2 * taps + 1);
  // Units of work for a warp: kRun rows of weights in one column of one map, and the bias.
  const int rows = (kernel + kRun - 1) / kRun, units = 2 * kernel * rows;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int unit = static_cast<int>(threadIdx.x / kWarp); unit <= units; unit += kThreads / kWarp) {
    if (unit == units) {
      A sum = 0;
      each_run(tile, lane, kWarp, [&](int row, int column) {
        for (int i = 0; i < kRun && row + i < tile.rows; ++i) {
          sum += dlogits.at(row + i + kernel / 2, column + kernel / 2);
        }
      });
      sum = warp_sum(sum);
      if (lane == 0) store(grads + 2 * taps, sum);
      continue;
    }
    const int map = unit / (kernel * rows), dx = unit / rows % kernel, dy = unit % rows * kRun;
    const A sum = map == 0 ? weight_grads<A>(tile, kernel, dy, dx, dlogits, mean)
                           : weight_grads<A>(tile, kernel, dy, dx, dlogits, highest);
    constexpr int kShare = kWarp / kRun;  // lanes that hold the same sum
    const int tap = dy + lane / kShare;
    if (lane % kShare == 0 && tap < kernel) store(grads + (map * kernel + tap) * kernel + dx, sum);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    map_grads_kernel(const __grid_constant__ MapGrads<S> args) {
  wait_for_previous_launches();
  const int64_t sample = blockIdx.x / args.tiling.tiles;
  const int64_t tile = blockIdx.x - sample * args.tiling.tiles;
  if (args.tiling.staged) {
    map_grads_of_tile<true>(args, sample, tile);
  } else {
    map_grads_of_tile<false>(args, sample, tile);
  }
}

}  // namespace cbam::cuda
