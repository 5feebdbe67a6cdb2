#include "../torch_abi.h"

#include "pack.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <utility>

namespace cbam::cpu {
namespace {

// Calls f(pointer to the first element of a row, stride within it, length, index of the row).
template <class Storage, class F>
void each_row(const ParameterView& view, F&& f) {
  Storage* data = static_cast<Storage*>(view.data);
  int64_t row = 0;
  for (int64_t i = 0; i < view.sizes[0]; ++i) {
    for (int64_t j = 0; j < view.sizes[1]; ++j) {
      for (int64_t k = 0; k < view.sizes[2]; ++k) {
        f(data + i * view.strides[0] + j * view.strides[1] + k * view.strides[2], view.strides[3],
          view.sizes[3], row++);
      }
    }
  }
}

template <class F>
void with_storage_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(torch::headeronly::BFloat16{});
    case DType::kFloat16:
      return f(torch::headeronly::Half{});
  }
}

}  // namespace

template <class A>
void pack(const ParameterView& from, int64_t row_stride, A* to) {
  with_storage_type(from.dtype, [&](auto type) {
    using Storage = decltype(type);
    each_row<const Storage>(from, [&](const Storage* data, int64_t stride, int64_t n, int64_t row) {
      A* out = to + row * row_stride;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(data[i * stride]);
    });
  });
}

template <class A>
void unpack(const A* from, int64_t row_stride, const ParameterView& to) {
  if (to.data == nullptr) return;
  with_storage_type(to.dtype, [&](auto type) {
    using Storage = decltype(type);
    each_row<Storage>(to, [&](Storage* data, int64_t stride, int64_t n, int64_t row) {
      const A* in = from + row * row_stride;
      for (int64_t i = 0; i < n; ++i) data[i * stride] = static_cast<Storage>(in[i]);
    });
  });
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
