// Forward: y = sigmoid(conv(stats of u)) u, u = ca x, in six launches for each chunk of samples.
//
//   1  pool           reads x           sum and maximum of each channel, in spans of pixels
//   2  hidden units   small maps        their average and maximum, and W1 times these
//   3  channel gate   small maps        the rest of the MLP: the channel gate ca
//   4  channel stats  reads x           sum and maximum of u for each pixel, in spans of channels
//   5  spatial gate   small maps        the convolution of their mean and maximum: the gate sa
//   6  output         reads x, writes   y = sa u
//                     y
//
// A launch either streams x, or is small and soon over. A chunk stays in the L2 cache, so that only
// the first read and the write reach memory. Launches 1, 4 and 6 are sweeps (sweep.cuh, bodies.cuh)
// with a block for each span of rows and columns; 2 and 3 have a block for each span of channels
// (mlp.cuh), and are one where that is one block for a sample; 5 has one for each tile of pixels
// (spatial_gate.cuh). Blocks of one launch never wait for each other. Grids: plan.cpp.
//
// A gate that is not there is one everywhere: without the channel gate a small launch that fills
// its map stands in the place of 1 to 3, without the spatial gate in that of 4 and 5.
//
// Where PyTorch runs the layers, three operators do what is around them. PoolArgs: launches 1 and
// 2, without the weights. ChannelStatsArgs: launch 4, and a small one that adds up the spans of
// channels (channel_stats.cuh). ApplyArgs: launch 6, behind a small one that makes gates of logits.

#include <limits>

#include "call.cuh"
#include "channel_stats.cuh"
#include "fill.cuh"
#include "mlp.cuh"
#include "spatial_gate.cuh"

namespace cbam::cuda {
namespace {

// ----------------------------------------------------------------------------------- memory

template <class A>
struct PoolMemory {
  PoolMemory(Arena& arena, const Problem& p, const Plan& plan)
      : sums(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        maxima(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)) {}
  A* sums;    // [chunk, pixel spans, C]
  A* maxima;  // [chunk, pixel spans, C]
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
        hidden_parts(arena.take<A>(plan.chunk * plan.mlp.blocks * 2 * p.hidden)),
        sa(arena.take<A>(plan.chunk * p.pixels())) {}
  PoolMemory<A> pool;
  StatsMemory<A> stats;
  A* ca;            // [chunk, C] where the caller does not want it
  A* hidden_parts;  // [chunk, blocks of the MLP, 2, R]
  A* sa;            // [chunk, P] where the caller does not want it
};

template <class A>
struct ApplyMemory {
  ApplyMemory(Arena& arena, const Problem& p, const Plan& plan)
      : sa(arena.take<A>(plan.chunk * p.pixels())) {}
  A* sa;  // [chunk, P]
};

// ---------------------------------------------------------------------------------- launches

// Launch 1.
template <class S, Layout layout, int W>
void launch_pool(const Chunk<S, layout, W>& chunk, const S* x, const PoolMemory<Acc<S>>& memory) {
  chunk.sweep(Pool<S>{chunk.shape(x), memory.sums, memory.maxima});
}

// What launch 2 needs beside the parameters.
template <class S, Layout layout, int W>
HiddenUnits<S> hidden_units(const Chunk<S, layout, W>& chunk, const PoolMemory<Acc<S>>& memory) {
  HiddenUnits<S> units{};
  units.shape = mlp_shape<S>(chunk.problem, chunk.plan);
  units.sums = memory.sums;
  units.maxima = memory.maxima;
  return units;
}

// Launches 2 and 3.
template <class S, Layout layout, int W>
void launch_mlp(const Chunk<S, layout, W>& chunk, const Parameters& parameters,
                const ForwardMemory<Acc<S>>& memory, Acc<S>* ca) {
  const Mlp& cut = chunk.plan.mlp;
  HiddenUnits<S> units = hidden_units(chunk, memory.pool);
  units.fc1 = matrix_of(parameters.fc1_weight, cut.span);
  units.parts = memory.hidden_parts;
  ChannelGate<S> gate{};
  gate.shape = units.shape;
  gate.parts = memory.hidden_parts;
  gate.fc1_bias = parameters.fc1_bias;
  gate.fc2_bias = parameters.fc2_bias;
  gate.fc2 = matrix_of(parameters.fc2_weight, gate.shape.piece);
  gate.channel_gate = ca;
  if (cut.blocks == 1) {
    chunk.launcher.launch(whole_gate_kernel<S>, chunk.samples,
                          sizeof(typename WholeGate<S>::Shared), WholeGate<S>{units, gate});
    return;
  }
  const int64_t blocks = chunk.samples * cut.blocks;
  chunk.launcher.launch(hidden_units_kernel<S>, blocks, sizeof(typename HiddenUnits<S>::Shared),
                        units);
  chunk.launcher.launch(channel_gate_kernel<S>, blocks, sizeof(typename ChannelGate<S>::Shared),
                        gate);
}

// In the place of launches 2 and 3.
template <class S, Layout layout, int W>
void launch_pooled_maps(const Chunk<S, layout, W>& chunk, const PoolMemory<Acc<S>>& memory,
                        Acc<S>* pooled) {
  HiddenUnits<S> units = hidden_units(chunk, memory);
  units.pooled = pooled;
  chunk.launcher.launch(hidden_units_kernel<S>, chunk.samples * chunk.plan.mlp.blocks,
                        sizeof(typename HiddenUnits<S>::Shared), units);
}

// Launch 4.
template <class S, Layout layout, int W>
void launch_stats(const Chunk<S, layout, W>& chunk, const S* x, const Acc<S>* ca,
                  const StatsMemory<Acc<S>>& memory) {
  chunk.sweep(ChannelStats<S, false>{chunk.shape(x), ca, memory.sums, memory.maxima, nullptr});
}

// Behind launch 4 where it is the last.
template <class S, Layout layout, int W>
void launch_joined_stats(const Chunk<S, layout, W>& chunk, const StatsMemory<Acc<S>>& memory,
                         Acc<S>* stats) {
  const Problem& p = chunk.problem;
  JoinedStats<Acc<S>> joined{};
  joined.samples = chunk.samples;
  joined.height = p.h;
  joined.width = p.w;
  joined.inverse_channels = Acc<S>{1} / static_cast<Acc<S>>(p.c);
  joined.sums = memory.sums;
  joined.maxima = memory.maxima;
  joined.spans = chunk.plan.sweep.channel_spans;
  joined.stats = stats;
  chunk.launcher.launch_each(joined_stats_kernel<Acc<S>>, chunk.samples * p.pixels(), joined);
}

// Launch 5. `gate` with the parameters and what is wanted.
template <class S, Layout layout, int W>
void launch_spatial_gate(const Chunk<S, layout, W>& chunk, const StatsMemory<Acc<S>>& memory,
                         SpatialGate<S> gate) {
  const Problem& p = chunk.problem;
  const Tiling& tiling = chunk.plan.tiling;
  gate.tiling = tiling;
  gate.height = p.h;
  gate.width = p.w;
  gate.inverse_channels = Acc<S>{1} / static_cast<Acc<S>>(p.c);
  gate.kernel = static_cast<int>(p.kernel);
  gate.sums = memory.sums;
  gate.maxima = memory.maxima;
  gate.spans = chunk.plan.sweep.channel_spans;
  chunk.launcher.launch(spatial_gate_kernel<S>, chunk.samples * tiling.tiles,
                        tiling.staged ? staged_bytes(tiling, p, Pass::kForward) : 0, gate);
}

// Launch 6.
template <class S, Layout layout, int W>
void launch_apply(const Chunk<S, layout, W>& chunk, const S* x, const Acc<S>* ca, const Acc<S>* sa,
                  S* y) {
  chunk.sweep(Apply<S>{chunk.shape(x), y, ca, sa});
}

// --------------------------------------------------------------------------------- operators

template <class S, Layout layout, int W>
void forward(const ForwardArgs& args, const Call<S, layout, W, ForwardMemory>& call) {
  using A = Acc<S>;
  const Problem& p = call.problem;
  const ForwardMemory<A>& memory = call.memory;
  call.each_chunk([&](const auto& chunk) {
    const S* const x = chunk.features(args.input);
    A* const wanted_ca = chunk.values(args.channel_gate, p.c);
    A* const ca = wanted_ca == nullptr ? memory.ca : wanted_ca;

    if (args.parameters.have_channel_gate()) {
      launch_pool(chunk, x, memory.pool);
      launch_mlp(chunk, args.parameters, memory, ca);
    } else {
      launch_fill(chunk.launcher, ca, chunk.samples * p.c, A{1});
    }

    A* const wanted_sa = chunk.values(args.spatial_gate, p.pixels());
    S* const y = chunk.features(args.output);
    A* const sa = wanted_sa == nullptr && y != nullptr ? memory.sa : wanted_sa;
    A* const logits = chunk.values(args.logits, p.pixels());
    if (args.parameters.have_spatial_gate()) {
      launch_stats(chunk, x, ca, memory.stats);
      SpatialGate<S> gate{};
      gate.conv_weight = args.parameters.conv_weight;
      gate.conv_bias = args.parameters.conv_bias;
      gate.sa = sa;
      gate.logits = logits;
      launch_spatial_gate(chunk, memory.stats, gate);
    } else {
      const int64_t count = chunk.samples * p.pixels();
      if (sa != nullptr) launch_fill(chunk.launcher, sa, count, A{1});
      if (logits != nullptr)
        launch_fill(chunk.launcher, logits, count, std::numeric_limits<A>::infinity());
    }

    if (y != nullptr) launch_apply(chunk, x, ca, sa, y);
  });
}

// The second phase alone: y from logits that come from outside.
template <class S, Layout layout, int W>
void apply(const ApplyArgs& args, const Call<S, layout, W, ApplyMemory>& call) {
  call.each_chunk([&](const auto& chunk) {
    launch_gates(chunk, chunk.values(args.logits, call.problem.pixels()), call.memory.sa);
    launch_apply(chunk, chunk.features(args.input), chunk.values(args.channel_gate, call.problem.c),
                 call.memory.sa, chunk.features(args.output));
  });
}

template <class S, Layout layout, int W>
void pool(const PoolArgs& args, const Call<S, layout, W, PoolMemory>& call) {
  call.each_chunk([&](const auto& chunk) {
    launch_pool(chunk, chunk.features(args.input), call.memory);
    launch_pooled_maps(chunk, call.memory, chunk.values(args.pooled, 2 * call.problem.c));
  });
}

template <class S, Layout layout, int W>
void channel_stats(const ChannelStatsArgs& args, const Call<S, layout, W, StatsMemory>& call) {
  const Problem& p = call.problem;
  call.each_chunk([&](const auto& chunk) {
    launch_stats(chunk, chunk.features(args.input), chunk.values(args.channel_gate, p.c),
                 call.memory);
    launch_joined_stats(chunk, call.memory, chunk.values(args.stats, 2 * p.pixels()));
  });
}

}  // namespace

// ------------------------------------------------------------------------------ entry points

int64_t workspace_bytes(const ForwardArgs& args, const Device& device) {
  return bytes_for<ForwardMemory>(args, Pass::kForward, device);
}
void run(const ForwardArgs& args, const Queue& queue) {
  with_call<ForwardMemory>(args, Pass::kForward, queue,
                           [&](const auto& call) { forward(args, call); });
}

int64_t workspace_bytes(const ApplyArgs& args, const Device& device) {
  return bytes_for<ApplyMemory>(args, Pass::kForward, device);
}
void run(const ApplyArgs& args, const Queue& queue) {
  with_call<ApplyMemory>(args, Pass::kForward, queue, [&](const auto& call) { apply(args, call); });
}

int64_t workspace_bytes(const PoolArgs& args, const Device& device) {
  return bytes_for<PoolMemory>(args, Pass::kForward, device);
}
void run(const PoolArgs& args, const Queue& queue) {
  with_call<PoolMemory>(args, Pass::kForward, queue, [&](const auto& call) { pool(args, call); });
}

int64_t workspace_bytes(const ChannelStatsArgs& args, const Device& device) {
  return bytes_for<StatsMemory>(args, Pass::kForward, device);
}
void run(const ChannelStatsArgs& args, const Queue& queue) {
  with_call<StatsMemory>(args, Pass::kForward, queue,
                         [&](const auto& call) { channel_stats(args, call); });
}

}  // namespace cbam::cuda
