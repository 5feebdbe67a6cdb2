// The gradient of forward's second phase alone, where something stands between the phases, in two
// launches for each chunk of samples:
//
//   1  gate gradients   reads x, g   sum_c g u of each pixel, sum_p g sa x of each channel
//   2  phase gradients  small maps   the spans added up: the gradients of the logits and of ca, and
//                                    sa for the backward of the rest
//
// The first is a sweep (sweep.cuh, sums.cuh); a chunk's part of its inputs is read once.

#include <algorithm>

#include "dispatch.cuh"
#include "launch.cuh"
#include "sums.cuh"
#include "workspace.h"

namespace cbam::cuda {
namespace {

// The partial results of GateGrads without statistics, added up.
template <class S>
struct PhaseGrads {
  using A = Acc<S>;
  int64_t samples, channels, pixels;
  int64_t pixel_spans, channel_spans;
  const A* gate_grads;   // [chunk, channel spans, P]
  const A* dots;         // [chunk, pixel spans, C]
  const A* logits;       // [chunk, P]
  A* grad_channel_gate;  // [chunk, C]
  A* grad_logits;        // [chunk, P]
  A* sa;                 // [chunk, P]
};

template <class A>
__device__ A add_partials(const A* partials, int64_t index, int64_t size, int64_t spans) {
  const int64_t sample = index / size, element = index - sample * size;
  A sum = 0;
  for (int64_t i = 0; i < spans; ++i) sum += load(partials + (sample * spans + i) * size + element);
  return sum;
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    phase_grads_kernel(const __grid_constant__ PhaseGrads<S> args) {
  using A = Acc<S>;
  wait_for_previous_launches();
  each_in_grid(args.samples * args.pixels, [&](int64_t i) {
    const A gate = sigmoid(load(args.logits + i));
    const A grad = add_partials(args.gate_grads, i, args.pixels, args.channel_spans);
    store(args.sa + i, gate);
    store(args.grad_logits + i, gate * (1 - gate) * grad);
  });
  each_in_grid(args.samples * args.channels, [&](int64_t i) {
    store(args.grad_channel_gate + i, add_partials(args.dots, i, args.channels, args.pixel_spans));
  });
}

template <class A>
struct PhaseMemory {
  PhaseMemory(Arena& arena, const Problem& p, const Plan& plan)
      : gate_grads(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)) {}
  A* gate_grads;  // [chunk, channel spans, P]
  A* dots;        // [chunk, pixel spans, C]
};

template <class S, Layout layout, int W>
void apply_backward(const ApplyBackwardArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  const Sweep& sweep = plan.sweep;
  Arena arena(queue.workspace);
  const PhaseMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const int64_t samples = std::min(plan.chunk, p.n - first);
    const int64_t element = first * p.c * p.pixels(), pixel = first * p.pixels();
    const A* const logits = static_cast<const A*>(args.logits) + pixel;
    const Body<S> shape{p.c,
                        p.pixels(),
                        sweep.pixel_spans,
                        sweep.channel_spans,
                        static_cast<const S*>(args.input) + element,
                        static_cast<const S*>(args.grad_output) + element};
    using Grads = GateGrads<S, false>;
    const Grads grads{shape,   static_cast<const A*>(args.channel_gate) + first * p.c,
                      logits,  memory.gate_grads,
                      nullptr, nullptr,
                      nullptr, memory.dots};
    launch_sweep<layout, W>(launcher, sweep, samples, grads);

    const PhaseGrads<S> sums{samples,
                             p.c,
                             p.pixels(),
                             sweep.pixel_spans,
                             sweep.channel_spans,
                             memory.gate_grads,
                             memory.dots,
                             logits,
                             static_cast<A*>(args.grad_channel_gate) + first * p.c,
                             static_cast<A*>(args.grad_logits) + pixel,
                             static_cast<A*>(args.spatial_gate) + pixel};
    launcher.launch_each(phase_grads_kernel<S>, samples * std::max(p.c, p.pixels()), sums);
  }
}

}  // namespace

int64_t workspace_bytes(const ApplyBackwardArgs& args, const Device& device) {
  return bytes_of<PhaseMemory>(args.problem, make_plan(args.problem, Pass::kBackward, device));
}

void run(const ApplyBackwardArgs& args, const Queue& queue) {
  const Plan plan = make_plan(args.problem, Pass::kBackward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    apply_backward<decltype(storage), decltype(layout)::value, decltype(width)::value>(args, plan,
                                                                                       queue);
  });
}

}  // namespace cbam::cuda
