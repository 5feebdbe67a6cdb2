// Calls cbam::forward and cbam::gates and compares them with ATen's own operators.
#include <ATen/ATen.h>
#include <cbam/cbam.h>

#include <cstdio>

// The definition, in float64, for an MLP without biases.
at::Tensor expected(at::Tensor x, at::Tensor fc1, at::Tensor fc2, at::Tensor conv,
                    at::Tensor bias) {
  for (at::Tensor* tensor : {&x, &fc1, &fc2, &conv, &bias}) *tensor = tensor->to(at::kDouble);
  const auto mlp = [&](const at::Tensor& v) {
    return at::linear(at::relu(at::linear(v, fc1)), fc2);
  };
  const at::Tensor logits = mlp(x.mean({2, 3})) + mlp(x.amax({2, 3}));
  const at::Tensor refined = at::sigmoid(logits).view({x.size(0), x.size(1), 1, 1}) * x;
  const at::Tensor maps = at::cat({refined.mean(1, true), refined.amax(1, true)}, 1);
  return at::sigmoid(at::conv2d(maps, conv, bias, 1, conv.size(3) / 2)) * refined;
}

// Whether both operators are right for random tensors on this device.
bool check(at::Device device) {
  const auto options = at::device(device).dtype(at::kFloat);
  const at::Tensor x = at::randn({2, 64, 28, 28}, options), fc1 = at::randn({4, 64}, options),
                   fc2 = at::randn({64, 4}, options), conv = at::randn({1, 2, 7, 7}, options),
                   bias = at::randn({1}, options);
  const at::Tensor y = cbam::forward(x, fc1, {}, fc2, {}, conv, bias);  // {}: no bias
  const auto [channel_gate, spatial_gate] = cbam::gates(x, fc1, {}, fc2, {}, conv, bias);
  const at::Tensor results = at::stack({y, channel_gate * spatial_gate * x});
  const at::Tensor differences = (results - expected(x, fc1, fc2, conv, bias)).abs();
  const double largest = differences.max().item<double>();
  std::printf("%s: largest difference %.1e\n", device.str().c_str(), largest);
  return largest < 1e-4;
}

int main() {
  const bool cpu = check(at::kCPU);
  const bool cuda = !at::hasCUDA() || check(at::kCUDA);
  return cpu && cuda ? 0 : 1;
}
