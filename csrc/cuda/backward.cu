// Backward, in six launches for each chunk of samples and one for the batch:
//
//   1  gate gradients     reads x, g     sum_c g u, and mean, maximum and argmax of u of each
//                                        pixel (forward kept none of them); sum_p g sa x of each
//                                        channel
//   2  map gradients      small maps     dl, the transposed convolution ds, and the weights of the
//                                        convolution
//   3  backward pool      reads x        sum, maximum and argmax of each channel, and
//                                        sum_p x (gradient of s), in spans of pixels
//   4  hidden gradients   small maps     these added up; the MLP forward once more, and backward
//                                        through W2
//   5  channel gradients  small maps     and through W1: the gradients of average and maximum
//   6  input gradient     reads g,       dx
//                         writes dx
//   7  parameters         small vectors  sums over the batch
//
// A chunk of x and g stays in the L2 cache, so that two reads and the write reach memory. Launches
// 1, 3 and 6 are sweeps (sweep.cuh, bodies.cuh) with a block for each span of rows and columns;
// launch 2 has a block for each tile (map_grads.cuh), 4 and 5 one for each span of channels
// (mlp_grads.cuh), and they are one launch where that is one block for a sample. Blocks of one
// launch never wait for each other. Grids: plan.cpp.
//
// Where a gate stands alone, launches that lead to the other are left out. A channel gate takes one
// sweep that reads x and g (PoolGrads) in the place of 1 and 3, and a small launch in that of 2. A
// spatial gate goes from 2 to 6, with a small launch in the place of 4 and 5.
//
// Where a norm stands between the phases of forward, the gradient of the second phase is an
// operator of its own (apply_backward.cu), and launch 1 then reads x alone.
//
// Where PyTorch runs the layers, two operators do what is around them. Both begin like launch 1
// that reads x alone, with a small launch behind it that makes of given gradients what launch 2
// makes of its own (channel_stats.cuh), and launches 3 and 4 without the MLP:
//
//   ChannelStatsBackwardArgs   reads x twice               ends there, with the gradient of ca
//   PoolBackwardArgs           reads x twice, g; writes dx goes on with launch 6

#include "call.cuh"
#include "fill.cuh"
#include "map_grads.cuh"
#include "mlp_grads.cuh"
#include "parameter_grads.cuh"

namespace cbam::cuda {
namespace {

// ----------------------------------------------------------------------------------- memory

// What the sweeps over x leave.
template <class A>
struct SweepMemory {
  SweepMemory(Arena& arena, const Problem& p, const Plan& plan)
      : sums(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        maxima(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        argmaxima(arena.take<int>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        pixel_grads(arena.take<PixelGrad<A>>(plan.chunk * p.pixels())),
        pool_sums(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_maxima(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_argmaxima(arena.take<int>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        pool_dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)),
        channel_grads(arena.take<ChannelGrad<A>>(plan.chunk * p.c)) {}
  A* sums;  // [chunk, channel spans, P], as the next two
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
        hidden_parts(arena.take<A>(plan.chunk * plan.mlp.blocks * 3 * p.hidden)),
        conv_grads(arena.take<A>(p.n * plan.tiling.tiles * (2 * p.kernel * p.kernel + 1))),
        gate_grads(arena.take<A>(plan.chunk * plan.sweep.channel_spans * p.pixels())),
        gate_dots(arena.take<A>(plan.chunk * plan.sweep.pixel_spans * p.c)) {}
  SweepMemory<A> sweeps;
  A* pooled;        // [N, 2, C]
  A* hidden_units;  // [N, 2, R]
  A* dz;            // [N, C]
  A* dunits;        // [N, 2, R]
  A* hidden_parts;  // [chunk, blocks of the MLP, 3, R]
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

  // In the place of launch 2; sa may be null where no gradient of x is taken, grad_stats where
  // there is no spatial gate.
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

  void launch_pool() const {
    chunk_.sweep(BackwardPool<S>{chunk_.shape(x_), memory_.pixel_grads, memory_.pool_sums,
                                 memory_.pool_maxima, memory_.pool_argmaxima, memory_.pool_dots});
  }

  // In the place of launches 1 and 3 where there is no spatial gate.
  void launch_pool_grads(const S* g) const {
    chunk_.sweep(PoolGrads<S>{chunk_.shape(x_, g), memory_.pool_sums, memory_.pool_maxima,
                              memory_.pool_argmaxima, memory_.pool_dots});
  }

  // In the place of launches 4 and 5 where there is no channel gate.
  void launch_no_channel_grads() const {
    static_assert(sizeof(ChannelGrad<A>) % sizeof(A) == 0, "zero in all of its parts");
    const int64_t count = chunk_.samples * chunk_.problem.c * (sizeof(ChannelGrad<A>) / sizeof(A));
    launch_fill(chunk_.launcher, reinterpret_cast<A*>(memory_.channel_grads), count, A{0});
  }

  // What launch 4 needs beside the parameters.
  HiddenGrads<S> hidden_grads() const {
    HiddenGrads<S> grads{};
    grads.shape = mlp_shape<S>(chunk_.problem, chunk_.plan);
    grads.span_pixels = chunk_.plan.sweep.span_pixels;
    grads.sums = memory_.pool_sums;
    grads.maxima = memory_.pool_maxima;
    grads.argmaxima = memory_.pool_argmaxima;
    grads.dots = memory_.pool_dots;
    grads.channel_gate = ca_;
    grads.channel_grads = memory_.channel_grads;
    return grads;
  }

  void launch_hidden_grads(const HiddenGrads<S>& grads) const {
    chunk_.launcher.launch(hidden_grads_kernel<S>, chunk_.samples * chunk_.plan.mlp.blocks,
                           sizeof(typename HiddenGrads<S>::Shared), grads);
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

// Launches 4 and 5.
template <class S, Layout layout, int W>
void launch_mlp(const Chunk<S, layout, W>& chunk, const Sweeps<S, layout, W>& sweeps,
                const BackwardArgs& args, const BackwardMemory<Acc<S>>& memory) {
  const Problem& p = chunk.problem;
  const Plan& plan = chunk.plan;
  HiddenGrads<S> hidden = sweeps.hidden_grads();
  if (args.grad_channel_gate != nullptr) {
    hidden.gate_grads = chunk.values(args.grad_channel_gate, p.c);
    hidden.gate_spans = 1;
  } else if (args.parameters.have_spatial_gate()) {
    hidden.gate_grads = memory.gate_dots;
    hidden.gate_spans = static_cast<int>(plan.sweep.pixel_spans);
  }
  hidden.fc1 = matrix_of(args.parameters.fc1_weight, plan.mlp.span);
  hidden.fc2 = matrix_of(args.parameters.fc2_weight, kMlpPiece);
  hidden.pooled = chunk.part(memory.pooled, 2 * p.c);
  hidden.dz = chunk.part(memory.dz, p.c);
  hidden.parts = memory.hidden_parts;
  ChannelGrads<S> grads{};
  grads.shape = hidden.shape;
  grads.parts = memory.hidden_parts;
  grads.fc1_bias = args.parameters.fc1_bias;
  grads.fc1 = hidden.fc1;
  grads.hidden_units = chunk.part(memory.hidden_units, 2 * p.hidden);
  grads.dunits = chunk.part(memory.dunits, 2 * p.hidden);
  grads.channel_grads = memory.sweeps.channel_grads;
  if (plan.mlp.blocks == 1) {
    chunk.launcher.launch(whole_gate_grads_kernel<S>, chunk.samples,
                          sizeof(typename WholeGateGrads<S>::Shared),
                          WholeGateGrads<S>{hidden, grads});
    return;
  }
  sweeps.launch_hidden_grads(hidden);
  chunk.launcher.launch(channel_grads_kernel<S>, chunk.samples * plan.mlp.blocks,
                        sizeof(typename ChannelGrads<S>::Shared), grads);
}

template <class S>
void launch_parameter_grads(Launcher& launcher, const BackwardArgs& args, const Plan& plan,
                            const BackwardMemory<Acc<S>>& memory) {
  const Problem& p = args.problem;
  ParameterGrads<S> grads{};
  grads.samples = p.n;
  grads.channels = p.c;
  grads.hidden = p.hidden;
  grads.kernel = static_cast<int>(p.kernel);
  grads.taps = 2 * grads.kernel * grads.kernel;
  grads.tiles = p.n * plan.tiling.tiles;
  grads.mlp_width = parameter_width(p.n);
  grads.conv_width = parameter_width(grads.tiles);
  grads.pooled = memory.pooled;
  grads.hidden_units = memory.hidden_units;
  grads.dz = memory.dz;
  grads.dunits = memory.dunits;
  grads.conv_grads = memory.conv_grads;
  grads.grads = args.grads;
  const bool wanted[kKinds] = {
      args.grads.fc1_weight.data != nullptr, args.grads.fc2_weight.data != nullptr,
      args.grads.fc1_bias.data != nullptr, args.grads.fc2_bias.data != nullptr,
      args.grads.conv_weight.data != nullptr || args.grads.conv_bias.data != nullptr};
  int64_t blocks = 0;
  for (int i = 0; i < kKinds; ++i) {
    const Kind kind = static_cast<Kind>(i);
    const int width = kind == Kind::kConv ? grads.conv_width : grads.mlp_width;
    grads.blocks[i] = wanted[i] ? divide_up(grads.elements(kind), width) : 0;
    blocks += grads.blocks[i];
  }
  if (blocks == 0) return;
  launcher.launch(parameter_grads_kernel<S>, blocks,
                  kThreads * static_cast<int64_t>(sizeof(Acc<S>)), grads);
}

// --------------------------------------------------------------------------------- operators

template <class S, Layout layout, int W>
void backward(const BackwardArgs& args, const Call<S, layout, W, BackwardMemory>& call) {
  const int64_t pixels = call.problem.pixels();
  const auto& memory = call.memory;
  const bool goes_on = args.mlp_grads || args.grad_input != nullptr;
  const bool has_channel_gate = args.parameters.have_channel_gate();
  const bool has_spatial_gate = args.parameters.have_spatial_gate();
  const bool is_given = args.grad_logits != nullptr;  // what reaches the gates
  call.each_chunk([&](const auto& chunk) {
    const Sweeps sweeps(chunk, memory.sweeps, args.input, args.channel_gate);
    const auto* const g = chunk.features(args.grad_output);
    const auto* const sa = chunk.values(args.spatial_gate, pixels);
    if (!has_spatial_gate) {
      sweeps.launch_pixel_grads(nullptr, sa);
    } else if (is_given) {
      sweeps.launch_stats();
    } else {
      sweeps.launch_gate_grads(g, sa, memory.gate_grads, memory.gate_dots);
    }
    if (has_spatial_gate) launch_map_grads(chunk, args, memory, goes_on);
    if (has_channel_gate && goes_on) {
      if (has_spatial_gate || is_given) {
        sweeps.launch_pool();
      } else {
        sweeps.launch_pool_grads(g);
      }
      launch_mlp(chunk, sweeps, args, memory);
    } else if (args.grad_input != nullptr) {
      sweeps.launch_no_channel_grads();
    }
    if (args.grad_input != nullptr) sweeps.launch_input_grad(g, chunk.features(args.grad_input));
  });
  launch_parameter_grads<S>(call.launcher, args, call.plan, memory);
}

template <class S, Layout layout, int W>
void channel_stats_backward(const ChannelStatsBackwardArgs& args,
                            const Call<S, layout, W, SweepMemory>& call) {
  const Problem& p = call.problem;
  call.each_chunk([&](const auto& chunk) {
    const Sweeps sweeps(chunk, call.memory, args.input, args.channel_gate);
    sweeps.launch_stats();
    sweeps.launch_pixel_grads(chunk.values(args.grad_stats, 2 * p.pixels()), nullptr);
    sweeps.launch_pool();
    HiddenGrads<S> sums = sweeps.hidden_grads();
    sums.grad_channel_gate = chunk.values(args.grad_channel_gate, p.c);
    sweeps.launch_hidden_grads(sums);
  });
}

template <class S, Layout layout, int W>
void pool_backward(const PoolBackwardArgs& args, const Call<S, layout, W, SweepMemory>& call) {
  const Problem& p = call.problem;
  call.each_chunk([&](const auto& chunk) {
    const Sweeps sweeps(chunk, call.memory, args.input, args.channel_gate);
    sweeps.launch_stats();
    sweeps.launch_pixel_grads(chunk.values(args.grad_stats, 2 * p.pixels()),
                              chunk.values(args.spatial_gate, p.pixels()));
    sweeps.launch_pool();
    HiddenGrads<S> given = sweeps.hidden_grads();
    given.grad_pooled = chunk.values(args.grad_pooled, 2 * p.c);
    sweeps.launch_hidden_grads(given);
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
