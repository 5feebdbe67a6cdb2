// Backward, the last launch: gradients of the parameters, summed over all samples of the batch.
//
//   reads   what the samples left: vectors of C and R, and k x k weights of each tile
//   launch  a block for `width` neighbouring elements of a parameter; the threads of an element
//           take its terms in turn, and meet in shared memory in a fixed order (spans.cuh). The
//           more terms there are, the more threads an element gets.
#pragma once

#include "spans.cuh"

namespace cbam::cuda {

// The parameters in the order of their blocks; those of the convolution have theirs together.
enum class Kind { kFc1Weight, kFc2Weight, kFc1Bias, kFc2Bias, kConv };
constexpr int kKinds = 5;

// Elements side by side in a block, for sums of so many terms: a power of two.
inline int parameter_width(int64_t terms) {
  constexpr int64_t kTerms = 64;  // for one thread
  constexpr int kLeast = 2;
  int width = kThreads;
  while (width > kLeast && divide_up(terms, kThreads / width) > kTerms) width /= 2;
  return width;
}

template <class S>
struct ParameterGrads {
  using A = Acc<S>;
  int64_t samples, channels, hidden;
  int kernel, taps;           // k, 2 k k
  int64_t tiles;              // of the batch
  int mlp_width, conv_width;  // elements of a block
  const A* pooled;            // [N, 2, C] average, maximum
  const A* hidden_units;      // [N, 2, R]
  const A* dz;                // [N, C] gradient of the channel gate's logits
  const A* dunits;            // [N, 2, R] gradient of W1 pooled + b1
  const A* conv_grads;        // [tiles, taps + 1], that of the bias behind those of the weights
  Parameters grads;
  int64_t blocks[kKinds];

  __host__ __device__ int64_t elements(Kind kind) const {
    switch (kind) {
      case Kind::kFc1Weight:
      case Kind::kFc2Weight:
        return channels * hidden;
      case Kind::kFc1Bias:
        return hidden;
      case Kind::kFc2Bias:
        return channels;
      default:
        return taps + 1;
    }
  }
};

// Row and column of an element. A division takes long in 64 bits.
inline __device__ void split(int64_t element, int64_t columns, int64_t& row, int64_t& column) {
  if ((element | columns) >> 32 == 0) {
    row = static_cast<unsigned>(element) / static_cast<unsigned>(columns);
  } else {
    row = element / columns;
  }
  column = element - row * columns;
}

template <Kind kind, class S>
__device__ void sum_elements(const ParameterGrads<S>& args, int64_t block) {
  using A = Acc<S>;
  const int64_t channels = args.channels, hidden = args.hidden;
  const int thread = static_cast<int>(threadIdx.x);
  const int width = kind == Kind::kConv ? args.conv_width : args.mlp_width;
  const int64_t element = block * width + (thread & (width - 1));
  Sum<A> total[1] = {Sum<A>::none()};
  const int64_t terms = kind == Kind::kConv ? args.tiles : args.samples;
  const int used = static_cast<int>(smaller<int64_t>(terms, kThreads / width)) * width;
  const auto add = [&](auto&& factors, auto&& term) {
    add_terms<8>(
        int64_t{thread / width}, int64_t{kThreads / width}, terms, factors,
        [&](const auto& loaded) { return Sum<A>{term(loaded)}; }, total[0]);
  };
  // Calls write() in one thread of the element.
  const auto keep = [&](auto&& write) {
    meet_in_block(total, width, used, shared_memory<Sum<A>>());
    if (thread < width && element < args.elements(kind)) write();
  };
  const bool present = element < args.elements(kind);
  if constexpr (kind == Kind::kFc1Weight) {
    int64_t r, c;
    split(element, channels, r, c);
    if (present) {
      struct Factors {
        A dunits[2], pooled[2];  // of average and maximum
      };
      add(
          [&](int64_t n) -> Factors {
            const A* const pooled = args.pooled + 2 * n * channels + c;
            const A* const dunits = args.dunits + 2 * n * hidden + r;
            return {{load(dunits), load(dunits + hidden)}, {load(pooled), load(pooled + channels)}};
          },
          [](const Factors& of) {
            return of.dunits[0] * of.pooled[0] + of.dunits[1] * of.pooled[1];
          });
    }
    keep([&] { store_parameter<S>(args.grads.fc1_weight, 0, r, c, total[0].value); });
  } else if constexpr (kind == Kind::kFc2Weight) {
    int64_t c, r;
    split(element, hidden, c, r);
    if (present) {
      struct Factors {
        A dz, units[2];
      };
      add(
          [&](int64_t n) -> Factors {
            const A* const units = args.hidden_units + 2 * n * hidden + r;
            return {load(args.dz + n * channels + c), {load(units), load(units + hidden)}};
          },
          [](const Factors& of) { return of.dz * (of.units[0] + of.units[1]); });
    }
    keep([&] { store_parameter<S>(args.grads.fc2_weight, 0, c, r, total[0].value); });
  } else if constexpr (kind == Kind::kFc1Bias) {
    if (present) {
      struct Terms {
        A dunits[2];
      };
      add(
          [&](int64_t n) -> Terms {
            const A* const dunits = args.dunits + 2 * n * hidden + element;
            return {{load(dunits), load(dunits + hidden)}};
          },
          [](const Terms& of) { return of.dunits[0] + of.dunits[1]; });
    }
    keep([&] { store_parameter<S>(args.grads.fc1_bias, 0, 0, element, total[0].value); });
  } else if constexpr (kind == Kind::kFc2Bias) {
    if (present) {
      // The MLP ran twice.
      add([&](int64_t n) { return load(args.dz + n * channels + element); },
          [](A dz) { return 2 * dz; });
    }
    keep([&] { store_parameter<S>(args.grads.fc2_bias, 0, 0, element, total[0].value); });
  } else {
    if (present) {
      add([&](int64_t n) { return load(args.conv_grads + n * (args.taps + 1) + element); },
          [](A of_tile) { return of_tile; });
    }
    keep([&] {
      if (element == args.taps) {
        if (args.grads.conv_bias.data == nullptr) return;
        store_parameter<S>(args.grads.conv_bias, 0, 0, 0, total[0].value);
      } else if (args.grads.conv_weight.data != nullptr) {
        const int tap = static_cast<int>(element), area = args.kernel * args.kernel;
        const int in_map = tap % area;
        store_parameter<S>(args.grads.conv_weight, tap / area, in_map / args.kernel,
                           in_map % args.kernel, total[0].value);
      }
    });
  }
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
    default:
      return sum_elements<Kind::kConv>(args, block);
  }
}

}  // namespace cbam::cuda
