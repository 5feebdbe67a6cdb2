// Backward, sample by sample:
//
//   gate sums        read x, g      sum_c g u per pixel -> dl; sum_p g sa x per channel
//   transposed conv  small maps     ds0, ds1
//   stats            read x         mean, maximum and argmax of u per pixel (forward kept none of
//                                   them), the pooled maps again, sum_p x ds0 per channel
//   MLP backward     small vectors  dz, the gradients of the pooled maps
//   input gradient   read g, write  dx
//
// Where a norm stands between the phases of forward, the first line is a call of its own
// (apply_backward), and what it found comes in as arguments of the rest.
//
// Included once per instruction set by isa.inl.

template <class A>
inline void add_all_tiles(const Shape& shape, const A* tiles, A* sums) {
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    store(sums + c, add_tiles(shape, tiles, c));
  }
}

// The first sweep over (x, g) of one sample.
template <class S, class Sweeps, class A>
inline void gate_grads(const Shape& shape, bool parallel, const S* x, const S* g, const A* ca,
                       const A* sa, const GateGrads<A>& grads) {
  for_each_unit(parallel, shape.tiles, [&](int64_t t) {
    const Tile tile(shape, t);
    A* per_pixel = grads.dl + tile.begin;
    Sweeps::gate_sums(shape, tile, x, g, ca, sa, per_pixel, grads.tile_sums + t * shape.padded_c);
    each_vector<A>(tile.size(), [&](int64_t i, auto part) {
      const Vec<A> gate = load(sa + tile.begin + i, part);
      store(per_pixel + i, gate * (A{1} - gate) * load(per_pixel + i), part);
    });
  });
  add_all_tiles(shape, grads.tile_sums, grads.dca);
}

template <class S, class Sweeps>
void apply_backward(const ApplyBackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const int64_t scratches = count_scratches(shape, workers);
  const Prepared<Gates<A>> all_gates(scratches, shape);
  const Prepared<GateGrads<A>> all_grads(scratches, shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const Gates<A>& gates = all_gates[worker];
    const GateGrads<A>& grads = all_grads[worker];
    const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
    const S* g = static_cast<const S*>(args.grad_output) + n * shape.c * shape.pixels;
    const A* logits = static_cast<const A*>(args.logits) + n * shape.pixels;
    std::copy_n(static_cast<const A*>(args.channel_gate) + n * shape.c, shape.c, gates.ca);
    for_each_unit(parallel, shape.tiles,
                  [&](int64_t t) { sigmoid_tile(Tile(shape, t), logits, gates.sa); });
    gate_grads<S, Sweeps>(shape, parallel, x, g, gates.ca, gates.sa, grads);
    std::copy_n(gates.sa, shape.pixels, static_cast<A*>(args.spatial_gate) + n * shape.pixels);
    std::copy_n(grads.dl, shape.pixels, static_cast<A*>(args.grad_logits) + n * shape.pixels);
    std::copy_n(grads.dca, shape.c, static_cast<A*>(args.grad_channel_gate) + n * shape.c);
  });
}

template <class A>
struct BackwardScratch {
  BackwardScratch(Arena& arena, const Shape& shape)
      : ca(arena.take<A>(shape.padded_c)),
        gate_grads(arena, shape),
        pools(arena, shape),
        hidden(arena, shape),
        mlp(arena, shape),
        tile_argmax(arena.take<Int<A>>(shape.tiles * shape.padded_c)),
        tile_dots(arena.take<A>(shape.tiles * shape.padded_c)),
        dots(arena.take<A>(shape.padded_c)),
        daverage(arena.take<A>(shape.padded_c)),
        dmaximum(arena.take<A>(shape.padded_c)),
        channel_argmax(arena.take<int64_t>(shape.c)),
        sums(arena.take<A>(shape.pixels)),
        maxima(arena.take<A>(shape.pixels)),
        argmax(arena.take<Int<A>>(shape.pixels)),
        ds{arena.take<A>(shape.pixels), arena.take<A>(shape.pixels)},
        rows{arena.take<A>(shape.h * shape.stride), arena.take<A>(shape.h * shape.stride)},
        dl(arena.take<A>(shape.bordered)),
        stats{arena.take<A>(shape.bordered), arena.take<A>(shape.bordered)} {}
  A* ca;  // [padded C], padding zero
  GateGrads<A> gate_grads;
  Pools<A> pools;
  Hidden<A> hidden;
  MlpGrads<A> mlp;
  Int<A>* tile_argmax;      // [tiles, padded C] pixel of the tile's maximum, counted from its begin
  A* tile_dots;             // [tiles, padded C] sum_p x (gradient of s that reaches x)
  A* dots;                  // [padded C]
  A* daverage;              // [padded C] gradient of the average over pixels, divided by P
  A* dmaximum;              // [padded C] gradient of the maximum over pixels
  int64_t* channel_argmax;  // [C] pixel of the maximum of each channel
  A* sums;                  // [P]
  A* maxima;                // [P]
  Int<A>* argmax;           // [P] channel of the maximum of u
  A* ds[2];                 // [P] gradient of the mean over channels, divided by C; of the maximum
  A* rows[2];               // [H, stride] ds as the transposed convolution leaves it
  A* dl;                    // bordered: gradient of the logits
  A* stats[2];              // bordered: mean and maximum of u
};

// Pixel of each channel's maximum: the first of equals, the first NaN if there is one.
template <class S, class Sweeps, class A>
inline void find_channel_argmax(const Shape& shape, const S* x, const BackwardScratch<A>& s) {
  for (int64_t c = 0; c < shape.c; ++c) {
    if (s.pools.maximum[c] != s.pools.maximum[c]) {
      s.channel_argmax[c] = find_nan_pixel<Sweeps>(shape, x, c);
      continue;
    }
    int64_t t = 0;
    while (t + 1 < shape.tiles &&
           s.pools.tile_maxima[t * shape.padded_c + c] != s.pools.maximum[c]) {
      ++t;
    }
    s.channel_argmax[c] = Sweeps::find_argmax(shape, Tile(shape, t), x, c, s.pools.maximum[c],
                                              s.tile_argmax + t * shape.padded_c);
  }
}

// dx of one element; `maps` as in Sweeps::input_grad. For the pixel of a channel's maximum.
template <class S, class Sweeps, class A>
inline void add_maximum_grad(const Shape& shape, int64_t c, int64_t p, const S* g, const A* ca,
                             const A* sa, const InputGradMaps<A>& maps, A dmaximum, S* dx) {
  const int64_t at = Sweeps::offset(shape, c, p);
  A du = load_scalar(g + at) * sa[p] + maps.ds0[p];
  if (maps.argmax[p] == c) du += maps.ds1[p];
  store_scalar(dx + at, ca[c] * du + maps.davg[c] + dmaximum);
}

// Everything after the first sweep, for one sample. dl and dca are what that sweep found.
template <class S, class Sweeps, class A>
inline void rest_of_sample(const BackwardArgs& args, const Shape& shape, const Weights<A>& weights,
                           bool parallel, int64_t n, const A* dl, const A* dca, const A* sa,
                           const BackwardScratch<A>& s, const MlpGrads<A>& mlp,
                           double* conv_grads) {
  const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
  const S* g = static_cast<const S*>(args.grad_output) + n * shape.c * shape.pixels;
  const A* ca = s.ca;

  copy_to_bordered(shape, 0, shape.pixels, dl, s.dl);
  for_each_unit(parallel, shape.row_units, [&](int64_t unit) {
    const int64_t first = unit * shape.rows_per_unit;
    const int64_t last = std::min(first + shape.rows_per_unit, shape.h);
    convolve_rows<1, 2>(shape, first, last, &s.dl, weights.conv_flipped, s.rows);
    for (int64_t row = first; row < last; ++row) {
      each_vector<A>(shape.w, [&](int64_t i, auto part) {
        const int64_t from = row * shape.stride + i, to = row * shape.w + i;
        store(s.ds[0] + to, load(s.rows[0] + from, part) / static_cast<A>(shape.c), part);
        store(s.ds[1] + to, load(s.rows[1] + from, part), part);
      });
    }
  });

  for_each_unit(parallel, shape.tiles, [&](int64_t t) {
    const Tile tile(shape, t);
    const int64_t at = t * shape.padded_c;
    const PixelStats<A> pixel{s.sums + tile.begin, s.maxima + tile.begin, s.argmax + tile.begin};
    const ChannelStats<A> channel{s.pools.tile_sums + at, s.pools.tile_maxima + at,
                                  s.tile_argmax + at, s.tile_dots + at};
    Sweeps::backward_stats(shape, tile, x, ca, s.ds[0], pixel, channel);
    settle_stats<Sweeps>(shape, tile, x, ca, pixel.sums, pixel.maxima, pixel.argmax);
    // The maximum sends its gradient to one channel of each pixel.
    for (int64_t p = tile.begin; p < tile.end; ++p) {
      const int64_t c = s.argmax[p];
      channel.dots[c] += s.ds[1][p] * load_scalar(x + Sweeps::offset(shape, c, p));
    }
    if (args.conv_grads) {
      copy_to_bordered(shape, tile.begin, tile.end, pixel.sums, s.stats[0]);
      copy_to_bordered(shape, tile.begin, tile.end, pixel.maxima, s.stats[1]);
    }
  });

  if (args.conv_grads) {
    const int64_t k = shape.kernel;
    for_each_unit(parallel, 2 * k, [&](int64_t unit) {
      convolution_weight_grads(shape, unit % k, s.dl, s.stats[unit / k], conv_grads + unit * k);
    });
    double bias = 0;
    for (int64_t p = 0; p < shape.pixels; ++p) bias += dl[p];
    conv_grads[2 * k * k] = bias;
  }
  if (!args.mlp_grads && args.grad_input == nullptr) return;

  settle_pools<Sweeps>(shape, x, s.pools);
  mlp_hidden(shape, weights, s.pools.average, s.pools.maximum, s.hidden);
  add_all_tiles(shape, s.tile_dots, s.dots);
  for (int64_t c = 0; c < shape.c; ++c) {
    mlp.dz[c] = ca[c] * (1 - ca[c]) * (dca[c] + s.dots[c]);
  }
  std::copy_n(s.pools.average, shape.padded_c, mlp.average);
  std::copy_n(s.pools.maximum, shape.padded_c, mlp.maximum);
  mlp_backward(shape, weights, s.hidden, mlp, s.daverage, s.dmaximum);
  if (args.grad_input == nullptr) return;

  for (int64_t c = 0; c < shape.c; ++c) s.daverage[c] /= static_cast<A>(shape.pixels);
  find_channel_argmax<S, Sweeps>(shape, x, s);
  S* dx = static_cast<S*>(args.grad_input) + n * shape.c * shape.pixels;
  const InputGradMaps<A> maps{s.ds[0], s.ds[1], s.argmax, s.daverage};
  for_each_unit(parallel, shape.tiles, [&](int64_t t) {
    const Tile tile(shape, t);
    Sweeps::input_grad(shape, tile, g, ca, sa, maps, dx);
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t p = s.channel_argmax[c];
      if (p < tile.begin || p >= tile.end) continue;
      add_maximum_grad<S, Sweeps>(shape, c, p, g, ca, sa, maps, s.dmaximum[c], dx);
    }
  });
}

// Sums over the batch what the samples contributed to the MLP's weights.
template <class A>
inline void write_mlp_grads(const Shape& shape, bool parallel, const Prepared<MlpGrads<A>>& samples,
                            const Parameters& grads) {
  const Prepared<Weights<A>> memory(1, shape);
  const Weights<A>& sums = memory[0];
  for_each_unit(parallel, shape.hidden, [&](int64_t r) {
    const int64_t row = r * shape.padded_c;
    mlp_weight_grads(shape, samples, r, sums.fc1 + row, sums.fc2 + row);
    double bias = 0;
    for (int64_t n = 0; n < shape.n; ++n) {
      bias += double{samples[n].dhidden_average[r]} + samples[n].dhidden_maximum[r];
    }
    sums.fc1_bias[r] = static_cast<A>(bias);
  });
  for (int64_t c = 0; c < shape.c; ++c) {
    double bias = 0;
    for (int64_t n = 0; n < shape.n; ++n) bias += samples[n].dz[c];
    sums.fc2_bias[c] = static_cast<A>(2 * bias);  // the MLP ran twice
  }
  unpack(sums.fc1, shape.padded_c, grads.fc1_weight);
  unpack(sums.fc1_bias, 0, grads.fc1_bias);
  unpack(sums.fc2, shape.padded_c, transposed(grads.fc2_weight));
  unpack(sums.fc2_bias, 0, grads.fc2_bias);
}

template <class A>
inline void write_conv_grads(const Shape& shape, const std::vector<double>& samples,
                             const Parameters& grads) {
  const int64_t taps = 2 * shape.kernel * shape.kernel;
  std::vector<A> sums(taps + 1);
  for (int64_t i = 0; i <= taps; ++i) {
    double sum = 0;
    for (int64_t n = 0; n < shape.n; ++n) sum += samples[n * (taps + 1) + i];
    sums[i] = static_cast<A>(sum);
  }
  unpack(sums.data(), shape.kernel, grads.conv_weight);
  unpack(sums.data() + taps, 0, grads.conv_bias);
}

template <class S, class Sweeps>
void backward(const BackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  const int64_t workers = count_workers(shape);
  const Prepared<Weights<A>> weights(1, shape);
  weights[0].pack_from(args.parameters, shape);
  const Prepared<BackwardScratch<A>> scratch(count_scratches(shape, workers), shape);
  // What the samples contribute to gradients of parameters is kept and summed in their order.
  const Prepared<MlpGrads<A>> mlp_grads(args.mlp_grads ? shape.n : 0, shape);
  const int64_t conv_size = 2 * shape.kernel * shape.kernel + 1;
  std::vector<double> conv_grads(args.conv_grads ? shape.n * conv_size : 0);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const BackwardScratch<A>& s = scratch[worker];
    const A* sa = static_cast<const A*>(args.spatial_gate) + n * shape.pixels;
    std::copy_n(static_cast<const A*>(args.channel_gate) + n * shape.c, shape.c, s.ca);
    const A* dl = s.gate_grads.dl;
    const A* dca = s.gate_grads.dca;
    if (args.grad_logits == nullptr) {
      const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
      const S* g = static_cast<const S*>(args.grad_output) + n * shape.c * shape.pixels;
      gate_grads<S, Sweeps>(shape, parallel, x, g, s.ca, sa, s.gate_grads);
    } else {
      dl = static_cast<const A*>(args.grad_logits) + n * shape.pixels;
      dca = static_cast<const A*>(args.grad_channel_gate) + n * shape.c;
    }
    rest_of_sample<S, Sweeps>(args, shape, weights[0], parallel, n, dl, dca, sa, s,
                              args.mlp_grads ? mlp_grads[n] : s.mlp,
                              args.conv_grads ? conv_grads.data() + n * conv_size : nullptr);
  });

  if (args.mlp_grads) write_mlp_grads(shape, workers > 1, mlp_grads, args.grads);
  if (args.conv_grads) write_conv_grads<A>(shape, conv_grads, args.grads);
}
