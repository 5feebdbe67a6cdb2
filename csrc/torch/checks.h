// Argument checks of the operators, the same for every backend. They read shapes, dtypes and
// devices and touch no data.
//
// The checks throw RuntimeError with the words that the Python side uses for TypeError and
// ValueError.
#pragma once

#include "abi.h"

#include "../problem.h"

namespace cbam {

// Without fc1_weight and fc2_weight there is no channel gate, without conv_weight no spatial gate.
struct ParameterTensors {
  OptionalTensor fc1_weight;
  OptionalTensor fc1_bias;
  OptionalTensor fc2_weight;
  OptionalTensor fc2_bias;
  OptionalTensor conv_weight;
  OptionalTensor conv_bias;
};

// Maps beside x (a gate, say) and their gradients, all in the accumulator dtype.
enum class MapKind {
  kChannel,  // [N, C, 1, 1]
  kSpatial,  // [N, 1, H, W]
  kPooled,   // [N, 2, C]
  kStats,    // [N, 2, H, W]
};

ScalarType accumulator_dtype(ScalarType dtype);

// What the kernels call a dtype; nothing where they do not know it.
std::optional<DType> kernel_dtype(ScalarType dtype);

// They return what they checked. All that the tensors' devices decide comes after these.
const Tensor& check_input(const Tensor& input);
const Tensor& check_forward(const Tensor& input, const ParameterTensors& parameters);

// For the tensors that check_forward does not see: the device first, the rest when it is the
// current one.
void check_device(const char* name, const Tensor& tensor, const Tensor& input);
void check_like_input(const char* name, const Tensor& tensor, const Tensor& input);
void check_map(const char* name, const Tensor& map, const Tensor& input, MapKind kind);

// Calls f(sizes) with the sizes that a map beside input has.
template <class F>
auto with_map_sizes(const Tensor& input, MapKind kind, F&& f) {
  switch (kind) {
    case MapKind::kChannel:
      return f({input.size(0), input.size(1), 1, 1});
    case MapKind::kSpatial:
      return f({input.size(0), 1, input.size(2), input.size(3)});
    case MapKind::kPooled:
      return f({input.size(0), 2, input.size(1)});
    case MapKind::kStats:
      break;
  }
  return f({input.size(0), 2, input.size(2), input.size(3)});
}

}  // namespace cbam
