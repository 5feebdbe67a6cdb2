// PyTorch's conversions of the half types behind cpu/pack.h.
#include "abi.h"

#include <algorithm>
#include <utility>

#include "../cpu/pack.h"

namespace cbam::cpu {
namespace {

// Calls f(element of the parameter, index of its row, index within the row) for all elements. They
// are taken in blocks, so that a transposed parameter is read (or written) in whole cache lines
// too.
template <class Storage, class F>
void each_element(const ParameterView& view, F&& f) {
  constexpr int64_t kBlock = 16;
  Storage* data = static_cast<Storage*>(view.data);
  const int64_t rows = view.sizes[2], columns = view.sizes[3];
  const int64_t row_stride = view.strides[2], stride = view.strides[3];
  for (int64_t i = 0; i < view.sizes[0] * view.sizes[1]; ++i) {
    Storage* matrix =
        data + i / view.sizes[1] * view.strides[0] + i % view.sizes[1] * view.strides[1];
    if (stride == 1) {  // for the compiler, which can make vectors of this
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) f(matrix[r * row_stride + c], i * rows + r, c);
      }
      continue;
    }
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
      const int64_t c1 = std::min(c0 + kBlock, columns);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = c0; c < c1; ++c) {
          f(matrix[r * row_stride + c * stride], i * rows + r, c);
        }
      }
    }
  }
}

// Calls f with a value of the type that a parameter's elements have.
template <class F>
void with_element(DType dtype, F&& f) {
  with_storage<torch::headeronly::BFloat16, torch::headeronly::Half>(dtype, f);
}

}  // namespace

template <class A>
void pack(const ParameterView& from, int64_t row_stride, A* to) {
  with_element(from.dtype, [&](auto type) {
    using Storage = decltype(type);
    each_element<const Storage>(from, [&](const Storage& value, int64_t row, int64_t column) {
      to[row * row_stride + column] = static_cast<A>(value);
    });
  });
}

template <class A>
void unpack(const A* from, int64_t row_stride, const ParameterView& to) {
  if (to.data == nullptr) return;
  with_element(to.dtype, [&](auto type) {
    using Storage = decltype(type);
    each_element<Storage>(to, [&](Storage& value, int64_t row, int64_t column) {
      value = static_cast<Storage>(from[row * row_stride + column]);
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
