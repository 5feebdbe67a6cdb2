// The MLP of the channel gate: backward, launches 4 and 5, or one where a block takes all channels
// of a sample; as mlp.cuh does forward, which they run once more.
//
//   hidden gradients    reads partial results of the backward   dz = ca (1 - ca) dca; its parts of
//                       pool, W1, W2                            W1 pooled and of W2^T dz
//   channel gradients   reads those parts, W1                   dunits = relu' W2^T dz, W1^T dunits
//   whole gradients     reads partial results, W1, W2           all of that
//
// Where PyTorch runs the MLP, the first launch stops before the weights.
#pragma once

#include "grads.cuh"
#include "mlp.cuh"

namespace cbam::cuda {

constexpr int kMlpGradBlocks = 2;  // on a multiprocessor: their grids are small, their sums many

// What the sweeps of backward leave of a channel.
template <class A>
struct PooledGrads {
  A sum;
  A dot, gate_dot;    // together what reaches the gate
  Argmax<A> highest;  // and its span; which pixel of that, only its own partial result tells
  static __device__ PooledGrads none() { return {0, 0, 0, {lowest<A>(), kNoIndex}}; }
  __device__ void combine(const PooledGrads& other) {
    sum += other.sum;
    dot += other.dot;
    gate_dot += other.gate_dot;
    highest.combine(other.highest);
  }
  __device__ PooledGrads shuffle(int offset) const {
    return {shuffle_xor(sum, offset), shuffle_xor(dot, offset), shuffle_xor(gate_dot, offset),
            highest.shuffle(offset)};
  }
};

template <class S>
struct HiddenGrads {
  using A = Acc<S>;
  MlpShape<S> shape;
  int64_t span_pixels;  // of a span, the last of which may have fewer
  const A* sums;        // [samples, pixel spans, C], as the next three
  const A* maxima;
  const int* argmaxima;  // pixels, counted from the first of their span
  const A* dots;
  const A* gate_grads;  // [samples, gate spans, C] partial sums of sum_p g sa x
  int gate_spans;       // 0, 1 or pixel_spans
  Matrix fc1, fc2;
  const A* channel_gate;          // [samples, C]
  A* pooled;                      // [samples, 2, C] average, maximum
  A* dz;                          // [samples, C] gradient of the gate's logits
  A* parts;                       // [samples, spans, 3, R] of W1 pooled, of W2^T dz
  ChannelGrad<A>* channel_grads;  // [samples, C]
  // Where PyTorch runs the MLP, one of these is there and the parameters are not. Either it is told
  // what reaches the gate, or it has told what reaches the pooled maps.
  A* grad_channel_gate;  // [samples, C]
  const A* grad_pooled;  // [samples, 2, C] average, maximum

  struct Shared {
    alignas(16) A pooled[2][kMaxMlpSpan];
    A dz[kMaxMlpSpan];
    PooledGrads<A> scratch[kThreads];
    Sum<A> column_sums[kColumnSums<S, 1>];
  };
};

// Average, maximum and dz of the block's channels, from the partial results of the backward pool.
template <class S>
__device__ void pool_channel_grads(const HiddenGrads<S>& args, const ChannelSpan<S>& at,
                                   typename HiddenGrads<S>::Shared& shared) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const A gate =
      args.dz != nullptr && thread < at.count ? load(args.channel_gate + at.origin + thread) : A{0};
  const int64_t partials = at.sample * shape.pixel_spans * shape.channels + at.first;
  const int64_t gate_partials = at.sample * args.gate_spans * shape.channels + at.first;
  add_spans<8>(
      at.count, shape.cut.span, shape.pixel_spans, shared.scratch,
      [&](int span, int c) -> PooledGrads<A> {
        const int64_t row = int64_t{span} * shape.channels + c;
        const A gate_dot =
            span < args.gate_spans ? load(args.gate_grads + gate_partials + row) : A{0};
        return {load(args.sums + partials + row),
                load(args.dots + partials + row),
                gate_dot,
                {load(args.maxima + partials + row), span}};
      },
      [&](int c, const PooledGrads<A>& total) {
        const A dgate = total.dot + total.gate_dot;
        if (args.grad_channel_gate != nullptr) {
          store(args.grad_channel_gate + at.origin + c, dgate);
          return;
        }
        ChannelGrad<A>* const grad = args.channel_grads + at.origin + c;
        const int64_t pooled = at.sample * 2 * shape.channels + at.first + c;
        if (args.grad_pooled != nullptr) {
          store(&grad->daverage, load(args.grad_pooled + pooled) * shape.inverse_pixels);
          store(&grad->dmaximum, load(args.grad_pooled + pooled + shape.channels));
        } else {
          shared.pooled[0][c] = total.sum * shape.inverse_pixels;
          shared.pooled[1][c] = total.highest.value;
          shared.dz[c] = gate * (1 - gate) * dgate;
          store(args.pooled + pooled, shared.pooled[0][c]);
          store(args.pooled + pooled + shape.channels, shared.pooled[1][c]);
          store(args.dz + at.origin + c, shared.dz[c]);
        }
        const int64_t span = total.highest.index;
        const int pixel = load(args.argmaxima + partials + span * shape.channels + c);
        store<Use::kAgain, long long>(&grad->argmax, span * args.span_pixels + pixel);
      });
}

template <class S>
__global__ void __launch_bounds__(kThreads, kMlpGradBlocks)
    hidden_grads_kernel(const __grid_constant__ HiddenGrads<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const ChannelSpan<S> at(shape);
  auto& shared = *shared_memory<typename HiddenGrads<S>::Shared>();
  const bool runs_mlp = args.parts != nullptr;
  const Part fc1{0, at.first, shape.hidden, at.count}, fc2{at.first, 0, at.count, shape.hidden};
  if (runs_mlp) {
    prefetch_weights<S>(args.fc1, fc1);
    prefetch_weights<S>(args.fc2, fc2);
  }
  wait_for_previous_launches();
  pool_channel_grads(args, at, shared);
  if (!runs_mlp) return;
  __syncthreads();
  A* const to = args.parts + (at.sample * shape.cut.blocks + at.index) * 3 * shape.hidden;
  multiply_rows<S, 2>(args.fc1, fc1, shared.pooled[0], kMaxMlpSpan, [&](int r, const A(&sums)[2]) {
    store(to + r, sums[0]);
    store(to + shape.hidden + r, sums[1]);
  });
  multiply_columns<S, 1>(
      args.fc2, fc2, shared.dz, 0, shared.column_sums,
      [&](int r, const A(&sums)[1]) { store(to + 2 * int64_t{shape.hidden} + r, sums[0]); });
}

template <class S>
struct ChannelGrads {
  using A = Acc<S>;
  MlpShape<S> shape;
  const A* parts;  // [samples, spans, 3, R] of W1 pooled, of W2^T dz
  ParameterView fc1_bias;
  Matrix fc1;
  A* hidden_units;                // [samples, 2, R] after the ReLU
  A* dunits;                      // [samples, 2, R] gradient of W1 pooled + b1
  ChannelGrad<A>* channel_grads;  // [samples, C]

  struct Shared {
    A dunits[2][kMlpPiece];
    A totals[2][kMaxMlpSpan];
    HiddenParts<A, 3> scratch[kThreads];
    Sum<A> column_sums[kColumnSums<S, 2>];
  };
};

// What goes through hidden unit `unit` of a sample, number r of those that the block has at once,
// from its products: with the average, with the maximum, and W2^T dz.
template <class S>
__device__ void take_unit(const ChannelGrads<S>& args, const ChannelSpan<S>& at, int unit, int r,
                          const Acc<S> (&products)[3], Acc<S> bias,
                          typename ChannelGrads<S>::Shared& shared) {
  using A = Acc<S>;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const A value = relu(products[v] + bias);
    // relu'(0) = 0; a NaN lets the gradient through, as PyTorch's threshold_backward does.
    const A dunit = value <= 0 ? A{0} : products[2];
    shared.dunits[v][r] = dunit;
    if (at.index != 0) continue;  // once for each sample
    const int64_t to = (at.sample * 2 + v) * args.shape.hidden + unit;
    store(args.hidden_units + to, value);
    store(args.dunits + to, dunit);
  }
}

// Adds W1^T dunits of the units that the block has.
template <class S>
__device__ void add_channel_grads(const ChannelGrads<S>& args, const ChannelSpan<S>& at, int first,
                                  int units, typename ChannelGrads<S>::Shared& shared) {
  using A = Acc<S>;
  multiply_columns<S, 2>(args.fc1, {first, at.first, units, at.count}, shared.dunits[0], kMlpPiece,
                         shared.column_sums, [&](int c, const A(&sums)[2]) {
                           shared.totals[0][c] += sums[0];
                           shared.totals[1][c] += sums[1];
                         });
}

template <class S>
__device__ void store_channel_grads(const ChannelGrads<S>& args, const ChannelSpan<S>& at,
                                    const typename ChannelGrads<S>::Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= at.count) return;
  ChannelGrad<Acc<S>>* const grad = args.channel_grads + at.origin + thread;
  store(&grad->daverage, shared.totals[0][thread] * args.shape.inverse_pixels);
  store(&grad->dmaximum, shared.totals[1][thread]);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kMlpGradBlocks)
    channel_grads_kernel(const __grid_constant__ ChannelGrads<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.shape;
  const ChannelSpan<S> at(shape);
  const int thread = static_cast<int>(threadIdx.x);
  auto& shared = *shared_memory<typename ChannelGrads<S>::Shared>();
  if (thread < at.count) shared.totals[0][thread] = shared.totals[1][thread] = 0;
  wait_for_previous_launches();
  for (int first = 0; first < shape.hidden; first += shape.piece) {
    const int units = smaller(shape.piece, shape.hidden - first);
    const A bias = thread < units ? load_bias<S>(args.fc1_bias, first + thread) : A{0};
    add_hidden_parts(shape, args.parts, at.sample, first, units, shared.scratch,
                     [&](int r, const HiddenParts<A, 3>& total) {
                       take_unit(args, at, first + r, r, total.values, bias, shared);
                     });
    __syncthreads();
    add_channel_grads(args, at, first, units, shared);
    __syncthreads();
  }
  store_channel_grads(args, at, shared);
}

// Both in one.
template <class S>
struct WholeGateGrads {
  HiddenGrads<S> hidden;
  ChannelGrads<S> channels;

  struct Shared {
    typename HiddenGrads<S>::Shared hidden;
    typename ChannelGrads<S>::Shared channels;
    Acc<S> products[kMlpPiece][3];
  };
};

template <class S>
__global__ void __launch_bounds__(kThreads, kMlpGradBlocks)
    whole_gate_grads_kernel(const __grid_constant__ WholeGateGrads<S> args) {
  using A = Acc<S>;
  const MlpShape<S>& shape = args.hidden.shape;
  const ChannelSpan<S> at(shape);
  const int thread = static_cast<int>(threadIdx.x);
  auto& shared = *shared_memory<typename WholeGateGrads<S>::Shared>();
  auto& totals = shared.channels.totals;
  prefetch_weights<S>(args.hidden.fc1, {0, 0, shape.hidden, at.count});
  prefetch_weights<S>(args.hidden.fc2, {0, 0, at.count, shape.hidden});
  if (thread < at.count) totals[0][thread] = totals[1][thread] = 0;
  wait_for_previous_launches();
  pool_channel_grads(args.hidden, at, shared.hidden);
  for (int first = 0; first < shape.hidden; first += shape.piece) {
    const int units = smaller(shape.piece, shape.hidden - first);
    const A bias = thread < units ? load_bias<S>(args.channels.fc1_bias, first + thread) : A{0};
    __syncthreads();
    multiply_rows<S, 2>(args.hidden.fc1, {first, 0, units, at.count}, shared.hidden.pooled[0],
                        kMaxMlpSpan, [&](int r, const A(&sums)[2]) {
                          shared.products[r][0] = sums[0];
                          shared.products[r][1] = sums[1];
                        });
    multiply_columns<S, 1>(args.hidden.fc2, {0, first, at.count, units}, shared.hidden.dz, 0,
                           shared.hidden.column_sums,
                           [&](int r, const A(&sums)[1]) { shared.products[r][2] = sums[0]; });
    __syncthreads();
    if (thread < units) {
      take_unit(args.channels, at, first + thread, thread, shared.products[thread], bias,
                shared.channels);
    }
    __syncthreads();
    add_channel_grads(args.channels, at, first, units, shared.channels);
  }
  __syncthreads();
  store_channel_grads(args.channels, at, shared.channels);
}

}  // namespace cbam::cuda
