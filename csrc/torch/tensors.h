// From tensors to what the kernels take, and new tensors for what they give. Copies are made of
// tensors whose strides no kernel takes; nothing else is read.
#pragma once

#include "abi.h"

#include "../problem.h"
#include "checks.h"

namespace cbam {

// The tensor itself where it is contiguous, else a copy that is.
Tensor contiguous_of(const Tensor& tensor);

// The tensor itself where it is contiguous or channels_last, else a contiguous copy.
Tensor native_layout(const Tensor& input);

// A tensor of input's shape, brought to the layout of input, which is a native one.
Tensor in_layout_of(const Tensor& input, const Tensor& tensor);

// The tensor itself where its data begins at a multiple of `alignment` bytes, else a copy.
Tensor aligned(const Tensor& tensor, int64_t alignment);

// A new tensor of the shape, dtype and strides of an input in a native layout.
Tensor empty_like_input(const Tensor& input);

// A new map beside input.
Tensor empty_map(const Tensor& input, MapKind kind);

// input must be of a native layout.
Problem describe(const Tensor& input, const ParameterTensors& parameters);
// Without parameters of a gate, hidden or kernel is 1.
Problem describe(const Tensor& input);

// Absent parameters become views without data, and so do the empty tensors that stand for gradients
// which nobody wants. The first does not count as writing to the parameters.
Parameters views(const ParameterTensors& parameters);
Parameters mutable_views(const ParameterTensors& gradients);

}  // namespace cbam
