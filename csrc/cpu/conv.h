// The k x k convolution of the spatial gate, its transpose, and the gradient of its weights, on the
// bordered maps of one sample (sample.h).
//
// A bordered map is walked as one long row: output q = row * stride + column takes its taps at
// q + dy * stride + dx. The few values at the right border that this computes for nothing cost less
// than partial vectors in every row would.
//
// Included once per instruction set by isa.inl.

// out[o][q] = sum over the in maps and taps of weights[o][i][tap] * in[i][q + offset of the tap],
// for the rows [first, last). The weights are [max(in, out), k, k]: one of the two counts is 1.
template <int in_maps, int out_maps, class A>
inline void convolve_rows(const Shape& shape, int64_t first, int64_t last, const A* const* in,
                          const A* weights, A* const* out) {
  constexpr int kUnroll = 4;
  const int64_t k = shape.kernel;
  const int64_t end = (last - 1) * shape.stride + shape.w;
  const auto vectors = [&](auto unroll, int64_t q, auto part) {
    constexpr int U = decltype(unroll)::value;
    Vec<A> sum[out_maps][U] = {};
    for (int i = 0; i < in_maps; ++i) {
      const A* weight = weights + i * k * k;
      for (int64_t dy = 0; dy < k; ++dy) {
        const A* row = in[i] + q + dy * shape.stride;
        for (int64_t dx = 0; dx < k; ++dx) {
          for (int u = 0; u < U; ++u) {
            const Vec<A> v = load(row + dx + u * kLanes<A>);
            for (int o = 0; o < out_maps; ++o) sum[o][u] += weight[o * k * k + dy * k + dx] * v;
          }
        }
      }
    }
    for (int o = 0; o < out_maps; ++o) {
      for (int u = 0; u < U; ++u) store(out[o] + q + u * kLanes<A>, sum[o][u], part);
    }
  };
  int64_t q = first * shape.stride;
  for (; q + kUnroll * kLanes<A> <= end; q += kUnroll * kLanes<A>) {
    vectors(std::integral_constant<int, kUnroll>{}, q, Full{});
  }
  each_vector<A>(end - q, [&](int64_t i, auto part) {
    vectors(std::integral_constant<int, 1>{}, q + i, part);
  });
}

// grads[dx] = sum_p dl[p] * stats[p shifted by (dy, dx)] for one row dy of taps of one map. dl and
// stats are bordered.
template <class A>
inline void convolution_weight_grads(const Shape& shape, int64_t dy, const A* dl, const A* stats,
                                     double* grads) {
  constexpr int kTaps = 4;
  const A* dl_interior = dl + (shape.kernel / 2) * (shape.stride + 1);
  // Sums in float stay short: every few thousand pixels they go to double.
  const int64_t block = std::max<int64_t>(1, 4096 / shape.stride);
  const auto taps = [&](auto count, int64_t dx) {
    constexpr int T = decltype(count)::value;
    double total[T] = {};
    for (int64_t first = 0; first < shape.h; first += block) {
      Vec<A> sum[T] = {};
      for (int64_t row = first; row < std::min(first + block, shape.h); ++row) {
        const A* weights = dl_interior + row * shape.stride;
        const A* values = stats + (row + dy) * shape.stride + dx;
        each_vector<A>(shape.w, [&](int64_t i, auto part) {
          // Lanes past the row must be zero on both sides: 0 * infinity would be NaN.
          const Vec<A> weight = fill_absent(load(weights + i), part, A{0});
          for (int t = 0; t < T; ++t) {
            sum[t] += weight * fill_absent(load(values + i + t), part, A{0});
          }
        });
      }
      const auto sums = reduce_lanes<Add, T>(sum);
      for (int t = 0; t < T; ++t) total[t] += sums[t];
    }
    std::copy_n(total, T, grads + dx);
  };
  int64_t dx = 0;
  for (; dx + kTaps <= shape.kernel; dx += kTaps) taps(std::integral_constant<int, kTaps>{}, dx);
  for (; dx < shape.kernel; ++dx) taps(std::integral_constant<int, 1>{}, dx);
}
