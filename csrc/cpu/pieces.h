// What is around the layers where PyTorch runs those itself, sample by sample:
//
//   pool                    read x            avg, max per channel, for the MLP
//   channel stats           read x            mean and maximum of u = ca x per pixel, for the
//                                             convolution
//   channel stats backward  read x            the gradient of ca from those maps
//   pool backward           read x, g,        dx
//                           write dx
//
// forward.h and backward.h are made of the same parts. Both backward functions sweep over x for the
// argmax of each pixel, which nobody kept.
//
// Included once per instruction set by isa.inl.

template <class S, class Sweeps>
void pool(const PoolArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const Prepared<Pools<A>> scratch(count_scratches(shape, workers), shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const Pools<A>& pools = scratch[worker];
    pool_sample<Sweeps>(shape, parallel,
                        static_cast<const S*>(args.input) + n * shape.c * shape.pixels, pools);
    A* to = static_cast<A*>(args.pooled) + n * 2 * shape.c;
    std::copy_n(pools.average, shape.c, to);
    std::copy_n(pools.maximum, shape.c, to + shape.c);
  });
}

template <class A>
struct PaddedGate {
  PaddedGate(Arena& arena, const Shape& shape) : ca(arena.channels<A>(shape)) {}
  A* ca;  // [padded C], padding zero
};

template <class S, class Sweeps>
void channel_stats(const ChannelStatsArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const Prepared<PaddedGate<A>> scratch(count_scratches(shape, workers), shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    A* ca = scratch[worker].ca;
    const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
    A* to = static_cast<A*>(args.stats) + n * 2 * shape.pixels;
    std::copy_n(static_cast<const A*>(args.channel_gate) + n * shape.c, shape.c, ca);
    for_each_unit(parallel, shape.tiles, [&](int64_t t) {
      const Tile tile(shape, t);
      tile_stats<Sweeps>(shape, tile, x, ca, [&](const A* means, const A* maxima) {
        std::copy_n(means, tile.size(), to + tile.begin);
        std::copy_n(maxima, tile.size(), to + shape.pixels + tile.begin);
      });
    });
  });
}

// The sweep over x of one sample for the gradients of its statistics, which are given: [2, P], the
// first not yet divided by C. `after` is called with each band.
template <class S, class Sweeps, class A, class After>
inline void given_stats_grads(const Shape& shape, bool parallel, const S* x, const A* channel_gate,
                              const A* grad_stats, const StatsScratch<A>& s, After&& after) {
  std::copy_n(channel_gate, shape.c, s.ca);
  for_each_unit(parallel, shape.tiles, [&](int64_t t) {
    const Tile pixels = Band(shape, t).pixels;
    for (int64_t p = pixels.begin; p < pixels.end; ++p) {
      s.ds[0][p] = grad_stats[p] / static_cast<A>(shape.c);
      s.ds[1][p] = grad_stats[shape.pixels + p];
    }
    band_stats<Sweeps>(shape, t, x, s);
    after(t);
  });
}

template <class S, class Sweeps>
void channel_stats_backward(const ChannelStatsBackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const Prepared<StatsScratch<A>> scratch(count_scratches(shape, workers), shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const StatsScratch<A>& s = scratch[worker];
    const S* x = static_cast<const S*>(args.input) + n * shape.c * shape.pixels;
    const A* gate = static_cast<const A*>(args.channel_gate) + n * shape.c;
    const A* ds = static_cast<const A*>(args.grad_stats) + n * 2 * shape.pixels;
    given_stats_grads<S, Sweeps>(shape, parallel, x, gate, ds, s, [&](int64_t t) {
      // x itself, not the maximum divided by the gate, which may be zero.
      band_shares(shape, t, s, [&](int64_t p) {
        return load_scalar(x + Sweeps::offset(shape, s.argmax[p], p));
      });
    });
    add_bands(shape, s);
    A* to = static_cast<A*>(args.grad_channel_gate) + n * shape.c;
    for (int64_t c = 0; c < shape.c; ++c) to[c] = s.dots[c] + s.shares[c];
  });
}

template <class A>
struct PoolBackwardScratch {
  PoolBackwardScratch(Arena& arena, const Shape& shape)
      : stats(arena, shape), daverage(arena.channels<A>(shape)) {}
  StatsScratch<A> stats;
  A* daverage;  // [padded C] gradient of the average over pixels, divided by P
};

template <class S, class Sweeps>
void pool_backward(const PoolBackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  if (shape.n == 0) return;
  const int64_t workers = count_workers(shape);
  const Prepared<PoolBackwardScratch<A>> scratch(count_scratches(shape, workers), shape);

  each_sample(shape, workers, [&](int64_t worker, int64_t n, bool parallel) {
    const StatsScratch<A>& s = scratch[worker].stats;
    const int64_t element = n * shape.c * shape.pixels;
    const S* x = static_cast<const S*>(args.input) + element;
    const A* gate = static_cast<const A*>(args.channel_gate) + n * shape.c;
    const A* ds = static_cast<const A*>(args.grad_stats) + n * 2 * shape.pixels;
    given_stats_grads<S, Sweeps>(shape, parallel, x, gate, ds, s, [](int64_t) {});
    settle_pools<Sweeps>(shape, x, s.pools);

    const A* dpooled = static_cast<const A*>(args.grad_pooled) + n * 2 * shape.c;
    A* daverage = scratch[worker].daverage;
    for (int64_t c = 0; c < shape.c; ++c) daverage[c] = dpooled[c] / static_cast<A>(shape.pixels);
    sample_input_grad<S, Sweeps>(
        shape, parallel, x, static_cast<const S*>(args.grad_output) + element,
        static_cast<const A*>(args.spatial_gate) + n * shape.pixels, s, daverage, dpooled + shape.c,
        static_cast<S*>(args.grad_input) + element);
  });
}
