// CBAM attention (Woo et al., ECCV 2018) for C++ programs that use ATen: typed calls of the
// operators cbam::forward and cbam::gates through PyTorch's dispatcher.
//
// libcbam_cpu registers the operators when it is loaded, libcbam_cuda the kernels for CUDA tensors.
// The CMake target cbam::cbam links both; where none is loaded, the calls throw. A Python process
// may load an extension that links them and import cbam_ext, which brings its own copies, in any
// order: the first copy registers the operators, the others leave them to it. Have both of one
// version.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace cbam {
namespace detail {

// The operator of this name. Both take the same arguments.
template <class Result>
auto find_operator(const char* name) {
  using Parameter = const std::optional<at::Tensor>&;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<Result(const at::Tensor&, Parameter, Parameter, Parameter, Parameter, Parameter,
                    Parameter)>();
}

// A torch::nn::Linear without a bias holds an undefined tensor.
inline std::optional<at::Tensor> if_defined(const std::optional<at::Tensor>& parameter) {
  return parameter.has_value() && parameter->defined() ? parameter : std::nullopt;
}

}  // namespace detail

// Refines `input` by channel attention, then by spatial attention:
//
//   channel_gate = sigmoid(mlp(mean of input over H, W) + mlp(maximum of input over H, W))
//   mlp(v) = fc2_weight relu(fc1_weight v + fc1_bias) + fc2_bias
//   refined = channel_gate * input
//   spatial_gate = sigmoid(conv2d([mean of refined over C, maximum over C]) + conv_bias)
//   result = spatial_gate * refined
//
//   input        [N, C, H, W], float64, float32, bfloat16 or float16; C, H, W of at least 1
//   fc1_weight   [R, C]
//   fc1_bias     [R]; std::nullopt or an undefined tensor for none, as for the other biases
//   fc2_weight   [C, R]
//   fc2_bias     [C]
//   conv_weight  [1, 2, k, k], k odd; both maps are padded with k / 2 zeros on each side
//   conv_bias    [1]
//
// One gate may be missing, and is then one everywhere: the channel gate where fc1_weight and
// fc2_weight are std::nullopt (or undefined), the spatial gate where conv_weight is.
//
// The parameters are on the device of `input`, each in its dtype or in float32 (for float64:
// float64). The result has input's shape and dtype, and its layout where that is contiguous or
// channels_last. A wrong argument throws a std::exception that names it.
//
// Gradients come from the Python package: in a process that has imported cbam_ext they are as in
// Python. A C++ program has none. There the result requires a gradient where an argument does, but
// backward stops at it: PyTorch prints a warning, and what lies before it gets nothing from this
// path. So call this under at::NoGradGuard or c10::InferenceMode.
inline at::Tensor forward(const at::Tensor& input, const std::optional<at::Tensor>& fc1_weight,
                          const std::optional<at::Tensor>& fc1_bias,
                          const std::optional<at::Tensor>& fc2_weight,
                          const std::optional<at::Tensor>& fc2_bias,
                          const std::optional<at::Tensor>& conv_weight,
                          const std::optional<at::Tensor>& conv_bias) {
  static const auto op = detail::find_operator<at::Tensor>("cbam::forward");
  return op.call(input, detail::if_defined(fc1_weight), detail::if_defined(fc1_bias),
                 detail::if_defined(fc2_weight), detail::if_defined(fc2_bias),
                 detail::if_defined(conv_weight), detail::if_defined(conv_bias));
}

// channel_gate [N, C, 1, 1] and spatial_gate [N, 1, H, W] of the same arguments, in float32 (for a
// float64 input: float64). Never differentiable.
inline std::tuple<at::Tensor, at::Tensor> gates(const at::Tensor& input,
                                                const std::optional<at::Tensor>& fc1_weight,
                                                const std::optional<at::Tensor>& fc1_bias,
                                                const std::optional<at::Tensor>& fc2_weight,
                                                const std::optional<at::Tensor>& fc2_bias,
                                                const std::optional<at::Tensor>& conv_weight,
                                                const std::optional<at::Tensor>& conv_bias) {
  static const auto op = detail::find_operator<std::tuple<at::Tensor, at::Tensor>>("cbam::gates");
  return op.call(input, detail::if_defined(fc1_weight), detail::if_defined(fc1_bias),
                 detail::if_defined(fc2_weight), detail::if_defined(fc2_bias),
                 detail::if_defined(conv_weight), detail::if_defined(conv_bias));
}

}  // namespace cbam
