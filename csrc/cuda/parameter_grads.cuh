// Backward, the last launch: gradients of the parameters, summed over all samples of the batch.
//
//   reads   what the samples left: vectors of C and R, and k x k weights of each tile
//   launch  a block for kWarp neighbouring elements of a parameter of the MLP, or for one of the
//           convolution; the threads of an element take its terms in turn, and meet in shared
//           memory in a fixed order
#pragma once

#include "reduce.cuh"

namespace cbam::cuda {

// The parameters in the order of their blocks.
enum class Kind { kFc1Weight, kFc2Weight, kFc1Bias, kFc2Bias, kConvWeight, kConvBias };
constexpr int kKinds = 6;

template <class S>
struct ParameterGrads {
  using A = Acc<S>;
  int64_t samples, channels, hidden;
  int64_t kernel, taps;   // k, 2 k k
  int64_t tiles;          // of a sample
  const A* pooled;        // [N, 2, C] average, maximum
  const A* hidden_units;  // [N, 2, R]
  const A* dz;            // [N, C] gradient of the channel gate's logits
  const A* dunits;        // [N, 2, R] gradient of W1 pooled + b1
  const A* conv_grads;    // [N, tiles, taps + 1]
  Parameters grads;
  int64_t blocks[kKinds];

  __device__ int64_t elements(Kind kind) const {
    switch (kind) {
      case Kind::kFc1Weight:
      case Kind::kFc2Weight:
        return channels * hidden;
      case Kind::kFc1Bias:
        return hidden;
      case Kind::kFc2Bias:
        return channels;
      case Kind::kConvWeight:
        return taps;
      default:
        return 1;
    }
  }

  // One term of the sum for an element. Weights count their elements as [R, C], whichever way the
  // parameter has them.
  template <Kind kind>
  __device__ A term(int64_t element, int64_t r, int64_t c, int64_t n) const {
    const A* const sample_pooled = pooled + n * 2 * channels;
    const A* const sample_units = hidden_units + n * 2 * hidden;
    const A* const sample_dunits = dunits + n * 2 * hidden;
    if constexpr (kind == Kind::kFc1Weight) {
      return load(sample_dunits + r) * load(sample_pooled + c) +
             load(sample_dunits + hidden + r) * load(sample_pooled + channels + c);
    } else if constexpr (kind == Kind::kFc2Weight) {
      return load(dz + n * channels + c) *
             (load(sample_units + r) + load(sample_units + hidden + r));
    } else if constexpr (kind == Kind::kFc1Bias) {
      return load(sample_dunits + element) + load(sample_dunits + hidden + element);
    } else if constexpr (kind == Kind::kFc2Bias) {
      return 2 * load(dz + n * channels + element);  // the MLP ran twice
    } else {
      // The bias of the convolution lies behind its weights; n counts tiles.
      return load(conv_grads + n * (taps + 1) + (kind == Kind::kConvBias ? taps : element));
    }
  }

  template <Kind kind>
  __device__ void write(int64_t element, int64_t r, int64_t c, A value) const {
    if constexpr (kind == Kind::kFc1Weight) {
      store_parameter<S>(grads.fc1_weight, 0, r, c, value);
    } else if constexpr (kind == Kind::kFc2Weight) {
      store_parameter<S>(grads.fc2_weight, 0, c, r, value);
    } else if constexpr (kind == Kind::kFc1Bias) {
      store_parameter<S>(grads.fc1_bias, 0, 0, element, value);
    } else if constexpr (kind == Kind::kFc2Bias) {
      store_parameter<S>(grads.fc2_bias, 0, 0, element, value);
    } else if constexpr (kind == Kind::kConvWeight) {
      const int64_t area = kernel * kernel, tap = element % area;
      store_parameter<S>(grads.conv_weight, element / area, tap / kernel, tap % kernel, value);
    } else {
      store_parameter<S>(grads.conv_bias, 0, 0, 0, value);
    }
  }
};

// The elements of one block, all of one kind.
template <Kind kind, class S>
__device__ void sum_elements(const ParameterGrads<S>& args, int64_t block) {
  using A = Acc<S>;
  constexpr bool kOfConv = kind == Kind::kConvWeight || kind == Kind::kConvBias;
  constexpr int kWidth = kOfConv ? 1 : kWarp;  // elements side by side
  constexpr int kParts = kThreads / kWidth, kBatch = 4;
  const int thread = static_cast<int>(threadIdx.x), part = thread / kWidth;
  const int64_t element = block * kWidth + thread % kWidth;
  const bool active = element < args.elements(kind);
  const int64_t r = element / args.channels, c = element - r * args.channels;
  A sum = 0;
  if (active) {
    const int64_t terms = kOfConv ? args.samples * args.tiles : args.samples;
#pragma unroll 1
    for (int64_t begin = part; begin < terms; begin += kBatch * kParts) {
      A values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t n = begin + i * kParts;
        values[i] = n < terms ? args.template term<kind>(element, r, c, n) : A{0};
      }
      // Adding the batch first bounds the rounding error of long sums.
      sum += (values[0] + values[1]) + (values[2] + values[3]);
    }
  }
  A* const sums = shared_memory<A>();
  for (int half = kParts / 2; half > 0; half /= 2) {
    __syncthreads();
    if (part >= half && part < 2 * half) sums[thread - half * kWidth] = sum;
    __syncthreads();
    if (part < half) sum += sums[thread];
  }
  if (part == 0 && active) args.template write<kind>(element, r, c, sum);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    parameter_grads_kernel(const __grid_constant__ ParameterGrads<S> args) {
  wait_for_previous_launches();
  int64_t block = blockIdx.x;
  int kind = 0;
  while (block >= args.blocks[kind]) block -= args.blocks[kind++];
  switch (static_cast<Kind>(kind)) {
    case Kind::kFc1Weight:
      return sum_elements<Kind::kFc1Weight>(args, block);
    case Kind::kFc2Weight:
      return sum_elements<Kind::kFc2Weight>(args, block);
    case Kind::kFc1Bias:
      return sum_elements<Kind::kFc1Bias>(args, block);
    case Kind::kFc2Bias:
      return sum_elements<Kind::kFc2Bias>(args, block);
    case Kind::kConvWeight:
      return sum_elements<Kind::kConvWeight>(args, block);
    default:
      return sum_elements<Kind::kConvBias>(args, block);
  }
}

}  // namespace cbam::cuda
