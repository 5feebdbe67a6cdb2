// The MLP of the channel gate, two launches in either direction:
//
//   hidden units       reads partial results of the pool, W1   its part of W1 pooled
//   channel gate       reads those parts, W2                   units = relu(W1 pooled + b1),
//                                                              ca = sigmoid(W2 units + 2 b2)
//   hidden gradients   reads partial results of the backward   dz = ca (1 - ca) dca; its parts of
//                      pool, W1, W2                            W1 pooled and of W2^T dz
//   channel gradients  reads those parts, W1                   dunits = relu' W2^T dz, W1^T dunits
//
// All of it is small against the feature map, but nothing else of a sample can go on meanwhile, so
// what counts is latency: loads are batched before the first is used, and the work is spread over
// blocks. A block takes a span of the channels of a sample with all hidden units. So partial
// results, and weights, are read once for each sample, and only vectors of R go from block to
// block: their parts, which each block of the next launch adds up in the order of the spans.
//
// Where PyTorch runs the MLP, the first launch of a direction stops before the weights.
#pragma once

#include "grads.cuh"
#include "matrix.cuh"

namespace cbam::cuda {

constexpr int kMlpPiece = kThreads;  // hidden units that a block has in shared memory at once
constexpr int kMlpGradBlocks = 2;    // on a multiprocessor: their grids are small, their sums many

template <class S>
struct MlpShape {
  Mlp cut;
  int channels, hidden;
  int piece;  // hidden units taken at once, rounded up to a power of two
  int pixel_spans;
  Acc<S> inverse_pixels;  // 1 / P
};

template <class S>
MlpShape<S> mlp_shape(const Problem& p, const Plan& plan) {
  return {plan.mlp,
          static_cast<int>(p.c),
          static_cast<int>(p.hidden),
          static_cast<int>(std::min<int64_t>(power_of_two_from(p.hidden), kMlpPiece)),
          static_cast<int>(plan.sweep.pixel_spans),
          Acc<S>{1} / static_cast<Acc<S>>(p.pixels())};
}

// The channels of a block.
template <class S>
struct ChannelSpan {
  int64_t sample;
  int index, first, count;
  int64_t origin;  // of the first in maps [samples, C]

  explicit __device__ ChannelSpan(const MlpShape<S>& shape) {
    const int block = static_cast<int>(blockIdx.x);
    sample = block / shape.cut.blocks;
    index = block - static_cast<int>(sample) * shape.cut.blocks;
    first = index * shape.cut.span;
    count = smaller(shape.cut.span, shape.channels - first);
    origin = sample * shape.channels + first;
  }
};

// What the sweep `Pool` leaves of a channel.
template <class A>
struct Pooled {
  A sum, highest;
  static __device__ Pooled none() { return {0, lowest<A>()}; }
  __device__ void combine(const Pooled& other) {
    sum += other.sum;
    highest = maximum(highest, other.highest);
  }
  __device__ Pooled shuffle(int offset) const {
    return {shuffle_xor(sum, offset), shuffle_xor(highest, offset)};
  }
};

// What the sweeps of backward leave of a channel.
template <class A>
struct PooledGrads {
  A sum, dot;         // `dot` is what reaches the gate
  Argmax<A> highest;  // and its span; which pixel of that, only its own partial result tells
  static __device__ PooledGrads none() { return {0, 0, {lowest<A>(), kNoIndex}}; }
  __device__ void combine(const PooledGrads& other) {
    sum += other.sum;
    dot += other.dot;
    highest.combine(other.highest);
  }
  __device__ PooledGrads shuffle(int offset) const {
    return {shuffle_xor(sum, offset), shuffle_xor(dot, offset), highest.shuffle(offset)};
  }
};

// Vectors of R of a span of channels, in memory as [samples, spans, count, R]. The average and the
// maximum have hidden units of their own.
template <class A, int count>
struct HiddenParts {
  A values[count];
  static __device__ HiddenParts none() { return {}; }
  __device__ void combine(const HiddenParts& other) {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] += other.values[i];
  }
  __device__ HiddenParts shuffle(int offset) const {
    HiddenParts result;
#pragma unroll
    for (int i = 0; i < count; ++i) result.values[i] = shuffle_xor(values[i], offset);
    return result;
  }
};

// Adds up the parts of `units` hidden units of a sample from `first` on; keep(unit, totals).
template <class S, int count, class Keep>
__device__ void add_hidden_parts(const MlpShape<S>& shape, const Acc<S>* parts, int64_t sample,
                                 int first, int units, HiddenParts<Acc<S>, count>* scratch,
                                 Keep&& keep) {
  const Acc<S>* const from = parts + sample * shape.cut.blocks * count * shape.hidden + first;
  add_spans<8>(
      units, shape.piece, shape.cut.blocks, scratch,
      [&](int span, int unit) {
        HiddenParts<Acc<S>, count> part;
#pragma unroll
        for (int i = 0; i < count; ++i) {
          part.values[i] = load(from + (int64_t{span} * count + i) * shape.hidden + unit);
        }
        return part;
      },
      keep);
}

// ----------------------------------------------------------------------------------- forward

template <class S>
struct HiddenUnits {
  using A = Acc<S>;
  MlpShape<S> shape;
  const A* sums;    // [samples, pixel spans, C]
  const A* maxima;  // [samples, pixel spans, C]
  Matrix fc1;
  A* pooled;  // [samples, 2, C] average, maximum; or null
  A* parts;   // [samples, spans, 2, R] of W1 pooled; null where there is no fc1

  struct Shared {
    alignas(16) A pooled[2][kMaxMlpSpan];
    Pooled<A> scratch[kThreads];
  };
};

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    hidden_units_kernel(const __grid_constant__ HiddenUnits<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const ChannelSpan<S> at(shape);
  auto& shared = *shared_memory<typename HiddenUnits<S>::Shared>();
  const bool runs_mlp = args.parts != nullptr;
  const Part fc1{0, at.first, shape.hidden, at.count};
  if (runs_mlp) prefetch_weights<S>(args.fc1, fc1);
  wait_for_previous_launches();
  const int64_t partials = at.sample * shape.pixel_spans * shape.channels + at.first;
  add_spans<8>(
      at.count, shape.cut.span, shape.pixel_spans, shared.scratch,
      [&](int span, int c) -> Pooled<A> {
        const int64_t from = partials + int64_t{span} * shape.channels + c;
        return {load(args.sums + from), load(args.maxima + from)};
      },
      [&](int c, const Pooled<A>& total) {
        const A average = total.sum * shape.inverse_pixels;
        shared.pooled[0][c] = average;
        shared.pooled[1][c] = total.highest;
        if (args.pooled == nullptr) return;
        A* const to = args.pooled + at.sample * 2 * shape.channels + at.first + c;
        store(to, average);
        store(to + shape.channels, total.highest);
      });
  if (!runs_mlp) return;
  __syncthreads();
  A* const to = args.parts + (at.sample * shape.cut.blocks + at.index) * 2 * shape.hidden;
  multiply_rows<S, 2>(args.fc1, fc1, shared.pooled[0], kMaxMlpSpan, [&](int r, const A(&sums)[2]) {
    store(to + r, sums[0]);
    store(to + shape.hidden + r, sums[1]);
  });
}

template <class S>
struct ChannelGate {
  using A = Acc<S>;
  MlpShape<S> shape;
  const A* parts;  // [samples, spans, 2, R] of W1 pooled
  ParameterView fc1_bias, fc2_bias;
  Matrix fc2;
  A* channel_gate;  // [samples, C]

  struct Shared {
    alignas(16) A units[kMlpPiece];
    A logits[kMaxMlpSpan];
    HiddenParts<A, 2> scratch[kThreads];
  };
};

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    channel_gate_kernel(const __grid_constant__ ChannelGate<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const ChannelSpan<S> at(shape);
  const int thread = static_cast<int>(threadIdx.x);
  auto& shared = *shared_memory<typename ChannelGate<S>::Shared>();
  A logit = 0;
  if (thread < at.count) {
    logit = 2 * load_bias<S>(args.fc2_bias, at.first + thread);
    shared.logits[thread] = 0;
  }
  prefetch_weights<S>(args.fc2, {at.first, 0, at.count, shape.hidden});
  wait_for_previous_launches();
  for (int first = 0; first < shape.hidden; first += shape.piece) {
    const int units = smaller(shape.piece, shape.hidden - first);
    const A bias = thread < units ? load_bias<S>(args.fc1_bias, first + thread) : A{0};
    add_hidden_parts(shape, args.parts, at.sample, first, units, shared.scratch,
                     [&](int r, const HiddenParts<A, 2>& total) {
                       // The second layer is linear: it takes the sum of both.
                       shared.units[r] =
                           relu(total.values[0] + bias) + relu(total.values[1] + bias);
                     });
    __syncthreads();
    multiply_rows<S, 1>(args.fc2, {at.first, first, at.count, units}, shared.units, 0,
                        [&](int c, const A(&sums)[1]) { shared.logits[c] += sums[0]; });
    __syncthreads();
  }
  if (thread < at.count) {
    store(args.channel_gate + at.origin + thread, sigmoid(logit + shared.logits[thread]));
  }
}

// ---------------------------------------------------------------------------------- backward

template <class S>
struct HiddenGrads {
  using A = Acc<S>;
  MlpShape<S> shape;
  int64_t span_pixels;  // of a span, the last of which may have fewer
  const A* sums;        // [samples, pixel spans, C], as the next three
  const A* maxima;
  const int* argmaxima;  // pixels, counted from the first of their span
  const A* dots;
  const A* gate_grads;  // [samples, gate spans, C] partial sums of sum_p g sa x
  int gate_spans;       // 0, 1 or pixel_spans
  Matrix fc1, fc2;
  const A* channel_gate;          // [samples, C]
  A* pooled;                      // [samples, 2, C] average, maximum
  A* dz;                          // [samples, C] gradient of the gate's logits
  A* parts;                       // [samples, spans, 3, R] of W1 pooled, of W2^T dz
  ChannelGrad<A>* channel_grads;  // [samples, C]
  // Where PyTorch runs the MLP, one of these is there and the parameters are not. Either it is told
  // what reaches the gate, or it has told what reaches the pooled maps.
  A* grad_channel_gate;  // [samples, C]
  const A* grad_pooled;  // [samples, 2, C] average, maximum

  struct Shared {
    alignas(16) A pooled[2][kMaxMlpSpan];
    A dz[kMaxMlpSpan];
    PooledGrads<A> scratch[kThreads];
    Sum<A> column_sums[kColumnSums<S, 1>];
  };
};

template <class S>
__global__ void __launch_bounds__(kThreads, kMlpGradBlocks)
    hidden_grads_kernel(const __grid_constant__ HiddenGrads<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const ChannelSpan<S> at(shape);
  const int thread = static_cast<int>(threadIdx.x);
  auto& shared = *shared_memory<typename HiddenGrads<S>::Shared>();
  const bool runs_mlp = args.parts != nullptr;
  const Part fc1{0, at.first, shape.hidden, at.count}, fc2{at.first, 0, at.count, shape.hidden};
  if (runs_mlp) {
    prefetch_weights<S>(args.fc1, fc1);
    prefetch_weights<S>(args.fc2, fc2);
  }
  wait_for_previous_launches();
  const A gate =
      runs_mlp && thread < at.count ? load(args.channel_gate + at.origin + thread) : A{0};
  const int64_t partials = at.sample * shape.pixel_spans * shape.channels + at.first;
  const int64_t gate_partials = at.sample * args.gate_spans * shape.channels + at.first;
  add_spans<8>(
      at.count, shape.cut.span, shape.pixel_spans, shared.scratch,
      [&](int span, int c) -> PooledGrads<A> {
        const int64_t row = int64_t{span} * shape.channels + c;
        const A dgate = span < args.gate_spans ? load(args.gate_grads + gate_partials + row) : A{0};
        return {load(args.sums + partials + row),
                load(args.dots + partials + row) + dgate,
                {load(args.maxima + partials + row), span}};
      },
      [&](int c, const PooledGrads<A>& total) {
        if (args.grad_channel_gate != nullptr) {
          store(args.grad_channel_gate + at.origin + c, total.dot);
          return;
        }
        ChannelGrad<A>* const grad = args.channel_grads + at.origin + c;
        const int64_t pooled = at.sample * 2 * shape.channels + at.first + c;
        if (args.grad_pooled != nullptr) {
          store(&grad->daverage, load(args.grad_pooled + pooled) * shape.inverse_pixels);
          store(&grad->dmaximum, load(args.grad_pooled + pooled + shape.channels));
        } else {
          shared.pooled[0][c] = total.sum * shape.inverse_pixels;
          shared.pooled[1][c] = total.highest.value;
          shared.dz[c] = gate * (1 - gate) * total.dot;
          store(args.pooled + pooled, shared.pooled[0][c]);
          store(args.pooled + pooled + shape.channels, shared.pooled[1][c]);
          store(args.dz + at.origin + c, shared.dz[c]);
        }
        const int64_t span = total.highest.index;
        const int pixel = load(args.argmaxima + partials + span * shape.channels + c);
        store<Use::kAgain, long long>(&grad->argmax, span * args.span_pixels + pixel);
      });
  if (!runs_mlp) return;
  __syncthreads();
  A* const to = args.parts + (at.sample * shape.cut.blocks + at.index) * 3 * shape.hidden;
  multiply_rows<S, 2>(args.fc1, fc1, shared.pooled[0], kMaxMlpSpan, [&](int r, const A(&sums)[2]) {
    store(to + r, sums[0]);
    store(to + shape.hidden + r, sums[1]);
  });
  multiply_columns<S, 1>(
      args.fc2, fc2, shared.dz, 0, shared.column_sums,
      [&](int r, const A(&sums)[1]) { store(to + 2 * int64_t{shape.hidden} + r, sums[0]); });
}

template <class S>
struct ChannelGrads {
  using A = Acc<S>;
  MlpShape<S> shape;
  const A* parts;  // [samples, spans, 3, R] of W1 pooled, of W2^T dz
  ParameterView fc1_bias;
  Matrix fc1;
  A* hidden_units;                // [samples, 2, R] after the ReLU
  A* dunits;                      // [samples, 2, R] gradient of W1 pooled + b1
  ChannelGrad<A>* channel_grads;  // [samples, C]

  struct Shared {
    A dunits[2][kMlpPiece];
    A totals[2][kMaxMlpSpan];
    HiddenParts<A, 3> scratch[kThreads];
    Sum<A> column_sums[kColumnSums<S, 2>];
  };
};

template <class S>
__global__ void __launch_bounds__(kThreads, kMlpGradBlocks)
    channel_grads_kernel(const __grid_constant__ ChannelGrads<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const ChannelSpan<S> at(shape);
  const int thread = static_cast<int>(threadIdx.x);
  auto& shared = *shared_memory<typename ChannelGrads<S>::Shared>();
  if (thread < at.count) shared.totals[0][thread] = shared.totals[1][thread] = 0;
  wait_for_previous_launches();
  for (int first = 0; first < shape.hidden; first += shape.piece) {
    const int units = smaller(shape.piece, shape.hidden - first);
    const A bias = thread < units ? load_bias<S>(args.fc1_bias, first + thread) : A{0};
    add_hidden_parts(shape, args.parts, at.sample, first, units, shared.scratch,
                     [&](int r, const HiddenParts<A, 3>& total) {
#pragma unroll
                       for (int v = 0; v < 2; ++v) {
                         const A unit = relu(total.values[v] + bias);
                         // relu'(0) = 0; a NaN lets the gradient through, as PyTorch's
                         // threshold_backward does.
                         const A dunit = unit <= 0 ? A{0} : total.values[2];
                         shared.dunits[v][r] = dunit;
                         if (at.index != 0) continue;  // once for each sample
                         const int64_t to = (at.sample * 2 + v) * shape.hidden + first + r;
                         store(args.hidden_units + to, unit);
                         store(args.dunits + to, dunit);
                       }
                     });
    __syncthreads();
    multiply_columns<S, 2>(args.fc1, {first, at.first, units, at.count}, shared.dunits[0],
                           kMlpPiece, shared.column_sums, [&](int c, const A(&sums)[2]) {
                             shared.totals[0][c] += sums[0];
                             shared.totals[1][c] += sums[1];
                           });
    __syncthreads();
  }
  if (thread >= at.count) return;
  ChannelGrad<A>* const grad = args.channel_grads + at.origin + thread;
  store(&grad->daverage, shared.totals[0][thread] * shape.inverse_pixels);
  store(&grad->dmaximum, shared.totals[1][thread]);
}

}  // namespace cbam::cuda
