// The statistics of u = ca x over the channels of a pixel, put together from what the sweeps leave
// of each span of channels; and launches that do only that, where PyTorch runs the convolution:
//
//   joined statistics   writes [N, 2, P]   mean and maximum of each pixel
//   pixel gradients     writes [N, P]      the same as map_grads.cuh, from gradients of the
//                                          statistics that come from outside
//
// Both read small maps only, and have a thread for each pixel.
#pragma once

#include "grads.cuh"
#include "reduce.cuh"

namespace cbam::cuda {

// Args are the arguments of a kernel, with the maps as sums, maxima and argmaxima, each
// [chunk, spans, P], with spans, height, width and inverse_channels, 1 / C.

// Mean (map 0) and maximum (map 1) of u over all channels at a pixel, from the spans' results.
template <class A, class Args>
__device__ A channel_stat(const Args& args, int64_t sample, int map, int64_t pixel) {
  const int64_t pixels = args.height * args.width;
  const A* const partials = (map == 0 ? args.sums : args.maxima) + sample * args.spans * pixels;
  A total = load(partials + pixel);
#pragma unroll 1
  for (int64_t i = 1; i < args.spans; ++i) {
    const A next = load(partials + i * pixels + pixel);
    total = map == 0 ? total + next : maximum(total, next);
  }
  return map == 0 ? total * args.inverse_channels : total;
}

// The channel of that maximum.
template <class A, class Args>
__device__ int channel_argmax(const Args& args, int64_t sample, int64_t pixel) {
  const int64_t pixels = args.height * args.width, at = sample * args.spans * pixels + pixel;
  Argmax<A> best = {load(args.maxima + at), load(args.argmaxima + at)};
  for (int64_t i = 1; i < args.spans; ++i) {
    best.combine({load(args.maxima + at + i * pixels), load(args.argmaxima + at + i * pixels)});
  }
  return best.index;
}

// What backward's later launches need of one pixel, to args.pixel_grads; ds0 and ds1 are the
// gradients of its mean and maximum over channels. args.gate_at(pixel of the chunk) is its gate.
template <class A, class Args>
__device__ void keep_pixel_grad(const Args& args, int64_t sample, int64_t pixel, A ds0, A ds1) {
  const int64_t at = sample * args.height * args.width + pixel;
  const A through_mean = ds0 * args.inverse_channels;
  const PixelGrad<A> grad{args.gate_at(at), through_mean, through_mean + ds1,
                          channel_argmax<A>(args, sample, pixel)};
  store_struct(args.pixel_grads + at, grad);
}

template <class A>
struct JoinedStats {
  int64_t samples, height, width;
  A inverse_channels;
  const A* sums;
  const A* maxima;
  int64_t spans;
  A* stats;  // [chunk, 2, P]
};

template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A>)
    joined_stats_kernel(const __grid_constant__ JoinedStats<A> args) {
  wait_for_previous_launches();
  const int64_t pixels = args.height * args.width;
  each_in_grid(args.samples * pixels, [&](int64_t i) {
    const int64_t sample = i / pixels, pixel = i - sample * pixels;
#pragma unroll
    for (int map = 0; map < 2; ++map) {
      store(args.stats + (2 * sample + map) * pixels + pixel,
            channel_stat<A>(args, sample, map, pixel));
    }
  });
}

template <class A>
struct PixelGrads {
  int64_t samples, height, width;
  A inverse_channels;
  const A* maxima;
  const int* argmaxima;
  int64_t spans;
  const A* sa;                // [chunk, P], or null where nobody asks for it
  const A* grad_stats;        // [chunk, 2, P]
  PixelGrad<A>* pixel_grads;  // [chunk, P]

  __device__ A gate_at(int64_t index) const { return sa == nullptr ? A{0} : load(sa + index); }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A>)
    pixel_grads_kernel(const __grid_constant__ PixelGrads<A> args) {
  wait_for_previous_launches();
  const int64_t pixels = args.height * args.width;
  each_in_grid(args.samples * pixels, [&](int64_t i) {
    const int64_t sample = i / pixels, pixel = i - sample * pixels;
    const A* const ds = args.grad_stats + 2 * sample * pixels + pixel;
    keep_pixel_grad(args, sample, pixel, load(ds), load(ds + pixels));
  });
}

}  // namespace cbam::cuda
