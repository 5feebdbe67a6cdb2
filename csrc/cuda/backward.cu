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
// 1, 3 and 4 are sweeps (sweep.cuh, sums.cuh) with a block for each span of rows and columns;
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

#include <algorithm>
#include <numeric>

#include "dispatch.cuh"
#include "launch.cuh"
#include "map_grads.cuh"
#include "parameter_grads.cuh"
#include "sums.cuh"
#include "workspace.h"

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

// --------------------------------------------------------------------------------- launches

// One chunk of samples: `first` of the batch and `samples` of them. The sweeps, and what stands
// between them where PyTorch runs the layers.
template <class S, Layout layout, int W>
class Chunk {
 public:
  using A = Acc<S>;

  Chunk(const Problem& problem, const Plan& plan, const SweepMemory<A>& memory, Launcher& launcher,
        int64_t first, const void* input, const void* channel_gate)
      : first(first),
        samples(std::min(plan.chunk, problem.n - first)),
        problem_(problem),
        sweep_(plan.sweep),
        memory_(memory),
        launcher_(launcher),
        x_(part(input)),
        ca_(part(static_cast<const A*>(channel_gate), problem.c)) {}

  // The chunk's part of an array with so many elements for each sample.
  template <class T>
  T* part(T* batch, int64_t elements) const {
    return batch + first * elements;
  }
  // Of a feature map.
  const S* part(const void* map) const {
    return part(static_cast<const S*>(map), problem_.c * problem_.pixels());
  }

  void launch_gate_grads(const S* g, const A* sa, A* gate_grads, A* gate_dots) const {
    launch(GateGrads<S, true>{shape(x_, g), ca_, sa, gate_grads, memory_.sums, memory_.maxima,
                              memory_.argmaxima, gate_dots});
  }

  void launch_stats() const {
    launch(ChannelStats<S, true>{shape(x_, nullptr), ca_, memory_.sums, memory_.maxima,
                                 memory_.argmaxima});
  }

  // In the place of launch 2; sa may be null where no gradient of x is taken.
  void launch_pixel_grads(const A* grad_stats, const A* sa) const {
    PixelGrads<A> grads{};
    grads.samples = samples;
    grads.height = problem_.h;
    grads.width = problem_.w;
    grads.inverse_channels = A{1} / static_cast<A>(problem_.c);
    grads.maxima = memory_.maxima;
    grads.argmaxima = memory_.argmaxima;
    grads.spans = sweep_.channel_spans;
    grads.sa = sa;
    grads.grad_stats = grad_stats;
    grads.pixel_grads = memory_.pixel_grads;
    launcher_.launch_each(pixel_grads_kernel<A>, samples * problem_.pixels(), grads);
  }

  // `mlp` with what it needs beside shapes and the memory of the sweeps.
  void launch_pool(MlpBackward<S> mlp) const {
    mlp.channels = problem_.c;
    mlp.hidden = problem_.hidden;
    mlp.inverse_pixels = A{1} / static_cast<A>(problem_.pixels());
    mlp.spans = sweep_.pixel_spans;
    mlp.span_pixels = sweep_.span_pixels;
    mlp.channel_gate = ca_;
    mlp.channel_grads = memory_.channel_grads;
    launch(BackwardPool<S>{shape(x_, nullptr), memory_.pixel_grads, memory_.pool_sums,
                           memory_.pool_maxima, memory_.pool_argmaxima, memory_.pool_dots,
                           memory_.counters + first, mlp});
  }

  void launch_input_grad(const S* g, void* grad_input) const {
    S* const dx = part(static_cast<S*>(grad_input), problem_.c * problem_.pixels());
    launch(InputGrad<S>{shape(g, nullptr), dx, ca_, memory_.pixel_grads, memory_.channel_grads});
  }

  const int64_t first, samples;

 private:
  template <class B>
  void launch(const B& body) const {
    launch_sweep<layout, W>(launcher_, sweep_, samples, body);
  }

  Body<S> shape(const S* x, const S* g) const {
    return {problem_.c, problem_.pixels(), sweep_.pixel_spans, sweep_.channel_spans, x, g};
  }

  const Problem& problem_;
  const Sweep& sweep_;
  const SweepMemory<A>& memory_;
  Launcher& launcher_;
  const S* const x_;
  const A* const ca_;
};

// Launch 2.
template <class S>
void launch_map_grads(Launcher& launcher, const BackwardArgs& args, const Plan& plan,
                      const BackwardMemory<Acc<S>>& memory, int64_t first, int64_t samples,
                      bool writes_pixel_grads) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  const SweepMemory<A>& sweeps = memory.sweeps;
  MapGrads<S> grads{};
  grads.tiling = plan.tiling;
  grads.inverse_channels = A{1} / static_cast<A>(p.c);
  grads.height = p.h;
  grads.width = p.w;
  grads.kernel = static_cast<int>(p.kernel);
  grads.conv_weight = args.parameters.conv_weight;
  grads.gate_grads = memory.gate_grads;
  if (args.grad_logits != nullptr) {
    grads.given_dlogits = static_cast<const A*>(args.grad_logits) + first * p.pixels();
  }
  grads.sa = static_cast<const A*>(args.spatial_gate) + first * p.pixels();
  grads.sums = sweeps.sums;
  grads.maxima = sweeps.maxima;
  grads.argmaxima = sweeps.argmaxima;
  grads.spans = plan.sweep.channel_spans;
  if (writes_pixel_grads) grads.pixel_grads = sweeps.pixel_grads;
  if (args.conv_grads) {
    const int64_t size = 2 * p.kernel * p.kernel + 1;
    grads.conv_grads = memory.conv_grads + first * plan.tiling.tiles * size;
  }
  launcher.launch(map_grads_kernel<S>, samples * plan.tiling.tiles,
                  plan.tiling.staged ? staged_bytes(plan.tiling, p, 3, 0) : kPlaceBytes, grads);
}

// Launch 3's MLP.
template <class S>
MlpBackward<S> mlp_backward(const BackwardArgs& args, const Plan& plan,
                            const BackwardMemory<Acc<S>>& memory, int64_t first) {
  const Problem& p = args.problem;
  const int64_t first_channel = first * p.c, first_unit = first * 2 * p.hidden;
  MlpBackward<S> mlp{};
  mlp.fc1_weight = args.parameters.fc1_weight;
  mlp.fc1_bias = args.parameters.fc1_bias;
  mlp.fc2_weight = args.parameters.fc2_weight;
  mlp.fc2_bias = args.parameters.fc2_bias;
  mlp.pooled = memory.pooled + 2 * first_channel;
  mlp.hidden_units = memory.hidden_units + first_unit;
  if (args.grad_channel_gate != nullptr) {
    mlp.gate_grads = static_cast<const Acc<S>*>(args.grad_channel_gate) + first_channel;
    mlp.gate_spans = 1;
  } else {
    mlp.gate_grads = memory.gate_dots;
    mlp.gate_spans = plan.sweep.pixel_spans;
  }
  mlp.dz = memory.dz + first_channel;
  mlp.dunits = memory.dunits + first_unit;
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

// ------------------------------------------------------------------------------------- host

template <class S, Layout layout, int W>
void backward(const BackwardArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  Arena arena(queue.workspace);
  const BackwardMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  launcher.clear(memory.sweeps.counters, p.n);
  const bool sweeps_again = args.mlp_grads || args.grad_input != nullptr;
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const Chunk<S, layout, W> chunk(p, plan, memory.sweeps, launcher, first, args.input,
                                    args.channel_gate);
    const S* const g = chunk.part(args.grad_output);
    if (args.grad_logits == nullptr) {
      const A* const sa = chunk.part(static_cast<const A*>(args.spatial_gate), p.pixels());
      chunk.launch_gate_grads(g, sa, memory.gate_grads, memory.gate_dots);
    } else {
      chunk.launch_stats();
    }
    launch_map_grads<S>(launcher, args, plan, memory, first, chunk.samples, sweeps_again);
    if (sweeps_again) chunk.launch_pool(mlp_backward<S>(args, plan, memory, first));
    if (args.grad_input != nullptr) chunk.launch_input_grad(g, args.grad_input);
  }
  launch_parameter_grads<S>(launcher, args, plan, memory);
}

template <class S, Layout layout, int W>
void channel_stats_backward(const ChannelStatsBackwardArgs& args, const Plan& plan,
                            const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  Arena arena(queue.workspace);
  const SweepMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  launcher.clear(memory.counters, p.n);
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const Chunk<S, layout, W> chunk(p, plan, memory, launcher, first, args.input,
                                    args.channel_gate);
    chunk.launch_stats();
    chunk.launch_pixel_grads(chunk.part(static_cast<const A*>(args.grad_stats), 2 * p.pixels()),
                             nullptr);
    MlpBackward<S> sums{};
    sums.grad_channel_gate = chunk.part(static_cast<A*>(args.grad_channel_gate), p.c);
    chunk.launch_pool(sums);
  }
}

template <class S, Layout layout, int W>
void pool_backward(const PoolBackwardArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  Arena arena(queue.workspace);
  const SweepMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  launcher.clear(memory.counters, p.n);
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const Chunk<S, layout, W> chunk(p, plan, memory, launcher, first, args.input,
                                    args.channel_gate);
    chunk.launch_stats();
    chunk.launch_pixel_grads(chunk.part(static_cast<const A*>(args.grad_stats), 2 * p.pixels()),
                             chunk.part(static_cast<const A*>(args.spatial_gate), p.pixels()));
    MlpBackward<S> given{};
    given.grad_pooled = chunk.part(static_cast<const A*>(args.grad_pooled), 2 * p.c);
    chunk.launch_pool(given);
    chunk.launch_input_grad(chunk.part(args.grad_output), args.grad_input);
  }
}

}  // namespace

int64_t workspace_bytes(const BackwardArgs& args, const Device& device) {
  return bytes_of<BackwardMemory>(args.problem, make_plan(args.problem, Pass::kBackward, device));
}

void run(const BackwardArgs& args, const Queue& queue) {
  const Plan plan = make_plan(args.problem, Pass::kBackward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    backward<decltype(storage), decltype(layout)::value, decltype(width)::value>(args, plan, queue);
  });
}

// Of the feature maps this reads x alone.

int64_t workspace_bytes(const ChannelStatsBackwardArgs& args, const Device& device) {
  return bytes_of<SweepMemory>(args.problem, make_plan(args.problem, Pass::kForward, device));
}

void run(const ChannelStatsBackwardArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = make_plan(args.problem, Pass::kForward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    channel_stats_backward<decltype(storage), decltype(layout)::value, decltype(width)::value>(
        args, plan, queue);
  });
}

int64_t workspace_bytes(const PoolBackwardArgs& args, const Device& device) {
  return bytes_of<SweepMemory>(args.problem, make_plan(args.problem, Pass::kBackward, device));
}

void run(const PoolBackwardArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = make_plan(args.problem, Pass::kBackward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    pool_backward<decltype(storage), decltype(layout)::value, decltype(width)::value>(args, plan,
                                                                                      queue);
  });
}

}  // namespace cbam::cuda
