// Threads, without PyTorch's headers: the kernels include this.
#pragma once

#include <cstdint>
#include <type_traits>

namespace cbam::cpu {

int64_t num_threads();

// Calls body(context, begin, end) on disjoint ranges that cover [0, n). The body must not throw.
void parallel_ranges(int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context);

// Calls f(i) for every i in [0, n), on several threads if `parallel`.
template <class F>
void for_each_unit(bool parallel, int64_t n, F&& f) {
  if (!parallel || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  parallel_ranges(
      n,
      [](void* context, int64_t begin, int64_t end) {
        auto& body = *static_cast<std::remove_reference_t<F>*>(context);
        for (int64_t i = begin; i < end; ++i) body(i);
      },
      &f);
}

}  // namespace cbam::cpu
