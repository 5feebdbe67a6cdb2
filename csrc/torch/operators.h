// The operators, the same for every backend: from the tensors of a call to the arguments of a
// kernel. Their schemas: schemas.h. What is checked: checks.h. How tensors become pointers:
// tensors.h.
//
// A backend is a class with
//   struct Scope { explicit Scope(const Tensor& input); };
//       lives while an operator of that input allocates and runs; on CUDA it makes the input's
//       device the current one
//   static constexpr int64_t kAlignment;
//       bytes; feature maps and gates that begin elsewhere are copied for it
//   static void run(const Tensor& input, const ForwardArgs& args);
//       and the same for all other argument structs of problem.h; new memory can be had from
//       empty(input, ...) of abi.h. The batch may be empty.
//
// Gradients, fake kernels and everything else that the stable ABI leaves to Python are in the
// Python package.
#pragma once

#include "abi.h"

#include <array>
#include <tuple>

#include "../problem.h"
#include "checks.h"
#include "tensors.h"

namespace cbam {

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// One call of an operator. It checks, makes the device current, and fills in the kernel's
// arguments: read_...() for a tensor that the kernel reads, new_...() for one that it writes.
template <class Backend, class Args>
class Call {
 public:
  using Others = std::initializer_list<NamedTensor>;  // of which devices are to be checked

  Call(const Tensor& input, Others others)
      : scope_(checked(check_input(input), others)), x(native(input)) {
    args.problem = describe(x);
    args.input = x.const_data_ptr();
  }
  Call(const Tensor& input, const ParameterTensors& parameters, Others others)
      : scope_(checked(check_forward(input, parameters), others)), x(native(input)) {
    args.problem = describe(x, parameters);
    args.parameters = views(parameters);
    args.input = x.const_data_ptr();
  }

  void read_like_input(const void*& where, const NamedTensor& given) {
    check_like_input(given.name, given.tensor, x);
    where = keep(in_layout_of(x, given.tensor));
  }
  void read_map(const void*& where, const NamedTensor& given, MapKind kind) {
    check_map(given.name, given.tensor, x, kind);
    where = keep(contiguous_of(given.tensor));
  }
  Tensor new_like_input(void*& where) const { return written(empty_like_input(x), where); }
  Tensor new_map(void*& where, MapKind kind) const { return written(empty_map(x, kind), where); }

  void run() const { Backend::run(x, args); }

 private:
  // All that a Scope may rely on is checked before it.
  static const Tensor& checked(const Tensor& input, Others others) {
    for (const NamedTensor& other : others) check_device(other.name, other.tensor, input);
    return input;
  }
  static Tensor native(const Tensor& input) {
    return aligned(native_layout(input), Backend::kAlignment);
  }
  static Tensor written(Tensor tensor, void*& where) {
    where = tensor.mutable_data_ptr();
    return tensor;
  }
  // A copy that had to be made lives as long as the call.
  const void* keep(const Tensor& tensor) {
    OptionalTensor& kept = kept_[count_++];
    kept = aligned(tensor, Backend::kAlignment);
    return kept->const_data_ptr();
  }

  typename Backend::Scope scope_;  // first: before the copy that x may be
  static constexpr size_t kMostRead = 5;
  std::array<OptionalTensor, kMostRead> kept_;
  size_t count_ = 0;

 public:
  Tensor x;  // the input in a native layout
  Args args{};
};

// The bodies.
template <class Backend>
struct Operators {
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Tensor forward(const Tensor& input, const OptionalTensor& fc1_weight,
                        const OptionalTensor& fc1_bias, const OptionalTensor& fc2_weight,
                        const OptionalTensor& fc2_bias, const OptionalTensor& conv_weight,
                        const OptionalTensor& conv_bias) {
    Call<Backend, ForwardArgs> call(
        input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias}, {});
    Tensor output = call.new_like_input(call.args.output);
    call.run();
    return output;
  }

  static std::tuple<Tensor, Tensor> gates(const Tensor& input, const OptionalTensor& fc1_weight,
                                          const OptionalTensor& fc1_bias,
                                          const OptionalTensor& fc2_weight,
                                          const OptionalTensor& fc2_bias,
                                          const OptionalTensor& conv_weight,
                                          const OptionalTensor& conv_bias) {
    Call<Backend, ForwardArgs> call(
        input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias}, {});
    Tensor channel_gate = call.new_map(call.args.channel_gate, MapKind::kChannel);
    Tensor spatial_gate = call.new_map(call.args.spatial_gate, MapKind::kSpatial);
    call.run();
    return {channel_gate, spatial_gate};
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_train(
      const Tensor& input, const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
      const OptionalTensor& fc2_weight, const OptionalTensor& fc2_bias,
      const OptionalTensor& conv_weight, const OptionalTensor& conv_bias) {
    Call<Backend, ForwardArgs> call(
        input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias}, {});
    Tensor output = call.new_like_input(call.args.output);
    Tensor channel_gate = call.new_map(call.args.channel_gate, MapKind::kChannel);
    Tensor spatial_gate = call.new_map(call.args.spatial_gate, MapKind::kSpatial);
    call.run();
    return {output, channel_gate, spatial_gate};
  }

  static std::tuple<Tensor, Tensor> logits(const Tensor& input, const OptionalTensor& fc1_weight,
                                           const OptionalTensor& fc1_bias,
                                           const OptionalTensor& fc2_weight,
                                           const OptionalTensor& fc2_bias,
                                           const OptionalTensor& conv_weight,
                                           const OptionalTensor& conv_bias) {
    Call<Backend, ForwardArgs> call(
        input, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias}, {});
    Tensor channel_gate = call.new_map(call.args.channel_gate, MapKind::kChannel);
    Tensor logits = call.new_map(call.args.logits, MapKind::kSpatial);
    call.run();
    return {channel_gate, logits};
  }

  static Tensor apply(const Tensor& input, const Tensor& channel_gate, const Tensor& logits) {
    const NamedTensor ca{"channel_gate", channel_gate}, given_logits{"logits", logits};
    Call<Backend, ApplyArgs> call(input, {ca, given_logits});
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    call.read_map(call.args.logits, given_logits, MapKind::kSpatial);
    Tensor output = call.new_like_input(call.args.output);
    call.run();
    return output;
  }

  static std::tuple<Tensor, Tensor, Tensor> apply_backward(const Tensor& grad_output,
                                                           const Tensor& input,
                                                           const Tensor& channel_gate,
                                                           const Tensor& logits) {
    const NamedTensor g{"grad_output", grad_output}, ca{"channel_gate", channel_gate};
    const NamedTensor given_logits{"logits", logits};
    Call<Backend, ApplyBackwardArgs> call(input, {g, ca, given_logits});
    call.read_like_input(call.args.grad_output, g);
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    call.read_map(call.args.logits, given_logits, MapKind::kSpatial);
    Tensor grad_channel_gate = call.new_map(call.args.grad_channel_gate, MapKind::kChannel);
    Tensor grad_logits = call.new_map(call.args.grad_logits, MapKind::kSpatial);
    Tensor spatial_gate = call.new_map(call.args.spatial_gate, MapKind::kSpatial);
    call.run();
    return {grad_channel_gate, grad_logits, spatial_gate};
  }

  // What is asked of both backward operators.
  struct Wanted {
    bool input_grad, mlp_grads, conv_grads;
  };

  // The end of both, whose maps have been read.
  static Gradients run_backward(Call<Backend, BackwardArgs>& call,
                                const ParameterTensors& parameters, const Wanted& wanted) {
    const auto none = [&] { return empty(call.x, {0}, call.x.scalar_type()); };
    const auto gradient_of = [&](bool is_wanted, const OptionalTensor& tensor) {
      return is_wanted && tensor.has_value() ? torch::stable::empty_like(*tensor) : none();
    };
    Tensor grad_input = wanted.input_grad ? call.new_like_input(call.args.grad_input) : none();
    const ParameterTensors grads{
        gradient_of(wanted.mlp_grads, parameters.fc1_weight),
        gradient_of(wanted.mlp_grads, parameters.fc1_bias),
        gradient_of(wanted.mlp_grads, parameters.fc2_weight),
        gradient_of(wanted.mlp_grads, parameters.fc2_bias),
        gradient_of(wanted.conv_grads, parameters.conv_weight),
        gradient_of(wanted.conv_grads, parameters.conv_bias),
    };
    call.args.grads = mutable_views(grads);
    call.args.mlp_grads = wanted.mlp_grads && call.args.parameters.have_channel_gate();
    call.args.conv_grads = wanted.conv_grads && call.args.parameters.have_spatial_gate();
    call.run();
    return {grad_input,      *grads.fc1_weight,  *grads.fc1_bias, *grads.fc2_weight,
            *grads.fc2_bias, *grads.conv_weight, *grads.conv_bias};
  }

  static Gradients backward(const Tensor& grad_output, const Tensor& input,
                            const Tensor& channel_gate, const Tensor& spatial_gate,
                            const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                            const OptionalTensor& fc2_weight, const OptionalTensor& fc2_bias,
                            const OptionalTensor& conv_weight, const OptionalTensor& conv_bias,
                            bool input_grad, bool mlp_grads, bool conv_grads) {
    const ParameterTensors parameters{fc1_weight, fc1_bias,    fc2_weight,
                                      fc2_bias,   conv_weight, conv_bias};
    const NamedTensor g{"grad_output", grad_output}, ca{"channel_gate", channel_gate};
    const NamedTensor sa{"spatial_gate", spatial_gate};
    Call<Backend, BackwardArgs> call(input, parameters, {g, ca, sa});
    call.read_like_input(call.args.grad_output, g);
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    call.read_map(call.args.spatial_gate, sa, MapKind::kSpatial);
    return run_backward(call, parameters, {input_grad, mlp_grads, conv_grads});
  }

  static Gradients logits_backward(const Tensor& grad_output, const Tensor& input,
                                   const Tensor& channel_gate, const Tensor& spatial_gate,
                                   const Tensor& grad_channel_gate, const Tensor& grad_logits,
                                   const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                                   const OptionalTensor& fc2_weight, const OptionalTensor& fc2_bias,
                                   const OptionalTensor& conv_weight,
                                   const OptionalTensor& conv_bias, bool input_grad, bool mlp_grads,
                                   bool conv_grads) {
    const ParameterTensors parameters{fc1_weight, fc1_bias,    fc2_weight,
                                      fc2_bias,   conv_weight, conv_bias};
    const NamedTensor g{"grad_output", grad_output}, ca{"channel_gate", channel_gate};
    const NamedTensor sa{"spatial_gate", spatial_gate};
    const NamedTensor dca{"grad_channel_gate", grad_channel_gate};
    const NamedTensor dlogits{"grad_logits", grad_logits};
    Call<Backend, BackwardArgs> call(input, parameters, {g, ca, sa, dca, dlogits});
    call.read_like_input(call.args.grad_output, g);
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    call.read_map(call.args.spatial_gate, sa, MapKind::kSpatial);
    call.read_map(call.args.grad_channel_gate, dca, MapKind::kChannel);
    call.read_map(call.args.grad_logits, dlogits, MapKind::kSpatial);
    return run_backward(call, parameters, {input_grad, mlp_grads, conv_grads});
  }

  static Tensor pool(const Tensor& input) {
    Call<Backend, PoolArgs> call(input, {});
    Tensor pooled = call.new_map(call.args.pooled, MapKind::kPooled);
    call.run();
    return pooled;
  }

  static Tensor channel_stats(const Tensor& input, const Tensor& channel_gate) {
    const NamedTensor ca{"channel_gate", channel_gate};
    Call<Backend, ChannelStatsArgs> call(input, {ca});
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    Tensor stats = call.new_map(call.args.stats, MapKind::kStats);
    call.run();
    return stats;
  }

  static Tensor channel_stats_backward(const Tensor& grad_stats, const Tensor& input,
                                       const Tensor& channel_gate) {
    const NamedTensor ds{"grad_stats", grad_stats}, ca{"channel_gate", channel_gate};
    Call<Backend, ChannelStatsBackwardArgs> call(input, {ds, ca});
    call.read_map(call.args.grad_stats, ds, MapKind::kStats);
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    Tensor grad_channel_gate = call.new_map(call.args.grad_channel_gate, MapKind::kChannel);
    call.run();
    return grad_channel_gate;
  }

  static Tensor pool_backward(const Tensor& grad_pooled, const Tensor& grad_output,
                              const Tensor& input, const Tensor& channel_gate,
                              const Tensor& spatial_gate, const Tensor& grad_stats) {
    const NamedTensor dpooled{"grad_pooled", grad_pooled}, g{"grad_output", grad_output};
    const NamedTensor ca{"channel_gate", channel_gate}, sa{"spatial_gate", spatial_gate};
    const NamedTensor ds{"grad_stats", grad_stats};
    Call<Backend, PoolBackwardArgs> call(input, {dpooled, g, ca, sa, ds});
    call.read_map(call.args.grad_pooled, dpooled, MapKind::kPooled);
    call.read_like_input(call.args.grad_output, g);
    call.read_map(call.args.channel_gate, ca, MapKind::kChannel);
    call.read_map(call.args.spatial_gate, sa, MapKind::kSpatial);
    call.read_map(call.args.grad_stats, ds, MapKind::kStats);
    Tensor grad_input = call.new_like_input(call.args.grad_input);
    call.run();
    return grad_input;
  }
};

template <class Backend>
void implement_operators(Library& m) {
  using Bodies = Operators<Backend>;
  m.impl("forward", TORCH_BOX(&Bodies::forward));
  m.impl("gates", TORCH_BOX(&Bodies::gates));
  m.impl("_forward_train", TORCH_BOX(&Bodies::forward_train));
  m.impl("_backward", TORCH_BOX(&Bodies::backward));
  m.impl("_logits", TORCH_BOX(&Bodies::logits));
  m.impl("_apply", TORCH_BOX(&Bodies::apply));
  m.impl("_apply_backward", TORCH_BOX(&Bodies::apply_backward));
  m.impl("_logits_backward", TORCH_BOX(&Bodies::logits_backward));
  m.impl("_pool", TORCH_BOX(&Bodies::pool));
  m.impl("_channel_stats", TORCH_BOX(&Bodies::channel_stats));
  m.impl("_channel_stats_backward", TORCH_BOX(&Bodies::channel_stats_backward));
  m.impl("_pool_backward", TORCH_BOX(&Bodies::pool_backward));
}

}  // namespace cbam
