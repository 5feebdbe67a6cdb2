// The gradient of forward's second phase alone, where something stands between the phases, in three
// launches for each chunk of samples:
//
//   1  gates            small maps   sa from the logits, also for the backward of the rest
//   2  gate gradients   reads x, g   sum_c g u of each pixel, sum_p g sa x of each channel
//   3  phase gradients  small maps   the spans added up: the gradients of the logits and of ca
//
// The second is a sweep (sweep.cuh, bodies.cuh); a chunk's part of its inputs is read once.

#include "call.cuh"
#include "channel_stats.cuh"
#include "mlp.cuh"
#include "spatial_gate.cuh"

namespace cbam::cuda {
namespace {

// The partial results of GateGrads without statistics, added up. A thread takes a pixel; but of a
// channel there are many partial results, so the first blocks take a span of channels of a sample
// each, as in the MLP.
template <class S>
struct PhaseGrads {
  using A = Acc<S>;
  int64_t samples, channels, pixels;
  int64_t pixel_spans, channel_spans;
  Mlp cut;
  const A* gate_grads;   // [chunk, channel spans, P]
  const A* dots;         // [chunk, pixel spans, C]
  const A* sa;           // [chunk, P]
  A* grad_channel_gate;  // [chunk, C]
  A* grad_logits;        // [chunk, P]

  __host__ __device__ int64_t channel_blocks() const { return samples * cut.blocks; }
};

template <class S>
__device__ void add_channels(const PhaseGrads<S>& args) {
  using A = Acc<S>;
  const ChannelSpan<S> at(args.cut, static_cast<int>(args.channels));
  const A* const dots = args.dots + at.sample * args.pixel_spans * args.channels + at.first;
  A* const to = args.grad_channel_gate + at.origin;
  add_spans<8>(
      at.count, args.cut.span, static_cast<int>(args.pixel_spans), shared_memory<Sum<A>>(),
      [&](int span, int c) { return Sum<A>{load(dots + span * args.channels + c)}; },
      [&](int c, const Sum<A>& total) { store(to + c, total.value); });
}

template <class S>
__device__ void add_pixels(const PhaseGrads<S>& args, int64_t block) {
  using A = Acc<S>;
  const int64_t i = block * kThreads + threadIdx.x;
  if (i >= args.samples * args.pixels) return;
  const int64_t sample = i / args.pixels, pixel = i - sample * args.pixels;
  const A* const grads = args.gate_grads + sample * args.channel_spans * args.pixels + pixel;
  const A gate = load(args.sa + i);
  const auto grad = join_spans<Sum<A>>(
      args.channel_spans, [&](int span) { return Sum<A>{load(grads + span * args.pixels)}; });
  store(args.grad_logits + i, gate * (1 - gate) * grad.value);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    phase_grads_kernel(const __grid_constant__ PhaseGrads<S> args) {
  wait_for_previous_launches();
  const int64_t block = blockIdx.x, channel_blocks = args.channel_blocks();
  if (block < channel_blocks) {
    add_channels(args);
  } else {
    add_pixels(args, block - channel_blocks);
  }
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
    sums.cut = call.plan.mlp;
    sums.pixel_spans = call.plan.sweep.pixel_spans;
    sums.channel_spans = call.plan.sweep.channel_spans;
    sums.gate_grads = memory.gate_grads;
    sums.dots = memory.dots;
    sums.sa = sa;
    sums.grad_channel_gate = chunk.values(args.grad_channel_gate, p.c);
    sums.grad_logits = chunk.values(args.grad_logits, p.pixels());
    const int64_t blocks = sums.channel_blocks() + divide_up(chunk.samples * p.pixels(), kThreads);
    call.launcher.launch(phase_grads_kernel<S>, blocks, kThreads * sizeof(Sum<A>), sums);
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
