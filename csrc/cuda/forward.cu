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

#include "convolution.cuh"
#include "dispatch.cuh"
#include "launch.cuh"
#include "sums.cuh"
#include "workspace.h"

namespace cbam::cuda {
namespace {

// ------------------------------------------------------------------------- launch 3: the gate

template <class S>
struct GateArgs {
  using A = Acc<S>;
  Tiling tiling;
  Gate gate;
  int64_t channels, height, width;
  int kernel;
  ParameterView conv_weight, conv_bias;
  const A* sums;    // [chunk, spans, P] of u over the channels of each span
  const A* maxima;  // [chunk, spans, P]
  int64_t spans;
  const A* given_logits;  // [chunk, P]; where it is not null, nothing is convolved
  const A* ca;            // [chunk, C]
  const S* x;             // [chunk, C, H, W]
  S* y;                   // [chunk, C, H, W] or null, as the following are
  A* sa;                  // [chunk, P]
  A* logits;              // [chunk, P]
};

// The gates of a tile, into shared memory `gates` and to the maps that are wanted.
template <bool staged, class S, class A>
__device__ __noinline__ void convolve_tile(const GateArgs<S>& args, int64_t sample,
                                           const Tile& tile, bool writes_maps, A* gates,
                                           A* memory) {
  const auto stat = [&](int map) {
    return make_window<staged, A>(
        args.tiling, tile, args.kernel, args.height, args.width,
        [&args, sample, map](int64_t p) { return channel_stat<A>(args, sample, map, p); });
  };
  auto mean = stat(0);
  auto highest = stat(1);
  Weights<staged, S> weights(args.conv_weight, args.kernel);
  weights.stage(highest.stage(mean.stage(memory)));
  __syncthreads();
  const A bias = load_bias<S>(args.conv_bias, 0);
  each_run(tile, static_cast<int>(threadIdx.x), kThreads, [&](int row, int column) {
    A logits[kRun] = {};
    correlate<false>(weights, 0, mean, row, column, logits);
    correlate<false>(weights, 1, highest, row, column, logits);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (row + i >= tile.rows) break;
      const A logit = logits[i] + bias, gate = sigmoid(logit);
      gates[(row + i) * args.tiling.columns + column] = gate;
      if (!writes_maps) continue;
      const int64_t pixel = (sample * args.height + tile.first_row + row + i) * args.width +
                            tile.first_column + column;
      if (args.sa != nullptr) store(args.sa + pixel, gate);
      if (args.logits != nullptr) store(args.logits + pixel, logit);
    }
  });
}

// y = sa u on a tile, for the channels of the block.
template <class S, Layout layout, int W>
__device__ void apply_gates(const GateArgs<S>& args, int64_t sample, const Tile& tile,
                            int64_t first_channel, const Acc<S>* gates) {
  using A = Acc<S>;
  constexpr int U = 4;  // accesses of a thread in flight
  constexpr bool kNchw = layout == Layout::kNCHW;
  const int64_t pixels = args.height * args.width;
  const int64_t origin = sample * args.channels * pixels;
  const A* const ca = args.ca + sample * args.channels + first_channel;
  const int channels =
      static_cast<int>(smaller(args.gate.channel_span, args.channels - first_channel));
  const int tile_pixels = args.tiling.rows * args.tiling.columns;
  const int rows = kNchw ? channels : tile_pixels, columns = kNchw ? tile_pixels : channels;
  const int lanes = args.gate.lanes, groups = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int group = static_cast<int>(threadIdx.x) / lanes;

  // Where pixel q of the tile lies in the map; -1 if it does not.
  const auto pixel_of = [&](int q) -> int64_t {
    const int row = row_of(args.tiling, q), column = q - row * args.tiling.columns;
    if (row >= tile.rows || column >= tile.columns) return -1;
    return (tile.first_row + row) * args.width + tile.first_column + column;
  };
  for (int column = lane * W; column < columns; column += lanes * W) {
    A column_gates[W];
    int64_t first_pixel = 0;
    if constexpr (kNchw) {
      first_pixel = pixel_of(column);
      if (first_pixel < 0) continue;
#pragma unroll
      for (int i = 0; i < W; ++i) column_gates[i] = gates[column + i];
    } else {
      load_values<W>(ca + column, column_gates);
    }
    for (int base = group; base < rows; base += groups * U) {
      Packed<S, W> x[U];
      int64_t at[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int row = base + u * groups;
        at[u] = -1;
        if (row >= rows) continue;
        if constexpr (kNchw) {
          at[u] = origin + (first_channel + row) * pixels + first_pixel;
        } else {
          const int64_t pixel = pixel_of(row);
          if (pixel < 0) continue;
          at[u] = origin + pixel * args.channels + first_channel + column;
        }
        x[u] = load_packed<S, W, Use::kLast>(args.x + at[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (at[u] < 0) continue;
        const int row = base + u * groups;
        const A row_gate = kNchw ? load(ca + row) : gates[row];
        A values[W];
        unpack<S, W>(x[u], values);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          // The same order in both layouts: u first.
          values[i] = kNchw ? column_gates[i] * (row_gate * values[i])
                            : row_gate * (column_gates[i] * values[i]);
        }
        store_output<S, W>(args.y + at[u], values);
      }
    }
  }
}

template <class S, Layout layout, int W>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Acc<S>>)
    gate_kernel(const __grid_constant__ GateArgs<S> args) {
  using A = Acc<S>;
  wait_for_previous_launches();
  const int64_t unit = blockIdx.x / args.tiling.tiles;
  const int64_t tile_index = blockIdx.x - unit * args.tiling.tiles;
  const int64_t sample = unit / args.gate.channel_spans;
  const int64_t span = unit - sample * args.gate.channel_spans;
  const Tile tile = tile_at(args.tiling, args.height, args.width, tile_index);

  A* const gates = shared_memory<A>();
  if (args.given_logits != nullptr) {
    for (int q = static_cast<int>(threadIdx.x); q < tile.rows * tile.columns; q += kThreads) {
      const int row = q / tile.columns, column = q % tile.columns;
      const int64_t pixel =
          (sample * args.height + tile.first_row + row) * args.width + tile.first_column + column;
      gates[row * args.tiling.columns + column] = sigmoid(load(args.given_logits + pixel));
    }
  } else {
    A* const memory = gates + args.tiling.rows * args.tiling.columns;
    if (args.tiling.staged) {
      convolve_tile<true>(args, sample, tile, span == 0, gates, memory);
    } else {
      convolve_tile<false>(args, sample, tile, span == 0, gates, memory);
    }
  }
  if (args.y == nullptr) return;
  __syncthreads();
  apply_gates<S, layout, W>(args, sample, tile, span * args.gate.channel_span, gates);
}

int64_t gate_shared_bytes(const Plan& plan, const Problem& problem, bool convolves, int64_t size) {
  const int64_t pixels = int64_t{plan.tiling.rows} * plan.tiling.columns;
  if (convolves && plan.tiling.staged) return staged_bytes(plan.tiling, problem, 2, pixels);
  return pixels * size;
}

template <class S>
void launch_gate(Launcher& launcher, const Plan& plan, const Problem& problem, int64_t samples,
                 GateArgs<S> args) {
  args.tiling = plan.tiling;
  args.gate = plan.gate;
  args.channels = problem.c;
  args.height = problem.h;
  args.width = problem.w;
  args.kernel = static_cast<int>(problem.kernel);
  const int64_t shared =
      gate_shared_bytes(plan, problem, args.given_logits == nullptr, sizeof(Acc<S>));
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

Plan plan_for(const ForwardArgs& args, const Device& device) {
  const bool aligned =
      are_aligned({args.input, args.output, args.channel_gate, args.spatial_gate, args.logits});
  return make_plan(args.problem, Pass::kForward, aligned, device);
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
    pool.mlp = {{p.c, p.hidden, p.pixels(), sweep.pixel_spans, args.parameters.fc1_weight,
                 args.parameters.fc1_bias, args.parameters.fc2_weight, args.parameters.fc2_bias,
                 memory.pooled, memory.hidden_units},
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

Plan plan_for(const ApplyArgs& args, const Device& device) {
  const bool aligned = are_aligned({args.input, args.output, args.channel_gate});
  return make_plan(args.problem, Pass::kForward, aligned, device);
}

}  // namespace

int64_t workspace_bytes(const ForwardArgs& args, const Device& device) {
  const Plan plan = plan_for(args, device);
  return with_storage(args.problem.dtype, [&](auto storage) {
    Arena arena(nullptr);
    ForwardMemory<Acc<decltype(storage)>>(arena, args.problem, plan);
    return arena.used();
  });
}

void run(const ForwardArgs& args, const Queue& queue) {
  if (args.problem.n == 0) return;
  const Plan plan = plan_for(args, queue.device);
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
  const Plan plan = plan_for(args, queue.device);
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
