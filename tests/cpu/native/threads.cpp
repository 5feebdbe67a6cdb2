// The CPU kernels with threads that ThreadSanitizer understands, without PyTorch: forward and
// backward of problems that share samples out, and that share out the tiles of a sample, from
// several callers at once. Prints how many calls gave the bits of a single thread.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace {

thread_local int64_t workers = 1;  // of calls that this thread makes

}  // namespace

namespace cbam::cpu {

int64_t num_threads() { return workers; }

void parallel_ranges(int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context) {
  const int64_t each = (n + workers - 1) / workers;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n; begin += each) {
    threads.emplace_back(body, context, begin, std::min(begin + each, n));
  }
  for (std::thread& thread : threads) thread.join();
}

// Of dense float32 parameters.
template <class A>
void pack(const ParameterView& from, int64_t row_stride, A* to) {
  const auto* data = static_cast<const float*>(from.data);
  const int64_t rows = from.sizes[0] * from.sizes[1] * from.sizes[2];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < from.sizes[3]; ++i) {
      to[row * row_stride + i] = data[row * from.strides[2] + i * from.strides[3]];
    }
  }
}
template <class A>
void unpack(const A* from, int64_t row_stride, const ParameterView& to) {
  auto* data = static_cast<float*>(to.data);
  if (data == nullptr) return;
  const int64_t rows = to.sizes[0] * to.sizes[1] * to.sizes[2];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < to.sizes[3]; ++i) {
      data[row * to.strides[2] + i * to.strides[3]] =
          static_cast<float>(from[row * row_stride + i]);
    }
  }
}
template void pack(const ParameterView&, int64_t, float*);
template void pack(const ParameterView&, int64_t, double*);
template void unpack(const float*, int64_t, const ParameterView&);
template void unpack(const double*, int64_t, const ParameterView&);

ParameterView transposed(ParameterView view) {
  std::swap(view.sizes[2], view.sizes[3]);
  std::swap(view.strides[2], view.strides[3]);
  return view;
}

}  // namespace cbam::cpu

namespace {

using Floats = std::vector<float>;

cbam::ParameterView view(Floats& data, int64_t rows, int64_t columns, int64_t outer = 1) {
  cbam::ParameterView view;
  view.data = data.data();
  const int64_t sizes[] = {1, outer, rows, columns};
  const int64_t strides[] = {outer * rows * columns, rows * columns, columns, 1};
  std::copy_n(sizes, 4, view.sizes);
  std::copy_n(strides, 4, view.strides);
  return view;
}

struct Parameters {
  Floats fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias;

  explicit Parameters(const cbam::Problem& p)
      : fc1_weight(p.hidden * p.c),
        fc1_bias(p.hidden),
        fc2_weight(p.c * p.hidden),
        fc2_bias(p.c),
        conv_weight(2 * p.kernel * p.kernel),
        conv_bias(1) {}
  std::vector<Floats*> all() {
    return {&fc1_weight, &fc1_bias, &fc2_weight, &fc2_bias, &conv_weight, &conv_bias};
  }
  cbam::Parameters views(const cbam::Problem& p) {
    return {view(fc1_weight, p.hidden, p.c),          view(fc1_bias, 1, p.hidden),
            view(fc2_weight, p.c, p.hidden),          view(fc2_bias, 1, p.c),
            view(conv_weight, p.kernel, p.kernel, 2), view(conv_bias, 1, 1)};
  }
};

void fill(Floats& values, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
}

// All results of forward and backward, one behind the other.
Floats results(const cbam::Problem& p, const Floats& x, const Floats& g, Parameters& parameters) {
  const size_t elements = p.n * p.c * p.pixels();
  Floats y(elements), dx(elements), ca(p.n * p.c), sa(p.n * p.pixels());
  Parameters grads(p);
  cbam::ForwardArgs forward{};
  forward.problem = p;
  forward.parameters = parameters.views(p);
  forward.input = x.data();
  forward.output = y.data();
  forward.channel_gate = ca.data();
  forward.spatial_gate = sa.data();
  cbam::cpu::generic::kTable.forward(forward);

  cbam::BackwardArgs backward{};
  backward.problem = p;
  backward.parameters = parameters.views(p);
  backward.input = x.data();
  backward.grad_output = g.data();
  backward.channel_gate = ca.data();
  backward.spatial_gate = sa.data();
  backward.grad_input = dx.data();
  backward.grads = grads.views(p);
  backward.mlp_grads = backward.conv_grads = true;
  cbam::cpu::generic::kTable.backward(backward);

  for (const Floats* part : {&dx, &ca, &sa}) y.insert(y.end(), part->begin(), part->end());
  for (const Floats* part : grads.all()) y.insert(y.end(), part->begin(), part->end());
  return y;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
  constexpr int kCallers = 3, kWorkers = 4;
  // A sample in tiles, fewer samples than workers, as many and some left over; both layouts.
  const int64_t shapes[][4] = {{1, 9, 67, 131}, {3, 17, 41, 53}, {9, 12, 33, 34}};
  int right = 0, calls = 0;
  std::mt19937 random(1);
  for (const auto& shape : shapes) {
    for (const cbam::Layout layout : {cbam::Layout::kNCHW, cbam::Layout::kNHWC}) {
      const cbam::Problem p{shape[0], shape[1], shape[2], shape[3], 3, 5, cbam::DType::kFloat32,
                            layout};
      Floats x(p.n * p.c * p.pixels()), g(x.size());
      Parameters parameters(p);
      fill(x, random);
      fill(g, random);
      for (Floats* each : parameters.all()) fill(*each, random);
      workers = 1;
      const Floats expected = results(p, x, g, parameters);
      std::vector<Floats> found(kCallers);
      std::vector<std::thread> callers;
      for (Floats& mine : found) {
        callers.emplace_back([&] {
          workers = kWorkers;
          mine = results(p, x, g, parameters);
        });
      }
      for (std::thread& caller : callers) caller.join();
      calls += kCallers;
      for (const Floats& mine : found) right += same_bits(mine, expected);
    }
  }
  std::printf("%d of %d calls gave the bits of one thread\n", right, calls);
  return right == calls ? 0 : 1;
}
