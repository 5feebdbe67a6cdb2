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
// operator of its own (ApplyBackwardArgs, at the end), and launch 1 then reads x alone.

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

template <class A>
struct BackwardMemory {
  BackwardMemory(Arena& arena, const Problem& p, const Plan& plan)
      : counters(arena.take<unsigned>(p.n)),
        pooled(arena.take<A>(p.n * 2 * p.c)),
        hidden_units(arena.take<A>(p.n * 2 * p.hidden)),
        dz(arena.take<A>(p.n * p.c)),
        dunits(arena.take<A>(p.n * 2 * p.hidden)),
        conv_grads(arena.take<A>(p.n * plan.tiling.tiles * (2 * p.kernel * p.kernel + 1))),
        gate_grads(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        sums(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        maxima(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        argmaxima(arena.take<int>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        gate_dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pixel_grads(arena.take<PixelGrad<A>>(plan.chunk * p.pixels())),
        pool_sums(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_maxima(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_argmaxima(arena.take<int>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        channel_grads(arena.take<ChannelGrad<A>>(plan.chunk * p.c)) {}
  unsigned* counters;  // [N]
  A* pooled;           // [N, 2, C]
  A* hidden_units;     // [N, 2, R]
  A* dz;               // [N, C]
  A* dunits;           // [N, 2, R]
  A* conv_grads;       // [N, tiles, 2 k k + 1]
  A* gate_grads;       // [chunk, channel spans, P], as the next three
  A* sums;
  A* maxima;
  int* argmaxima;
  A* gate_dots;               // [chunk, pixel spans, C]
  PixelGrad<A>* pixel_grads;  // [chunk, P]
  A* pool_sums;               // [chunk, pixel spans, C], as the next three
  A* pool_maxima;
  int* pool_argmaxima;
  A* pool_dots;
  ChannelGrad<A>* channel_grads;  // [chunk, C]
};

// --------------------------------------------------------------------------------- launches

// One chunk of samples: `first` of the batch and `samples` of them.
template <class S, Layout layout, int W>
class Chunk {
 public:
  using A = Acc<S>;

  Chunk(const BackwardArgs& args, const Plan& plan, const BackwardMemory<A>& memory,
        Launcher& launcher, int64_t first)
      : args_(args),
        problem_(args.problem),
        sweep_(plan.sweep),
        tiling_(plan.tiling),
        memory_(memory),
        launcher_(launcher),
        first_(first),
        samples_(std::min(plan.chunk, args.problem.n - first)),
        x_(static_cast<const S*>(args.input) + first * elements()),
        g_(static_cast<const S*>(args.grad_output) + first * elements()),
        ca_(static_cast<const A*>(args.channel_gate) + first * args.problem.c),
        sa_(static_cast<const A*>(args.spatial_gate) + first * args.problem.pixels()) {}

  void run() const {
    const bool sweeps_again = args_.mlp_grads || args_.grad_input != nullptr;
    if (args_.grad_logits == nullptr) {
      launch_gate_grads();
    } else {
      launch_stats();
    }
    launch_map_grads(sweeps_again);
    if (sweeps_again) launch_pool();
    if (args_.grad_input != nullptr) launch_input_grad();
  }

 private:
  int64_t elements() const { return problem_.c * problem_.pixels(); }

  template <class B>
  void launch_sweep(const B& body) const {
    launcher_.launch(sweep_kernel<B, layout, W>, samples_ * sweep_.blocks,
                     sweep_shared_bytes<B, layout, W>(sweep_), body, sweep_);
  }

  Body<S> shape(const S* x, const S* g) const {
    return {problem_.c, problem_.pixels(), sweep_.pixel_spans, sweep_.channel_spans, x, g};
  }

  void launch_gate_grads() const {
    launch_sweep(GateGrads<S, true>{shape(x_, g_), ca_, sa_, memory_.gate_grads, memory_.sums,
                                    memory_.maxima, memory_.argmaxima, memory_.gate_dots});
  }

  void launch_stats() const {
    launch_sweep(ChannelStats<S, true>{shape(x_, nullptr), ca_, memory_.sums, memory_.maxima,
                                       memory_.argmaxima});
  }

  void launch_map_grads(bool writes_pixel_grads) const {
    MapGrads<S> grads{};
    grads.tiling = tiling_;
    grads.inverse_channels = A{1} / static_cast<A>(problem_.c);
    grads.height = problem_.h;
    grads.width = problem_.w;
    grads.kernel = static_cast<int>(problem_.kernel);
    grads.conv_weight = args_.parameters.conv_weight;
    grads.gate_grads = memory_.gate_grads;
    if (args_.grad_logits != nullptr) {
      grads.given_dlogits = static_cast<const A*>(args_.grad_logits) + first_ * problem_.pixels();
    }
    grads.sa = sa_;
    grads.sums = memory_.sums;
    grads.maxima = memory_.maxima;
    grads.argmaxima = memory_.argmaxima;
    grads.spans = sweep_.channel_spans;
    if (writes_pixel_grads) grads.pixel_grads = memory_.pixel_grads;
    if (args_.conv_grads) {
      const int64_t size = 2 * problem_.kernel * problem_.kernel + 1;
      grads.conv_grads = memory_.conv_grads + first_ * tiling_.tiles * size;
    }
    launcher_.launch(map_grads_kernel<S>, samples_ * tiling_.tiles,
                     tiling_.staged ? staged_bytes(tiling_, problem_, 3, 0) : kPlaceBytes, grads);
  }

  void launch_pool() const {
    BackwardPool<S> pool{shape(x_, nullptr)};
    pool.pixel_grads = memory_.pixel_grads;
    pool.sums = memory_.pool_sums;
    pool.maxima = memory_.pool_maxima;
    pool.argmaxima = memory_.pool_argmaxima;
    pool.dots = memory_.pool_dots;
    pool.counters = memory_.counters + first_;
    const Parameters& parameters = args_.parameters;
    const int64_t first_channel = first_ * problem_.c, first_unit = first_ * 2 * problem_.hidden;
    const bool given = args_.grad_channel_gate != nullptr;
    pool.mlp = {
        {problem_.c, problem_.hidden, A{1} / static_cast<A>(problem_.pixels()), sweep_.pixel_spans,
         parameters.fc1_weight, parameters.fc1_bias, parameters.fc2_weight, parameters.fc2_bias,
         memory_.pooled + 2 * first_channel, memory_.hidden_units + first_unit},
        ca_,
        given ? static_cast<const A*>(args_.grad_channel_gate) + first_channel : memory_.gate_dots,
        given ? 1 : sweep_.pixel_spans,
        sweep_.span_pixels,
        memory_.dz + first_channel,
        memory_.dunits + first_unit,
        memory_.channel_grads};
    launch_sweep(pool);
  }

  void launch_input_grad() const {
    launch_sweep(InputGrad<S>{shape(g_, nullptr),
                              static_cast<S*>(args_.grad_input) + first_ * elements(), ca_,
                              memory_.pixel_grads, memory_.channel_grads});
  }

  const BackwardArgs& args_;
  const Problem& problem_;
  const Sweep& sweep_;
  const Tiling& tiling_;
  const BackwardMemory<A>& memory_;
  Launcher& launcher_;
  const int64_t first_, samples_;
  const S* const x_;
  const S* const g_;
  const A* const ca_;
  const A* const sa_;
};

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

template <class S, Layout layout, int W>
void backward(const BackwardArgs& args, const Plan& plan, const Queue& queue) {
  const Problem& p = args.problem;
  Arena arena(queue.workspace);
  const BackwardMemory<Acc<S>> memory(arena, p, plan);
  Launcher launcher(queue);
  if (p.n > 0) launcher.clear(memory.counters, p.n * static_cast<int64_t>(sizeof(unsigned)));
  for (int64_t first = 0; first < p.n; first += plan.chunk) {
    Chunk<S, layout, W>(args, plan, memory, launcher, first).run();
  }
  launch_parameter_grads<S>(launcher, args, plan, memory);
}

// ---------------------------------------------------------- gradient of the second phase alone

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
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = first; i < args.samples * args.pixels; i += step) {
    const A gate = sigmoid(load(args.logits + i));
    const A grad = add_partials(args.gate_grads, i, args.pixels, args.channel_spans);
    store(args.sa + i, gate);
    store(args.grad_logits + i, gate * (1 - gate) * grad);
  }
  for (int64_t i = first; i < args.samples * args.channels; i += step) {
    store(args.grad_channel_gate + i, add_partials(args.dots, i, args.channels, args.pixel_spans));
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
    launcher.launch(sweep_kernel<Grads, layout, W>, samples * sweep.blocks,
                    sweep_shared_bytes<Grads, layout, W>(sweep), grads, sweep);

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
    constexpr int64_t kMaxBlocks = 4096;  // a thread takes several elements beyond that
    const int64_t wanted = divide_up(samples * std::max(p.c, p.pixels()), kThreads);
    launcher.launch(phase_grads_kernel<S>, std::min(wanted, kMaxBlocks), 0, sums);
  }
}

}  // namespace

int64_t workspace_bytes(const BackwardArgs& args, const Device& device) {
  const Plan plan = make_plan(args.problem, Pass::kBackward, device);
  return with_storage(args.problem.dtype, [&](auto storage) {
    Arena arena(nullptr);
    BackwardMemory<Acc<decltype(storage)>>(arena, args.problem, plan);
    return arena.used();
  });
}

void run(const BackwardArgs& args, const Queue& queue) {
  const Plan plan = make_plan(args.problem, Pass::kBackward, queue.device);
  with_storage(args.problem.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_access<S>(args.problem.layout, plan.vector, [&](auto layout, auto width) {
      backward<S, decltype(layout)::value, decltype(width)::value>(args, plan, queue);
    });
  });
}

int64_t workspace_bytes(const ApplyBackwardArgs& args, const Device& device) {
  const Plan plan = make_plan(args.problem, Pass::kBackward, device);
  return with_storage(args.problem.dtype, [&](auto storage) {
    Arena arena(nullptr);
    PhaseMemory<Acc<decltype(storage)>>(arena, args.problem, plan);
    return arena.used();
  });
}

void run(const ApplyBackwardArgs& args, const Queue& queue) {
  const Plan plan = make_plan(args.problem, Pass::kBackward, queue.device);
  with_storage(args.problem.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_access<S>(args.problem.layout, plan.vector, [&](auto layout, auto width) {
      apply_backward<S, decltype(layout)::value, decltype(width)::value>(args, plan, queue);
    });
  });
}

}  // namespace cbam::cuda
