// Backward, the last launch: gradients of the parameters, summed over all samples of the batch.
//
//   reads   what the samples left: vectors of C and R, and k x k weights of each tile
//   launch  a block for each kThreads / kWarp neighbouring elements of one parameter; its lanes
//           take the elements, its warps the samples in turn, and the warps' sums meet in order
#pragma once

#include "reduce.cuh"

namespace cbam::cuda {

template <class S>
struct ParameterGrads {
  using A = Acc<S>;
  int64_t samples, channels, hidden, taps;  // taps: 2 k k
  int64_t tiles;                            // of a sample
  const A* pooled;                          // [N, 2, C] average, maximum
  const A* hidden_units;                    // [N, 2, R]
  const A* dz;                              // [N, C] gradient of the channel gate's logits
  const A* dunits;                          // [N, 2, R] gradient of W1 pooled + b1
  const A* conv_grads;                      // [N, tiles, taps + 1]
  Parameters grads;
  int kernel;

  // The parameters in the order of their blocks.
  enum Kind { kFc1Weight, kFc2Weight, kFc1Bias, kFc2Bias, kConvWeight, kConvBias, kKinds };

  __host__ __device__ const ParameterView& view(int kind) const {
    switch (kind) {
      case kFc1Weight:
        return grads.fc1_weight;
      case kFc2Weight:
        return grads.fc2_weight;
      case kFc1Bias:
        return grads.fc1_bias;
      case kFc2Bias:
        return grads.fc2_bias;
      case kConvWeight:
        return grads.conv_weight;
      default:
        return grads.conv_bias;
    }
  }
  __host__ __device__ int64_t elements(int kind) const {
    switch (kind) {
      case kFc1Weight:
      case kFc2Weight:
        return channels * hidden;
      case kFc1Bias:
        return hidden;
      case kFc2Bias:
        return channels;
      case kConvWeight:
        return taps;
      default:
        return 1;
    }
  }
  __host__ __device__ int64_t blocks(int kind) const {
    return view(kind).data == nullptr ? 0 : (elements(kind) + kWarp - 1) / kWarp;
  }

  // Terms of the sum for one element.
  __device__ int64_t terms(int kind) const {
    return kind == kConvWeight || kind == kConvBias ? samples * tiles : samples;
  }
  // Weights count their elements as [R, C], whichever way the parameter has them.
  __device__ A term(int kind, int64_t element, int64_t n) const {
    const int64_t r = element / channels, c = element - r * channels;
    const A* const sample_pooled = pooled + n * 2 * channels;
    const A* const sample_units = hidden_units + n * 2 * hidden;
    const A* const sample_dunits = dunits + n * 2 * hidden;
    switch (kind) {
      case kFc1Weight:
        return load(sample_dunits + r) * load(sample_pooled + c) +
               load(sample_dunits + hidden + r) * load(sample_pooled + channels + c);
      case kFc2Weight:
        return load(dz + n * channels + c) *
               (load(sample_units + r) + load(sample_units + hidden + r));
      case kFc1Bias:
        return load(sample_dunits + element) + load(sample_dunits + hidden + element);
      case kFc2Bias:
        return 2 * load(dz + n * channels + element);  // the MLP ran twice
      case kConvWeight:
        return load(conv_grads + n * (taps + 1) + element);
      default:
        return load(conv_grads + n * (taps + 1) + taps);
    }
  }
  __device__ void write(int kind, int64_t element, A value) const {
    const int64_t row = element / channels, column = element - row * channels;
    const int64_t area = int64_t{kernel} * kernel;
    switch (kind) {
      case kFc1Weight:
        return store_parameter<S>(grads.fc1_weight, 0, row, column, value);
      case kFc2Weight:
        return store_parameter<S>(grads.fc2_weight, 0, column, row, value);
      case kConvWeight:
        return store_parameter<S>(grads.conv_weight, element / area, element % area / kernel,
                                  element % kernel, value);
      default:
        return store_parameter<S>(view(kind), 0, 0, element, value);
    }
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    parameter_grads_kernel(const __grid_constant__ ParameterGrads<S> args) {
  using A = Acc<S>;
  wait_for_previous_launches();
  int64_t block = blockIdx.x;
  int kind = 0;
  while (block >= args.blocks(kind)) block -= args.blocks(kind++);

  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t element = block * kWarp + lane;
  const bool active = element < args.elements(kind);
  A sum = 0;
  if (active) {
    constexpr int kWarps = kThreads / kWarp, kBlock = 32;  // blocks bound the rounding error
    const int64_t terms = args.terms(kind);
    for (int64_t begin = warp; begin < terms; begin += kWarps * kBlock) {
      const int64_t end = smaller(terms, begin + kWarps * kBlock);
      A of_block = 0;
#pragma unroll 1
      for (int64_t n = begin; n < end; n += kWarps) of_block += args.term(kind, element, n);
      sum += of_block;
    }
  }
  A* const sums = shared_memory<A>();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && active) {
    for (int i = 1; i < kThreads / kWarp; ++i) sum += sums[i * kWarp + lane];
    args.write(kind, element, sum);
  }
}

}  // namespace cbam::cuda
