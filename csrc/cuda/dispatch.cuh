// From what is known at run time to what kernels are compiled for.
#pragma once

#include "storage.cuh"
#include "workspace.h"

namespace cbam::cuda {

template <Layout layout>
using LayoutTag = std::integral_constant<Layout, layout>;
template <int W>
using WidthTag = std::integral_constant<int, W>;

// Calls f with a value of the storage type.
template <class F>
auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

// Calls f(layout, elements of an access), both as tags.
template <class S, class F>
void with_access(Layout layout, int vector, F&& f) {
  const auto with_width = [&](auto tag) {
    if (vector == 1) {
      f(tag, WidthTag<1>{});
    } else {
      f(tag, WidthTag<kWide<S>>{});
    }
  };
  if (layout == Layout::kNCHW) {
    with_width(LayoutTag<Layout::kNCHW>{});
  } else {
    with_width(LayoutTag<Layout::kNHWC>{});
  }
}

// Calls f(value of the storage type, layout, elements of an access) for the sweeps of a problem.
template <class F>
void with_sweep(const Problem& problem, const Plan& plan, F&& f) {
  with_storage(problem.dtype, [&](auto storage) {
    with_access<decltype(storage)>(problem.layout, plan.vector,
                                   [&](auto layout, auto width) { f(storage, layout, width); });
  });
}

// Bytes that Memory<accumulator> takes from an arena.
template <template <class> class Memory>
int64_t bytes_of(const Problem& problem, const Plan& plan) {
  return with_storage(problem.dtype, [&](auto storage) {
    Arena arena(nullptr);
    Memory<Acc<decltype(storage)>>(arena, problem, plan);
    return arena.used();
  });
}

}  // namespace cbam::cuda
