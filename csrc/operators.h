// The operators, the same for every backend: schemas, argument checks, allocation.
//
// A backend is a class with
//   struct Scope { explicit Scope(const Tensor& input); };
//       lives while an operator of that input allocates and runs; on CUDA it makes the input's
//       device the current one
//   static constexpr int64_t kAlignment;
//       bytes; feature maps and gates that begin elsewhere are copied for it
//   static void run(const Tensor& input, const ForwardArgs& args);
//       and the same for all other argument structs of problem.h; new memory can be had from
//       new_empty(input, ...). The batch may be empty.
//
// Gradients, fake kernels and everything else that the stable ABI leaves to Python are in
// cbam_ext/ops.py.
#pragma once

#include "torch_abi.h"

#include <initializer_list>
#include <optional>
#include <tuple>

#include "checks.h"
#include "problem.h"

namespace cbam {

using torch::stable::Tensor;
using Library = torch::stable::detail::StableLibrary;  // what the registration macros hand out
using OptionalTensor = std::optional<Tensor>;

// ------------------------------------------------------------------------------------ schemas

inline void define_operators(Library& m) {
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

  // What is around the layers, where PyTorch runs those itself: with _apply and _apply_backward it
  // makes forward and backward.
  // [N,C,H,W] -> [N,2,C]: average and maximum over the pixels, for the MLP.
  m.def("_pool(Tensor input) -> Tensor");
  // -> [N,2,H,W]: mean and maximum of channel_gate * input over the channels, for the convolution.
  m.def("_channel_stats(Tensor input, Tensor channel_gate) -> Tensor");
  // The gradient of channel_gate alone; that of input is in the next.
  m.def("_channel_stats_backward(Tensor grad_stats, Tensor input, Tensor channel_gate) -> Tensor");
  // Everything that input receives, rounded once.
  m.def(
      "_pool_backward(Tensor grad_pooled, Tensor grad_output, Tensor input, Tensor channel_gate, "
      "Tensor spatial_gate, Tensor grad_stats) -> Tensor");
}

// --------------------------------------------------------------------------------- allocation

// torch::stable::new_empty finds its operator by name on every call, which takes as long again.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()), &number, /*layout=*/nullptr,
      /*device=*/nullptr, /*device_index=*/0, /*pin_memory=*/nullptr, &result));
  return Tensor(result);
}

inline Tensor empty_channel_gate(const Tensor& input) {
  return empty(input, {input.size(0), input.size(1), 1, 1}, accumulator_dtype(input.scalar_type()));
}

inline Tensor empty_spatial_map(const Tensor& input) {
  return empty(input, {input.size(0), 1, input.size(2), input.size(3)},
               accumulator_dtype(input.scalar_type()));
}

inline Tensor empty_pooled(const Tensor& input) {
  return empty(input, {input.size(0), 2, input.size(1)}, accumulator_dtype(input.scalar_type()));
}

inline Tensor empty_stats(const Tensor& input) {
  return empty(input, {input.size(0), 2, input.size(2), input.size(3)},
               accumulator_dtype(input.scalar_type()));
}

// ---------------------------------------------------------------------------------- operators

// forward and its variants check their arguments, find the layout, and hand all outputs that are
// wanted to one kernel.
template <class Backend>
struct ForwardCall {
  ForwardCall(const Tensor& input, const ParameterTensors& parameters)
      : scope(check_forward(input, parameters)),
        input(aligned(native_layout(input), Backend::kAlignment)) {
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
  void run() const { Backend::run(input, args); }

  typename Backend::Scope scope;  // first: before the copy that input may be
  Tensor input;
  ForwardArgs args{};
};

// The bodies. All that a Scope may rely on, the devices among it, is checked before it.
template <class Backend>
struct Operators {
  using Scope = typename Backend::Scope;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  // Tensors as the kernels take them.
  static Tensor native(const Tensor& input) {
    return aligned(native_layout(input), Backend::kAlignment);
  }
  static Tensor like(const char* name, const Tensor& tensor, const Tensor& x) {
    return aligned(like_input(name, tensor, x), Backend::kAlignment);
  }
  static Tensor map(const char* name, const Tensor& tensor, const Tensor& x, MapKind kind) {
    return aligned(small_map(name, tensor, x, kind), Backend::kAlignment);
  }

  static Tensor forward(const Tensor& input, const Tensor& fc1_weight,
                        const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                        const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                        const OptionalTensor& conv_bias) {
    ForwardCall<Backend> call(input,
                              {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
    Tensor output = call.output();
    call.run();
    return output;
  }

  static std::tuple<Tensor, Tensor> gates(const Tensor& input, const Tensor& fc1_weight,
                                          const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                          const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                                          const OptionalTensor& conv_bias) {
    ForwardCall<Backend> call(input,
                              {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
    Tensor channel_gate = call.channel_gate();
    Tensor spatial_gate = call.spatial_map(call.args.spatial_gate);
    call.run();
    return {channel_gate, spatial_gate};
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_train(
      const Tensor& input, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
      const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const Tensor& conv_weight,
      const OptionalTensor& conv_bias) {
    ForwardCall<Backend> call(input,
                              {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
    Tensor output = call.output();
    Tensor channel_gate = call.channel_gate();
    Tensor spatial_gate = call.spatial_map(call.args.spatial_gate);
    call.run();
    return {output, channel_gate, spatial_gate};
  }

  static std::tuple<Tensor, Tensor> logits(const Tensor& input, const Tensor& fc1_weight,
                                           const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                           const OptionalTensor& fc2_bias,
                                           const Tensor& conv_weight,
                                           const OptionalTensor& conv_bias) {
    ForwardCall<Backend> call(input,
                              {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias});
    Tensor channel_gate = call.channel_gate();
    Tensor logits = call.spatial_map(call.args.logits);
    call.run();
    return {channel_gate, logits};
  }

  static Tensor apply(const Tensor& input, const Tensor& channel_gate, const Tensor& logits) {
    check_input(input);
    check_device("channel_gate", channel_gate, input);
    check_device("logits", logits, input);
    const Scope scope(input);
    const Tensor x = native(input);
    const Tensor gate = map("channel_gate", channel_gate, x, MapKind::kChannel);
    const Tensor dense_logits = map("logits", logits, x, MapKind::kSpatial);
    Tensor output = empty_like_input(x);
    ApplyArgs args{};
    args.problem = describe(x);
    args.input = x.const_data_ptr();
    args.channel_gate = gate.const_data_ptr();
    args.logits = dense_logits.const_data_ptr();
    args.output = output.mutable_data_ptr();
    Backend::run(x, args);
    return output;
  }

  static std::tuple<Tensor, Tensor, Tensor> apply_backward(const Tensor& grad_output,
                                                           const Tensor& input,
                                                           const Tensor& channel_gate,
                                                           const Tensor& logits) {
    check_input(input);
    check_device("grad_output", grad_output, input);
    check_device("channel_gate", channel_gate, input);
    check_device("logits", logits, input);
    const Scope scope(input);
    const Tensor x = native(input);
    const Tensor g = like("grad_output", grad_output, x);
    const Tensor gate = map("channel_gate", channel_gate, x, MapKind::kChannel);
    const Tensor dense_logits = map("logits", logits, x, MapKind::kSpatial);
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
    Backend::run(x, args);
    return {grad_channel_gate, grad_logits, spatial_gate};
  }

  // The body of both backward operators; the two maps are absent where the kernel computes them.
  static Gradients run_backward(const Tensor& grad_output, const Tensor& input,
                                const Tensor& channel_gate, const Tensor& spatial_gate,
                                const OptionalTensor& grad_channel_gate,
                                const OptionalTensor& grad_logits,
                                const ParameterTensors& parameters, bool input_grad, bool mlp_grads,
                                bool conv_grads) {
    check_forward(input, parameters);
    check_device("grad_output", grad_output, input);
    check_device("channel_gate", channel_gate, input);
    check_device("spatial_gate", spatial_gate, input);
    if (grad_logits.has_value()) {
      check_device("grad_channel_gate", *grad_channel_gate, input);
      check_device("grad_logits", *grad_logits, input);
    }
    const Scope scope(input);
    const Tensor x = native(input);
    const Tensor g = like("grad_output", grad_output, x);
    const Tensor gate = map("channel_gate", channel_gate, x, MapKind::kChannel);
    const Tensor sa = map("spatial_gate", spatial_gate, x, MapKind::kSpatial);
    OptionalTensor dca, dl;
    if (grad_logits.has_value()) {
      dca = map("grad_channel_gate", *grad_channel_gate, x, MapKind::kChannel);
      dl = map("grad_logits", *grad_logits, x, MapKind::kSpatial);
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
    Backend::run(x, args);
    return {grad_input,      grads.fc1_weight,  *grads.fc1_bias, grads.fc2_weight,
            *grads.fc2_bias, grads.conv_weight, *grads.conv_bias};
  }

  static Gradients backward(const Tensor& grad_output, const Tensor& input,
                            const Tensor& channel_gate, const Tensor& spatial_gate,
                            const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                            const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                            const Tensor& conv_weight, const OptionalTensor& conv_bias,
                            bool input_grad, bool mlp_grads, bool conv_grads) {
    return run_backward(grad_output, input, channel_gate, spatial_gate, std::nullopt, std::nullopt,
                        {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias},
                        input_grad, mlp_grads, conv_grads);
  }

  static Gradients logits_backward(const Tensor& grad_output, const Tensor& input,
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

  static Tensor pool(const Tensor& input) {
    check_input(input);
    const Scope scope(input);
    const Tensor x = native(input);
    Tensor pooled = empty_pooled(x);
    PoolArgs args{};
    args.problem = describe(x);
    args.input = x.const_data_ptr();
    args.pooled = pooled.mutable_data_ptr();
    Backend::run(x, args);
    return pooled;
  }

  static Tensor channel_stats(const Tensor& input, const Tensor& channel_gate) {
    check_input(input);
    check_device("channel_gate", channel_gate, input);
    const Scope scope(input);
    const Tensor x = native(input);
    const Tensor gate = map("channel_gate", channel_gate, x, MapKind::kChannel);
    Tensor stats = empty_stats(x);
    ChannelStatsArgs args{};
    args.problem = describe(x);
    args.input = x.const_data_ptr();
    args.channel_gate = gate.const_data_ptr();
    args.stats = stats.mutable_data_ptr();
    Backend::run(x, args);
    return stats;
  }

  static Tensor channel_stats_backward(const Tensor& grad_stats, const Tensor& input,
                                       const Tensor& channel_gate) {
    check_input(input);
    check_device("grad_stats", grad_stats, input);
    check_device("channel_gate", channel_gate, input);
    const Scope scope(input);
    const Tensor x = native(input);
    const Tensor ds = map("grad_stats", grad_stats, x, MapKind::kStats);
    const Tensor gate = map("channel_gate", channel_gate, x, MapKind::kChannel);
    Tensor grad_channel_gate = empty_channel_gate(x);
    ChannelStatsBackwardArgs args{};
    args.problem = describe(x);
    args.grad_stats = ds.const_data_ptr();
    args.input = x.const_data_ptr();
    args.channel_gate = gate.const_data_ptr();
    args.grad_channel_gate = grad_channel_gate.mutable_data_ptr();
    Backend::run(x, args);
    return grad_channel_gate;
  }

  static Tensor pool_backward(const Tensor& grad_pooled, const Tensor& grad_output,
                              const Tensor& input, const Tensor& channel_gate,
                              const Tensor& spatial_gate, const Tensor& grad_stats) {
    check_input(input);
    check_device("grad_pooled", grad_pooled, input);
    check_device("grad_output", grad_output, input);
    check_device("channel_gate", channel_gate, input);
    check_device("spatial_gate", spatial_gate, input);
    check_device("grad_stats", grad_stats, input);
    const Scope scope(input);
    const Tensor x = native(input);
    const Tensor dpooled = map("grad_pooled", grad_pooled, x, MapKind::kPooled);
    const Tensor g = like("grad_output", grad_output, x);
    const Tensor gate = map("channel_gate", channel_gate, x, MapKind::kChannel);
    const Tensor sa = map("spatial_gate", spatial_gate, x, MapKind::kSpatial);
    const Tensor ds = map("grad_stats", grad_stats, x, MapKind::kStats);
    Tensor grad_input = empty_like_input(x);
    PoolBackwardArgs args{};
    args.problem = describe(x);
    args.grad_pooled = dpooled.const_data_ptr();
    args.grad_output = g.const_data_ptr();
    args.input = x.const_data_ptr();
    args.channel_gate = gate.const_data_ptr();
    args.spatial_gate = sa.const_data_ptr();
    args.grad_stats = ds.const_data_ptr();
    args.grad_input = grad_input.mutable_data_ptr();
    Backend::run(x, args);
    return grad_input;
  }
};

template <class Backend>
void implement_operators(Library& m) {
  using Kernels = Operators<Backend>;
  m.impl("forward", TORCH_BOX(&Kernels::forward));
  m.impl("gates", TORCH_BOX(&Kernels::gates));
  m.impl("_forward_train", TORCH_BOX(&Kernels::forward_train));
  m.impl("_backward", TORCH_BOX(&Kernels::backward));
  m.impl("_logits", TORCH_BOX(&Kernels::logits));
  m.impl("_apply", TORCH_BOX(&Kernels::apply));
  m.impl("_apply_backward", TORCH_BOX(&Kernels::apply_backward));
  m.impl("_logits_backward", TORCH_BOX(&Kernels::logits_backward));
  m.impl("_pool", TORCH_BOX(&Kernels::pool));
  m.impl("_channel_stats", TORCH_BOX(&Kernels::channel_stats));
  m.impl("_channel_stats_backward", TORCH_BOX(&Kernels::channel_stats_backward));
  m.impl("_pool_backward", TORCH_BOX(&Kernels::pool_backward));
}

}  // namespace cbam
