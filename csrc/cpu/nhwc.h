// The sweeps over x (and g) for channels_last tensors, where the channels of a pixel lie together.
//
// Same functions as nchw.h. Sums per pixel run along the lanes, so several pixels are walked side
// by side and their vectors reduced together; sums per channel stay in the lanes.
//
// Arrays per channel (ca, partial sums, daverage) are padded to whole vectors, so only x, g, y and
// dx know about a last, partial vector of channels.
//
// Included once per instruction set by isa.inl.

template <class S>
struct Nhwc {
  using A = Acc<S>;
  // Pixels side by side: as many as leave registers for the sums.
  static constexpr int kGroup = kVectorBytes == 64 ? 8 : 4;
  static constexpr int kSmallGroup = 4;  // where three vectors per pixel are held

  template <int group, class F>
  static void each_group(Tile tile, F&& f) {
    int64_t p = tile.begin;
    for (; p + group <= tile.end; p += group) f(std::integral_constant<int, group>{}, p);
    for (; p < tile.end; ++p) f(std::integral_constant<int, 1>{}, p);
  }

  static int64_t offset(const Shape& shape, int64_t c, int64_t p) { return p * shape.c + c; }

  static void pool(const Shape& shape, Tile tile, const S* x, A* sums, A* maxima) {
    constexpr int kColumns = 4;          // vectors of channels held in registers
    constexpr int64_t kPixelBlock = 64;  // pixels before the next columns, so that x stays cached
    std::fill_n(sums, shape.padded_c, A{0});
    std::fill_n(maxima, shape.padded_c, -kInfinity<A>);
    const auto column_sums = [&](auto columns, int64_t c, int64_t begin, int64_t end, auto part) {
      constexpr int K = decltype(columns)::value;
      Vec<A> sum[K], maximum[K];
      for (int k = 0; k < K; ++k) {
        sum[k] = Vec<A>{};
        maximum[k] = load(maxima + c + k * kLanes<A>);
      }
      for (int64_t p = begin; p < end; ++p) {
        const S* row = x + offset(shape, c, p);
        for (int k = 0; k < K; ++k) {
          const Vec<A> v = load(row + k * kLanes<A>, part);
          sum[k] += v;
          maximum[k] = max(v, maximum[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        A* at = sums + c + k * kLanes<A>;
        store(at, load(at) + sum[k]);
        store(maxima + c + k * kLanes<A>, maximum[k]);
      }
    };
    for (int64_t begin = tile.begin; begin < tile.end; begin += kPixelBlock) {
      const int64_t end = std::min(begin + kPixelBlock, tile.end);
      int64_t c = 0;
      for (; c + kColumns * kLanes<A> <= shape.c; c += kColumns * kLanes<A>) {
        column_sums(std::integral_constant<int, kColumns>{}, c, begin, end, Full{});
      }
      each_vector<A>(shape.c - c, [&](int64_t i, auto part) {
        column_sums(std::integral_constant<int, 1>{}, c + i, begin, end, part);
      });
    }
  }

  static void channel_stats(const Shape& shape, Tile tile, const S* x, const A* ca, A* sums,
                            A* maxima) {
    each_group<kGroup>(tile, [&](auto group, int64_t p) {
      constexpr int G = decltype(group)::value;
      const S* rows = x + offset(shape, 0, p);
      Vec<A> sum[G], maximum[G];
      for (int g = 0; g < G; ++g) {
        sum[g] = Vec<A>{};
        maximum[g] = broadcast(-kInfinity<A>);
      }
      each_vector<A>(shape.c, [&](int64_t c, auto part) {
        const Vec<A> gate = load(ca + c);
        for (int g = 0; g < G; ++g) {
          const Vec<A> u = gate * load(rows + g * shape.c + c, part);
          sum[g] += u;
          maximum[g] = max(fill_absent(u, part, -kInfinity<A>), maximum[g]);
        }
      });
      const auto total = reduce_lanes<Add, G>(sum), highest = reduce_lanes<Max, G>(maximum);
      for (int g = 0; g < G; ++g) {
        sums[p - tile.begin + g] = total[g];
        maxima[p - tile.begin + g] = highest[g];
      }
    });
  }

  static void apply(const Shape& shape, Tile tile, const S* x, const A* ca, const A* sa, S* y) {
    for (int64_t p = tile.begin; p < tile.end; ++p) {
      const int64_t row = offset(shape, 0, p);
      each_vector<A>(shape.c, [&](int64_t c, auto part) {
        const Vec<A> u = load(ca + c) * load(x + row + c, part);
        store(y + row + c, sa[p] * u, part);
      });
    }
  }

  static void gate_grads(const Shape& shape, Tile tile, const S* x, const S* g, const A* ca,
                         const A* sa, A* grads, A* dots) {
    std::fill_n(dots, shape.padded_c, A{0});
    each_group<kGroup>(tile, [&](auto group, int64_t p) {
      constexpr int G = decltype(group)::value;
      const int64_t rows = offset(shape, 0, p);
      Vec<A> grad[G] = {};
      each_vector<A>(shape.c, [&](int64_t c, auto part) {
        const Vec<A> gate = load(ca + c);
        Vec<A> dot = Vec<A>{};
        for (int k = 0; k < G; ++k) {
          const int64_t at = rows + k * shape.c + c;
          const Vec<A> product = load(g + at, part) * load(x + at, part);
          grad[k] += gate * product;
          dot += sa[p + k] * product;
        }
        store(dots + c, load(dots + c) + dot);
      });
      const auto total = reduce_lanes<Add, G>(grad);
      for (int k = 0; k < G; ++k) grads[p - tile.begin + k] = total[k];
    });
  }

  static void backward_stats(const Shape& shape, Tile tile, const S* x, const A* ca, const A* ds0,
                             PixelResults<A> pixel, ChannelResults<A> channel) {
    std::fill_n(channel.sums, shape.padded_c, A{0});
    std::fill_n(channel.dots, shape.padded_c, A{0});
    std::fill_n(channel.maxima, shape.padded_c, -kInfinity<A>);
    std::fill_n(channel.argmaxima, shape.padded_c, Int<A>{0});
    each_group<kSmallGroup>(tile, [&](auto group, int64_t p) {
      constexpr int G = decltype(group)::value;
      const S* rows = x + offset(shape, 0, p);
      Vec<A> sum[G], maximum[G];
      IntVec<A> argmax[G];
      for (int g = 0; g < G; ++g) {
        sum[g] = Vec<A>{};
        maximum[g] = broadcast(-kInfinity<A>);
        argmax[g] = iota<A>();
      }
      each_vector<A>(shape.c, [&](int64_t c, auto part) {
        const Vec<A> gate = load(ca + c);
        const IntVec<A> channels = iota<A>() + static_cast<Int<A>>(c);
        Vec<A> pool_sum = Vec<A>{}, pool_dot = Vec<A>{}, pool_maximum = load(channel.maxima + c);
        IntVec<A> pool_argmax = load_index<A>(channel.argmaxima + c);
        for (int g = 0; g < G; ++g) {
          const Vec<A> v = load(rows + g * shape.c + c, part);
          const Vec<A> u = fill_absent(gate * v, part, -kInfinity<A>);
          const IntVec<A> higher = u > maximum[g];
          sum[g] += gate * v;
          maximum[g] = higher ? u : maximum[g];
          argmax[g] = higher ? channels : argmax[g];
          const IntVec<A> pool_higher = v > pool_maximum;
          pool_maximum = pool_higher ? v : pool_maximum;
          pool_argmax = pool_higher ? broadcast_index<A>(p + g - tile.begin) : pool_argmax;
          pool_sum += v;
          pool_dot += ds0[p + g] * v;
        }
        store(channel.sums + c, load(channel.sums + c) + pool_sum);
        store(channel.dots + c, load(channel.dots + c) + pool_dot);
        store(channel.maxima + c, pool_maximum);
        store_index<A>(channel.argmaxima + c, pool_argmax);
      });
      const auto total = reduce_lanes<Add, G>(sum), highest = reduce_lanes<Max, G>(maximum);
      for (int g = 0; g < G; ++g) {
        // Of the lanes that hold the maximum, the lowest channel.
        argmax[g] = maximum[g] == highest[g] ? argmax[g] : broadcast_index<A>(shape.c);
      }
      const auto first = reduce_lanes<Min, G>(argmax);
      for (int g = 0; g < G; ++g) {
        pixel.sums[p - tile.begin + g] = total[g];
        pixel.maxima[p - tile.begin + g] = highest[g];
        pixel.argmaxima[p - tile.begin + g] = first[g];
      }
    });
  }

  static void channel_grads(const Shape& shape, Tile tile, const S* x, const S* g,
                            ChannelResults<A> channel) {
    constexpr int kColumns = 2;          // vectors of channels held in registers
    constexpr int64_t kPixelBlock = 64;  // as in pool
    std::fill_n(channel.sums, shape.padded_c, A{0});
    std::fill_n(channel.dots, shape.padded_c, A{0});
    std::fill_n(channel.maxima, shape.padded_c, -kInfinity<A>);
    std::fill_n(channel.argmaxima, shape.padded_c, Int<A>{0});
    const auto column_sums = [&](auto columns, int64_t c, int64_t begin, int64_t end, auto part) {
      constexpr int K = decltype(columns)::value;
      Vec<A> sum[K], dot[K], maximum[K];
      IntVec<A> argmax[K];
      for (int k = 0; k < K; ++k) {
        sum[k] = dot[k] = Vec<A>{};
        maximum[k] = load(channel.maxima + c + k * kLanes<A>);
        argmax[k] = load_index<A>(channel.argmaxima + c + k * kLanes<A>);
      }
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = offset(shape, c, p);
        const IntVec<A> pixel = broadcast_index<A>(p - tile.begin);
        for (int k = 0; k < K; ++k) {
          const Vec<A> v = load(x + row + k * kLanes<A>, part);
          const IntVec<A> higher = v > maximum[k];  // strictly: the first of equals stays
          sum[k] += v;
          dot[k] += load(g + row + k * kLanes<A>, part) * v;
          maximum[k] = higher ? v : maximum[k];
          argmax[k] = higher ? pixel : argmax[k];
        }
      }
      for (int k = 0; k < K; ++k) {
        const int64_t at = c + k * kLanes<A>;
        store(channel.sums + at, load(channel.sums + at) + sum[k]);
        store(channel.dots + at, load(channel.dots + at) + dot[k]);
        store(channel.maxima + at, maximum[k]);
        store_index<A>(channel.argmaxima + at, argmax[k]);
      }
    };
    for (int64_t begin = tile.begin; begin < tile.end; begin += kPixelBlock) {
      const int64_t end = std::min(begin + kPixelBlock, tile.end);
      int64_t c = 0;
      for (; c + kColumns * kLanes<A> <= shape.c; c += kColumns * kLanes<A>) {
        column_sums(std::integral_constant<int, kColumns>{}, c, begin, end, Full{});
      }
      each_vector<A>(shape.c - c, [&](int64_t i, auto part) {
        column_sums(std::integral_constant<int, 1>{}, c + i, begin, end, part);
      });
    }
  }

  static void pixel_grads(const Shape& shape, Tile tile, const S* x, const S* g, A* grads,
                          PixelResults<A> pixel) {
    each_group<kSmallGroup>(tile, [&](auto group, int64_t p) {
      constexpr int G = decltype(group)::value;
      const int64_t rows = offset(shape, 0, p);
      Vec<A> grad[G], sum[G], maximum[G];
      IntVec<A> argmax[G];
      for (int k = 0; k < G; ++k) {
        grad[k] = sum[k] = Vec<A>{};
        maximum[k] = broadcast(-kInfinity<A>);
        argmax[k] = iota<A>();
      }
      each_vector<A>(shape.c, [&](int64_t c, auto part) {
        const IntVec<A> channels = iota<A>() + static_cast<Int<A>>(c);
        for (int k = 0; k < G; ++k) {
          const int64_t at = rows + k * shape.c + c;
          const Vec<A> v = load(x + at, part), filled = fill_absent(v, part, -kInfinity<A>);
          const IntVec<A> higher = filled > maximum[k];
          grad[k] += load(g + at, part) * v;
          sum[k] += v;
          maximum[k] = higher ? filled : maximum[k];
          argmax[k] = higher ? channels : argmax[k];
        }
      });
      const auto grad_total = reduce_lanes<Add, G>(grad), total = reduce_lanes<Add, G>(sum);
      const auto highest = reduce_lanes<Max, G>(maximum);
      for (int k = 0; k < G; ++k) {
        // Of the lanes that hold the maximum, the lowest channel.
        argmax[k] = maximum[k] == highest[k] ? argmax[k] : broadcast_index<A>(shape.c);
      }
      const auto first = reduce_lanes<Min, G>(argmax);
      for (int k = 0; k < G; ++k) {
        grads[p - tile.begin + k] = grad_total[k];
        pixel.sums[p - tile.begin + k] = total[k];
        pixel.maxima[p - tile.begin + k] = highest[k];
        pixel.argmaxima[p - tile.begin + k] = first[k];
      }
    });
  }

  static int64_t find_argmax(const Shape&, Tile tile, const S*, int64_t c, A /*maximum*/,
                             const Int<A>* argmaxima) {
    return tile.begin + argmaxima[c];
  }

  static void input_grad(const Shape& shape, Tile tile, const S* g, const A* ca, const A* sa,
                         const InputGradMaps<A>& maps, S* dx) {
    for (int64_t p = tile.begin; p < tile.end; ++p) {
      const int64_t row = offset(shape, 0, p);
      const Vec<A> ds0 = broadcast(maps.ds0[p]), ds1 = broadcast(maps.ds1[p]);
      each_vector<A>(shape.c, [&](int64_t c, auto part) {
        const IntVec<A> channels = iota<A>() + static_cast<Int<A>>(c);
        Vec<A> du = load(g + row + c, part) * sa[p] + ds0;
        du += channels == maps.argmaxima[p] ? ds1 : Vec<A>{};
        store(dx + row + c, load(ca + c) * du + load(maps.daverage + c), part);
      });
    }
  }
};
