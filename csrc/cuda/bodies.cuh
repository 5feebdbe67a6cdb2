// The bodies of the sweeps (sweep.cuh): what they add up or write, in the order in which they run.
//
//   Pool            x      per channel  sum, maximum                         (forward, launch 1)
//   ChannelStats    x      per pixel    sum and maximum of u = ca x          (forward, launch 4)
//   Apply           x      y                                                 (forward, launch 6)
//   GateGrads       x, g   per pixel    sum_c g u, and ChannelStats          (backward, launch 1)
//                          per channel  sum_p g sa x
//   BackwardPool    x      per channel  Pool, and sum_p x (gradient of s)    (backward, launch 3)
//   PoolGrads       x, g   per channel  Pool, and sum_p g x                  (channel gate alone)
//   InputGrad       g      dx                                                (backward, launch 6)
//
// Pointers lead to the first sample of a chunk. Maps per pixel are [chunk, channel spans, P], maps
// per channel [chunk, pixel spans, C], of accumulators.
#pragma once

#include "grads.cuh"
#include "sweep.cuh"

namespace cbam::cuda {

// What all bodies have; each hides what it has of its own.
template <class S>
struct Body {
  using Storage = S;
  using A = Acc<S>;
  using Pixel = Nothing;
  using Channel = Nothing;
  using PixelFactor = Nothing;
  using ChannelFactor = Nothing;
  static constexpr int kInputs = 1;
  // As many as registers are left for.
  template <Layout>
  static constexpr int kRowsDown = sizeof(S) == 4 ? 4 : 2;
  static constexpr int kRowsAlong = 2, kPieces = 2;
  static constexpr bool kEarly = true;
  static constexpr bool kReversed = false;
  static constexpr Use kUse = Use::kAgain;
  static constexpr bool kWrites = false;

  int64_t channels, pixels;
  int64_t pixel_spans, channel_spans;
  const S* x;  // [chunk, C, H, W] in its layout: the first input, whatever its name
  const S* g;  // the second

  __device__ Nothing start_pixel(int) const { return {}; }
  __device__ Nothing start_channel(int) const { return {}; }
  template <int W>
  __device__ void pixel_factors(const Place&, int, Nothing (&)[W]) const {}
  template <int W>
  __device__ void channel_factors(const Place&, int, Nothing (&)[W]) const {}
  __device__ void store_pixel(const Place&, int, const Nothing&) const {}
  __device__ void store_channel(const Place&, int, const Nothing&) const {}

  // Offsets in maps: of the sample alone, and of partial results.
  __device__ int64_t pixel_at(const Place& at, int pixel) const { return at.pixel_origin + pixel; }
  __device__ int64_t channel_at(const Place& at, int channel) const {
    return at.channel_origin + channel;
  }
  __device__ int64_t partial_pixel_at(const Place& at, int pixel) const {
    return (int64_t{at.sample} * channel_spans + at.channel_span) * pixels + at.first_pixel + pixel;
  }
  __device__ int64_t partial_channel_at(const Place& at, int channel) const {
    return (int64_t{at.sample} * pixel_spans + at.pixel_span) * channels + at.first_channel +
           channel;
  }
};

template <class S>
struct Pool : Body<S> {
  using A = Acc<S>;
  using Channel = Totals<A, 1, Maximum<A>>;

  A* sums;
  A* maxima;

  __device__ Channel start_channel(int first) const { return Channel::from(first); }
  __device__ A visit(A x, A, int pixel, int, const Nothing&, const Nothing&, Nothing&,
                     Channel& of_channel) const {
    of_channel.sums[0] += x;
    of_channel.take(x, pixel);
    return x;
  }
  __device__ void store_channel(const Place& at, int channel, const Channel& total) const {
    const int64_t to = this->partial_channel_at(at, channel);
    store(sums + to, total.sums[0]);
    store(maxima + to, total.value);
  }
};

template <class S, bool kArgmax>
struct ChannelStats : Body<S> {
  using A = Acc<S>;
  using Pixel = Totals<A, 1, std::conditional_t<kArgmax, Argmax<A>, Maximum<A>>>;
  using ChannelFactor = A;  // ca
  static constexpr bool kReversed = !kArgmax;

  const A* ca;  // [chunk, C]
  A* sums;
  A* maxima;
  int* argmaxima;  // channels, where kArgmax

  __device__ Pixel start_pixel(int first) const { return Pixel::from(first); }
  template <int W>
  __device__ void channel_factors(const Place& at, int channel, A (&to)[W]) const {
    load_values<W>(ca + this->channel_at(at, channel), to);
  }
  __device__ A visit(A x, A, int, int channel, const Nothing&, const A& gate, Pixel& of_pixel,
                     Nothing&) const {
    const A u = gate * x;
    of_pixel.sums[0] += u;
    of_pixel.take(u, channel);
    return x;
  }
  __device__ void store_pixel(const Place& at, int pixel, const Pixel& total) const {
    const int64_t to = this->partial_pixel_at(at, pixel);
    store(sums + to, total.sums[0]);
    store(maxima + to, total.value);
    if constexpr (kArgmax) store(argmaxima + to, total.index);
  }
};

// y = sa ca x.
template <class S>
struct Apply : Body<S> {
  using A = Acc<S>;
  using PixelFactor = A;    // sa
  using ChannelFactor = A;  // ca
  static constexpr Use kUse = Use::kLast;
  static constexpr bool kWrites = true;

  S* output;    // y
  const A* ca;  // [chunk, C]
  const A* sa;  // [chunk, P]

  template <int W>
  __device__ void pixel_factors(const Place& at, int pixel, A (&to)[W]) const {
    load_values<W>(sa + this->pixel_at(at, pixel), to);
  }
  template <int W>
  __device__ void channel_factors(const Place& at, int channel, A (&to)[W]) const {
    load_values<W>(ca + this->channel_at(at, channel), to);
  }
  __device__ A visit(A x, A, int, int, const A& spatial, const A& gate, Nothing&, Nothing&) const {
    return spatial * (gate * x);
  }
};

// The sweep over (x, g). With kStats it is the first launch of backward; without, it is the
// gradient of the second phase alone.
template <class S, bool kStats>
struct GateGrads : Body<S> {
  using A = Acc<S>;
  // Sums of g u and, with statistics, of u.
  using Pixel = std::conditional_t<kStats, Totals<A, 2, Argmax<A>>, Totals<A, 1, Nothing>>;
  using Channel = Totals<A, 1, Nothing>;
  using PixelFactor = A;    // sa
  using ChannelFactor = A;  // ca
  static constexpr int kInputs = 2;
  template <Layout layout>
  static constexpr int kRowsDown = sizeof(S) == 4 || layout == Layout::kNHWC ? 2 : 1;
  static constexpr bool kEarly = false;

  const A* ca;    // [chunk, C]
  const A* sa;    // [chunk, P]
  A* gate_grads;  // sum_c g u
  A* sums;        // as in ChannelStats
  A* maxima;
  int* argmaxima;
  A* dots;  // sum_p g sa x

  __device__ Pixel start_pixel(int first) const { return Pixel::from(first); }
  __device__ Channel start_channel(int first) const { return Channel::from(first); }
  template <int W>
  __device__ void pixel_factors(const Place& at, int pixel, A (&to)[W]) const {
    load_values<W>(sa + this->pixel_at(at, pixel), to);
  }
  template <int W>
  __device__ void channel_factors(const Place& at, int channel, A (&to)[W]) const {
    load_values<W>(ca + this->channel_at(at, channel), to);
  }
  __device__ A visit(A x, A g, int, int channel, const A& spatial, const A& gate, Pixel& of_pixel,
                     Channel& of_channel) const {
    const A product = g * x;
    of_pixel.sums[0] += gate * product;
    of_channel.sums[0] += spatial * product;
    if constexpr (kStats) {
      const A u = gate * x;
      of_pixel.sums[1] += u;
      of_pixel.take(u, channel);
    }
    return x;
  }
  __device__ void store_pixel(const Place& at, int pixel, const Pixel& total) const {
    const int64_t to = this->partial_pixel_at(at, pixel);
    store(gate_grads + to, total.sums[0]);
    if constexpr (kStats) {
      store(sums + to, total.sums[1]);
      store(maxima + to, total.value);
      store(argmaxima + to, total.index);
    }
  }
  __device__ void store_channel(const Place& at, int channel, const Channel& total) const {
    store(dots + this->partial_channel_at(at, channel), total.sums[0]);
  }
};

template <class S>
struct BackwardPool : Body<S> {
  using A = Acc<S>;
  using Channel = Totals<A, 2, Argmax<A>>;
  // Of a PixelGrad what this needs.
  struct PixelFactor {
    A through_mean, through_both;
    int argmax;
    __device__ A grad_at(int channel) const {
      return argmax == channel ? through_both : through_mean;
    }
    __device__ void move_index(int by) { argmax += by; }
  };
  template <Layout>
  static constexpr int kRowsDown = sizeof(S) == 4 ? 2 : 1;
  static constexpr bool kEarly = false;
  static constexpr bool kReversed = true;
  static constexpr Use kUse = Use::kLast;

  const PixelGrad<A>* pixel_grads;  // [chunk, P]
  A* sums;
  A* maxima;
  int* argmaxima;  // pixels, counted from the first of their span
  A* dots;         // sum_p x (ds0 + [c is the argmax at p] ds1)

  __device__ Channel start_channel(int first) const { return Channel::from(first); }
  template <int W>
  __device__ void pixel_factors(const Place& at, int pixel, PixelFactor (&to)[W]) const {
    const PixelGrad<A>* const from = pixel_grads + this->pixel_at(at, pixel);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const PixelGrad<A> grad = load_struct(from + i);
      to[i] = {grad.through_mean, grad.through_both, grad.argmax};
    }
  }
  __device__ A visit(A x, A, int pixel, int channel, const PixelFactor& factor, const Nothing&,
                     Nothing&, Channel& of_channel) const {
    of_channel.sums[0] += x;
    of_channel.sums[1] += x * factor.grad_at(channel);
    of_channel.take(x, pixel);
    return x;
  }
  __device__ void store_channel(const Place& at, int channel, const Channel& total) const {
    const int64_t to = this->partial_channel_at(at, channel);
    store(sums + to, total.sums[0]);
    store(maxima + to, total.value);
    store(argmaxima + to, total.index);
    store(dots + to, total.sums[1]);
  }
};

// Where no spatial gate is behind it, in the place of GateGrads and BackwardPool.
template <class S>
struct PoolGrads : Body<S> {
  using A = Acc<S>;
  using Channel = Totals<A, 2, Argmax<A>>;
  static constexpr int kInputs = 2;
  template <Layout>
  static constexpr int kRowsDown = sizeof(S) == 4 ? 2 : 1;
  static constexpr int kRowsAlong = 1;
  static constexpr bool kEarly = false;

  A* sums;  // as in BackwardPool
  A* maxima;
  int* argmaxima;
  A* dots;  // sum_p g x

  __device__ Channel start_channel(int first) const { return Channel::from(first); }
  __device__ A visit(A x, A g, int pixel, int, const Nothing&, const Nothing&, Nothing&,
                     Channel& of_channel) const {
    of_channel.sums[0] += x;
    of_channel.sums[1] += g * x;
    of_channel.take(x, pixel);
    return x;
  }
  __device__ void store_channel(const Place& at, int channel, const Channel& total) const {
    const int64_t to = this->partial_channel_at(at, channel);
    store(sums + to, total.sums[0]);
    store(maxima + to, total.value);
    store(argmaxima + to, total.index);
    store(dots + to, total.sums[1]);
  }
};

// dx = ca (g sa + ds0 + [c is the argmax of p] ds1) + daverage + [p is the argmax of c] dmaximum.
template <class S>
struct InputGrad : Body<S> {
  using A = Acc<S>;
  using PixelFactor = PixelGrad<A>;
  struct ChannelFactor {
    A ca, daverage, dmaximum;
    int argmax;  // pixel counted from the block's first; negative where it is in another block
    __device__ void move_index(int by) { argmax += by; }
  };
  static constexpr bool kReversed = true;
  static constexpr Use kUse = Use::kLast;
  static constexpr bool kWrites = true;
  template <Layout>
  static constexpr int kRowsDown = sizeof(S) == 4 ? 2 : 1;

  S* output;                            // dx
  const A* ca;                          // [chunk, C]
  const PixelGrad<A>* pixel_grads;      // [chunk, P]
  const ChannelGrad<A>* channel_grads;  // [chunk, C]

  template <int W>
  __device__ void pixel_factors(const Place& at, int pixel, PixelFactor (&to)[W]) const {
    load_structs(pixel_grads + this->pixel_at(at, pixel), to);
  }
  template <int W>
  __device__ void channel_factors(const Place& at, int channel, ChannelFactor (&to)[W]) const {
    const int64_t from = this->channel_at(at, channel);
    A gates[W];
    load_values<W>(ca + from, gates);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const ChannelGrad<A> grad = load_struct(channel_grads + from + i);
      const int64_t pixel = grad.argmax - at.first_pixel;
      const bool here = pixel >= 0 && pixel < kNoIndex;
      to[i] = {gates[i], grad.daverage, grad.dmaximum, here ? static_cast<int>(pixel) : -1};
    }
  }
  __device__ A visit(A g, A, int pixel, int channel, const PixelFactor& p, const ChannelFactor& c,
                     Nothing&, Nothing&) const {
    A dx = c.ca * (g * p.sa + p.grad_at(channel)) + c.daverage;
    if (c.argmax == pixel) dx += c.dmaximum;
    return dx;
  }
};

}  // namespace cbam::cuda
