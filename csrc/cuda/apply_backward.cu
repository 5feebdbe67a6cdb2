// The gradient of forward's second phase alone, where something stands between the phases, in three
// launches for each chunk of samples:
//
//   1  gates            small maps   sa from the logits, also for the backward of the rest
//   2  gate gradients   reads x, g   sum_c g u of each pixel, sum_p g sa x of each channel
//   3  phase gradients  small maps   the spans added up: the gradients of the logits and of ca
//
// The second is a sweep (sweep.cuh, bodies.cuh); a chunk's part of its inputs is read once.

#include "call.cuh"
#include "spans.cuh"
#include "spatial_gate.cuh"

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
  const A* sa;           // [chunk, P]
  A* grad_channel_gate;  // [chunk, C]
  A* grad_logits;        // [chunk, P]
};

template <class A>
__device__ A add_partials(const A* partials, int64_t index, int64_t size, int64_t spans) {
  const int64_t sample = index / size, element = index - sample * size;
  const A* const from = partials + sample * spans * size + element;
  Sum<A> sum = Sum<A>::none();
  add_terms<8>(
      int64_t{0}, int64_t{1}, spans, [&](int64_t i) { return Sum<A>{load(from + i * size)}; }, sum);
  return sum.value;
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    phase_grads_kernel(const __grid_constant__ PhaseGrads<S> args) {
  using A = Acc<S>;
  wait_for_previous_launches();
  each_in_grid(args.samples * args.pixels, [&](int64_t i) {
    const A gate = load(args.sa + i);
    const A grad = add_partials(args.gate_grads, i, args.pixels, args.channel_spans);
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
void apply_backward(const ApplyBackwardArgs& args, const Call<S, layout, W, PhaseMemory>& call) {
  using A = Acc<S>;
  const Problem& p = call.problem;
  const PhaseMemory<A>& memory = call.memory;
  call.each_chunk([&](const auto& chunk) {
    A* const sa = chunk.values(args.spatial_gate, p.pixels());
    launch_gates(chunk, chunk.values(args.logits, p.pixels()), sa);

    chunk.sweep(GateGrads<S, false>{
        chunk.shape(chunk.features(args.input), chunk.features(args.grad_output)),
        chunk.values(args.channel_gate, p.c), sa, memory.gate_grads, nullptr, nullptr, nullptr,
        memory.dots});

    PhaseGrads<S> sums{};
    sums.samples = chunk.samples;
    sums.channels = p.c;
    sums.pixels = p.pixels();
    sums.pixel_spans = call.plan.sweep.pixel_spans;
    sums.channel_spans = call.plan.sweep.channel_spans;
    sums.gate_grads = memory.gate_grads;
    sums.dots = memory.dots;
    sums.sa = sa;
    sums.grad_channel_gate = chunk.values(args.grad_channel_gate, p.c);
    sums.grad_logits = chunk.values(args.grad_logits, p.pixels());
    call.launcher.launch_each(phase_grads_kernel<S>, chunk.samples * std::max(p.c, p.pixels()),
                              sums);
  });
}

}  // namespace

int64_t workspace_bytes(const ApplyBackwardArgs& args, const Device& device) {
  return bytes_for<PhaseMemory>(args, Pass::kBackward, device);
}
void run(const ApplyBackwardArgs& args, const Queue& queue) {
  with_call<PhaseMemory>(args, Pass::kBackward, queue,
                         [&](const auto& call) { apply_backward(args, call); });
}

}  // namespace cbam::cuda
