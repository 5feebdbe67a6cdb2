#include "torch_abi.h"

#include "checks.h"

#include <string>
#include <utility>

namespace cbam {
namespace {

using torch::stable::Tensor;

// Kernels keep the channel of a maximum in 32 bits.
constexpr int64_t kMaxChannels = 2147483647;

std::string shape_of(const Tensor& tensor) {
  std::string text = "shape [";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(tensor.size(i));
  }
  return text + "]";
}

std::string list_of(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

// Python's name of a dtype.
std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "a dtype of number " + std::to_string(static_cast<int>(dtype));
  }
}

bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

DType storage(ScalarType dtype) {
  if (dtype == ScalarType::Double) return DType::kFloat64;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  if (dtype == ScalarType::Half) return DType::kFloat16;
  return DType::kFloat32;
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

void check_parameter(const char* name, const Tensor& parameter, const Tensor& input) {
  const ScalarType dtype = input.scalar_type(), accumulator = accumulator_dtype(dtype);
  const ScalarType got = parameter.scalar_type();
  STD_TORCH_CHECK(got == dtype || got == accumulator, name, " must be ", name_of(accumulator),
                  dtype == accumulator ? std::string() : " or " + name_of(dtype),
                  " for an input of ", name_of(dtype), ", got ", name_of(got));
  check_device(name, parameter, input);
}

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(has_shape(tensor, sizes), name, " must have shape ", list_of(sizes), ", got ",
                  shape_of(tensor));
}

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

// Asking is far cheaper than a call of the operator that would return the tensor itself.
Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
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
  view.dtype = storage(tensor.scalar_type());
  const int64_t skipped = 4 - tensor.dim();
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    view.sizes[skipped + i] = tensor.size(i);
    view.strides[skipped + i] = tensor.stride(i);
  }
  return view;
}

template <class View>
Parameters views_of(const ParameterTensors& tensors, View&& view) {
  const auto optional_view = [&](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? view(*tensor) : ParameterView{};
  };
  return {view(tensors.fc1_weight),  optional_view(tensors.fc1_bias),
          view(tensors.fc2_weight),  optional_view(tensors.fc2_bias),
          view(tensors.conv_weight), optional_view(tensors.conv_bias)};
}

}  // namespace

ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const Tensor& check_input(const Tensor& input) {
  STD_TORCH_CHECK(is_supported(input.scalar_type()),
                  "input must be float64, float32, bfloat16 or float16, got ",
                  name_of(input.scalar_type()));
  STD_TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions [N, C, H, W], got ",
                  shape_of(input));
  STD_TORCH_CHECK(input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0,
                  "input must have C, H and W of at least 1, got ", shape_of(input));
  STD_TORCH_CHECK(input.size(1) <= kMaxChannels, "input must have at most ", kMaxChannels,
                  " channels, got ", shape_of(input));
  return input;
}

void check_device(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(same_device(tensor, input), name, " must be on the device of input, ",
                  device_of(input), ", got ", device_of(tensor));
}

const Tensor& check_forward(const Tensor& input, const ParameterTensors& parameters) {
  check_input(input);
  const auto check_optional = [&](const char* name, const std::optional<Tensor>& parameter) {
    if (parameter.has_value()) check_parameter(name, *parameter, input);
  };
  check_parameter("fc1_weight", parameters.fc1_weight, input);
  check_optional("fc1_bias", parameters.fc1_bias);
  check_parameter("fc2_weight", parameters.fc2_weight, input);
  check_optional("fc2_bias", parameters.fc2_bias);
  check_parameter("conv_weight", parameters.conv_weight, input);
  check_optional("conv_bias", parameters.conv_bias);

  const int64_t channels = input.size(1);
  const Tensor& fc1 = parameters.fc1_weight;
  STD_TORCH_CHECK(fc1.dim() == 2 && fc1.size(0) > 0 && fc1.size(1) == channels,
                  "fc1_weight must have shape [R, ", channels, "] (R >= 1, and the ", channels,
                  " channels of input), got ", shape_of(fc1));
  const int64_t hidden = fc1.size(0);
  if (parameters.fc1_bias.has_value()) check_shape("fc1_bias", *parameters.fc1_bias, {hidden});
  check_shape("fc2_weight", parameters.fc2_weight, {channels, hidden});
  if (parameters.fc2_bias.has_value()) check_shape("fc2_bias", *parameters.fc2_bias, {channels});
  const Tensor& conv = parameters.conv_weight;
  STD_TORCH_CHECK(conv.dim() == 4 && conv.size(0) == 1 && conv.size(1) == 2 &&
                      conv.size(2) == conv.size(3) && conv.size(2) % 2 == 1,
                  "conv_weight must have shape [1, 2, k, k] with k odd, got ", shape_of(conv));
  if (parameters.conv_bias.has_value()) check_shape("conv_bias", *parameters.conv_bias, {1});
  return input;
}

Tensor native_layout(const Tensor& input) {
  return is_channels_last(input) ? input : contiguous_of(input);
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

Tensor like_input(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must be ",
                  name_of(input.scalar_type()), " as input is, got ",
                  name_of(tensor.scalar_type()));
  check_shape(name, tensor, {input.size(0), input.size(1), input.size(2), input.size(3)});
  if (input.is_contiguous()) return contiguous_of(tensor);
  if (is_channels_last(tensor)) return tensor;
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor small_map(const char* name, const Tensor& map, const Tensor& input, MapKind kind) {
  const ScalarType accumulator = accumulator_dtype(input.scalar_type());
  STD_TORCH_CHECK(map.scalar_type() == accumulator, name, " must be ", name_of(accumulator),
                  " for an input of ", name_of(input.scalar_type()), ", got ",
                  name_of(map.scalar_type()));
  switch (kind) {
    case MapKind::kChannel:
      check_shape(name, map, {input.size(0), input.size(1), 1, 1});
      break;
    case MapKind::kSpatial:
      check_shape(name, map, {input.size(0), 1, input.size(2), input.size(3)});
      break;
    case MapKind::kPooled:
      check_shape(name, map, {input.size(0), 2, input.size(1)});
      break;
    case MapKind::kStats:
      check_shape(name, map, {input.size(0), 2, input.size(2), input.size(3)});
      break;
  }
  return contiguous_of(map);
}

Problem describe(const Tensor& input) {
  return {input.size(0),
          input.size(1),
          input.size(2),
          input.size(3),
          1,
          1,
          storage(input.scalar_type()),
          layout_of(input)};
}

Problem describe(const Tensor& input, const ParameterTensors& parameters) {
  Problem problem = describe(input);
  problem.hidden = parameters.fc1_weight.size(0);
  problem.kernel = parameters.conv_weight.size(2);
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
