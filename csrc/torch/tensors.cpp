#include "tensors.h"

#include <cstdint>

namespace cbam {
namespace {

// Whether the dimensions, taken in this order from the fastest, lie densely; strides of dimensions
// of size 1 do not matter.
bool is_dense(const Tensor& tensor, std::initializer_list<int64_t> fastest_first) {
  int64_t expected = 1;
  for (int64_t dim : fastest_first) {
    const int64_t size = tensor.size(dim);
    if (size != 1 && tensor.stride(dim) != expected) return false;
    expected *= size;
  }
  return true;
}

bool is_channels_last(const Tensor& tensor) { return is_dense(tensor, {1, 3, 2, 0}); }

// Where a tensor is both, the layout with the longer rows is the better one to walk.
Layout layout_of(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return Layout::kNHWC;
  const bool single_pixel = tensor.size(2) == 1 && tensor.size(3) == 1;
  return single_pixel ? Layout::kNHWC : Layout::kNCHW;
}

ParameterView view_of(const Tensor& tensor, void* data) {
  ParameterView view;
  view.data = data;
  view.dtype = *kernel_dtype(tensor.scalar_type());
  const int64_t skipped = 4 - tensor.dim();
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    view.sizes[skipped + i] = tensor.size(i);
    view.strides[skipped + i] = tensor.stride(i);
  }
  return view;
}

template <class View>
Parameters views_of(const ParameterTensors& tensors, View&& view) {
  const auto view_or_none = [&](const OptionalTensor& tensor) {
    return tensor.has_value() ? view(*tensor) : ParameterView{};
  };
  return {view_or_none(tensors.fc1_weight),  view_or_none(tensors.fc1_bias),
          view_or_none(tensors.fc2_weight),  view_or_none(tensors.fc2_bias),
          view_or_none(tensors.conv_weight), view_or_none(tensors.conv_bias)};
}

}  // namespace

// Asking is far cheaper than a call of the operator that would return the tensor itself.
Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor native_layout(const Tensor& input) {
  return is_channels_last(input) ? input : contiguous_of(input);
}

Tensor in_layout_of(const Tensor& input, const Tensor& tensor) {
  if (input.is_contiguous()) return contiguous_of(tensor);
  if (is_channels_last(tensor)) return tensor;
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor aligned(const Tensor& tensor, int64_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % static_cast<uintptr_t>(alignment) == 0 ? tensor : torch::stable::clone(tensor);
}

Tensor empty_like_input(const Tensor& input) {
  if (input.numel() > 0) return torch::stable::empty_like(input);
  // An empty tensor counts as contiguous whatever its strides, and keeps them in empty_like.
  const bool last = is_channels_last(input) && input.size(1) > 1 && input.stride(1) == 1;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(torch::stable::new_empty(input, input.sizes()),
                                   last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor empty_map(const Tensor& input, MapKind kind) {
  return with_map_sizes(input, kind, [&](std::initializer_list<int64_t> sizes) {
    return empty(input, sizes, accumulator_dtype(input.scalar_type()));
  });
}

Problem describe(const Tensor& input) {
  return {input.size(0),
          input.size(1),
          input.size(2),
          input.size(3),
          1,
          1,
          *kernel_dtype(input.scalar_type()),
          layout_of(input)};
}

Problem describe(const Tensor& input, const ParameterTensors& parameters) {
  Problem problem = describe(input);
  if (parameters.fc1_weight.has_value()) problem.hidden = parameters.fc1_weight->size(0);
  if (parameters.conv_weight.has_value()) problem.kernel = parameters.conv_weight->size(2);
  return problem;
}

Parameters views(const ParameterTensors& parameters) {
  return views_of(parameters, [](const Tensor& tensor) {
    return view_of(tensor, const_cast<void*>(tensor.const_data_ptr()));
  });
}

Parameters mutable_views(const ParameterTensors& gradients) {
  return views_of(gradients, [](const Tensor& tensor) {
    return tensor.numel() == 0 ? ParameterView{} : view_of(tensor, tensor.mutable_data_ptr());
  });
}

}  // namespace cbam
