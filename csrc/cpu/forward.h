// Forward, sample by sample, so that the second and third read of a sample find it in the cache:
//
//   pool           read x         avg, max per channel -> MLP -> channel gate
//   channel stats  read x         mean and maximum of u = ca x per pixel, into bordered maps
//   convolution    small maps     logits of the spatial gate, and the gate
//   apply          read x, write  y = sa u
//
// The last three go tile by tile: as soon as the statistics of a tile and of the rows around it are
// there, its gate is computed and applied, before its pixels leave the cache (Band in tiles.h).
//
// A gate that is not there is one everywhere, and what leads to it is left out: without the channel
// gate the first line, without the spatial gate the two after it.
//
// Where PyTorch runs the layers, three operators do what is around them: pool and channel stats are
// the first two lines, apply the last one behind a sigmoid.
//
// Included once per instruction set by isa.inl.

// The pooled maps of one sample: [tiles, padded C] partial results, then [padded C].
template <class A>
struct PoolMemory {
  PoolMemory(Arena& arena, const Shape& shape)
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
inline void settle_pools(const Shape& shape, const S* x, const PoolMemory<A>& pools) {
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

template <class Sweeps, class S, class A>
[[gnu::flatten]] void tile_pool(const Shape& shape, int64_t t, const S* x,
                                const PoolMemory<A>& pools) {
  const int64_t at = t * shape.padded_c;
  Sweeps::pool(shape, Tile(shape, t), x, pools.tile_sums + at, pools.tile_maxima + at);
}

// The pooled maps of one sample.
template <class Sweeps, class S, class A>
inline void pool_sample(const Shape& shape, bool parallel, const S* x, const PoolMemory<A>& pools) {
  each_tile_backwards(shape, parallel, [&](int64_t t) { tile_pool<Sweeps>(shape, t, x, pools); });
  settle_pools<Sweeps>(shape, x, pools);
}

// Turns sums over the channels into means; where a pixel has a NaN, it wins the maximum, and its
// channel the argmax (where one is asked for).
template <class Sweeps, class S, class A>
inline void settle_stats(const Shape& shape, Tile tile, const S* x, const A* ca, A* sums, A* maxima,
                         Int<A>* argmaxima) {
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
        if (argmaxima != nullptr) argmaxima[i] = static_cast<Int<A>>(c);
        break;
      }
    }
  }
}

// Calls keep(means, maxima) with the statistics of the pixels of one tile.
template <class Sweeps, class S, class A, class Keep>
[[gnu::flatten]] void tile_stats(const Shape& shape, Tile tile, const S* x, const A* ca,
                                 Keep&& keep) {
  A sums[Shape::kMaxTile], maxima[Shape::kMaxTile];
  Sweeps::channel_stats(shape, tile, x, ca, sums, maxima);
  settle_stats<Sweeps>(shape, tile, x, ca, sums, maxima, static_cast<Int<A>*>(nullptr));
  keep(sums, maxima);
}

template <class Sweeps, class S, class A>
[[gnu::flatten]] void tile_apply(const Shape& shape, Tile tile, const S* x, const A* ca,
                                 const A* sa, S* y) {
  Sweeps::apply(shape, tile, x, ca, sa, y);
}

template <class A>
struct ForwardMemory {
  ForwardMemory(Arena& arena, const Shape& shape)
      : pools(arena, shape),
        hidden_units(arena, shape),
        ca(arena.channels<A>(shape)),
        stats{{arena, shape}, {arena, shape}},
        sa(arena.take<A>(shape.pixels)) {}
  PoolMemory<A> pools;
  HiddenUnits<A> hidden_units;
  A* ca;                 // [padded C]
  Bordered<A> stats[2];  // mean, maximum
  A* sa;                 // [P]
};

template <class S, class Sweeps>
void forward(const ForwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  const Prepared<Weights<A>> all_weights(1, shape);
  const Weights<A>& weights = all_weights[0];
  weights.pack_from(args.parameters, shape);

  using Memory = ForwardMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& memory) {
    const S* x = sample.features(args.input);
    if (args.parameters.have_channel_gate()) {
      pool_sample<Sweeps>(shape, sample.parallel, x, memory.pools);
      mlp_hidden_units(shape, weights, memory.pools.average, memory.pools.maximum,
                       memory.hidden_units);
      mlp_gate(shape, weights, memory.hidden_units, memory.ca);
    } else {
      std::fill_n(memory.ca, shape.c, A{1});
    }
    if (args.channel_gate != nullptr) {
      std::copy_n(memory.ca, shape.c, sample.values(args.channel_gate, shape.c));
    }

    A* logits = sample.values(args.logits, shape.pixels);
    const bool gate_wanted = args.spatial_gate != nullptr || args.output != nullptr;
    A* wanted_sa = sample.values(args.spatial_gate, shape.pixels);
    A* sa = wanted_sa == nullptr ? memory.sa : wanted_sa;
    S* y = sample.features(args.output);
    if (!args.parameters.have_spatial_gate()) {
      if (logits != nullptr) std::fill_n(logits, shape.pixels, kInfinity<A>);
      std::fill_n(sa, shape.pixels, A{1});
      if (y == nullptr) return;
      for_each_unit(sample.parallel, shape.tiles, [&](int64_t t) {
        tile_apply<Sweeps>(shape, Tile(shape, t), x, memory.ca, sa, y);
      });
      return;
    }
    const A bias = weights.conv_bias[0];
    each_tile_and_band(
        shape, sample.parallel,
        [&](int64_t t) {
          const Tile tile(shape, t);
          tile_stats<Sweeps>(shape, tile, x, memory.ca, [&](const A* means, const A* maxima) {
            memory.stats[0].fill(shape, tile, means);
            memory.stats[1].fill(shape, tile, maxima);
          });
        },
        [&](int64_t t) {
          const Band band(shape, t);
          convolve_rows<2, 1>(shape, band.first_row, band.last_row, memory.stats, weights.conv,
                              [&](int64_t pixel, auto part, const Vec<A>* sums) {
                                const Vec<A> logit = sums[0] + bias;
                                if (logits != nullptr) store(logits + pixel, logit, part);
                                if (gate_wanted) store(sa + pixel, sigmoid(logit), part);
                              });
          if (y != nullptr) tile_apply<Sweeps>(shape, band.pixels, x, memory.ca, sa, y);
        });
  });
}

// --------------------------------------------------------------------------- parts of forward

template <class S, class Sweeps>
void pool(const PoolArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  using Memory = PoolMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& pools) {
    pool_sample<Sweeps>(shape, sample.parallel, sample.features(args.input), pools);
    A* pooled = sample.values(args.pooled, 2 * shape.c);
    std::copy_n(pools.average, shape.c, pooled);
    std::copy_n(pools.maximum, shape.c, pooled + shape.c);
  });
}

// The channel gate, padded with zeros.
template <class A>
struct PaddedGate {
  PaddedGate(Arena& arena, const Shape& shape) : ca(arena.channels<A>(shape)) {}
  A* ca;  // [padded C]
};

template <class S, class Sweeps>
void channel_stats(const ChannelStatsArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  using Memory = PaddedGate<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& memory) {
    const S* x = sample.features(args.input);
    A* stats = sample.values(args.stats, 2 * shape.pixels);
    std::copy_n(sample.values(args.channel_gate, shape.c), shape.c, memory.ca);
    for_each_unit(sample.parallel, shape.tiles, [&](int64_t t) {
      const Tile tile(shape, t);
      tile_stats<Sweeps>(shape, tile, x, memory.ca, [&](const A* means, const A* maxima) {
        std::copy_n(means, tile.size(), stats + tile.begin);
        std::copy_n(maxima, tile.size(), stats + shape.pixels + tile.begin);
      });
    });
  });
}

// The spatial gate of a tile, from logits that come from outside.
template <class A>
inline void sigmoid_tile(Tile tile, const A* logits, A* sa) {
  each_vector<A>(tile.size(), [&](int64_t i, auto part) {
    store(sa + tile.begin + i, sigmoid(load(logits + tile.begin + i, part)), part);
  });
}

// Both gates of one sample.
template <class A>
struct GateMemory {
  GateMemory(Arena& arena, const Shape& shape)
      : ca(arena.channels<A>(shape)), sa(arena.take<A>(shape.pixels)) {}
  A* ca;  // [padded C], padding zero
  A* sa;  // [P]
};

template <class S, class Sweeps>
void apply(const ApplyArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  using Memory = GateMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& gates) {
    const S* x = sample.features(args.input);
    S* y = sample.features(args.output);
    const A* logits = sample.values(args.logits, shape.pixels);
    std::copy_n(sample.values(args.channel_gate, shape.c), shape.c, gates.ca);
    for_each_unit(sample.parallel, shape.tiles, [&](int64_t t) {
      const Tile tile(shape, t);
      sigmoid_tile(tile, logits, gates.sa);
      tile_apply<Sweeps>(shape, tile, x, gates.ca, gates.sa, y);
    });
  });
}
