// The k x k convolution of the spatial gate, its transpose, and the gradient of its weights, on the
// bordered maps of one sample.
//
// A vector of the map, once loaded, serves several rows: an output row r takes its taps from the
// rows r - halo to r + halo of the map, so a row of the map meets several output rows (with a row
// of weights each), and in the gradient several rows of dlogits. Loads of shifted vectors straddle
// cache lines; without sharing them the load ports would be the limit, not the multipliers.
//
// Included once per instruction set by isa.inl.

// A map with a border of zeros (see Shape).
template <class A>
class Bordered {
 public:
  Bordered(Arena& arena, const Shape& shape) : data_(arena.take<A>(shape.bordered)) {
    if (data_ == nullptr) return;
    std::fill_n(data_, shape.interior, A{0});
    for (int64_t y = 0; y < shape.h; ++y) {
      std::fill(row(shape, y) + shape.w, row(shape, y + 1), A{0});
    }
    std::fill(row(shape, shape.h), data_ + shape.bordered, A{0});
  }

  // Row y of the pixels; from -halo to h + halo - 1.
  A* row(const Shape& shape, int64_t y) const { return data_ + shape.interior + y * shape.stride; }

  // Copies the pixels of a tile, which lie densely at `dense`, to where they belong.
  void fill(const Shape& shape, Tile tile, const A* dense) const {
    int64_t y = tile.begin / shape.w, x = tile.begin % shape.w;
    for (int64_t p = tile.begin; p < tile.end; ++y, x = 0) {
      const int64_t count = std::min(shape.w - x, tile.end - p);
      std::copy_n(dense + (p - tile.begin), count, row(shape, y) + x);
      p += count;
    }
  }

 private:
  A* data_;
};

// Calls f(integral_constant first, integral_constant last, j) for j from 0 to count + rows - 2,
// where [first, last] are the i of 0 <= i < rows with 0 <= j - i < count. Needs count >= rows.
template <int rows, class F, int... I>
inline void each_overlap_impl(int64_t count, F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, 0>{}, std::integral_constant<int, I>{}, int64_t{I}), ...);
  for (int64_t j = rows - 1; j < count; ++j) {
    f(std::integral_constant<int, 0>{}, std::integral_constant<int, rows - 1>{}, j);
  }
  (f(std::integral_constant<int, I + 1>{}, std::integral_constant<int, rows - 1>{}, count + I),
   ...);
}
template <int rows, class F>
inline void each_overlap(int64_t count, F&& f) {
  each_overlap_impl<rows>(count, f, std::make_integer_sequence<int, rows - 1>());
}

// One block of outputs: `rows` rows from `row` and `columns` vectors from pixel x.
template <int in_maps, int out_maps, int rows, int columns, class A, class F>
inline void convolve_block(const Shape& shape, int64_t row, int64_t x,
                           const Bordered<A> (&in)[in_maps], const A* weights, F&& f) {
  const int64_t k = shape.kernel, taps = k * k;
  Vec<A> sum[out_maps][rows][columns];
  for (auto& map : sum) {
    for (auto& row_sums : map) std::fill_n(row_sums, columns, Vec<A>{});
  }
  for (int i = 0; i < in_maps; ++i) {
    const A* map_weights = weights + i * taps;
    const A* top = in[i].row(shape, row - shape.halo) + x - shape.halo;
    each_overlap<rows>(k, [&](auto first, auto last, int64_t j) {
      const A* from = top + j * shape.stride;
      const A* weight = map_weights + j * k;  // of row `row`; those of the next stand k before
      for (int64_t dx = 0; dx < k; ++dx) {
        Vec<A> v[columns];
        for (int u = 0; u < columns; ++u) v[u] = load(from + dx + u * kLanes<A>);
        for (int o = 0; o < out_maps; ++o) {
          for (int r = first; r <= last; ++r) {
            for (int u = 0; u < columns; ++u) sum[o][r][u] += weight[o * taps - r * k + dx] * v[u];
          }
        }
      }
    });
  }
  for (int r = 0; r < rows; ++r) {
    for (int u = 0; u < columns; ++u) {
      Vec<A> sums[out_maps];
      for (int o = 0; o < out_maps; ++o) sums[o] = sum[o][r][u];
      const int64_t at = x + u * kLanes<A>;
      const int64_t left = shape.w - at;
      const int64_t pixel = (row + r) * shape.w + at;
      if (left >= kLanes<A>) {
        f(pixel, Full{}, sums);
      } else if (left > 0) {
        f(pixel, Partial{static_cast<int>(left)}, sums);
      }
    }
  }
}

// Calls f(pixel, part, sums) for the vectors of pixels in the rows [first, last), where sums[o] is
// the sum over the in maps i and taps of weights[max(i, o)][tap] * in[i][pixel shifted by the tap].
// The weights are [max(in, out), k, k]: one of the two counts is 1.
template <int in_maps, int out_maps, class A, class F>
inline void convolve_rows(const Shape& shape, int64_t first, int64_t last,
                          const Bordered<A> (&in)[in_maps], const A* weights, F&& f) {
  constexpr int kRows = 4, kColumns = 2 / out_maps;  // 8 sums, to keep two multipliers busy
  const auto rows_from = [&](auto rows, int64_t row) {
    constexpr int R = decltype(rows)::value;
    int64_t x = 0;
    for (; x + (kColumns - 1) * kLanes<A> < shape.w; x += kColumns * kLanes<A>) {
      convolve_block<in_maps, out_maps, R, kColumns>(shape, row, x, in, weights, f);
    }
    for (; x < shape.w; x += kLanes<A>) {
      convolve_block<in_maps, out_maps, R, 1>(shape, row, x, in, weights, f);
    }
  };
  int64_t row = first;
  if (shape.kernel >= kRows) {
    for (; row + kRows <= last; row += kRows) rows_from(std::integral_constant<int, kRows>{}, row);
  }
  for (; row < last; ++row) rows_from(std::integral_constant<int, 1>{}, row);
}

// Taps [dy, dy + rows) x [dx, dx + columns) of the weights' gradient for one map:
// grads[j][i] += sum_p dlogits[p] * stats[p shifted by (dy + j, dx + i)], rows of k in `grads`.
template <int rows, int columns, class A>
inline void weight_grads_block(const Shape& shape, int64_t dy, int64_t dx,
                               const Bordered<A>& dlogits, const Bordered<A>& stats,
                               double* grads) {
  // Sums in float stay short: every few thousand pixels they go to double.
  const int64_t block = std::max<int64_t>(rows, 4096 / shape.stride);
  const auto sum_rows = [&](auto shared_rows, int64_t first, int64_t count) {
    constexpr int R =
        decltype(shared_rows)::value;  // rows, or 1 where there are too few of dlogits
    for (int j = 0; j < rows; j += R) {
      Vec<A> sum[R * columns];
      std::fill_n(sum, R * columns, Vec<A>{});
      // Row q of the overlap is the row first + q + dy + j - halo of the statistics; it meets the
      // rows first + q - r of dlogits.
      each_overlap<R>(count, [&](auto first_tap, auto last_tap, int64_t q) {
        const A* values = stats.row(shape, first + q + dy + j - shape.halo) + dx - shape.halo;
        const A* weights = dlogits.row(shape, first + q);
        each_vector<A>(shape.w, [&](int64_t i, auto part) {
          // Lanes past the row must be zero on both sides: 0 * infinity would be NaN.
          Vec<A> value[columns];
          for (int t = 0; t < columns; ++t) {
            value[t] = fill_absent(load(values + i + t), part, A{0});
          }
          for (int r = first_tap; r <= last_tap; ++r) {
            const Vec<A> weight = fill_absent(load(weights - r * shape.stride + i), part, A{0});
            for (int t = 0; t < columns; ++t) sum[r * columns + t] += weight * value[t];
          }
        });
      });
      for (int r = 0; r < R; ++r) {
        const auto sums = reduce_lanes<Add, columns>(sum + r * columns);
        for (int t = 0; t < columns; ++t) grads[(j + r) * shape.kernel + t] += sums[t];
      }
    }
  };
  for (int64_t first = 0; first < shape.h; first += block) {
    const int64_t count = std::min(block, shape.h - first);
    if (count >= rows) {
      sum_rows(std::integral_constant<int, rows>{}, first, count);
    } else {
      sum_rows(std::integral_constant<int, 1>{}, first, count);
    }
  }
}

// How the taps of both maps are shared out: blocks of kTapRows x kTapColumns, smaller at the ends.
constexpr int kTapRows = 4, kTapColumns = 2;

inline int64_t count_weight_grad_units(const Shape& shape) {
  return 2 * divide_up(shape.kernel, kTapRows) * divide_up(shape.kernel, kTapColumns);
}

// One such block: its part of grads, [2, k, k].
template <class A>
inline void convolution_weight_grads(const Shape& shape, int64_t unit, const Bordered<A>& dlogits,
                                     const Bordered<A> (&stats)[2], double* grads) {
  const int64_t k = shape.kernel;
  const int64_t columns = divide_up(k, kTapColumns);
  const int64_t dx = unit % columns * kTapColumns;
  const int64_t dy = unit / columns / 2 * kTapRows;
  const int64_t map = unit / columns % 2;
  double* at = grads + (map * k + dy) * k + dx;
  const auto with_columns = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    if (k - dx >= kTapColumns)
      return weight_grads_block<R, 2>(shape, dy, dx, dlogits, stats[map], at);
    return weight_grads_block<R, 1>(shape, dy, dx, dlogits, stats[map], at);
  };
  switch (std::min<int64_t>(k - dy, kTapRows)) {  // k is odd: 1 or 3 rows are left
    case 4:
      return with_columns(std::integral_constant<int, 4>{});
    case 3:
      return with_columns(std::integral_constant<int, 3>{});
    default:
      return with_columns(std::integral_constant<int, 1>{});
  }
}

template <class A>
inline double sum_of_pixels(const Shape& shape, const Bordered<A>& map) {
  double total = 0;
  for (int64_t y = 0; y < shape.h; ++y) {
    const A* row = map.row(shape, y);
    Vec<A> sum = Vec<A>{};
    each_vector<A>(shape.w, [&](int64_t x, auto part) { sum += load(row + x, part); });
    total += reduce_lanes<Add>(sum);
  }
  return total;
}
