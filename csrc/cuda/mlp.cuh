// The MLP of the channel gate, forward and backward, for one sample and run by one block: the last
// that pooled the sample. Small against the feature map, so it is written to be read.
//
// Both passes keep what they find in global memory (C and R have no limit), where the threads of
// the block, and backward's last launch, read it again.
#pragma once

#include "grads.cuh"
#include "reduce.cuh"

namespace cbam::cuda {

// Threads of a block take the elements [0, count) in turn.
template <class F>
__device__ void each_element(int64_t count, F&& f) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
}

// Warps of a block take the elements [0, count) in turn; f gets the lane too.
template <class F>
__device__ void each_element_by_warp(int64_t count, F&& f) {
  for (int64_t i = threadIdx.x / kWarp; i < count; i += kThreads / kWarp) {
    f(i, static_cast<int>(threadIdx.x % kWarp));
  }
}

// One sample's pooled maps and hidden units. The average and the maximum have units of their own.
// Loops over weights are unrolled far: a single block runs this, and waits for memory.
template <class S>
struct Perceptron {
  using A = Acc<S>;
  int64_t channels, hidden;
  int64_t pixels;
  int64_t spans;  // partial results of each channel
  ParameterView fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  A* pooled;        // [samples, 2, C] average, maximum
  A* hidden_units;  // [samples, 2, R] after the ReLU

  __device__ A* average(int64_t sample) const { return pooled + sample * 2 * channels; }
  __device__ A* maximum(int64_t sample) const { return average(sample) + channels; }
  __device__ A* units(int64_t sample) const { return hidden_units + sample * 2 * hidden; }

  // sum over the spans of one channel, in order.
  __device__ A add_spans(const A* partials, int64_t channel) const {
    A sum = 0;
#pragma unroll 4
    for (int64_t i = 0; i < spans; ++i) sum += load_fresh(partials + i * channels + channel);
    return sum;
  }

  // relu(W1 pooled + b1) for both pooled maps.
  __device__ void compute_units(int64_t sample) const {
    const A* const averages = average(sample);
    const A* const maxima = maximum(sample);
    A* const to = units(sample);
    each_element_by_warp(hidden, [&](int64_t r, int lane) {
      A of_average = 0, of_maximum = 0;
      with_parameter<S>(fc1_weight, [&](const auto* weights) {
        const auto* const row = weights + offset_in(fc1_weight, 0, r, 0);
#pragma unroll 4
        for (int64_t c = lane; c < channels; c += kWarp) {
          const A weight = widen(load(row + c * fc1_weight.strides[3]));
          of_average += weight * load_fresh(averages + c);
          of_maximum += weight * load_fresh(maxima + c);
        }
      });
      of_average = warp_sum(of_average);
      of_maximum = warp_sum(of_maximum);
      if (lane == 0) {
        const A bias = load_bias<S>(fc1_bias, r);
        store(to + r, relu(of_average + bias));
        store(to + hidden + r, relu(of_maximum + bias));
      }
    });
  }
};

template <class S>
struct MlpForward : Perceptron<S> {
  using A = Acc<S>;
  A* channel_gate;  // [samples, C]

  // From the partial results of the sample, [spans, C], to its channel gate.
  __device__ __noinline__ void run(int64_t sample, const A* sums, const A* maxima) const {
    const int64_t channels = this->channels, hidden = this->hidden;
    each_element(channels, [&](int64_t c) {
      A highest = lowest<A>();
      for (int64_t i = 0; i < this->spans; ++i) {
        highest = cuda::maximum(highest, load_fresh(maxima + i * channels + c));
      }
      store(this->average(sample) + c, this->add_spans(sums, c) / static_cast<A>(this->pixels));
      store(this->maximum(sample) + c, highest);
    });
    __syncthreads();
    this->compute_units(sample);
    __syncthreads();
    const A* const units = this->units(sample);
    each_element(channels, [&](int64_t c) {
      A logit = 2 * load_bias<S>(this->fc2_bias, c);
      with_parameter<S>(this->fc2_weight, [&](const auto* weights) {
        const auto* const row = weights + offset_in(this->fc2_weight, 0, c, 0);
        const int64_t stride = this->fc2_weight.strides[3];
#pragma unroll 4
        for (int64_t r = 0; r < hidden; ++r) {
          logit += widen(load(row + r * stride)) *
                   (load_fresh(units + r) + load_fresh(units + hidden + r));
        }
      });
      store(channel_gate + sample * channels + c, sigmoid(logit));
    });
  }
};

template <class S>
struct MlpBackward : Perceptron<S> {
  using A = Acc<S>;
  const A* channel_gate;  // [samples, C]
  const A* gate_grads;    // [samples, gate_spans, C] partial sums of sum_p g sa x
  int64_t gate_spans;
  A* dz;                          // [samples, C] gradient of the gate's logits
  A* dunits;                      // [samples, 2, R] gradient of W1 pooled + b1
  ChannelGrad<A>* channel_grads;  // [samples, C]

  // From the partial results of the sample, [spans, C] each, to the gradients of the pooled maps.
  __device__ __noinline__ void run(int64_t sample, const A* sums, const A* maxima,
                                   const long long* pixels, const A* dots) const {
    const int64_t channels = this->channels, hidden = this->hidden;
    A* const dlogits = dz + sample * channels;
    each_element(channels, [&](int64_t c) {
      A highest = load_fresh(maxima + c);
      long long pixel = load_fresh(pixels + c);
      for (int64_t i = 1; i < this->spans; ++i) {  // pixels rise from span to span
        const A next = load_fresh(maxima + i * channels + c);
        if (next > highest || (next != next && highest == highest)) {
          highest = next;
          pixel = load_fresh(pixels + i * channels + c);
        }
      }
      store(this->average(sample) + c, this->add_spans(sums, c) / static_cast<A>(this->pixels));
      store(this->maximum(sample) + c, highest);
      store(&channel_grads[sample * channels + c].argmax, pixel);
      A dgate = this->add_spans(dots, c);
      for (int64_t i = 0; i < gate_spans; ++i) {
        dgate += load(gate_grads + (sample * gate_spans + i) * channels + c);
      }
      const A gate = load(channel_gate + sample * channels + c);
      store(dlogits + c, gate * (1 - gate) * dgate);
    });
    __syncthreads();
    this->compute_units(sample);
    __syncthreads();
    const A* const units = this->units(sample);
    A* const dhidden = dunits + sample * 2 * hidden;
    each_element_by_warp(hidden, [&](int64_t r, int lane) {
      A grad = 0;
      with_parameter<S>(this->fc2_weight, [&](const auto* weights) {
        const auto* const column = weights + offset_in(this->fc2_weight, 0, 0, r);
        const int64_t stride = this->fc2_weight.strides[2];
#pragma unroll 4
        for (int64_t c = lane; c < channels; c += kWarp) {
          grad += widen(load(column + c * stride)) * load_fresh(dlogits + c);
        }
      });
      grad = warp_sum(grad);
      if (lane == 0) {
        // relu'(0) = 0; a NaN lets the gradient through, as PyTorch's threshold_backward does.
        store(dhidden + r, load_fresh(units + r) <= 0 ? A{0} : grad);
        store(dhidden + hidden + r, load_fresh(units + hidden + r) <= 0 ? A{0} : grad);
      }
    });
    __syncthreads();
    each_element(channels, [&](int64_t c) {
      A daverage = 0, dmaximum = 0;
      with_parameter<S>(this->fc1_weight, [&](const auto* weights) {
        const auto* const column = weights + offset_in(this->fc1_weight, 0, 0, c);
        const int64_t stride = this->fc1_weight.strides[2];
#pragma unroll 4
        for (int64_t r = 0; r < hidden; ++r) {
          const A weight = widen(load(column + r * stride));
          daverage += weight * load_fresh(dhidden + r);
          dmaximum += weight * load_fresh(dhidden + hidden + r);
        }
      });
      ChannelGrad<A>& grad = channel_grads[sample * channels + c];
      store(&grad.daverage, daverage / static_cast<A>(this->pixels));
      store(&grad.dmaximum, dmaximum);
    });
  }
};

}  // namespace cbam::cuda
