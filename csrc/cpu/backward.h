// Backward, sample by sample:
//
//   gate gradients   read x, g      sum_c g u per pixel -> dl; sum_p g sa x per channel
//   transposed conv  small maps     ds0, ds1
//   stats            read x         mean, maximum and argmax of u per pixel (forward kept none of
//                                   them), the pooled maps again, sum_p x ds0 per channel
//   MLP backward     small vectors  dz, the gradients of the pooled maps
//   input gradient   read g, write  dx
//
// The first three go tile by tile, like forward's last three, so that the second read of x finds it
// in the cache. Where a norm stands between the phases of forward, the first line is a call of its
// own (apply_backward.h), and what it found comes in as arguments of the rest.
//
// For a gate alone one sweep over (x, g) takes the place of the first and the third: a channel gate
// needs the pooled maps and sum_p g x of it, a spatial gate the statistics and sum_c g x.
//
// Where PyTorch runs the layers, two operators do what is around them: channel stats backward is
// the third line, pool backward that and the last. Both sweep over x for the argmax of each pixel,
// which nobody kept.
//
// Included once per instruction set by isa.inl.

// What the sweep over x alone is given of one sample, and finds.
template <class A>
struct SweepMemory {
  SweepMemory(Arena& arena, const Shape& shape)
      : ca(arena.channels<A>(shape)),
        pools(arena, shape),
        tile_argmaxima(arena.channels<Int<A>>(shape, shape.tiles)),
        tile_dots(arena.channels<A>(shape, shape.tiles)),
        tile_shares(arena.channels<A>(shape, shape.tiles)),
        dots(arena.channels<A>(shape)),
        shares(arena.channels<A>(shape)),
        channel_argmaxima(arena.take<int64_t>(shape.c)),
        means(arena.take<A>(shape.pixels)),
        maxima(arena.take<A>(shape.pixels)),
        argmaxima(arena.take<Int<A>>(shape.pixels)),
        ds{arena.take<A>(shape.pixels), arena.take<A>(shape.pixels)} {}
  A* ca;  // [padded C], padding zero
  PoolMemory<A> pools;
  Int<A>* tile_argmaxima;  // [tiles, padded C] pixel of the band's maximum, counted from its begin
  A* tile_dots;            // [tiles, padded C] sum_p x ds0
  A* tile_shares;          // [tiles, padded C] see band_shares
  A* dots;                 // [padded C]
  A* shares;               // [padded C]
  int64_t* channel_argmaxima;  // [C] pixel of the maximum of each channel
  A* means;                    // [P] of u
  A* maxima;                   // [P]
  Int<A>* argmaxima;           // [P] channel of the maximum of u
  A* ds[2];                    // [P] gradient of the mean (divided by C) and of the maximum of u
};

// The sweep over x alone for one band, whose ds are known.
template <class Sweeps, class S, class A>
[[gnu::flatten]] void band_stats(const Shape& shape, int64_t t, const S* x,
                                 const SweepMemory<A>& sweeps) {
  const Tile pixels = Band(shape, t).pixels;
  const int64_t at = t * shape.padded_c;
  const PixelResults<A> pixel{sweeps.means + pixels.begin, sweeps.maxima + pixels.begin,
                              sweeps.argmaxima + pixels.begin};
  const ChannelResults<A> channel{sweeps.pools.tile_sums + at, sweeps.pools.tile_maxima + at,
                                  sweeps.tile_argmaxima + at, sweeps.tile_dots + at};
  Sweeps::backward_stats(shape, pixels, x, sweeps.ca, sweeps.ds[0], pixel, channel);
  settle_stats<Sweeps>(shape, pixels, x, sweeps.ca, pixel.sums, pixel.maxima, pixel.argmaxima);
}

// The maximum of a pixel sends its gradient to one channel: sums of ds1 value(p) over the pixels of
// a band, for the channels where they have their maximum.
template <class A, class Value>
inline void band_shares(const Shape& shape, int64_t t, const SweepMemory<A>& sweeps,
                        Value&& value) {
  const Tile pixels = Band(shape, t).pixels;
  A* shares = sweeps.tile_shares + t * shape.padded_c;
  std::fill_n(shares, shape.c, A{0});
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    shares[sweeps.argmaxima[p]] += sweeps.ds[1][p] * value(p);
  }
}

// The results of all bands, added up.
template <class A>
inline void add_bands(const Shape& shape, const SweepMemory<A>& sweeps) {
  add_all_tiles(shape, sweeps.tile_dots, sweeps.dots);
  add_all_tiles(shape, sweeps.tile_shares, sweeps.shares);
}

template <class A>
struct BackwardMemory {
  BackwardMemory(Arena& arena, const Shape& shape)
      : gate_dots(arena, shape),
        sweeps(arena, shape),
        hidden_units(arena, shape),
        mlp(arena, shape),
        daverage(arena.channels<A>(shape)),
        dmaximum(arena.channels<A>(shape)),
        dlogits(arena, shape),
        maps{{arena, shape}, {arena, shape}} {}
  GateDots<A> gate_dots;
  SweepMemory<A> sweeps;
  HiddenUnits<A> hidden_units;
  MlpGrads<A> mlp;
  A* daverage;          // [padded C] gradient of the average over pixels, divided by P
  A* dmaximum;          // [padded C] gradient of the maximum over pixels
  Bordered<A> dlogits;  // gradient of the logits
  Bordered<A> maps[2];  // mean and maximum of u
};

constexpr int64_t kNoPixel = -1;

// Pixel of each channel's maximum: the first of equals, the first NaN if there is one.
template <class S, class Sweeps, class A>
inline void find_channel_argmaxima(const Shape& shape, const S* x, const SweepMemory<A>& sweeps) {
  std::fill_n(sweeps.channel_argmaxima, shape.c, kNoPixel);
  for (int64_t t = 0; t < shape.tiles; ++t) {
    const Tile pixels = Band(shape, t).pixels;
    const A* maxima = sweeps.pools.tile_maxima + t * shape.padded_c;
    const Int<A>* argmaxima = sweeps.tile_argmaxima + t * shape.padded_c;
    for (int64_t c = 0; c < shape.c; ++c) {
      if (sweeps.channel_argmaxima[c] != kNoPixel || maxima[c] != sweeps.pools.maximum[c]) continue;
      sweeps.channel_argmaxima[c] = Sweeps::find_argmax(shape, pixels, x, c, maxima[c], argmaxima);
    }
  }
  for (int64_t c = 0; c < shape.c; ++c) {
    // No tile has a NaN for its maximum.
    int64_t& argmax = sweeps.channel_argmaxima[c];
    if (argmax == kNoPixel) argmax = find_nan_pixel<Sweeps>(shape, x, c);
  }
}

template <class Sweeps, class S, class A>
[[gnu::flatten]] void tile_input_grad(const Shape& shape, Tile tile, const S* g, const A* ca,
                                      const A* sa, const InputGradMaps<A>& maps, S* dx) {
  Sweeps::input_grad(shape, tile, g, ca, sa, maps, dx);
}

// dx of one element; `maps` as in Sweeps::input_grad. For the pixel of a channel's maximum.
template <class S, class Sweeps, class A>
inline void add_maximum_grad(const Shape& shape, int64_t c, int64_t p, const S* g, const A* ca,
                             const A* sa, const InputGradMaps<A>& maps, A dmaximum, S* dx) {
  const int64_t at = Sweeps::offset(shape, c, p);
  A du = load_scalar(g + at) * sa[p] + maps.ds0[p];
  if (maps.argmaxima[p] == c) du += maps.ds1[p];
  store_scalar(dx + at, ca[c] * du + maps.daverage[c] + dmaximum);
}

// dx of one sample, whose sweep over x is done and settled. `daverage` and `dmaximum`: gradients of
// its pooled maps, the first divided by P and [padded C].
template <class Sweeps, class S, class A>
inline void sample_input_grad(const Sample<S>& sample, const S* g, const A* sa,
                              const SweepMemory<A>& sweeps, const A* daverage, const A* dmaximum,
                              S* dx) {
  const Shape& shape = sample.shape;
  const InputGradMaps<A> maps{sweeps.ds[0], sweeps.ds[1], sweeps.argmaxima, daverage};
  each_tile_backwards(shape, sample.parallel, [&](int64_t t) {
    const Tile tile(shape, t);
    tile_input_grad<Sweeps>(shape, tile, g, sweeps.ca, sa, maps, dx);
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t p = sweeps.channel_argmaxima[c];
      if (p < tile.begin || p >= tile.end) continue;
      add_maximum_grad<S, Sweeps>(shape, c, p, g, sweeps.ca, sa, maps, dmaximum[c], dx);
    }
  });
}

// What the sweeps of one sample read.
template <class S>
struct SampleMaps {
  using A = Acc<S>;
  SampleMaps(const BackwardArgs& args, const Sample<S>& sample)
      : x(sample.features(args.input)),
        g(sample.features(args.grad_output)),
        ca(sample.values(args.channel_gate, sample.shape.c)),
        sa(sample.values(args.spatial_gate, sample.shape.pixels)),
        dca(sample.values(args.grad_channel_gate, sample.shape.c)),
        dlogits(sample.values(args.grad_logits, sample.shape.pixels)) {}
  const S* x;
  const S* g;
  const A* ca;
  const A* sa;
  const A* dca;      // null where this backward computes it, as dlogits
  const A* dlogits;  // both are given or none
};

// ds of the pixels of a band, from the gradients of all logits around it.
template <class A>
inline void transposed_convolution(const Shape& shape, const Band& band, const Weights<A>& weights,
                                   const BackwardMemory<A>& memory) {
  const Bordered<A> dlogits[1] = {memory.dlogits};
  A* const* ds = memory.sweeps.ds;
  convolve_rows<1, 2>(shape, band.first_row, band.last_row, dlogits, weights.conv_flipped,
                      [&](int64_t pixel, auto part, const Vec<A>* sums) {
                        store(ds[0] + pixel, sums[0] / static_cast<A>(shape.c), part);
                        store(ds[1] + pixel, sums[1], part);
                      });
}

// The sweeps up to the sums that reach the MLP, where a spatial gate stands behind a channel gate,
// or a norm behind either.
template <class S, class Sweeps, class A>
inline void sweep_both(const SampleMaps<S>& maps, const Weights<A>& weights, bool conv_grads,
                       const Sample<S>& sample, const BackwardMemory<A>& memory) {
  const Shape& shape = sample.shape;
  const SweepMemory<A>& sweeps = memory.sweeps;
  each_tile_and_band(
      shape, sample.parallel,
      [&](int64_t t) {
        const Tile tile(shape, t);
        if (maps.dlogits != nullptr) {
          return memory.dlogits.fill(shape, tile, maps.dlogits + tile.begin);
        }
        A dlogits[Shape::kMaxTile];
        tile_gate_grads<S, Sweeps>(shape, t, maps.x, maps.g, sweeps.ca, maps.sa, memory.gate_dots,
                                   dlogits);
        memory.dlogits.fill(shape, tile, dlogits);
      },
      [&](int64_t t) {
        const Band band(shape, t);
        transposed_convolution(shape, band, weights, memory);
        band_stats<Sweeps>(shape, t, maps.x, sweeps);
        band_shares(shape, t, sweeps, [&](int64_t p) { return sweeps.maxima[p]; });
        if (conv_grads) {
          memory.maps[0].fill(shape, band.pixels, sweeps.means + band.pixels.begin);
          memory.maps[1].fill(shape, band.pixels, sweeps.maxima + band.pixels.begin);
        }
      });
  if (maps.dlogits == nullptr) {
    add_all_tiles(shape, memory.gate_dots.tiles, memory.gate_dots.sums);
  } else {
    std::copy_n(maps.dca, shape.c, memory.gate_dots.sums);
  }
  add_bands(shape, sweeps);
}

template <class Sweeps, class S, class A>
[[gnu::flatten]] void tile_pixel_grads(const Shape& shape, Tile tile, const SampleMaps<S>& maps,
                                       const SweepMemory<A>& sweeps, A* dlogits) {
  const PixelResults<A> pixel{sweeps.means + tile.begin, sweeps.maxima + tile.begin,
                              sweeps.argmaxima + tile.begin};
  Sweeps::pixel_grads(shape, tile, maps.x, maps.g, dlogits, pixel);
  settle_stats<Sweeps>(shape, tile, maps.x, sweeps.ca, pixel.sums, pixel.maxima, pixel.argmaxima);
  through_sigmoid(tile, maps.sa, dlogits);
}

// The same for a spatial gate alone: nothing goes on to an MLP.
template <class S, class Sweeps, class A>
inline void sweep_pixels(const SampleMaps<S>& maps, const Weights<A>& weights, bool conv_grads,
                         const Sample<S>& sample, const BackwardMemory<A>& memory) {
  const Shape& shape = sample.shape;
  each_tile_and_band(
      shape, sample.parallel,
      [&](int64_t t) {
        const Tile tile(shape, t);
        A dlogits[Shape::kMaxTile];
        tile_pixel_grads<Sweeps>(shape, tile, maps, memory.sweeps, dlogits);
        memory.dlogits.fill(shape, tile, dlogits);
        if (conv_grads) {
          memory.maps[0].fill(shape, tile, memory.sweeps.means + tile.begin);
          memory.maps[1].fill(shape, tile, memory.sweeps.maxima + tile.begin);
        }
      },
      [&](int64_t t) { transposed_convolution(shape, Band(shape, t), weights, memory); });
}

template <class Sweeps, class S, class A>
[[gnu::flatten]] void band_channel_grads(const Shape& shape, int64_t t, const SampleMaps<S>& maps,
                                         const SweepMemory<A>& sweeps) {
  const int64_t at = t * shape.padded_c;
  const ChannelResults<A> channel{sweeps.pools.tile_sums + at, sweeps.pools.tile_maxima + at,
                                  sweeps.tile_argmaxima + at, sweeps.tile_dots + at};
  Sweeps::channel_grads(shape, Band(shape, t).pixels, maps.x, maps.g, channel);
}

// The same for a channel gate alone: nothing comes from pixels.
template <class S, class Sweeps, class A>
inline void sweep_channels(const SampleMaps<S>& maps, const Sample<S>& sample,
                           const BackwardMemory<A>& memory) {
  const Shape& shape = sample.shape;
  const SweepMemory<A>& sweeps = memory.sweeps;
  for (A* ds : sweeps.ds) std::fill_n(ds, shape.pixels, A{0});
  std::fill_n(sweeps.argmaxima, shape.pixels, Int<A>{0});
  for_each_unit(sample.parallel, shape.tiles, [&](int64_t t) {
    if (maps.dca == nullptr) return band_channel_grads<Sweeps>(shape, t, maps, sweeps);
    band_stats<Sweeps>(shape, t, maps.x, sweeps);
  });
  add_all_tiles(shape, sweeps.tile_dots, sweeps.dots);
  std::fill_n(sweeps.shares, shape.c, A{0});
  if (maps.dca == nullptr) {
    std::fill_n(memory.gate_dots.sums, shape.c, A{0});
  } else {
    std::copy_n(maps.dca, shape.c, memory.gate_dots.sums);
  }
}

// From the sums to the gradients of the pooled maps: the MLP.
template <class S, class Sweeps, class A>
inline void sample_mlp_grads(const SampleMaps<S>& maps, const Shape& shape,
                             const Weights<A>& weights, const BackwardMemory<A>& memory,
                             const MlpGrads<A>& mlp) {
  const SweepMemory<A>& sweeps = memory.sweeps;
  const A* ca = sweeps.ca;
  settle_pools<Sweeps>(shape, maps.x, sweeps.pools);
  mlp_hidden_units(shape, weights, sweeps.pools.average, sweeps.pools.maximum, memory.hidden_units);
  for (int64_t c = 0; c < shape.c; ++c) {
    // The shares have u where the others have x: a factor of ca already.
    mlp.dz[c] =
        (1 - ca[c]) * (ca[c] * (memory.gate_dots.sums[c] + sweeps.dots[c]) + sweeps.shares[c]);
  }
  std::copy_n(sweeps.pools.average, shape.padded_c, mlp.average);
  std::copy_n(sweeps.pools.maximum, shape.padded_c, mlp.maximum);
  mlp_backward(shape, weights, memory.hidden_units, mlp, memory.daverage, memory.dmaximum);
}

// `mlp` is where the gradients of the sample's MLP are kept; `conv_grads` those of the convolution,
// [2, k, k] and the bias, or null.
template <class S, class Sweeps, class A>
inline void backward_sample(const BackwardArgs& args, const Weights<A>& weights,
                            const Sample<S>& sample, const BackwardMemory<A>& memory,
                            const MlpGrads<A>& mlp, double* conv_grads) {
  const Shape& shape = sample.shape;
  const bool has_channel_gate = args.parameters.have_channel_gate();
  const SweepMemory<A>& sweeps = memory.sweeps;
  const SampleMaps<S> maps(args, sample);
  std::copy_n(maps.ca, shape.c, sweeps.ca);

  if (!args.parameters.have_spatial_gate()) {
    sweep_channels<S, Sweeps>(maps, sample, memory);
  } else if (has_channel_gate || maps.dlogits != nullptr) {
    sweep_both<S, Sweeps>(maps, weights, args.conv_grads, sample, memory);
  } else {
    sweep_pixels<S, Sweeps>(maps, weights, args.conv_grads, sample, memory);
  }
  if (args.conv_grads) {
    for_each_unit(sample.parallel, count_weight_grad_units(shape), [&](int64_t unit) {
      convolution_weight_grads(shape, unit, memory.dlogits, memory.maps, conv_grads);
    });
    if (args.grads.conv_bias.data != nullptr) {
      conv_grads[2 * shape.kernel * shape.kernel] = sum_of_pixels(shape, memory.dlogits);
    }
  }
  if (!args.mlp_grads && args.grad_input == nullptr) return;

  if (has_channel_gate) {
    sample_mlp_grads<S, Sweeps>(maps, shape, weights, memory, mlp);
  } else {
    std::fill_n(memory.daverage, shape.c, A{0});
  }
  if (args.grad_input == nullptr) return;

  if (has_channel_gate) {
    find_channel_argmaxima<S, Sweeps>(shape, maps.x, sweeps);
    for (int64_t c = 0; c < shape.c; ++c) memory.daverage[c] /= static_cast<A>(shape.pixels);
  } else {
    std::fill_n(sweeps.channel_argmaxima, shape.c, kNoPixel);
  }
  sample_input_grad<Sweeps>(sample, maps.g, maps.sa, sweeps, memory.daverage, memory.dmaximum,
                            sample.features(args.grad_input));
}

template <class S, class Sweeps>
void backward(const BackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  const Prepared<Weights<A>> all_weights(1, shape);
  const Weights<A>& weights = all_weights[0];
  weights.pack_from(args.parameters, shape);
  // What the samples contribute to gradients of parameters is kept and summed in their order.
  const Prepared<MlpGrads<A>> mlp_grads(args.mlp_grads ? shape.n : 0, shape);
  const int64_t conv_size = 2 * shape.kernel * shape.kernel + 1;
  std::vector<double> conv_grads(args.conv_grads ? shape.n * conv_size : 0);

  using Memory = BackwardMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& memory) {
    backward_sample<S, Sweeps>(
        args, weights, sample, memory, args.mlp_grads ? mlp_grads[sample.n] : memory.mlp,
        args.conv_grads ? sample.part(conv_grads.data(), conv_size) : nullptr);
  });

  const bool parallel = count_workers(shape) > 1;
  if (args.mlp_grads) write_mlp_grads(shape, parallel, mlp_grads, args.grads);
  if (args.conv_grads) write_conv_grads<A>(shape, conv_grads, args.grads);
}

// -------------------------------------------------------------------------- parts of backward

// The sweep over x of one sample for the gradients of its statistics, which are given: [2, P], the
// first not yet divided by C. `after` is called with each band.
template <class Sweeps, class S, class A, class After>
inline void given_stats_grads(const Sample<S>& sample, const S* x, const A* channel_gate,
                              const A* grad_stats, const SweepMemory<A>& sweeps, After&& after) {
  const Shape& shape = sample.shape;
  std::copy_n(channel_gate, shape.c, sweeps.ca);
  for_each_unit(sample.parallel, shape.tiles, [&](int64_t t) {
    const Tile pixels = Band(shape, t).pixels;
    for (int64_t p = pixels.begin; p < pixels.end; ++p) {
      sweeps.ds[0][p] = grad_stats[p] / static_cast<A>(shape.c);
      sweeps.ds[1][p] = grad_stats[shape.pixels + p];
    }
    band_stats<Sweeps>(shape, t, x, sweeps);
    after(t);
  });
}

template <class S, class Sweeps>
void channel_stats_backward(const ChannelStatsBackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  using Memory = SweepMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& sweeps) {
    const S* x = sample.features(args.input);
    const A* channel_gate = sample.values(args.channel_gate, shape.c);
    const A* grad_stats = sample.values(args.grad_stats, 2 * shape.pixels);
    given_stats_grads<Sweeps>(sample, x, channel_gate, grad_stats, sweeps, [&](int64_t t) {
      // x itself, not the maximum divided by the gate, which may be zero.
      band_shares(shape, t, sweeps, [&](int64_t p) {
        return load_scalar(x + Sweeps::offset(shape, sweeps.argmaxima[p], p));
      });
    });
    add_bands(shape, sweeps);
    A* grad_channel_gate = sample.values(args.grad_channel_gate, shape.c);
    for (int64_t c = 0; c < shape.c; ++c) {
      grad_channel_gate[c] = sweeps.dots[c] + sweeps.shares[c];
    }
  });
}

template <class A>
struct PoolBackwardMemory {
  PoolBackwardMemory(Arena& arena, const Shape& shape)
      : sweeps(arena, shape), daverage(arena.channels<A>(shape)) {}
  SweepMemory<A> sweeps;
  A* daverage;  // [padded C] gradient of the average over pixels, divided by P
};

template <class S, class Sweeps>
void pool_backward(const PoolBackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  using Memory = PoolBackwardMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& memory) {
    const SweepMemory<A>& sweeps = memory.sweeps;
    const S* x = sample.features(args.input);
    const A* channel_gate = sample.values(args.channel_gate, shape.c);
    const A* grad_stats = sample.values(args.grad_stats, 2 * shape.pixels);
    given_stats_grads<Sweeps>(sample, x, channel_gate, grad_stats, sweeps, [](int64_t) {});
    settle_pools<Sweeps>(shape, x, sweeps.pools);

    const A* dpooled = sample.values(args.grad_pooled, 2 * shape.c);
    for (int64_t c = 0; c < shape.c; ++c) {
      memory.daverage[c] = dpooled[c] / static_cast<A>(shape.pixels);
    }
    find_channel_argmaxima<S, Sweeps>(shape, x, sweeps);
    sample_input_grad<Sweeps>(sample, sample.features(args.grad_output),
                              sample.values(args.spatial_gate, shape.pixels), sweeps,
                              memory.daverage, dpooled + shape.c, sample.features(args.grad_input));
  });
}
