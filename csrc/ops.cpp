// The operators: schemas, argument checks, allocation, and the CPU registration.
//
// Gradients, fake kernels and everything else that the stable ABI leaves to Python are in
// cbam_ext/ops.py. A C++ program that loads this library alone has the forward operators without
// autograd.
#include "torch_abi.h"

#include "checks.h"
#include "cpu/kernels.h"

namespace cbam {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

STABLE_TORCH_LIBRARY(cbam, m) {
  // [N,C,H,W] [R,C] [R]? [C,R] [C]? [1,2,k,k] [1]? -> [N,C,H,W]
  m.def(
      "forward(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor conv_weight, Tensor? conv_bias) -> Tensor");
  m.def(
      "gates(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor conv_weight, Tensor? conv_bias) "
      "-> (Tensor channel_gate, Tensor spatial_gate)");

  // forward, and the two maps that backward needs beside the input.
  m.def(
      "_forward_train(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor conv_weight, Tensor? conv_bias) "
      "-> (Tensor output, Tensor channel_gate, Tensor spatial_gate)");
  // Gradients of the input and the parameters, in the order of forward's arguments; those of a
  // group that is not asked for, and of absent biases, are empty.
  m.def(
      "_backward(Tensor grad_output, Tensor input, Tensor channel_gate, Tensor spatial_gate, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "Tensor conv_weight, Tensor? conv_bias, bool input_grad, bool mlp_grads, bool conv_grads) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // The same in two phases, for a norm of the logits between them.
  m.def(
      "_logits(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor conv_weight, Tensor? conv_bias) "
      "-> (Tensor channel_gate, Tensor logits)");
  m.def("_apply(Tensor input, Tensor channel_gate, Tensor logits) -> Tensor");
  m.def(
      "_apply_backward(Tensor grad_output, Tensor input, Tensor channel_gate, Tensor logits) "
      "-> (Tensor grad_channel_gate, Tensor grad_logits, Tensor spatial_gate)");
  m.def(
      "_logits_backward(Tensor grad_output, Tensor input, Tensor channel_gate, "
      "Tensor spatial_gate, Tensor grad_channel_gate, Tensor grad_logits, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "Tensor conv_weight, Tensor? conv_bias, bool input_grad, bool mlp_grads, bool conv_grads) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // The instruction set of the CPU kernels: KernelTable::isa.
  m.def("_cpu_isa() -> int");
}

// --------------------------------------------------------------------------------- allocation

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

Tensor empty_channel_gate(const Tensor& input) {
  return empty(input, {input.size(0), input.size(1), 1, 1}, accumulator_dtype(input.scalar_type()));
}

Tensor empty_spatial_map(const Tensor& input) {
  return empty(input, {input.size(0), 1, input.size(2), input.size(3)},
               accumulator_dtype(input.scalar_type()));
}

// ---------------------------------------------------------------------------------- operators

// forward and its variants check their arguments, find the layout, and hand all outputs that are
// wanted to one kernel.
struct ForwardCall {
  ForwardCall(const Tensor& input, const ParameterTensors& parameters)
      : input(native_layout(check_forward(input, parameters))) {
    args.problem = describe(this->input, parameters);
    args.parameters = views(parameters);
    args.input = this->input.const_data_ptr();
  }
  Tensor output() {
    Tensor output = empty_like_input(input);
    args.output = output.mutable_data_ptr();
    return output;
  }
  Tensor channel_gate() {
    Tensor gate = empty_channel_gate(input);
    args.channel_gate = gate.mutable_data_ptr();
    return gate;
  }
  Tensor spatial_map(void*& where) {
    Tensor map = empty_spatial_map(input);
    where = map.mutable_data_ptr();
    return map;
  }
  void run() const { cpu::kernels().forward(args); }

  Tensor input;
  ForwardArgs args{};
};

Tensor forward_cpu(const Tensor& input, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                   const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                   const Tensor& conv_weight, const OptionalTensor& conv_bias) {
  ForwardCall call(input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
  Tensor output = call.output();
  call.run();
  return output;
}

std::tuple<Tensor, Tensor> gates_cpu(const Tensor& input, const Tensor& fc1_weight,
                                     const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                     const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                                     const OptionalTensor& conv_bias) {
  ForwardCall call(input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
  Tensor channel_gate = call.channel_gate();
  Tensor spatial_gate = call.spatial_map(call.args.spatial_gate);
  call.run();
  return {channel_gate, spatial_gate};
}

std::tuple<Tensor, Tensor, Tensor> forward_train_cpu(const Tensor& input, const Tensor& fc1_weight,
                                                     const OptionalTensor& fc1_bias,
                                                     const Tensor& fc2_weight,
                                                     const OptionalTensor& fc2_bias,
                                                     const Tensor& conv_weight,
                                                     const OptionalTensor& conv_bias) {
  ForwardCall call(input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
  Tensor output = call.output();
  Tensor channel_gate = call.channel_gate();
  Tensor spatial_gate = call.spatial_map(call.args.spatial_gate);
  call.run();
  return {output, channel_gate, spatial_gate};
}

std::tuple<Tensor, Tensor> logits_cpu(const Tensor& input, const Tensor& fc1_weight,
                                      const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                      const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                                      const OptionalTensor& conv_bias) {
  ForwardCall call(input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
  Tensor channel_gate = call.channel_gate();
  Tensor logits = call.spatial_map(call.args.logits);
  call.run();
  return {channel_gate, logits};
}

Tensor apply_cpu(const Tensor& input, const Tensor& channel_gate, const Tensor& logits) {
  check_input(input);
  const Tensor x = native_layout(input);
  const Tensor gate = small_map("channel_gate", channel_gate, x, MapKind::kChannel);
  const Tensor dense_logits = small_map("logits", logits, x, MapKind::kSpatial);
  Tensor output = empty_like_input(x);
  ApplyArgs args{};
  args.problem = describe(x);
  args.input = x.const_data_ptr();
  args.channel_gate = gate.const_data_ptr();
  args.logits = dense_logits.const_data_ptr();
  args.output = output.mutable_data_ptr();
  cpu::kernels().apply(args);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> apply_backward_cpu(const Tensor& grad_output,
                                                      const Tensor& input,
                                                      const Tensor& channel_gate,
                                                      const Tensor& logits) {
  check_input(input);
  const Tensor x = native_layout(input);
  const Tensor g = like_input("grad_output", grad_output, x);
  const Tensor gate = small_map("channel_gate", channel_gate, x, MapKind::kChannel);
  const Tensor dense_logits = small_map("logits", logits, x, MapKind::kSpatial);
  Tensor grad_channel_gate = empty_channel_gate(x);
  Tensor grad_logits = empty_spatial_map(x);
  Tensor spatial_gate = empty_spatial_map(x);
  ApplyBackwardArgs args{};
  args.problem = describe(x);
  args.grad_output = g.const_data_ptr();
  args.input = x.const_data_ptr();
  args.channel_gate = gate.const_data_ptr();
  args.logits = dense_logits.const_data_ptr();
  args.grad_channel_gate = grad_channel_gate.mutable_data_ptr();
  args.grad_logits = grad_logits.mutable_data_ptr();
  args.spatial_gate = spatial_gate.mutable_data_ptr();
  cpu::kernels().apply_backward(args);
  return {grad_channel_gate, grad_logits, spatial_gate};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The body of both backward operators; the two maps are absent where the kernel computes them.
Gradients run_backward(const Tensor& grad_output, const Tensor& input, const Tensor& channel_gate,
                       const Tensor& spatial_gate, const OptionalTensor& grad_channel_gate,
                       const OptionalTensor& grad_logits, const ParameterTensors& parameters,
                       bool input_grad, bool mlp_grads, bool conv_grads) {
  check_forward(input, parameters);
  const Tensor x = native_layout(input);
  const Tensor g = like_input("grad_output", grad_output, x);
  const Tensor gate = small_map("channel_gate", channel_gate, x, MapKind::kChannel);
  const Tensor sa = small_map("spatial_gate", spatial_gate, x, MapKind::kSpatial);
  OptionalTensor dca, dl;
  if (grad_logits.has_value()) {
    dca = small_map("grad_channel_gate", *grad_channel_gate, x, MapKind::kChannel);
    dl = small_map("grad_logits", *grad_logits, x, MapKind::kSpatial);
  }

  const auto gradient_of = [&](bool wanted, const OptionalTensor& tensor) {
    if (!wanted || !tensor.has_value()) return empty(x, {0}, x.scalar_type());
    return torch::stable::empty_like(*tensor);
  };
  Tensor grad_input = input_grad ? empty_like_input(x) : empty(x, {0}, x.scalar_type());
  const ParameterTensors grads{
      gradient_of(mlp_grads, parameters.fc1_weight),
      gradient_of(mlp_grads, parameters.fc1_bias),
      gradient_of(mlp_grads, parameters.fc2_weight),
      gradient_of(mlp_grads, parameters.fc2_bias),
      gradient_of(conv_grads, parameters.conv_weight),
      gradient_of(conv_grads, parameters.conv_bias),
  };

  BackwardArgs args{};
  args.problem = describe(x, parameters);
  args.parameters = views(parameters);
  args.grad_output = g.const_data_ptr();
  args.input = x.const_data_ptr();
  args.channel_gate = gate.const_data_ptr();
  args.spatial_gate = sa.const_data_ptr();
  args.grad_channel_gate = dca.has_value() ? dca->const_data_ptr() : nullptr;
  args.grad_logits = dl.has_value() ? dl->const_data_ptr() : nullptr;
  args.grad_input = input_grad ? grad_input.mutable_data_ptr() : nullptr;
  args.grads = mutable_views(grads);
  args.mlp_grads = mlp_grads;
  args.conv_grads = conv_grads;
  cpu::kernels().backward(args);
  return {grad_input,      grads.fc1_weight,  *grads.fc1_bias, grads.fc2_weight,
          *grads.fc2_bias, grads.conv_weight, *grads.conv_bias};
}

Gradients backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& channel_gate,
                       const Tensor& spatial_gate, const Tensor& fc1_weight,
                       const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                       const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                       const OptionalTensor& conv_bias, bool input_grad, bool mlp_grads,
                       bool conv_grads) {
  return run_backward(grad_output, input, channel_gate, spatial_gate, std::nullopt, std::nullopt,
                      {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias},
                      input_grad, mlp_grads, conv_grads);
}

Gradients logits_backward_cpu(const Tensor& grad_output, const Tensor& input,
                              const Tensor& channel_gate, const Tensor& spatial_gate,
                              const Tensor& grad_channel_gate, const Tensor& grad_logits,
                              const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                              const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                              const Tensor& conv_weight, const OptionalTensor& conv_bias,
                              bool input_grad, bool mlp_grads, bool conv_grads) {
  return run_backward(grad_output, input, channel_gate, spatial_gate, grad_channel_gate,
                      grad_logits,
                      {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias},
                      input_grad, mlp_grads, conv_grads);
}

int64_t cpu_isa() { return cpu::kernels().isa; }

STABLE_TORCH_LIBRARY_IMPL(cbam, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_cpu));
  m.impl("gates", TORCH_BOX(&gates_cpu));
  m.impl("_forward_train", TORCH_BOX(&forward_train_cpu));
  m.impl("_backward", TORCH_BOX(&backward_cpu));
  m.impl("_logits", TORCH_BOX(&logits_cpu));
  m.impl("_apply", TORCH_BOX(&apply_cpu));
  m.impl("_apply_backward", TORCH_BOX(&apply_backward_cpu));
  m.impl("_logits_backward", TORCH_BOX(&logits_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace
}  // namespace cbam
