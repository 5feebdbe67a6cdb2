// The MLP of the channel gate, forward and backward, for one sample and run by one block: the last
// that pooled the sample. It first adds up what the sample's blocks left.
//
// All of it is small against the feature map, but nothing else of the sample can go on meanwhile,
// so what counts is latency: loads are batched before the first is used. Both passes keep what they
// find in global memory (C and R have no limit), where the threads of the block, and backward's
// last launch, read it again. Where PyTorch runs the MLP, adding up is all that they do.
#pragma once

#include "grads.cuh"
#include "reduce.cuh"

namespace cbam::cuda {

// Threads of a block take the elements [0, count) in turn.
template <class F>
__device__ void each_element(int64_t count, F&& f) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
}

// Totals of partial results [spans, channels], one accumulator for each channel. Neighbouring
// threads take neighbouring channels; where those are few, the spans are dealt out to the rest of
// the block and meet in `scratch`, shared memory for kThreads accumulators.
//
//   load(span, channel)     a partial result
//   keep(channel, total)    called by one thread for each channel
template <int batch, class Accumulator, class Load, class Keep>
__device__ void add_spans(int64_t channels, int64_t spans, Accumulator* scratch, Load&& load,
                          Keep&& keep) {
  const int thread = static_cast<int>(threadIdx.x);
  int width = kWarp;  // channels side by side
  while (width < channels && width < kThreads) width *= 2;
  const int parts = kThreads / width, part = thread / width;
  for (int64_t first = 0; first < channels; first += width) {
    const int64_t channel = first + thread % width;
    Accumulator total = Accumulator::none();
    if (channel < channels) {
#pragma unroll 1
      for (int64_t begin = part; begin < spans; begin += batch * parts) {
        Accumulator partials[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int64_t span = begin + i * parts;
          partials[i] = span < spans ? load(span, channel) : Accumulator::none();
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) total.combine(partials[i]);
      }
    }
    for (int half = parts / 2; half > 0; half /= 2) {
      __syncthreads();
      if (part >= half && part < 2 * half) scratch[thread - half * width] = total;
      __syncthreads();
      if (part < half) total.combine(scratch[thread]);
    }
    if (part == 0 && channel < channels) keep(channel, total);
  }
}

// sum_j matrix[i][j] vectors[v][j] for V vectors and rows i = 0 ... rows - 1 of a parameter, whose
// strides may be any. Warps take rows. keep(row, sums) is called by one lane.
template <class S, int V, class Keep>
__device__ void multiply(const ParameterView& matrix, int64_t rows, int64_t row_stride,
                         int64_t columns, int64_t column_stride, const Acc<S>* const (&vectors)[V],
                         Keep&& keep) {
  using A = Acc<S>;
  constexpr int kBatch = 4;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  with_parameter<S>(matrix, [&](const auto* weights) {
#pragma unroll 1
    for (int64_t row = threadIdx.x / kWarp; row < rows; row += kThreads / kWarp) {
      A sums[V] = {};
#pragma unroll 1
      for (int64_t begin = lane; begin < columns; begin += kBatch * kWarp) {
        A values[kBatch][V], factors[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int64_t column = begin + i * kWarp;
          const bool present = column < columns;
          factors[i] =
              present ? widen(load(weights + row * row_stride + column * column_stride)) : A{0};
#pragma unroll
          for (int v = 0; v < V; ++v) values[i][v] = present ? load_fresh(vectors[v] + column) : 0;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v] += factors[i] * values[i][v];
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] = warp_sum(sums[v]);
      if (lane == 0) keep(row, sums);
    }
  });
}

// One sample's pooled maps and hidden units. The average and the maximum have units of their own.
template <class S>
struct Perceptron {
  using A = Acc<S>;
  int64_t channels, hidden;
  A inverse_pixels;  // 1 / P
  int64_t spans;     // partial results of each channel
  ParameterView fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  A* pooled;        // [samples, 2, C] average, maximum
  A* hidden_units;  // [samples, 2, R] after the ReLU

  __device__ A* average(int64_t sample) const { return pooled + sample * 2 * channels; }
  __device__ A* maximum(int64_t sample) const { return average(sample) + channels; }
  __device__ A* units(int64_t sample) const { return hidden_units + sample * 2 * hidden; }

  // relu(W1 pooled + b1) for both pooled maps.
  __device__ void compute_units(int64_t sample) const {
    A* const to = units(sample);
    const int64_t count = hidden;
    const ParameterView bias = fc1_bias;
    multiply<S, 2>(fc1_weight, hidden, fc1_weight.strides[2], channels, fc1_weight.strides[3],
                   {average(sample), maximum(sample)}, [&](int64_t r, const A(&sums)[2]) {
                     const A shift = load_bias<S>(bias, r);
                     store(to + r, relu(sums[0] + shift));
                     store(to + count + r, relu(sums[1] + shift));
                   });
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
};

template <class S>
struct MlpForward : Perceptron<S> {
  using A = Acc<S>;
  A* channel_gate;  // [samples, C]; where it is null, the pooled maps are all that is wanted

  // From the partial results [samples, spans, C] to the channel gate of a sample. `scratch` is
  // shared memory for kThreads Pooled.
  __device__ void run(int64_t sample, const A* sums, const A* maxima, Pooled<A>* scratch) const {
    const int64_t channels = this->channels, hidden = this->hidden;
    const int64_t partials = sample * this->spans * channels;
    add_spans<4>(
        channels, this->spans, scratch,
        [&](int64_t span, int64_t c) -> Pooled<A> {
          const int64_t at = partials + span * channels + c;
          return {load_fresh(sums + at), load_fresh(maxima + at)};
        },
        [&](int64_t c, const Pooled<A>& total) {
          store(this->average(sample) + c, total.sum * this->inverse_pixels);
          store(this->maximum(sample) + c, total.highest);
        });
    if (channel_gate == nullptr) return;
    __syncthreads();
    this->compute_units(sample);
    __syncthreads();
    const A* const units = this->units(sample);
    with_parameter<S>(this->fc2_weight, [&](const auto* weights) {
      each_element(channels, [&](int64_t c) {
        A logit = 2 * load_bias<S>(this->fc2_bias, c);
#pragma unroll 4
        for (int64_t r = 0; r < hidden; ++r) {
          logit += widen(load(weights + offset_in(this->fc2_weight, 0, c, r))) *
                   (load_fresh(units + r) + load_fresh(units + hidden + r));
        }
        store(channel_gate + sample * channels + c, sigmoid(logit));
      });
    });
  }
};

// What the sweeps of backward leave of a channel.
template <class A>
struct PooledGrads {
  A sum;
  Argmax<A, long long> highest;
  A dot;  // what reaches the gate
  static __device__ PooledGrads none() { return {0, {lowest<A>(), kNoIndex64}, 0}; }
  __device__ void combine(const PooledGrads& other) {
    sum += other.sum;
    highest.combine(other.highest);
    dot += other.dot;
  }
};

template <class S>
struct MlpBackward : Perceptron<S> {
  using A = Acc<S>;
  const A* channel_gate;          // [samples, C]
  const A* gate_grads;            // [samples, gate_spans, C] partial sums of sum_p g sa x
  int64_t gate_spans;             // 1 or spans
  int64_t span_pixels;            // of a span, the last of which may have fewer
  A* dz;                          // [samples, C] gradient of the gate's logits
  A* dunits;                      // [samples, 2, R] gradient of W1 pooled + b1
  ChannelGrad<A>* channel_grads;  // [samples, C]
  // Where PyTorch runs the MLP, one of these is there and the parameters are not. Either it is told
  // what reaches the gate, or it has told what reaches the pooled maps.
  A* grad_channel_gate;  // [samples, C]
  const A* grad_pooled;  // [samples, 2, C] average, maximum

  // From the partial results [samples, spans, C] to the gradients of a sample's pooled maps.
  // `scratch` is shared memory for kThreads PooledGrads.
  __device__ void run(int64_t sample, const A* sums, const A* maxima, const int* argmaxima,
                      const A* dots, PooledGrads<A>* scratch) const {
    const int64_t channels = this->channels, hidden = this->hidden;
    const int64_t partials = sample * this->spans * channels;
    const int64_t first = sample * channels;  // of the sample's channels
    add_spans<4>(
        channels, this->spans, scratch,
        [&](int64_t span, int64_t c) -> PooledGrads<A> {
          const int64_t at = partials + span * channels + c;
          const A dgate = span < gate_spans
                              ? load(gate_grads + first * gate_spans + span * channels + c)
                              : A{0};
          return {load_fresh(sums + at),
                  {load_fresh(maxima + at), span * span_pixels + load_fresh(argmaxima + at)},
                  load_fresh(dots + at) + dgate};
        },
        [&](int64_t c, const PooledGrads<A>& total) {
          if (grad_channel_gate != nullptr) {
            store(grad_channel_gate + first + c, total.dot);
            return;
          }
          store(&channel_grads[first + c].argmax, total.highest.index);
          if (grad_pooled != nullptr) {
            const A* const given = grad_pooled + 2 * first + c;
            store(&channel_grads[first + c].daverage, load(given) * this->inverse_pixels);
            store(&channel_grads[first + c].dmaximum, load(given + channels));
            return;
          }
          const A gate = load(channel_gate + first + c);
          store(this->average(sample) + c, total.sum * this->inverse_pixels);
          store(this->maximum(sample) + c, total.highest.value);
          store(dz + first + c, gate * (1 - gate) * total.dot);
        });
    if (grad_channel_gate != nullptr || grad_pooled != nullptr) return;
    __syncthreads();
    this->compute_units(sample);
    __syncthreads();
    const A* const units = this->units(sample);
    A* const dhidden = dunits + sample * 2 * hidden;
    multiply<S, 1>(this->fc2_weight, hidden, this->fc2_weight.strides[3], channels,
                   this->fc2_weight.strides[2], {dz + first}, [&](int64_t r, const A(&sums)[1]) {
                     // relu'(0) = 0; a NaN lets the gradient through, as PyTorch's
                     // threshold_backward does.
                     store(dhidden + r, load_fresh(units + r) <= 0 ? A{0} : sums[0]);
                     store(dhidden + hidden + r,
                           load_fresh(units + hidden + r) <= 0 ? A{0} : sums[0]);
                   });
    __syncthreads();
    with_parameter<S>(this->fc1_weight, [&](const auto* weights) {
      each_element(channels, [&](int64_t c) {
        A daverage = 0, dmaximum = 0;
#pragma unroll 4
        for (int64_t r = 0; r < hidden; ++r) {
          const A weight = widen(load(weights + offset_in(this->fc1_weight, 0, r, c)));
          daverage += weight * load_fresh(dhidden + r);
          dmaximum += weight * load_fresh(dhidden + hidden + r);
        }
        store(&channel_grads[first + c].daverage, daverage * this->inverse_pixels);
        store(&channel_grads[first + c].dmaximum, dmaximum);
      });
    });
  }
};

}  // namespace cbam::cuda
