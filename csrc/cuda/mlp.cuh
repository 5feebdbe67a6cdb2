// The MLP of the channel gate: forward, launches 2 and 3, or one where a sample has so few channels
// that one block takes them all.
//
//   hidden units   reads partial results of the pool, W1   its part of W1 pooled
//   channel gate   reads those parts, W2                   units = relu(W1 pooled + b1),
//                                                          ca = sigmoid(W2 units + 2 b2)
//   whole gate     reads partial results, W1, W2           ca
//
// All of it is small against the feature map, but nothing else of a sample can go on meanwhile, so
// what counts is latency: loads are batched before the first is used, and the work is spread over
// blocks. A block takes a span of the channels of a sample with all hidden units. So partial
// results, and weights, are read once for each sample, and only vectors of R go from block to
// block: their parts, which each block of the next launch adds up in the order of the spans. One
// block alone has them in shared memory.
//
// Where PyTorch runs the MLP, the first launch stops before the weights. Backward: mlp_grads.cuh.
#pragma once

#include "matrix.cuh"

namespace cbam::cuda {

constexpr int kMlpPiece = kThreads;  // hidden units that a block has in shared memory at once

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

  explicit __device__ ChannelSpan(const MlpShape<S>& shape)
      : ChannelSpan(shape.cut, shape.channels) {}
  __device__ ChannelSpan(const Mlp& cut, int channels) {
    const int block = static_cast<int>(blockIdx.x);
    sample = block / cut.blocks;
    index = block - static_cast<int>(sample) * cut.blocks;
    first = index * cut.span;
    count = smaller(cut.span, channels - first);
    origin = sample * channels + first;
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

// Average and maximum of the block's channels, from the partial results of the pool.
template <class S>
__device__ void pool_channels(const HiddenUnits<S>& args, const ChannelSpan<S>& at,
                              typename HiddenUnits<S>::Shared& shared) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
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
}

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
  pool_channels(args, at, shared);
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

// Of the units of average and maximum: the second layer is linear.
template <class A>
__device__ A unit_sum(const A (&products)[2], A bias) {
  return relu(products[0] + bias) + relu(products[1] + bias);
}

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
                       shared.units[r] = unit_sum(total.values, bias);
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

// Both in one.
template <class S>
struct WholeGate {
  HiddenUnits<S> hidden;
  ChannelGate<S> gate;

  struct Shared {
    typename HiddenUnits<S>::Shared hidden;
    alignas(16) Acc<S> units[kMlpPiece];
    Acc<S> biases[kMlpPiece], logits[kMaxMlpSpan];
  };
};

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    whole_gate_kernel(const __grid_constant__ WholeGate<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.hidden.shape;
  const ChannelSpan<S> at(shape);
  const int thread = static_cast<int>(threadIdx.x);
  auto& shared = *shared_memory<typename WholeGate<S>::Shared>();
  prefetch_weights<S>(args.hidden.fc1, {0, 0, shape.hidden, at.count});
  prefetch_weights<S>(args.gate.fc2, {0, 0, at.count, shape.hidden});
  const auto load_unit_bias = [&](int unit) {
    return unit < shape.hidden ? load_bias<S>(args.gate.fc1_bias, unit) : A{0};
  };
  A bias = load_unit_bias(thread), logit = 0;
  if (thread < at.count) {
    logit = 2 * load_bias<S>(args.gate.fc2_bias, thread);
    shared.logits[thread] = 0;
  }
  wait_for_previous_launches();
  pool_channels(args.hidden, at, shared.hidden);
  for (int first = 0; first < shape.hidden; first += shape.piece) {
    const int units = smaller(shape.piece, shape.hidden - first);
    shared.biases[thread] = bias;
    __syncthreads();
    multiply_rows<S, 2>(
        args.hidden.fc1, {first, 0, units, at.count}, shared.hidden.pooled[0], kMaxMlpSpan,
        [&](int r, const A(&sums)[2]) { shared.units[r] = unit_sum(sums, shared.biases[r]); });
    bias = load_unit_bias(first + shape.piece + thread);
    __syncthreads();
    multiply_rows<S, 1>(args.gate.fc2, {0, first, at.count, units}, shared.units, 0,
                        [&](int c, const A(&sums)[1]) { shared.logits[c] += sums[0]; });
  }
  __syncthreads();
  if (thread < at.count) {
    store(args.gate.channel_gate + at.origin + thread, sigmoid(logit + shared.logits[thread]));
  }
}

}  // namespace cbam::cuda
