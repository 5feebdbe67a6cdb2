// The schemas of the operators, the same for every backend. Their meaning: problem.h, the structs
// that end in Args.
#pragma once

#include "abi.h"

namespace cbam {

inline void define_operators(Library& m) {
  // [N,C,H,W] [R,C]? [R]? [C,R]? [C]? [1,2,k,k]? [1]? -> [N,C,H,W]
  // Without weights of the MLP there is no channel gate, without those of the convolution no
  // spatial gate; a gate that is not there is one everywhere.
  m.def(
      "forward(Tensor input, Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, "
      "Tensor? fc2_bias, Tensor? conv_weight, Tensor? conv_bias) -> Tensor");
  m.def(
      "gates(Tensor input, Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, "
      "Tensor? fc2_bias, Tensor? conv_weight, Tensor? conv_bias) "
      "-> (Tensor channel_gate, Tensor spatial_gate)");

  // forward, and the two maps that backward needs beside the input.
  m.def(
      "_forward_train(Tensor input, Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, "
      "Tensor? fc2_bias, Tensor? conv_weight, Tensor? conv_bias) "
      "-> (Tensor output, Tensor channel_gate, Tensor spatial_gate)");
  // Gradients of the input and the parameters, in the order of forward's arguments; those of a
  // group that is not asked for, and of absent biases, are empty.
  m.def(
      "_backward(Tensor grad_output, Tensor input, Tensor channel_gate, Tensor spatial_gate, "
      "Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, "
      "Tensor? conv_weight, Tensor? conv_bias, bool input_grad, bool mlp_grads, bool conv_grads) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // The same in two phases, for a norm of the logits between them.
  m.def(
      "_logits(Tensor input, Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, "
      "Tensor? fc2_bias, Tensor? conv_weight, Tensor? conv_bias) "
      "-> (Tensor channel_gate, Tensor logits)");
  m.def("_apply(Tensor input, Tensor channel_gate, Tensor logits) -> Tensor");
  m.def(
      "_apply_backward(Tensor grad_output, Tensor input, Tensor channel_gate, Tensor logits) "
      "-> (Tensor grad_channel_gate, Tensor grad_logits, Tensor spatial_gate)");
  m.def(
      "_logits_backward(Tensor grad_output, Tensor input, Tensor channel_gate, "
      "Tensor spatial_gate, Tensor grad_channel_gate, Tensor grad_logits, "
      "Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, "
      "Tensor? conv_weight, Tensor? conv_bias, bool input_grad, bool mlp_grads, bool conv_grads) "
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

}  // namespace cbam
