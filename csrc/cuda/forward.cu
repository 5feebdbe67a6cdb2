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

#include <algorithm>

#include "dispatch.cuh"
#include "gate.cuh"
#include "launch.cuh"
#include "sums.cuh"
#include "workspace.h"

namespace cbam::cuda {
namespace {

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

// ----------------------------------------------------------------------------------- memory

template <class A>
struct ForwardMemory {
  ForwardMemory(Arena& arena, const Problem& p, const Plan& plan)
      : counters(arena.take<unsigned>(p.n)),
        ca(arena.take<A>(plan.chunk * p.c)),
        pool_sums(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_maxima(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pooled(arena.take<A>(plan.chunk * 2 * p.c)),
        hidden_units(arena.take<A>(plan.chunk * 2 * p.hidden)),
        sums(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        maxima(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())) {}
  unsigned* counters;  // [N]
  A* ca;               // [chunk, C] where the caller does not want it
  A* pool_sums;        // [chunk, pixel spans, C]
  A* pool_maxima;      // [chunk, pixel spans, C]
  A* pooled;           // [chunk, 2, C]
  A* hidden_units;     // [chunk, 2, R]
  A* sums;             // [chunk, channel spans, P]
  A* maxima;           // [chunk, channel spans, P]
};

// ------------------------------------------------------------------------------------- host

template <class T>
T* advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

template <class S, Layout layout, int W>
void forward(const ForwardArgs& args, const Plan& plan, const Queue& queue) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  const Sweep& sweep = plan.sweep;
  Arena arena(queue.workspace);
  const ForwardMemory<A> memory(arena, p, plan);
  Launcher launcher(queue);
  launcher.clear(memory.counters, p.n * static_cast<int64_t>(sizeof(unsigned)));

  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    const int64_t samples = std::min(plan.chunk, p.n - first);
    const S* const x = static_cast<const S*>(args.input) + first * p.c * p.pixels();
    A* const wanted_ca = static_cast<A*>(args.channel_gate);
    A* const ca = wanted_ca == nullptr ? memory.ca : wanted_ca + first * p.c;
    const Body<S> shape{p.c, p.pixels(), sweep.pixel_spans, sweep.channel_spans, x, nullptr};

    Pool<S> pool{shape};
    pool.sums = memory.pool_sums;
    pool.maxima = memory.pool_maxima;
    pool.counters = memory.counters + first;
    pool.mlp = {{p.c, p.hidden, A{1} / static_cast<A>(p.pixels()), sweep.pixel_spans,
                 args.parameters.fc1_weight, args.parameters.fc1_bias, args.parameters.fc2_weight,
                 args.parameters.fc2_bias, memory.pooled, memory.hidden_units},
                ca};
    launcher.launch(sweep_kernel<Pool<S>, layout, W>, samples * sweep.blocks,
                    sweep_shared_bytes<Pool<S>, layout, W>(sweep), pool, sweep);

    using Stats = ChannelStats<S, false>;
    const Stats stats{shape, ca, memory.sums, memory.maxima, nullptr};
    launcher.launch(sweep_kernel<Stats, layout, W>, samples * sweep.blocks,
                    sweep_shared_bytes<Stats, layout, W>(sweep), stats, sweep);

    GateArgs<S> gate{};
    gate.conv_weight = args.parameters.conv_weight;
    gate.conv_bias = args.parameters.conv_bias;
    gate.sums = memory.sums;
    gate.maxima = memory.maxima;
    gate.spans = sweep.channel_spans;
    gate.ca = ca;
    gate.x = x;
    gate.y = advance(static_cast<S*>(args.output), first * p.c * p.pixels());
    gate.sa = advance(static_cast<A*>(args.spatial_gate), first * p.pixels());
    gate.logits = advance(static_cast<A*>(args.logits), first * p.pixels());
    launch_gate(launcher, plan, p, samples, gate);
  }
}

}  // namespace

int64_t workspace_bytes(const ForwardArgs& args, const Device& device) {
  const Plan plan = make_plan(args.problem, Pass::kForward, device);
  return with_storage(args.problem.dtype, [&](auto storage) {
    Arena arena(nullptr);
    ForwardMemory<Acc<decltype(storage)>>(arena, args.problem, plan);
    return arena.used();
  });
}

void run(const ForwardArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = make_plan(args.problem, Pass::kForward, queue.device);
  with_storage(args.problem.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_access<S>(args.problem.layout, plan.vector, [&](auto layout, auto width) {
      forward<S, decltype(layout)::value, decltype(width)::value>(args, plan, queue);
    });
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
