#include "checks.h"

#include <string>

namespace cbam {
namespace {

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

// Which gates there are: one of them at least, and of each all weights or none.
void check_gates(const ParameterTensors& p) {
  const bool channel = p.fc1_weight.has_value(), spatial = p.conv_weight.has_value();
  STD_TORCH_CHECK(
      p.fc2_weight.has_value() == channel,
      "fc1_weight and fc2_weight must be given together, or both be None for no channel "
      "gate");
  STD_TORCH_CHECK(channel || (!p.fc1_bias.has_value() && !p.fc2_bias.has_value()),
                  "fc1_bias and fc2_bias must be None where fc1_weight and fc2_weight are");
  STD_TORCH_CHECK(spatial || !p.conv_bias.has_value(),
                  "conv_bias must be None where conv_weight is");
  STD_TORCH_CHECK(channel || spatial,
                  "weights of at least one gate must be given: fc1_weight and fc2_weight of the "
                  "channel gate, conv_weight of the spatial gate");
}

}  // namespace

ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::optional<DType> kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

const Tensor& check_input(const Tensor& input) {
  STD_TORCH_CHECK(kernel_dtype(input.scalar_type()).has_value(),
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
  const auto check_optional = [&](const char* name, const OptionalTensor& parameter) {
    if (parameter.has_value()) check_parameter(name, *parameter, input);
  };
  check_optional("fc1_weight", parameters.fc1_weight);
  check_optional("fc1_bias", parameters.fc1_bias);
  check_optional("fc2_weight", parameters.fc2_weight);
  check_optional("fc2_bias", parameters.fc2_bias);
  check_optional("conv_weight", parameters.conv_weight);
  check_optional("conv_bias", parameters.conv_bias);

  check_gates(parameters);
  const auto check_optional_shape = [&](const char* name, const OptionalTensor& parameter,
                                        int64_t size) {
    if (parameter.has_value()) check_shape(name, *parameter, {size});
  };
  if (parameters.fc1_weight.has_value()) {
    const int64_t channels = input.size(1);
    const Tensor& fc1 = *parameters.fc1_weight;
    STD_TORCH_CHECK(fc1.dim() == 2 && fc1.size(0) > 0 && fc1.size(1) == channels,
                    "fc1_weight must have shape [R, ", channels, "] (R >= 1, and the ", channels,
                    " channels of input), got ", shape_of(fc1));
    const int64_t hidden = fc1.size(0);
    check_optional_shape("fc1_bias", parameters.fc1_bias, hidden);
    check_shape("fc2_weight", *parameters.fc2_weight, {channels, hidden});
    check_optional_shape("fc2_bias", parameters.fc2_bias, channels);
  }
  if (parameters.conv_weight.has_value()) {
    const Tensor& conv = *parameters.conv_weight;
    STD_TORCH_CHECK(conv.dim() == 4 && conv.size(0) == 1 && conv.size(1) == 2 &&
                        conv.size(2) == conv.size(3) && conv.size(2) % 2 == 1,
                    "conv_weight must have shape [1, 2, k, k] with k odd, got ", shape_of(conv));
    check_optional_shape("conv_bias", parameters.conv_bias, 1);
  }
  return input;
}

void check_like_input(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must be ",
                  name_of(input.scalar_type()), " as input is, got ",
                  name_of(tensor.scalar_type()));
  check_shape(name, tensor, {input.size(0), input.size(1), input.size(2), input.size(3)});
}

void check_map(const char* name, const Tensor& map, const Tensor& input, MapKind kind) {
  const ScalarType accumulator = accumulator_dtype(input.scalar_type());
  STD_TORCH_CHECK(map.scalar_type() == accumulator, name, " must be ", name_of(accumulator),
                  " for an input of ", name_of(input.scalar_type()), ", got ",
                  name_of(map.scalar_type()));
  with_map_sizes(input, kind,
                 [&](std::initializer_list<int64_t> sizes) { check_shape(name, map, sizes); });
}

}  // namespace cbam
