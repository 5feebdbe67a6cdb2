// Argument checks of the operators and the way from tensors to the kernels' view of a problem.
// Every backend uses these. They copy tensors whose strides no kernel takes, and read nothing else.
#pragma once

#include "torch_abi.h"

#include <optional>

#include "problem.h"

namespace cbam {

using torch::headeronly::ScalarType;

struct ParameterTensors {
  torch::stable::Tensor fc1_weight;
  std::optional<torch::stable::Tensor> fc1_bias;
  torch::stable::Tensor fc2_weight;
  std::optional<torch::stable::Tensor> fc2_bias;
  torch::stable::Tensor conv_weight;
  std::optional<torch::stable::Tensor> conv_bias;
};

ScalarType accumulator_dtype(ScalarType dtype);

// The checks throw RuntimeError with the words that cbam_ext/_checks.py uses for TypeError and
// ValueError. They return what they checked.
const torch::stable::Tensor& check_input(const torch::stable::Tensor& input);
const torch::stable::Tensor& check_forward(const torch::stable::Tensor& input,
                                           const ParameterTensors& parameters);

// For the tensors that check_forward does not see.
void check_device(const char* name, const torch::stable::Tensor& tensor,
                  const torch::stable::Tensor& input);

// The tensor itself where it is contiguous or channels_last, else a contiguous copy.
torch::stable::Tensor native_layout(const torch::stable::Tensor& input);

// The tensor itself where its data begins at a multiple of `alignment` bytes, else a copy.
torch::stable::Tensor aligned(const torch::stable::Tensor& tensor, int64_t alignment);

// A new tensor of the shape, dtype and strides of an input in a native layout.
torch::stable::Tensor empty_like_input(const torch::stable::Tensor& input);

// A tensor of input's shape and dtype, which check_device has seen, brought to input's layout.
torch::stable::Tensor like_input(const char* name, const torch::stable::Tensor& tensor,
                                 const torch::stable::Tensor& input);

// A map beside x (a gate, say), or a gradient of one, in the accumulator dtype, which check_device
// has seen: contiguous, of the shape that its kind has.
enum class MapKind {
  kChannel,  // [N, C, 1, 1]
  kSpatial,  // [N, 1, H, W]
  kPooled,   // [N, 2, C]
  kStats,    // [N, 2, H, W]
};
torch::stable::Tensor small_map(const char* name, const torch::stable::Tensor& map,
                                const torch::stable::Tensor& input, MapKind kind);

// input must be of a native layout.
Problem describe(const torch::stable::Tensor& input, const ParameterTensors& parameters);
// Without parameters, hidden and kernel are 1.
Problem describe(const torch::stable::Tensor& input);

// Absent biases become views without data, and so do the empty tensors that stand for gradients
// which nobody wants. The first does not count as writing to the parameters.
Parameters views(const ParameterTensors& parameters);
Parameters mutable_views(const ParameterTensors& gradients);

}  // namespace cbam
