// Forward, sample by sample, so that the second and third read of a sample find it in the cache:
//
//   pool           read x         avg, max per channel -> MLP -> channel gate
//   channel stats  read x         mean and maximum of u = ca x per pixel, into bordered maps
//   convolution    small maps     logits of the spatial gate, and the gate
//   apply          read x, write  y = sa u
//
// The last three go tile by tile: as soon as the statistics of a tile and of the rows around it are
// there, its gate is computed and applied, before its pixels leave the cache (Band in sample.h).
//
// Included once per instruction set by isa.inl.

// The pooled maps of one sample: [tiles, padded C] partial results, then [padded C].
template <class A>
struct Pools {
  Pools(Arena& arena, const Shape& shape)
      : tile_sums(arena.channels<A>(shape, shape.tiles)),
        tile_maxima(arena.channels<A>(shape, shape.tiles)),
        average(arena.channels<A>(shape)),
        maximum(arena.channels<A>(shape)) {}
  A* tile_sums;
  A* tile_maxima;
  A* average;
  A* maximum;
};

// Channel c has a NaN exactly if its sum is NaN and a look at its pixels finds one (the sum of
// opposite infinities is NaN too). Returns that pixel, or -1.
template <class Sweeps, class S>
inline int64_t find_nan_pixel(const Shape& shape, const S* x, int64_t c) {
  for (int64_t p = 0; p < shape.pixels; ++p) {
    const Acc<S> value = load_scalar(x + Sweeps::offset(shape, c, p));
    if (value != value) return p;
  }
  return -1;
}

// Adds up the tiles of one array for a vector of channels, in order. Blocks of tiles bound the
// rounding error of big planes.
template <class A>
inline Vec<A> add_tiles(const Shape& shape, const A* tiles, int64_t c) {
  constexpr int64_t kBlock = 64;
  Vec<A> sum = Vec<A>{};
  for (int64_t begin = 0; begin < shape.tiles; begin += kBlock) {
    Vec<A> block = Vec<A>{};
    for (int64_t t = begin; t < std::min(begin + kBlock, shape.tiles); ++t) {
      block += load(tiles + t * shape.padded_c + c);
    }
    sum += block;
  }
  return sum;
}

// From tiles to the sample. The sweeps' maxima ignore NaN; here NaN wins.
template <class Sweeps, class S, class A>
inline void settle_pools(const Shape& shape, const S* x, const Pools<A>& pools) {
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    Vec<A> maximum = broadcast(-kInfinity<A>);
    for (int64_t t = 0; t < shape.tiles; ++t) {
      maximum = max(load(pools.tile_maxima + t * shape.padded_c + c), maximum);
    }
    const Vec<A> average = add_tiles(shape, pools.tile_sums, c) / static_cast<A>(shape.pixels);
    store(pools.average + c, average);
    store(pools.maximum + c, maximum);
    if (any<A>(average != average)) {
      for (int64_t i = c; i < std::min(c + kLanes<A>, shape.c); ++i) {
        if (pools.average[i] != pools.average[i] && find_nan_pixel<Sweeps>(shape, x, i) >= 0) {
          pools.maximum[i] = kNaN<A>;
        }
      }
    }
  }
  // The padding meets weights of zero, so it must be finite.
  std::fill(pools.average + shape.c, pools.average + shape.padded_c, A{0});
  std::fill(pools.maximum + shape.c, pools.maximum + shape.padded_c, A{0});
}

// The pooled maps of one sample.
template <class Sweeps, class S, class A>
inline void pool_sample(const Shape& shape, bool parallel, const S* x, const Pools<A>& pools) {
  each_tile_backwards(shape, parallel, [&](int64_t t) {
    const int64_t at = t * shape.padded_c;
    Sweeps::pool(shape, Tile(shape, t), x, pools.tile_sums + at, pools.tile_maxima + at);
  });
  settle_pools<Sweeps>(shape, x, pools);
}

// Turns sums over the channels into means; where a pixel has a NaN, it wins the maximum, and its
// channel the argmax (where one is asked for).
template <class Sweeps, class S, class A>
inline void settle_stats(const Shape& shape, Tile tile, const S* x, const A* ca, A* sums, A* maxima,
                         Int<A>* argmax) {
  IntVec<A> undefined = {};
  each_vector<A>(tile.size(), [&](int64_t i, auto part) {
    const Vec<A> mean = load(sums + i) / static_cast<A>(shape.c);
    const Vec<A> present = fill_absent(mean, part, A{0});
    undefined |= present != present;
    store(sums + i, mean);
  });
  if (!any<A>(undefined)) return;
  for (int64_t i = 0; i < tile.size(); ++i) {
    if (sums[i] == sums[i]) continue;
    for (int64_t c = 0; c < shape.c; ++c) {
      const A u = ca[c] * load_scalar(x + Sweeps::offset(shape, c, tile.begin + i));
      if (u != u) {
        maxima[i] = kNaN<A>;
        if (argmax != nullptr) argmax[i] = static_cast<Int<A>>(c);
        break;
      }
    }
  }
}

// Calls keep(means, maxima) with the statistics of the pixels of one tile.
template <class Sweeps, class S, class A, class Keep>
inline void tile_stats(const Shape& shape, Tile tile, const S* x, const A* ca, Keep&& keep) {
  A sums[Shape::kMaxTile], maxima[Shape::kMaxTile];
  Sweeps::channel_stats(shape, tile, x, ca, sums, maxima);
  settle_stats<Sweeps>(shape, tile, x, ca, sums, maxima, static_cast<Int<A>*>(nullptr));
  keep(sums, maxima);
}

template <class A>
struct ForwardScratch {
  ForwardScratch(Arena& arena, const Shape& shape)
      : pools(arena, shape),
        hidden(arena, shape),
        ca(arena.channels<A>(shape)),
        stats{{arena, shape}, {arena, shape}},
        sa(arena.take<A>(shape.pixels)) {}
  Pools<A> pools;
  Hidden<A> hidden;
  A* ca;                 // [padded C]
  Bordered<A> stats[2];  // mean, maximum
  A* sa;                 // [P]
};

template <class S, class Sweeps>
void forward(const ForwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const Prepared<Weights<A>> weights(1, shape);
  weights[0].pack_from(args.parameters, shape);
  const Prepared<ForwardScratch<A>> scratch(count_scratches(shape, workers), shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const ForwardScratch<A>& s = scratch[worker];
    const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
    S* y = static_cast<S*>(args.output) + (args.output == nullptr ? 0 : n * shape.c * shape.pixels);

    pool_sample<Sweeps>(shape, parallel, x, s.pools);
    mlp_hidden(shape, weights[0], s.pools.average, s.pools.maximum, s.hidden);
    mlp_gate(shape, weights[0], s.hidden, s.ca);
    if (args.channel_gate != nullptr) {
      std::copy_n(s.ca, shape.c, static_cast<A*>(args.channel_gate) + n * shape.c);
    }

    A* logits = args.logits == nullptr ? nullptr : static_cast<A*>(args.logits) + n * shape.pixels;
    const bool gate_wanted = args.spatial_gate != nullptr || args.output != nullptr;
    A* sa =
        args.spatial_gate == nullptr ? s.sa : static_cast<A*>(args.spatial_gate) + n * shape.pixels;
    const A bias = weights[0].conv_bias[0];
    each_tile_and_band(
        shape, parallel,
        [&](int64_t t) {
          const Tile tile(shape, t);
          tile_stats<Sweeps>(shape, tile, x, s.ca, [&](const A* means, const A* maxima) {
            s.stats[0].fill(shape, tile, means);
            s.stats[1].fill(shape, tile, maxima);
          });
        },
        [&](int64_t t) {
          const Band band(shape, t);
          convolve_rows<2, 1>(shape, band.first_row, band.last_row, s.stats, weights[0].conv,
                              [&](int64_t pixel, auto part, const Vec<A>* sums) {
                                const Vec<A> logit = sums[0] + bias;
                                if (logits != nullptr) store(logits + pixel, logit, part);
                                if (gate_wanted) store(sa + pixel, sigmoid(logit), part);
                              });
          if (args.output != nullptr) Sweeps::apply(shape, band.pixels, x, s.ca, sa, y);
        });
  });
}

// The second phase alone: the logits come from outside.
template <class S, class Sweeps>
void apply(const ApplyArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const Prepared<Gates<A>> scratch(count_scratches(shape, workers), shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const Gates<A>& s = scratch[worker];
    const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
    S* y = static_cast<S*>(args.output) + n * shape.c * shape.pixels;
    const A* logits = static_cast<const A*>(args.logits) + n * shape.pixels;
    std::copy_n(static_cast<const A*>(args.channel_gate) + n * shape.c, shape.c, s.ca);
    for_each_unit(parallel, shape.tiles, [&](int64_t t) {
      const Tile tile(shape, t);
      sigmoid_tile(tile, logits, s.sa);
      Sweeps::apply(shape, tile, x, s.ca, s.sa, y);
    });
  });
}
