// Where partial results of spans of channels meet, pixel by pixel; and launches that do only that,
// where PyTorch runs the convolution:
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

constexpr int kSpansAtOnce = 8;  // whose partial results a thread has in flight

// Adds up the partial results of several elements, each in the order of the spans; T has combine().
//
//   load(element, span)   a partial result
template <int at_once, class T, int elements, class Load>
__device__ void join_spans(int spans, T (&totals)[elements], Load&& load) {
#pragma unroll
  for (int i = 0; i < elements; ++i) totals[i] = load(i, 0);
#pragma unroll 1
  for (int begin = 1; begin < spans; begin += at_once) {
    T next[elements][at_once];
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
#pragma unroll
      for (int i = 0; i < elements; ++i) next[i][j] = load(i, smaller(begin + j, spans - 1));
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (begin + j >= spans) break;
#pragma unroll
      for (int i = 0; i < elements; ++i) totals[i].combine(next[i][j]);
    }
  }
}

// The same for one element.
template <class T, class Load>
__device__ T join_spans(int64_t spans, Load&& load) {
  T total[1];
  join_spans<kSpansAtOnce>(static_cast<int>(spans), total,
                           [&](int, int span) { return load(span); });
  return total[0];
}

// Args are the arguments of a kernel, with the maps as sums, maxima and argmaxima, each
// [chunk, spans, P], with spans, height, width and inverse_channels, 1 / C.

// Offset of a partial result in such a map.
template <class Args>
__device__ int64_t partial_at(const Args& args, int64_t sample, int span, int64_t pixel) {
  return (sample * args.spans + span) * args.height * args.width + pixel;
}

// Sum and maximum of u over the channels of a pixel.
template <class A>
struct Stats {
  A sum, highest;

  template <class Args>
  static __device__ Stats load(const Args& args, int64_t sample, int span, int64_t pixel) {
    const int64_t at = partial_at(args, sample, span, pixel);
    return {cuda::load(args.sums + at), cuda::load(args.maxima + at)};
  }
  __device__ void combine(const Stats& other) {
    sum += other.sum;
    highest = maximum(highest, other.highest);
  }
};

// Maximum of u over the channels of a pixel, and its channel.
template <class A, class Args>
__device__ Argmax<A> load_argmax(const Args& args, int64_t sample, int span, int64_t pixel) {
  const int64_t at = partial_at(args, sample, span, pixel);
  return {load(args.maxima + at), load(args.argmaxima + at)};
}

// What backward's later launches need of one pixel; ds0 and ds1 are the gradients of its mean and
// maximum over channels, `gate` its spatial gate, `argmax` the channel of that maximum.
template <class A>
__device__ PixelGrad<A> pixel_grad(A gate, A inverse_channels, A ds0, A ds1, int argmax) {
  const A through_mean = ds0 * inverse_channels;
  return {gate, through_mean, through_mean + ds1, argmax};
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
    const auto stats = join_spans<Stats<A>>(
        args.spans, [&](int span) { return Stats<A>::load(args, sample, span, pixel); });
    A* const to = args.stats + 2 * sample * pixels + pixel;
    store(to, stats.sum * args.inverse_channels);
    store(to + pixels, stats.highest);
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
  const A* grad_stats;        // [chunk, 2, P], or null: no statistics, and nothing comes from them
  PixelGrad<A>* pixel_grads;  // [chunk, P]
};

template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A>)
    pixel_grads_kernel(const __grid_constant__ PixelGrads<A> args) {
  wait_for_previous_launches();
  const int64_t pixels = args.height * args.width;
  each_in_grid(args.samples * pixels, [&](int64_t i) {
    const A gate = args.sa == nullptr ? A{0} : load(args.sa + i);
    if (args.grad_stats == nullptr) {
      store_struct(args.pixel_grads + i, PixelGrad<A>{gate, 0, 0, kNoIndex});
      return;
    }
    const int64_t sample = i / pixels, pixel = i - sample * pixels;
    const A* const ds = args.grad_stats + 2 * sample * pixels + pixel;
    const A ds0 = load(ds), ds1 = load(ds + pixels);
    const auto highest = join_spans<Argmax<A>>(
        args.spans, [&](int span) { return load_argmax<A>(args, sample, span, pixel); });
    store_struct(args.pixel_grads + i,
                 pixel_grad(gate, args.inverse_channels, ds0, ds1, highest.index));
  });
}

}  // namespace cbam::cuda
