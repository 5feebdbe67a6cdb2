// From the call of an operator to its launches: what is known at run time becomes what kernels are
// compiled for, the workspace is handed out, and the batch is cut into chunks.
//
// The file of an operator (forward.cu, backward.cu, apply_backward.cu) has three parts: structs
// that say what memory it needs, functions that launch, and the entry points of kernels.h, which
// are one line each with the functions of this file.
#pragma once

#include <algorithm>

#include "arena.h"
#include "bodies.cuh"
#include "launch.cuh"

namespace cbam::cuda {

// --------------------------------------------------------------------------------- one call

// Some samples of the batch that are launched together; S, layout and W are what their sweeps are
// compiled for.
template <class S, Layout layout, int W>
struct Chunk {
  using A = Acc<S>;

  // The chunk's part of an array with so many elements for each sample. Null stays null.
  template <class T>
  T* part(T* batch, int64_t elements) const {
    return batch == nullptr ? nullptr : batch + first * elements;
  }
  // Of a feature map, and of accumulators, as the arguments have them.
  const S* features(const void* map) const {
    return part(static_cast<const S*>(map), problem.c * problem.pixels());
  }
  S* features(void* map) const { return part(static_cast<S*>(map), problem.c * problem.pixels()); }
  const A* values(const void* batch, int64_t elements) const {
    return part(static_cast<const A*>(batch), elements);
  }
  A* values(void* batch, int64_t elements) const { return part(static_cast<A*>(batch), elements); }

  // What every body of a sweep begins with.
  Body<S> shape(const S* x, const S* g = nullptr) const {
    return {problem.c, problem.pixels(), plan.sweep.pixel_spans, plan.sweep.channel_spans, x, g};
  }
  template <class SweepBody>
  void sweep(const SweepBody& body) const {
    launch_sweep<layout, W>(launcher, plan.sweep, samples, body);
  }

  const Problem& problem;
  const Plan& plan;
  Launcher& launcher;
  int64_t first, samples;
};

template <class S, Layout layout, int W, template <class> class Memory>
struct Call {
  using A = Acc<S>;

  // Calls f(chunk) for the chunks of the batch, in order.
  template <class F>
  void each_chunk(F&& f) const {
    for (int64_t first = 0; first < problem.n; first += plan.chunk) {
      const int64_t samples = std::min(plan.chunk, problem.n - first);
      f(Chunk<S, layout, W>{problem, plan, launcher, first, samples});
    }
  }

  const Problem& problem;
  const Plan& plan;
  const Memory<A>& memory;
  Launcher& launcher;
};

// ------------------------------------------------------------- from run time to compile time

// Calls f(elements of an access as a tag).
template <class S, class F>
void with_width(int vector, F&& f) {
  if (vector == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    f(std::integral_constant<int, kWide<S>>{});
  }
}

// Calls f(layout as a tag).
template <class F>
void with_layout(Layout layout, F&& f) {
  if (layout == Layout::kNCHW) {
    f(std::integral_constant<Layout, Layout::kNCHW>{});
  } else {
    f(std::integral_constant<Layout, Layout::kNHWC>{});
  }
}

// Calls f(call) with the Call that fits the arguments. Memory<accumulator> takes what it needs from
// (Arena&, const Problem&, const Plan&).
template <template <class> class Memory, class Args, class F>
void with_call(const Args& args, Pass pass, const Queue& queue, F&& f) {
  const Problem& problem = args.problem;
  const Plan plan = make_plan(problem, pass, queue.device);
  with_storage<BFloat16, Half>(problem.dtype, [&](auto storage) {
    using S = decltype(storage);
    Arena arena(queue.workspace);
    const Memory<Acc<S>> memory(arena, problem, plan);
    Launcher launcher(queue);
    with_layout(problem.layout, [&](auto layout) {
      with_width<S>(plan.vector, [&](auto width) {
        f(Call<S, decltype(layout)::value, decltype(width)::value, Memory>{problem, plan, memory,
                                                                           launcher});
      });
    });
  });
}

// Bytes of workspace for such a call.
template <template <class> class Memory, class Args>
int64_t bytes_for(const Args& args, Pass pass, const Device& device) {
  const Plan plan = make_plan(args.problem, pass, device);
  return with_storage<BFloat16, Half>(args.problem.dtype, [&](auto storage) {
    Arena arena(nullptr);
    Memory<Acc<decltype(storage)>>(arena, args.problem, plan);
    return arena.used();
  });
}

}  // namespace cbam::cuda
