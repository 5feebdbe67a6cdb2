// Forward: y = sigmoid(conv(stats of u)) u, u = ca x, in three launches for each chunk of samples.
//
//   1  pool               reads x           average and maximum of each channel; the last block of
//                                           a sample runs the MLP: the channel gate ca
//   2  channel statistics reads x           mean and maximum of u for each pixel
//   3  gate               reads x, writes y the convolution of those maps on a tile of pixels, the
//                                           spatial gate sa, and y = sa u
//
// A chunk stays in the L2 cache, so that only the first read and the write reach memory. The first
// two launches are sweeps (sweep.cuh, sums.cuh) with a block for each span of rows and columns; the
// third has a block for each tile and span of channels. Grids: plan.cpp.
//
// Where PyTorch runs the layers, three operators do what is around them. PoolArgs: launch 1 without
// the MLP. ChannelStatsArgs: launch 2, and a small one that adds up the spans of channels
// (channel_stats.cuh). ApplyArgs: launch 3 without the convolution.

#include <algorithm>

#include "channel_stats.cuh"
#include "dispatch.cuh"
#include "gate.cuh"
#include "launch.cuh"
#include "sums.cuh"
#include "workspace.h"

namespace cbam::cuda {
namespace {

// ----------------------------------------------------------------------------------- memory

template <class A>
struct PoolMemory {
  PoolMemory(Arena& arena, const Problem& p, const Plan& plan)
      : counters(arena.take<unsigned>(p.n)),
        sums(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        maxima(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)) {}
  unsigned* counters;  // [N]
  A* sums;             // [chunk, pixel spans, C]
  A* maxima;           // [chunk, pixel spans, C]
};

template <class A>
struct StatsMemory {
  StatsMemory(Arena& arena, const Problem& p, const Plan& plan)
      : sums(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        maxima(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())) {}
  A* sums;    // [chunk, channel spans, P]
  A* maxima;  // [chunk, channel spans, P]
};

template <class A>
struct ForwardMemory {
  ForwardMemory(Arena& arena, const Problem& p, const Plan& plan)
      : pool(arena, p, plan),
        stats(arena, p, plan),
        ca(arena.take<A>(plan.chunk * p.c)),
        pooled(arena.take<A>(plan.chunk * 2 * p.c)),
        hidden_units(arena.take<A>(plan.chunk * 2 * p.hidden)) {}
  PoolMemory<A> pool;
  StatsMemory<A> stats;
  A* ca;            // [chunk, C] where the caller does not want it
  A* pooled;        // [chunk, 2, C]
  A* hidden_units;  // [chunk, 2, R]
};

// ---------------------------------------------------------------- launches 1 and 2: the sweeps

// One chunk of samples: `first` of the batch and `samples` of them.
template <class S, Layout layout, int W>
class Chunk {
 public:
  using A = Acc<S>;

  Chunk(const Problem& problem, const Plan& plan, Launcher& launcher, const void* input,
        int64_t first)
      : first(first),
        samples(std::min(plan.chunk, problem.n - first)),
        x(static_cast<const S*>(input) + first * problem.c * problem.pixels()),
        problem_(problem),
        sweep_(plan.sweep),
        launcher_(launcher) {}

  // `mlp` with what it needs beside shapes.
  void launch_pool(const PoolMemory<A>& memory, MlpForward<S> mlp) const {
    mlp.channels = problem_.c;
    mlp.hidden = problem_.hidden;
    mlp.inverse_pixels = A{1} / static_cast<A>(problem_.pixels());
    mlp.spans = sweep_.pixel_spans;
    launch_sweep<layout, W>(
        launcher_, sweep_, samples,
        Pool<S>{shape(), memory.sums, memory.maxima, memory.counters + first, mlp});
  }

  void launch_stats(const StatsMemory<A>& memory, const A* ca) const {
    launch_sweep<layout, W>(
        launcher_, sweep_, samples,
        ChannelStats<S, false>{shape(), ca, memory.sums, memory.maxima, nullptr});
  }

  const int64_t first, samples;
  const S* const x;

 private:
  Body<S> shape() const {
    return {problem_.c, problem_.pixels(), sweep_.pixel_spans, sweep_.channel_spans, x, nullptr};
  }

  const Problem& problem_;
  const Sweep& sweep_;
  Launcher& launcher_;
};

// ------------------------------------------------------------------------- launch 3: the gate

template <class S>
void launch_gate(Launcher& launcher, const Plan& plan, const Problem& problem, int64_t samples,
                 GateArgs<S> args) {
  args.tiling = plan.tiling;
  args.gate = plan.gate;
  args.channels = problem.c;
  args.inverse_channels = Acc<S>{1} / static_cast<Acc<S>>(problem.c);
  args.height = problem.h;
  args.width = problem.w;
  args.kernel = static_cast<int>(problem.kernel);
  const int64_t pixels = int64_t{plan.tiling.rows} * plan.tiling.columns;
  const bool stages = args.given_logits == nullptr && plan.tiling.staged;
  const int64_t shared = stages ? staged_bytes(plan.tiling, problem, 2, pixels)
                                : kPlaceBytes + pixels * static_cast<int64_t>(sizeof(Acc<S>));
  // Without y, one block a tile is enough.
  if (args.y == nullptr) args.gate.channel_spans = 1;
  const int64_t blocks = samples * args.tiling.tiles * args.gate.channel_spans;
  with_access<S>(problem.layout, plan.gate.vector, [&](auto layout, auto width) {
    launcher.launch(gate_kernel<S, decltype(layout)::value, decltype(width)::value>, blocks, shared,
                    args);
  });
}

// ------------------------------------------------------------------------------------- host

template <class T>
T* advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

template <class S, Layout layout, int W>
void forward(const ForwardArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  const Parameters& parameters = args.parameters;
  Arena arena(queue.workspace);
  const ForwardMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  launcher.clear(memory.pool.counters, p.n);

  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const Chunk<S, layout, W> chunk(p, plan, launcher, args.input, first);
    A* const wanted_ca = static_cast<A*>(args.channel_gate);
    A* const ca = wanted_ca == nullptr ? memory.ca : wanted_ca + first * p.c;

    MlpForward<S> mlp{};
    mlp.fc1_weight = parameters.fc1_weight;
    mlp.fc1_bias = parameters.fc1_bias;
    mlp.fc2_weight = parameters.fc2_weight;
    mlp.fc2_bias = parameters.fc2_bias;
    mlp.pooled = memory.pooled;
    mlp.hidden_units = memory.hidden_units;
    mlp.channel_gate = ca;
    chunk.launch_pool(memory.pool, mlp);

    chunk.launch_stats(memory.stats, ca);

    GateArgs<S> gate{};
    gate.conv_weight = parameters.conv_weight;
    gate.conv_bias = parameters.conv_bias;
    gate.sums = memory.stats.sums;
    gate.maxima = memory.stats.maxima;
    gate.spans = plan.sweep.channel_spans;
    gate.ca = ca;
    gate.x = chunk.x;
    gate.y = advance(static_cast<S*>(args.output), first * p.c * p.pixels());
    gate.sa = advance(static_cast<A*>(args.spatial_gate), first * p.pixels());
    gate.logits = advance(static_cast<A*>(args.logits), first * p.pixels());
    launch_gate(launcher, plan, p, chunk.samples, gate);
  }
}

template <class S, Layout layout, int W>
void pool(const PoolArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  Arena arena(queue.workspace);
  const PoolMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  launcher.clear(memory.counters, p.n);
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    MlpForward<S> pooled_maps{};
    pooled_maps.pooled = static_cast<A*>(args.pooled) + first * 2 * p.c;
    Chunk<S, layout, W>(p, plan, launcher, args.input, first).launch_pool(memory, pooled_maps);
  }
}

template <class S, Layout layout, int W>
void channel_stats(const ChannelStatsArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  Arena arena(queue.workspace);
  const StatsMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const Chunk<S, layout, W> chunk(p, plan, launcher, args.input, first);
    chunk.launch_stats(memory, static_cast<const A*>(args.channel_gate) + first * p.c);

    JoinedStats<A> stats{};
    stats.samples = chunk.samples;
    stats.height = p.h;
    stats.width = p.w;
    stats.inverse_channels = A{1} / static_cast<A>(p.c);
    stats.sums = memory.sums;
    stats.maxima = memory.maxima;
    stats.spans = plan.sweep.channel_spans;
    stats.stats = static_cast<A*>(args.stats) + first * 2 * p.pixels();
    launcher.launch_each(joined_stats_kernel<A>, chunk.samples * p.pixels(), stats);
  }
}

}  // namespace

int64_t workspace_bytes(const ForwardArgs& args, const Device& device) {
  return bytes_of<ForwardMemory>(args.problem, make_plan(args.problem, Pass::kForward, device));
}

void run(const ForwardArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = make_plan(args.problem, Pass::kForward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    forward<decltype(storage), decltype(layout)::value, decltype(width)::value>(args, plan, queue);
  });
}

int64_t workspace_bytes(const PoolArgs& args, const Device& device) {
  return bytes_of<PoolMemory>(args.problem, make_plan(args.problem, Pass::kForward, device));
}

void run(const PoolArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = make_plan(args.problem, Pass::kForward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    pool<decltype(storage), decltype(layout)::value, decltype(width)::value>(args, plan, queue);
  });
}

int64_t workspace_bytes(const ChannelStatsArgs& args, const Device& device) {
  return bytes_of<StatsMemory>(args.problem, make_plan(args.problem, Pass::kForward, device));
}

void run(const ChannelStatsArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = make_plan(args.problem, Pass::kForward, queue.device);
  with_sweep(args.problem, plan, [&](auto storage, auto layout, auto width) {
    channel_stats<decltype(storage), decltype(layout)::value, decltype(width)::value>(args, plan,
                                                                                      queue);
  });
}

// The second phase alone: y from logits that come from outside, in one launch.

int64_t workspace_bytes(const ApplyArgs&, const Device&) { return 0; }

void run(const ApplyArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Problem& p = args.problem;
  const Plan plan = make_plan(args.problem, Pass::kForward, queue.device);
  with_storage(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    Launcher launcher(queue);
    for (int64_t first = 0; first < p.n; first += plan.chunk) {
      GateArgs<S> gate{};
      gate.given_logits = static_cast<const A*>(args.logits) + first * p.pixels();
      gate.ca = static_cast<const A*>(args.channel_gate) + first * p.c;
      gate.x = static_cast<const S*>(args.input) + first * p.c * p.pixels();
      gate.y = static_cast<S*>(args.output) + first * p.c * p.pixels();
      launch_gate(launcher, plan, p, std::min(plan.chunk, p.n - first), gate);
    }
  });
}

}  // namespace cbam::cuda
