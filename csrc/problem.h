// One CBAM problem as the kernels see it: shapes, dtypes, layout and pointers. Shared by every
// backend; knows nothing of PyTorch.
//
// Notation of the whole project: N samples, C channels, H x W = P pixels, R hidden units of the
// MLP, a k x k convolution. Storage and accumulator: dtype.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "rounding.h"  // for all who cut a problem into pieces

namespace cbam {

enum class Layout {
  kNCHW,  // contiguous: the pixels of a channel lie together
  kNHWC,  // channels_last: the channels of a pixel lie together
};

struct Problem {
  int64_t n, c, h, w;
  int64_t hidden;
  int64_t kernel;
  DType dtype;
  Layout layout;

  int64_t pixels() const { return h * w; }
};

// A parameter where PyTorch holds it: any strides, its own dtype. data is null where there is none.
struct ParameterView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t sizes[4] = {1, 1, 1, 1};    // right-aligned: [R, C] is {1, 1, R, C}
  int64_t strides[4] = {0, 0, 0, 0};  // in elements
};

struct Parameters {
  ParameterView fc1_weight;   // [R, C]
  ParameterView fc1_bias;     // [R]
  ParameterView fc2_weight;   // [C, R]
  ParameterView fc2_bias;     // [C]
  ParameterView conv_weight;  // [1, 2, k, k]
  ParameterView conv_bias;    // [1]

  // One of the two may be missing: it is one everywhere, its logits infinite.
  bool have_channel_gate() const { return fc1_weight.data != nullptr; }
  bool have_spatial_gate() const { return conv_weight.data != nullptr; }
};

// x -> channel gate -> logits of the spatial gate -> y. Outputs that are null are not wanted, and
// not computed where nothing else needs them.
struct ForwardArgs {
  Problem problem;
  Parameters parameters;
  const void* input;   // [N, C, H, W]
  void* output;        // [N, C, H, W]
  void* channel_gate;  // [N, C] accumulator
  void* spatial_gate;  // [N, P] accumulator
  void* logits;        // [N, P] accumulator
};

// y = sigmoid(logits) * channel gate * x.
struct ApplyArgs {
  Problem problem;
  const void* input;         // [N, C, H, W]
  const void* channel_gate;  // [N, C] accumulator
  const void* logits;        // [N, P] accumulator
  void* output;              // [N, C, H, W]
};

// Gradient of ApplyArgs with respect to the two maps; its gradient with respect to x is taken by
// BackwardArgs, together with everything else that x receives.
struct ApplyBackwardArgs {
  Problem problem;
  const void* grad_output;   // [N, C, H, W]
  const void* input;         // [N, C, H, W]
  const void* channel_gate;  // [N, C] accumulator
  const void* logits;        // [N, P] accumulator
  void* grad_channel_gate;   // [N, C] accumulator: sum_p g sa x
  void* grad_logits;         // [N, P] accumulator: sa (1 - sa) sum_c g u
  void* spatial_gate;        // [N, P] accumulator
};

// The whole backward. Where grad_logits and grad_channel_gate are null they are computed first, as
// ApplyBackwardArgs says; where they are given (a norm stands between the phases) that is skipped.
struct BackwardArgs {
  Problem problem;
  Parameters parameters;
  const void* grad_output;        // [N, C, H, W]
  const void* input;              // [N, C, H, W]
  const void* channel_gate;       // [N, C] accumulator
  const void* spatial_gate;       // [N, P] accumulator
  const void* grad_channel_gate;  // [N, C] accumulator or null
  const void* grad_logits;        // [N, P] accumulator or null
  void* grad_input;               // [N, C, H, W] or null: not wanted
  Parameters grads;               // views with null data are not wanted
  bool mlp_grads;                 // whether any gradient of the MLP is wanted
  bool conv_grads;                // whether any gradient of the convolution is wanted
};

// The following are what is left for kernels where PyTorch runs the layers itself: x -> pooled
// maps, (channel gate, x) -> statistics, and the gradients of both. ApplyArgs and ApplyBackwardArgs
// go with them.

// Average and maximum of each channel over the pixels: what the MLP sees.
struct PoolArgs {
  Problem problem;
  const void* input;  // [N, C, H, W]
  void* pooled;       // [N, 2, C] accumulator: average, maximum
};

// Mean and maximum of u = channel gate * x over the channels: what the convolution sees.
struct ChannelStatsArgs {
  Problem problem;
  const void* input;         // [N, C, H, W]
  const void* channel_gate;  // [N, C] accumulator
  void* stats;               // [N, 2, P] accumulator: mean, maximum
};

// Gradient of ChannelStatsArgs with respect to the channel gate; with respect to x it is taken by
// PoolBackwardArgs. ds0 and ds1 are the two maps of grad_stats.
struct ChannelStatsBackwardArgs {
  Problem problem;
  const void* grad_stats;    // [N, 2, P] accumulator
  const void* input;         // [N, C, H, W]
  const void* channel_gate;  // [N, C] accumulator
  void* grad_channel_gate;   // [N, C] accumulator: sum_p x (ds0 / C + [c is the argmax at p] ds1)
};

// Everything that x receives: from y, from the statistics and from the pooled maps.
struct PoolBackwardArgs {
  Problem problem;
  const void* grad_pooled;   // [N, 2, C] accumulator
  const void* grad_output;   // [N, C, H, W]
  const void* input;         // [N, C, H, W]
  const void* channel_gate;  // [N, C] accumulator
  const void* spatial_gate;  // [N, P] accumulator
  const void* grad_stats;    // [N, 2, P] accumulator
  void* grad_input;          // [N, C, H, W]
};

}  // namespace cbam
