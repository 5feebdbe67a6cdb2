// Backward, in four launches for each chunk of samples and one for the batch:
//
//   1  gate gradients   reads x, g       sum_c g u, and mean, maximum and argmax of u of each
//                                        pixel (forward kept none of them); sum_p g sa x of each
//                                        channel
//   2  map gradients    small maps       dl, the transposed convolution ds, and the weights of the
//                                        convolution
//   3  backward pool    reads x          average, maximum and argmax of each channel, and
//                                        sum_p x (gradient of s); the last block of a sample runs
//                                        the MLP forward and backward
//   4  input gradient   reads g, writes  dx
//   5  parameters       small vectors    sums over the batch
//
// A chunk of x and g stays in the L2 cache, so that two reads and the write reach memory. Launches
// 1, 3 and 4 are sweeps (sweep.cuh, bodies.cuh) with a block for each span of rows and columns;
// launch 2 has a block for each tile (map_grads.cuh). Grids: plan.cpp.
//
// Where a norm stands between the phases of forward, the gradient of the second phase is an
// operator of its own (apply_backward.cu), and launch 1 then reads x alone.
//
// Where PyTorch runs the layers, two operators do what is around them. Both begin like launch 1
// that reads x alone, with a small launch behind it that makes of given gradients what launch 2
// makes of its own (channel_stats.cuh), and launch 3 without the MLP:
//
//   ChannelStatsBackwardArgs   reads x twice               ends there, with the gradient of ca
//   PoolBackwardArgs           reads x twice, g; writes dx goes on with launch 4

#include <numeric>

#include "call.cuh"
#include "map_grads.cuh"
#include "parameter_grads.cuh"

namespace cbam::cuda {
namespace {

// ----------------------------------------------------------------------------------- memory

// What the sweeps over x leave.
template <class A>
struct SweepMemory {
  SweepMemory(Arena& arena, const Problem& p, const Plan& plan)
      : counters(arena.take<unsigned>(p.n)),
        sums(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        maxima(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        argmaxima(arena.take<int>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        pixel_grads(arena.take<PixelGrad<A>>(plan.chunk * p.pixels())),
        pool_sums(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_maxima(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_argmaxima(arena.take<int>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        channel_grads(arena.take<ChannelGrad<A>>(plan.chunk * p.c)) {}
  unsigned* counters;  // [N]
  A* sums;             // [chunk, channel spans, P], as the next two
  A* maxima;
  int* argmaxima;
  PixelGrad<A>* pixel_grads;  // [chunk, P]
  A* pool_sums;               // [chunk, pixel spans, C], as the next three
  A* pool_maxima;
  int* pool_argmaxima;
  A* pool_dots;
  ChannelGrad<A>* channel_grads;  // [chunk, C]
};

template <class A>
struct BackwardMemory {
  BackwardMemory(Arena& arena, const Problem& p, const Plan& plan)
      : sweeps(arena, p, plan),
        pooled(arena.take<A>(p.n * 2 * p.c)),
        hidden_units(arena.take<A>(p.n * 2 * p.hidden)),
        dz(arena.take<A>(p.n * p.c)),
        dunits(arena.take<A>(p.n * 2 * p.hidden)),
        conv_grads(arena.take<A>(p.n * plan.tiling.tiles * (2 * p.kernel * p.kernel + 1))),
        gate_grads(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        gate_dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)) {}
  SweepMemory<A> sweeps;
  A* pooled;        // [N, 2, C]
  A* hidden_units;  // [N, 2, R]
  A* dz;            // [N, C]
  A* dunits;        // [N, 2, R]
  A* conv_grads;    // [N, tiles, 2 k k + 1]
  A* gate_grads;    // [chunk, channel spans, P]
  A* gate_dots;     // [chunk, pixel spans, C]
};

// ---------------------------------------------------------------------------------- launches

// The launches of one chunk that sweep, and what stands between them where PyTorch runs the layers.
template <class S, Layout layout, int W>
class Sweeps {
 public:
  using A = Acc<S>;

  Sweeps(const Chunk<S, layout, W>& chunk, const SweepMemory<A>& memory, const void* input,
         const void* channel_gate)
      : chunk_(chunk),
        memory_(memory),
        x_(chunk.features(input)),
        ca_(chunk.values(channel_gate, chunk.problem.c)) {}

  void launch_gate_grads(const S* g, const A* sa, A* gate_grads, A* gate_dots) const {
    chunk_.sweep(GateGrads<S, true>{chunk_.shape(x_, g), ca_, sa, gate_grads, memory_.sums,
                                    memory_.maxima, memory_.argmaxima, gate_dots});
  }

  void launch_stats() const {
    chunk_.sweep(ChannelStats<S, true>{chunk_.shape(x_), ca_, memory_.sums, memory_.maxima,
                                       memory_.argmaxima});
  }

  // In the place of launch 2; sa may be null where no gradient of x is taken.
  void launch_pixel_grads(const A* grad_stats, const A* sa) const {
    const Problem& p = chunk_.problem;
    PixelGrads<A> grads{};
    grads.samples = chunk_.samples;
    grads.height = p.h;
    grads.width = p.w;
    grads.inverse_channels = A{1} / static_cast<A>(p.c);
    grads.maxima = memory_.maxima;
    grads.argmaxima = memory_.argmaxima;
    grads.spans = chunk_.plan.sweep.channel_spans;
    grads.sa = sa;
    grads.grad_stats = grad_stats;
    grads.pixel_grads = memory_.pixel_grads;
    chunk_.launcher.launch_each(pixel_grads_kernel<A>, chunk_.samples * p.pixels(), grads);
  }

  // `mlp` with what it needs beside shapes and the memory of the sweeps.
  void launch_pool(MlpBackward<S> mlp) const {
    const Problem& p = chunk_.problem;
    mlp.channels = p.c;
    mlp.hidden = p.hidden;
    mlp.inverse_pixels = A{1} / static_cast<A>(p.pixels());
    mlp.spans = chunk_.plan.sweep.pixel_spans;
    mlp.span_pixels = chunk_.plan.sweep.span_pixels;
    mlp.channel_gate = ca_;
    mlp.channel_grads = memory_.channel_grads;
    chunk_.sweep(BackwardPool<S>{chunk_.shape(x_), memory_.pixel_grads, memory_.pool_sums,
                                 memory_.pool_maxima, memory_.pool_argmaxima, memory_.pool_dots,
                                 memory_.counters + chunk_.first, mlp});
  }

  void launch_input_grad(const S* g, S* dx) const {
    chunk_.sweep(
        InputGrad<S>{chunk_.shape(g), dx, ca_, memory_.pixel_grads, memory_.channel_grads});
  }

 private:
  const Chunk<S, layout, W>& chunk_;
  const SweepMemory<A>& memory_;
  const S* const x_;
  const A* const ca_;
};

// Launch 2.
template <class S, Layout layout, int W>
void launch_map_grads(const Chunk<S, layout, W>& chunk, const BackwardArgs& args,
                      const BackwardMemory<Acc<S>>& memory, bool writes_pixel_grads) {
  using A = Acc<S>;
  const Problem& p = chunk.problem;
  const Plan& plan = chunk.plan;
  const SweepMemory<A>& sweeps = memory.sweeps;
  MapGrads<S> grads{};
  grads.tiling = plan.tiling;
  grads.inverse_channels = A{1} / static_cast<A>(p.c);
  grads.height = p.h;
  grads.width = p.w;
  grads.kernel = static_cast<int>(p.kernel);
  grads.conv_weight = args.parameters.conv_weight;
  grads.gate_grads = memory.gate_grads;
  grads.given_dlogits = chunk.values(args.grad_logits, p.pixels());
  grads.sa = chunk.values(args.spatial_gate, p.pixels());
  grads.sums = sweeps.sums;
  grads.maxima = sweeps.maxima;
  grads.argmaxima = sweeps.argmaxima;
  grads.spans = plan.sweep.channel_spans;
  if (writes_pixel_grads) grads.pixel_grads = sweeps.pixel_grads;
  if (args.conv_grads) {
    const int64_t size = 2 * p.kernel * p.kernel + 1;
    grads.conv_grads = chunk.part(memory.conv_grads, plan.tiling.tiles * size);
  }
  chunk.launcher.launch(map_grads_kernel<S>, chunk.samples * plan.tiling.tiles,
                        plan.tiling.staged ? staged_bytes(plan.tiling, p, Pass::kBackward) : 0,
                        grads);
}

// Launch 3's MLP.
template <class S, Layout layout, int W>
MlpBackward<S> mlp_backward(const Chunk<S, layout, W>& chunk, const BackwardArgs& args,
                            const BackwardMemory<Acc<S>>& memory) {
  const Problem& p = chunk.problem;
  MlpBackward<S> mlp{};
  mlp.fc1_weight = args.parameters.fc1_weight;
  mlp.fc1_bias = args.parameters.fc1_bias;
  mlp.fc2_weight = args.parameters.fc2_weight;
  mlp.fc2_bias = args.parameters.fc2_bias;
  mlp.pooled = chunk.part(memory.pooled, 2 * p.c);
  mlp.hidden_units = chunk.part(memory.hidden_units, 2 * p.hidden);
  if (args.grad_channel_gate != nullptr) {
    mlp.gate_grads = chunk.values(args.grad_channel_gate, p.c);
    mlp.gate_spans = 1;
  } else {
    mlp.gate_grads = memory.gate_dots;
    mlp.gate_spans = chunk.plan.sweep.pixel_spans;
  }
  mlp.dz = chunk.part(memory.dz, p.c);
  mlp.dunits = chunk.part(memory.dunits, 2 * p.hidden);
  return mlp;
}

template <class S>
void launch_parameter_grads(Launcher& launcher, const BackwardArgs& args, const Plan& plan,
                            const BackwardMemory<Acc<S>>& memory) {
  const Problem& p = args.problem;
  ParameterGrads<S> grads{};
  grads.samples = p.n;
  grads.channels = p.c;
  grads.hidden = p.hidden;
  grads.kernel = p.kernel;
  grads.taps = 2 * p.kernel * p.kernel;
  grads.tiles = plan.tiling.tiles;
  grads.pooled = memory.pooled;
  grads.hidden_units = memory.hidden_units;
  grads.dz = memory.dz;
  grads.dunits = memory.dunits;
  grads.conv_grads = memory.conv_grads;
  grads.grads = args.grads;
  const auto side_by_side = [](const ParameterView& view, int64_t elements, int64_t width) {
    return view.data == nullptr ? 0 : divide_up(elements, width);
  };
  const int64_t needed[kKinds] = {side_by_side(args.grads.fc1_weight, p.c * p.hidden, kWarp),
                                  side_by_side(args.grads.fc2_weight, p.c * p.hidden, kWarp),
                                  side_by_side(args.grads.fc1_bias, p.hidden, kWarp),
                                  side_by_side(args.grads.fc2_bias, p.c, kWarp),
                                  side_by_side(args.grads.conv_weight, grads.taps, 1),
                                  side_by_side(args.grads.conv_bias, 1, 1)};
  std::copy_n(needed, kKinds, grads.blocks);
  const int64_t blocks = std::accumulate(needed, needed + kKinds, int64_t{0});
  if (blocks == 0) return;
  launcher.launch(parameter_grads_kernel<S>, blocks,
                  kThreads * static_cast<int64_t>(sizeof(Acc<S>)), grads);
}

// --------------------------------------------------------------------------------- operators

template <class S, Layout layout, int W>
void backward(const BackwardArgs& args, const Call<S, layout, W, BackwardMemory>& call) {
  const int64_t pixels = call.problem.pixels();
  const auto& memory = call.memory;
  call.launcher.clear(memory.sweeps.counters, call.problem.n);
  const bool sweeps_again = args.mlp_grads || args.grad_input != nullptr;
  call.each_chunk([&](const auto& chunk) {
    const Sweeps sweeps(chunk, memory.sweeps, args.input, args.channel_gate);
    const auto* const g = chunk.features(args.grad_output);
    if (args.grad_logits == nullptr) {
      sweeps.launch_gate_grads(g, chunk.values(args.spatial_gate, pixels), memory.gate_grads,
                               memory.gate_dots);
    } else {
      sweeps.launch_stats();
    }
    launch_map_grads(chunk, args, memory, sweeps_again);
    if (sweeps_again) sweeps.launch_pool(mlp_backward(chunk, args, memory));
    if (args.grad_input != nullptr) sweeps.launch_input_grad(g, chunk.features(args.grad_input));
  });
  launch_parameter_grads<S>(call.launcher, args, call.plan, memory);
}

template <class S, Layout layout, int W>
void channel_stats_backward(const ChannelStatsBackwardArgs& args,
                            const Call<S, layout, W, SweepMemory>& call) {
  const Problem& p = call.problem;
  call.launcher.clear(call.memory.counters, p.n);
  call.each_chunk([&](const auto& chunk) {
    const Sweeps sweeps(chunk, call.memory, args.input, args.channel_gate);
    sweeps.launch_stats();
    sweeps.launch_pixel_grads(chunk.values(args.grad_stats, 2 * p.pixels()), nullptr);
    MlpBackward<S> sums{};
    sums.grad_channel_gate = chunk.values(args.grad_channel_gate, p.c);
    sweeps.launch_pool(sums);
  });
}

template <class S, Layout layout, int W>
void pool_backward(const PoolBackwardArgs& args, const Call<S, layout, W, SweepMemory>& call) {
  const Problem& p = call.problem;
  call.launcher.clear(call.memory.counters, p.n);
  call.each_chunk([&](const auto& chunk) {
    const Sweeps sweeps(chunk, call.memory, args.input, args.channel_gate);
    sweeps.launch_stats();
    sweeps.launch_pixel_grads(chunk.values(args.grad_stats, 2 * p.pixels()),
                              chunk.values(args.spatial_gate, p.pixels()));
    MlpBackward<S> given{};
    given.grad_pooled = chunk.values(args.grad_pooled, 2 * p.c);
    sweeps.launch_pool(given);
    sweeps.launch_input_grad(chunk.features(args.grad_output), chunk.features(args.grad_input));
  });
}

}  // namespace

// ------------------------------------------------------------------------------ entry points

int64_t workspace_bytes(const BackwardArgs& args, const Device& device) {
  return bytes_for<BackwardMemory>(args, Pass::kBackward, device);
}
void run(const BackwardArgs& args, const Queue& queue) {
  with_call<BackwardMemory>(args, Pass::kBackward, queue,
                            [&](const auto& call) { backward(args, call); });
}

// Of the feature maps this reads x alone, and its chunks are those of forward.
int64_t workspace_bytes(const ChannelStatsBackwardArgs& args, const Device& device) {
  return bytes_for<SweepMemory>(args, Pass::kForward, device);
}
void run(const ChannelStatsBackwardArgs& args, const Queue& queue) {
  with_call<SweepMemory>(args, Pass::kForward, queue,
                         [&](const auto& call) { channel_stats_backward(args, call); });
}

int64_t workspace_bytes(const PoolBackwardArgs& args, const Device& device) {
  return bytes_for<SweepMemory>(args, Pass::kBackward, device);
}
void run(const PoolBackwardArgs& args, const Queue& queue) {
  with_call<SweepMemory>(args, Pass::kBackward, queue,
                         [&](const auto& call) { pool_backward(args, call); });
}

}  // namespace cbam::cuda
