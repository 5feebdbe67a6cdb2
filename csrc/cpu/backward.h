// Backward, sample by sample:
//
//   gate sums        read x, g      sum_c g u per pixel -> dl; sum_p g sa x per channel
//   transposed conv  small maps     ds0, ds1
//   stats            read x         mean, maximum and argmax of u per pixel (forward kept none of
//                                   them), the pooled maps again, sum_p x ds0 per channel
//   MLP backward     small vectors  dz, the gradients of the pooled maps
//   input gradient   read g, write  dx
//
// The first three go tile by tile, like forward's last three, so that the second read of x finds it
// in the cache. Where a norm stands between the phases of forward, the first line is a call of its
// own (apply_backward), and what it found comes in as arguments of the rest.
//
// Included once per instruction set by isa.inl.

template <class A>
inline void add_all_tiles(const Shape& shape, const A* tiles, A* sums) {
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    store(sums + c, add_tiles(shape, tiles, c));
  }
}

// The first sweep over (x, g), for one tile: dl of its pixels.
template <class S, class Sweeps, class A>
inline void gate_grads(const Shape& shape, int64_t t, const S* x, const S* g, const A* ca,
                       const A* sa, const GateGrads<A>& grads, A* dl) {
  const Tile tile(shape, t);
  Sweeps::gate_sums(shape, tile, x, g, ca, sa, dl, grads.tile_sums + t * shape.padded_c);
  each_vector<A>(tile.size(), [&](int64_t i, auto part) {
    const Vec<A> gate = load(sa + tile.begin + i, part);
    store(dl + i, gate * (A{1} - gate) * load(dl + i, part), part);
  });
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
    for_each_unit(parallel, shape.tiles, [&](int64_t t) {
      const Tile tile(shape, t);
      A dl[Shape::kMaxTile];
      sigmoid_tile(tile, logits, gates.sa);
      gate_grads<S, Sweeps>(shape, t, x, g, gates.ca, gates.sa, grads, dl);
      std::copy_n(dl, tile.size(),
                  static_cast<A*>(args.grad_logits) + n * shape.pixels + tile.begin);
    });
    add_all_tiles(shape, grads.tile_sums, grads.dca);
    std::copy_n(gates.sa, shape.pixels, static_cast<A*>(args.spatial_gate) + n * shape.pixels);
    std::copy_n(grads.dca, shape.c, static_cast<A*>(args.grad_channel_gate) + n * shape.c);
  });
}

// What the sweep over x alone is given of one sample, and finds.
template <class A>
struct StatsScratch {
  StatsScratch(Arena& arena, const Shape& shape)
      : ca(arena.channels<A>(shape)),
        pools(arena, shape),
        tile_argmax(arena.channels<Int<A>>(shape, shape.tiles)),
        tile_dots(arena.channels<A>(shape, shape.tiles)),
        tile_shares(arena.channels<A>(shape, shape.tiles)),
        dots(arena.channels<A>(shape)),
        shares(arena.channels<A>(shape)),
        channel_argmax(arena.take<int64_t>(shape.c)),
        means(arena.take<A>(shape.pixels)),
        maxima(arena.take<A>(shape.pixels)),
        argmax(arena.take<Int<A>>(shape.pixels)),
        ds{arena.take<A>(shape.pixels), arena.take<A>(shape.pixels)} {}
  A* ca;  // [padded C], padding zero
  Pools<A> pools;
  Int<A>* tile_argmax;      // [tiles, padded C] pixel of the band's maximum, counted from its begin
  A* tile_dots;             // [tiles, padded C] sum_p x ds0
  A* tile_shares;           // [tiles, padded C] see band_shares
  A* dots;                  // [padded C]
  A* shares;                // [padded C]
  int64_t* channel_argmax;  // [C] pixel of the maximum of each channel
  A* means;                 // [P] of u
  A* maxima;                // [P]
  Int<A>* argmax;           // [P] channel of the maximum of u
  A* ds[2];                 // [P] gradient of the mean over channels, divided by C; of the maximum
};

// The sweep over x alone for one band, whose ds are known.
template <class Sweeps, class S, class A>
inline void band_stats(const Shape& shape, int64_t t, const S* x, const StatsScratch<A>& s) {
  const Tile pixels = Band(shape, t).pixels;
  const int64_t at = t * shape.padded_c;
  const PixelStats<A> pixel{s.means + pixels.begin, s.maxima + pixels.begin,
                            s.argmax + pixels.begin};
  const ChannelStats<A> channel{s.pools.tile_sums + at, s.pools.tile_maxima + at,
                                s.tile_argmax + at, s.tile_dots + at};
  Sweeps::backward_stats(shape, pixels, x, s.ca, s.ds[0], pixel, channel);
  settle_stats<Sweeps>(shape, pixels, x, s.ca, pixel.sums, pixel.maxima, pixel.argmax);
}

// The maximum of a pixel sends its gradient to one channel: sums of ds1 value(p) over the pixels of
// a band, for the channels where they have their maximum.
template <class A, class Value>
inline void band_shares(const Shape& shape, int64_t t, const StatsScratch<A>& s, Value&& value) {
  const Tile pixels = Band(shape, t).pixels;
  A* shares = s.tile_shares + t * shape.padded_c;
  std::fill_n(shares, shape.c, A{0});
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    shares[s.argmax[p]] += s.ds[1][p] * value(p);
  }
}

// The results of all bands, added up.
template <class A>
inline void add_bands(const Shape& shape, const StatsScratch<A>& s) {
  add_all_tiles(shape, s.tile_dots, s.dots);
  add_all_tiles(shape, s.tile_shares, s.shares);
}

template <class A>
struct BackwardScratch {
  BackwardScratch(Arena& arena, const Shape& shape)
      : gate_grads(arena, shape),
        stats(arena, shape),
        hidden(arena, shape),
        mlp(arena, shape),
        daverage(arena.channels<A>(shape)),
        dmaximum(arena.channels<A>(shape)),
        dl(arena, shape),
        maps{{arena, shape}, {arena, shape}} {}
  GateGrads<A> gate_grads;
  StatsScratch<A> stats;
  Hidden<A> hidden;
  MlpGrads<A> mlp;
  A* daverage;          // [padded C] gradient of the average over pixels, divided by P
  A* dmaximum;          // [padded C] gradient of the maximum over pixels
  Bordered<A> dl;       // gradient of the logits
  Bordered<A> maps[2];  // mean and maximum of u
};

// Pixel of each channel's maximum: the first of equals, the first NaN if there is one.
template <class S, class Sweeps, class A>
inline void find_channel_argmax(const Shape& shape, const S* x, const StatsScratch<A>& s) {
  constexpr int64_t kNotYet = -1;
  std::fill_n(s.channel_argmax, shape.c, kNotYet);
  for (int64_t t = 0; t < shape.tiles; ++t) {
    const Tile pixels = Band(shape, t).pixels;
    const A* maxima = s.pools.tile_maxima + t * shape.padded_c;
    const Int<A>* argmax = s.tile_argmax + t * shape.padded_c;
    for (int64_t c = 0; c < shape.c; ++c) {
      if (s.channel_argmax[c] != kNotYet || maxima[c] != s.pools.maximum[c]) continue;
      s.channel_argmax[c] = Sweeps::find_argmax(shape, pixels, x, c, maxima[c], argmax);
    }
  }
  for (int64_t c = 0; c < shape.c; ++c) {
    // No tile has a NaN for its maximum.
    if (s.channel_argmax[c] == kNotYet) s.channel_argmax[c] = find_nan_pixel<Sweeps>(shape, x, c);
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

// dx of one sample, whose sweep over x is done and settled. `daverage` and `dmaximum`: gradients of
// its pooled maps, the first divided by P and [padded C].
template <class S, class Sweeps, class A>
inline void sample_input_grad(const Shape& shape, bool parallel, const S* x, const S* g,
                              const A* sa, const StatsScratch<A>& s, const A* daverage,
                              const A* dmaximum, S* dx) {
  find_channel_argmax<S, Sweeps>(shape, x, s);
  const InputGradMaps<A> maps{s.ds[0], s.ds[1], s.argmax, daverage};
  each_tile_backwards(shape, parallel, [&](int64_t t) {
    const Tile tile(shape, t);
    Sweeps::input_grad(shape, tile, g, s.ca, sa, maps, dx);
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t p = s.channel_argmax[c];
      if (p < tile.begin || p >= tile.end) continue;
      add_maximum_grad<S, Sweeps>(shape, c, p, g, s.ca, sa, maps, dmaximum[c], dx);
    }
  });
}

// One sample. `mlp` is where its MLP's gradients are kept; `conv_grads` those of the convolution,
// [2, k, k] and the bias, or null.
template <class S, class Sweeps, class A>
inline void backward_sample(const BackwardArgs& args, const Shape& shape, const Weights<A>& weights,
                            bool parallel, int64_t n, const BackwardScratch<A>& scratch,
                            const MlpGrads<A>& mlp, double* conv_grads) {
  const StatsScratch<A>& s = scratch.stats;
  const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
  const S* g = static_cast<const S*>(args.grad_output) + n * shape.c * shape.pixels;
  const A* sa = static_cast<const A*>(args.spatial_gate) + n * shape.pixels;
  const A* ca = s.ca;
  std::copy_n(static_cast<const A*>(args.channel_gate) + n * shape.c, shape.c, s.ca);

  each_tile_and_band(
      shape, parallel,
      [&](int64_t t) {
        const Tile tile(shape, t);
        if (args.grad_logits != nullptr) {
          const A* given = static_cast<const A*>(args.grad_logits) + n * shape.pixels;
          return scratch.dl.fill(shape, tile, given + tile.begin);
        }
        A dl[Shape::kMaxTile];
        gate_grads<S, Sweeps>(shape, t, x, g, ca, sa, scratch.gate_grads, dl);
        scratch.dl.fill(shape, tile, dl);
      },
      [&](int64_t t) {
        const Band band(shape, t);
        const Bordered<A> dl[1] = {scratch.dl};
        convolve_rows<1, 2>(shape, band.first_row, band.last_row, dl, weights.conv_flipped,
                            [&](int64_t pixel, auto part, const Vec<A>* sums) {
                              store(s.ds[0] + pixel, sums[0] / static_cast<A>(shape.c), part);
                              store(s.ds[1] + pixel, sums[1], part);
                            });
        band_stats<Sweeps>(shape, t, x, s);
        band_shares(shape, t, s, [&](int64_t p) { return s.maxima[p]; });
        if (args.conv_grads) {
          scratch.maps[0].fill(shape, band.pixels, s.means + band.pixels.begin);
          scratch.maps[1].fill(shape, band.pixels, s.maxima + band.pixels.begin);
        }
      });

  if (args.conv_grads) {
    for_each_unit(parallel, count_weight_grad_units(shape), [&](int64_t unit) {
      convolution_weight_grads(shape, unit, scratch.dl, scratch.maps, conv_grads);
    });
    if (args.grads.conv_bias.data != nullptr) {
      conv_grads[2 * shape.kernel * shape.kernel] = sum_of_pixels(shape, scratch.dl);
    }
  }
  if (!args.mlp_grads && args.grad_input == nullptr) return;

  settle_pools<Sweeps>(shape, x, s.pools);
  mlp_hidden(shape, weights, s.pools.average, s.pools.maximum, scratch.hidden);
  const A* dca = scratch.gate_grads.dca;
  if (args.grad_logits == nullptr) {
    add_all_tiles(shape, scratch.gate_grads.tile_sums, scratch.gate_grads.dca);
  } else {
    dca = static_cast<const A*>(args.grad_channel_gate) + n * shape.c;
  }
  add_bands(shape, s);
  for (int64_t c = 0; c < shape.c; ++c) {
    // The shares have u where the others have x: a factor of ca already.
    mlp.dz[c] = (1 - ca[c]) * (ca[c] * (dca[c] + s.dots[c]) + s.shares[c]);
  }
  std::copy_n(s.pools.average, shape.padded_c, mlp.average);
  std::copy_n(s.pools.maximum, shape.padded_c, mlp.maximum);
  mlp_backward(shape, weights, scratch.hidden, mlp, scratch.daverage, scratch.dmaximum);
  if (args.grad_input == nullptr) return;

  for (int64_t c = 0; c < shape.c; ++c) scratch.daverage[c] /= static_cast<A>(shape.pixels);
  S* dx = static_cast<S*>(args.grad_input) + n * shape.c * shape.pixels;
  sample_input_grad<S, Sweeps>(shape, parallel, x, g, sa, s, scratch.daverage, scratch.dmaximum,
                               dx);
}

// Sums over the batch what the samples contributed to the MLP's weights.
template <class A>
inline void write_mlp_grads(const Shape& shape, bool parallel, const Prepared<MlpGrads<A>>& samples,
                            const Parameters& grads) {
  const Prepared<Weights<A>> memory(1, shape);
  const Weights<A>& sums = memory[0];
  constexpr int kRows = 4;
  for_each_unit(parallel, Shape::divide_up(shape.hidden, kRows), [&](int64_t unit) {
    const int64_t first = unit * kRows, last = std::min(first + kRows, shape.hidden);
    if (last - first == kRows) {
      mlp_weight_grads<kRows>(shape, samples, first, sums);
    } else {
      for (int64_t r = first; r < last; ++r) mlp_weight_grads<1>(shape, samples, r, sums);
    }
    for (int64_t r = first; r < last; ++r) {
      double bias = 0;
      for (int64_t n = 0; n < shape.n; ++n) {
        bias += double{samples[n].dhidden_average[r]} + samples[n].dhidden_maximum[r];
      }
      sums.fc1_bias[r] = static_cast<A>(bias);
    }
  });
  for (int64_t c = 0; c < shape.c; ++c) {
    double bias = 0;
    for (int64_t n = 0; n < shape.n; ++n) bias += samples[n].dz[c];
    sums.fc2_bias[c] = static_cast<A>(2 * bias);  // the MLP ran twice
  }
  unpack(sums.fc1, shape.padded_c, grads.fc1_weight);
  unpack(sums.fc1_bias, 0, grads.fc1_bias);
  const ParameterView& fc2 = grads.fc2_weight;
  if (fc2.data != nullptr && has_plain_rows<A>(fc2)) {
    transpose(shape.hidden, shape.c, sums.fc2, shape.padded_c, static_cast<A*>(fc2.data),
              shape.hidden);
  } else {
    unpack(sums.fc2, shape.padded_c, transposed(fc2));
  }
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
    backward_sample<S, Sweeps>(args, shape, weights[0], parallel, n, s,
                               args.mlp_grads ? mlp_grads[n] : s.mlp,
                               args.conv_grads ? conv_grads.data() + n * conv_size : nullptr);
  });

  if (args.mlp_grads) write_mlp_grads(shape, workers > 1, mlp_grads, args.grads);
  if (args.conv_grads) write_conv_grads<A>(shape, conv_grads, args.grads);
}
