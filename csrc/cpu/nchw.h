// The sweeps over x (and g) for contiguous tensors, where the pixels of a channel lie together.
//
// nhwc.h has the same functions for channels_last; forward.h and backward.h know only their names.
// Each works on one tile of pixels of one sample and leaves partial sums per (tile, channel).
//
// Rows of kGroup channels are walked side by side: their sums are independent, so additions of one
// do not wait for another, and the maps per pixel are loaded and stored once for all of them.
//
// Who calls them for a tile is marked [[gnu::flatten]]: all of a sweep, down to the loads, becomes
// one function. Compilers would else decide that by the size of the whole file; and a piece left
// as a function of its own loads the pointers of its arguments again after every store of a
// vector, which may alias them.
//
// Included once per instruction set by isa.inl.

template <class S>
struct Nchw {
  using A = Acc<S>;
  static constexpr int kGroup = 4;

  // Calls f(integral_constant<int, g>, first channel) over groups of g channels.
  template <class F>
  static void each_group(int64_t channels, F&& f) {
    int64_t c = 0;
    for (; c + kGroup <= channels; c += kGroup) f(std::integral_constant<int, kGroup>{}, c);
    for (; c < channels; ++c) f(std::integral_constant<int, 1>{}, c);
  }

  static int64_t offset(const Shape& shape, int64_t c, int64_t p) { return c * shape.pixels + p; }

  // sum_p x and max_p x per channel (the maximum ignores NaN; see settle_pools).
  static void pool(const Shape& shape, Tile tile, const S* x, A* sums, A* maxima) {
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const S* rows = x + offset(shape, c, tile.begin);
      Vec<A> sum[G], maximum[G];
      for (int g = 0; g < G; ++g) {
        sum[g] = Vec<A>{};
        maximum[g] = broadcast(-kInfinity<A>);
      }
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        for (int g = 0; g < G; ++g) {
          const Vec<A> v = load(rows + g * shape.pixels + i, part);
          sum[g] += v;
          maximum[g] = max(fill_absent(v, part, -kInfinity<A>), maximum[g]);
        }
      });
      const auto total = reduce_lanes<Add, G>(sum), highest = reduce_lanes<Max, G>(maximum);
      for (int g = 0; g < G; ++g) {
        sums[c + g] = total[g];
        maxima[c + g] = highest[g];
      }
    });
  }

  // sum_c u and max_c u per pixel, u = ca x (the maximum ignores NaN; see settle_stats).
  static void channel_stats(const Shape& shape, Tile tile, const S* x, const A* ca, A* sums,
                            A* maxima) {
    std::fill_n(sums, tile.size(), A{0});
    std::fill_n(maxima, tile.size(), -kInfinity<A>);
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const S* rows = x + offset(shape, c, tile.begin);
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        Vec<A> sum = Vec<A>{}, maximum = load(maxima + i);
        for (int g = 0; g < G; ++g) {
          const Vec<A> u = ca[c + g] * load(rows + g * shape.pixels + i, part);
          sum += u;
          maximum = max(u, maximum);
        }
        store(sums + i, load(sums + i) + sum);
        store(maxima + i, maximum);
      });
    });
  }

  // y = sa ca x.
  static void apply(const Shape& shape, Tile tile, const S* x, const A* ca, const A* sa, S* y) {
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t row = offset(shape, c, tile.begin);
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        const Vec<A> u = ca[c] * load(x + row + i, part);
        store(y + row + i, load(sa + tile.begin + i, part) * u, part);
      });
    }
  }

  // sum_c g u per pixel and sum_p g sa x per channel.
  static void gate_grads(const Shape& shape, Tile tile, const S* x, const S* g, const A* ca,
                         const A* sa, A* grads, A* dots) {
    std::fill_n(grads, tile.size(), A{0});
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const int64_t rows = offset(shape, c, tile.begin);
      Vec<A> dot[G] = {};
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        const Vec<A> gate = load(sa + tile.begin + i, part);
        Vec<A> grad = Vec<A>{};
        for (int k = 0; k < G; ++k) {
          const int64_t at = rows + k * shape.pixels + i;
          const Vec<A> product = load(g + at, part) * load(x + at, part);
          grad += ca[c + k] * product;
          dot[k] += gate * product;
        }
        store(grads + i, load(grads + i) + grad);
      });
      const auto total = reduce_lanes<Add, G>(dot);
      for (int k = 0; k < G; ++k) dots[c + k] = total[k];
    });
  }

  // Backward's sweep over x alone: channel_stats with the channel of the maximum, pool with the
  // pixel of the maximum, and sum_p x ds0 per channel.
  static void backward_stats(const Shape& shape, Tile tile, const S* x, const A* ca, const A* ds0,
                             PixelResults<A> pixel, ChannelResults<A> channel) {
    std::fill_n(pixel.sums, tile.size(), A{0});
    std::fill_n(pixel.maxima, tile.size(), -kInfinity<A>);
    std::fill_n(pixel.argmaxima, tile.size(), Int<A>{0});
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const S* rows = x + offset(shape, c, tile.begin);
      Vec<A> pool_sum[G], pool_maximum[G], dot[G];
      for (int g = 0; g < G; ++g) {
        pool_sum[g] = dot[g] = Vec<A>{};
        pool_maximum[g] = broadcast(-kInfinity<A>);
      }
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        const Vec<A> weight = load(ds0 + tile.begin + i, part);
        Vec<A> sum = Vec<A>{}, maximum = load(pixel.maxima + i);
        IntVec<A> argmax = load_index<A>(pixel.argmaxima + i);
        for (int g = 0; g < G; ++g) {
          const Vec<A> v = load(rows + g * shape.pixels + i, part);
          const Vec<A> u = ca[c + g] * v;
          const IntVec<A> higher = u > maximum;  // strictly: the first of equals stays
          sum += u;
          maximum = higher ? u : maximum;
          argmax = higher ? broadcast_index<A>(c + g) : argmax;
          pool_sum[g] += v;
          pool_maximum[g] = max(fill_absent(v, part, -kInfinity<A>), pool_maximum[g]);
          dot[g] += weight * v;
        }
        store(pixel.sums + i, load(pixel.sums + i) + sum);
        store(pixel.maxima + i, maximum);
        store_index<A>(pixel.argmaxima + i, argmax);
      });
      const auto sums = reduce_lanes<Add, G>(pool_sum), dots = reduce_lanes<Add, G>(dot);
      const auto maxima = reduce_lanes<Max, G>(pool_maximum);
      for (int g = 0; g < G; ++g) {
        channel.sums[c + g] = sums[g];
        channel.maxima[c + g] = maxima[g];
        channel.dots[c + g] = dots[g];
      }
    });
  }

  // Where the channel gate stands alone: pool with the pixel of the maximum, and sum_p g x.
  static void channel_grads(const Shape& shape, Tile tile, const S* x, const S* g,
                            ChannelResults<A> channel) {
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const int64_t rows = offset(shape, c, tile.begin);
      Vec<A> sum[G], maximum[G], dot[G];
      for (int k = 0; k < G; ++k) {
        sum[k] = dot[k] = Vec<A>{};
        maximum[k] = broadcast(-kInfinity<A>);
      }
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        for (int k = 0; k < G; ++k) {
          const int64_t at = rows + k * shape.pixels + i;
          const Vec<A> v = load(x + at, part);
          sum[k] += v;
          maximum[k] = max(fill_absent(v, part, -kInfinity<A>), maximum[k]);
          dot[k] += load(g + at, part) * v;
        }
      });
      const auto sums = reduce_lanes<Add, G>(sum), dots = reduce_lanes<Add, G>(dot);
      const auto maxima = reduce_lanes<Max, G>(maximum);
      for (int k = 0; k < G; ++k) {
        channel.sums[c + k] = sums[k];
        channel.maxima[c + k] = maxima[k];
        channel.dots[c + k] = dots[k];
      }
    });
  }

  // Where the spatial gate stands alone, and u is x: channel_stats with the channel of the maximum,
  // and sum_c g x.
  static void pixel_grads(const Shape& shape, Tile tile, const S* x, const S* g, A* grads,
                          PixelResults<A> pixel) {
    std::fill_n(grads, tile.size(), A{0});
    std::fill_n(pixel.sums, tile.size(), A{0});
    std::fill_n(pixel.maxima, tile.size(), -kInfinity<A>);
    std::fill_n(pixel.argmaxima, tile.size(), Int<A>{0});
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const int64_t rows = offset(shape, c, tile.begin);
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        Vec<A> grad = Vec<A>{}, sum = Vec<A>{}, maximum = load(pixel.maxima + i);
        IntVec<A> argmax = load_index<A>(pixel.argmaxima + i);
        for (int k = 0; k < G; ++k) {
          const int64_t at = rows + k * shape.pixels + i;
          const Vec<A> v = load(x + at, part);
          const IntVec<A> higher = v > maximum;  // strictly: the first of equals stays
          grad += load(g + at, part) * v;
          sum += v;
          maximum = higher ? v : maximum;
          argmax = higher ? broadcast_index<A>(c + k) : argmax;
        }
        store(grads + i, load(grads + i) + grad);
        store(pixel.sums + i, load(pixel.sums + i) + sum);
        store(pixel.maxima + i, maximum);
        store_index<A>(pixel.argmaxima + i, argmax);
      });
    });
  }

  // The first pixel of the tile where channel c of x is `maximum`.
  static int64_t find_argmax(const Shape& shape, Tile tile, const S* x, int64_t c, A maximum,
                             const Int<A>* /*argmaxima*/) {
    const S* row = x + offset(shape, c, tile.begin);
    int64_t i = 0;
    for (; i + kLanes<A> <= tile.size(); i += kLanes<A>) {
      const uint32_t found = lane_bits<A>(load(row + i) == maximum);
      if (found != 0) return tile.begin + i + __builtin_ctz(found);
    }
    while (i + 1 < tile.size() && load_scalar(row + i) != maximum) ++i;
    return tile.begin + i;
  }

  // dx = ca (g sa + ds0 + [c is the argmax of p] ds1) + daverage, ds0 and daverage already divided
  // by the counts of their means. The gradient of the maximum over pixels is added by the caller.
  static void input_grad(const Shape& shape, Tile tile, const S* g, const A* ca, const A* sa,
                         const InputGradMaps<A>& maps, S* dx) {
    each_group(shape.c, [&](auto group, int64_t c) {
      constexpr int G = decltype(group)::value;
      const int64_t rows = offset(shape, c, tile.begin);
      each_vector<A>(tile.size(), [&](int64_t i, auto part) {
        const int64_t p = tile.begin + i;
        const Vec<A> gate = load(sa + p, part), ds0 = load(maps.ds0 + p);
        const Vec<A> ds1 = load(maps.ds1 + p);
        const IntVec<A> argmax = load_index<A>(maps.argmaxima + p);
        for (int k = 0; k < G; ++k) {
          const int64_t at = rows + k * shape.pixels + i;
          Vec<A> du = load(g + at, part) * gate + ds0;
          du += argmax == static_cast<Int<A>>(c + k) ? ds1 : Vec<A>{};
          store(dx + at, ca[c + k] * du + maps.daverage[c + k], part);
        }
      });
    });
  }
};
