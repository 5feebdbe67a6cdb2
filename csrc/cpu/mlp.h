// The MLP of the channel gate, one sample at a time, forward and backward.
//
// Weights are packed as rows over the channels for both layers ([R, C], the second layer
// transposed), padded with zeros to whole vectors, so that no loop here has a tail.
//
// Included once per instruction set by isa.inl.

// Whether a matrix lies as the kernels would have it themselves: rows of accumulators.
template <class A>
inline bool has_plain_rows(const ParameterView& view) {
  return view.dtype == (sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32) &&
         view.strides[3] == 1 && view.strides[2] == view.sizes[3];
}

template <class A>
struct Weights {
  Weights(Arena& arena, const Shape& shape)
      : fc1(arena.channels<A>(shape, shape.hidden)),
        fc1_bias(arena.zeros<A>(shape.hidden)),
        fc2(arena.channels<A>(shape, shape.hidden)),
        fc2_bias(arena.zeros<A>(shape.padded_c)),
        conv(arena.take<A>(2 * shape.kernel * shape.kernel)),
        conv_flipped(arena.take<A>(2 * shape.kernel * shape.kernel)),
        conv_bias(arena.zeros<A>(1)) {}

  // Absent biases stay zero; of a gate that is absent nothing is read.
  void pack_from(const Parameters& from, const Shape& shape) const {
    if (from.have_channel_gate()) pack_mlp(from, shape);
    if (from.have_spatial_gate()) pack_convolution(from, shape);
  }

  A* fc1;           // [R, padded C]
  A* fc1_bias;      // [R]
  A* fc2;           // [R, padded C], transposed
  A* fc2_bias;      // [padded C]
  A* conv;          // [2, k, k]
  A* conv_flipped;  // [2, k, k], each map turned by half a turn
  A* conv_bias;     // [1]

 private:
  void pack_mlp(const Parameters& from, const Shape& shape) const {
    pack(from.fc1_weight, shape.padded_c, fc1);
    if (has_plain_rows<A>(from.fc2_weight)) {
      transpose(shape.c, shape.hidden, static_cast<const A*>(from.fc2_weight.data), shape.hidden,
                fc2, shape.padded_c);
    } else {
      pack(transposed(from.fc2_weight), shape.padded_c, fc2);
    }
    if (from.fc1_bias.data != nullptr) pack(from.fc1_bias, 0, fc1_bias);
    if (from.fc2_bias.data != nullptr) pack(from.fc2_bias, 0, fc2_bias);
  }
  void pack_convolution(const Parameters& from, const Shape& shape) const {
    const int64_t taps = shape.kernel * shape.kernel;
    pack(from.conv_weight, shape.kernel, conv);
    if (from.conv_bias.data != nullptr) pack(from.conv_bias, 0, conv_bias);
    for (int map = 0; map < 2; ++map) {
      std::reverse_copy(conv + map * taps, conv + (map + 1) * taps, conv_flipped + map * taps);
    }
  }
};

// sums[r][k] = sum_c matrix[r][c] * vectors[k][c] for `rows` rows of padded C elements. Several
// rows at a time, because each sum has to wait for its own last addition.
template <int rows, int count, class A>
inline auto rows_times_vectors(const Shape& shape, const A* matrix,
                               const A* const (&vectors)[count]) {
  constexpr int64_t kBlock = 4096;  // bounds the rounding error of long sums
  Vec<A> sum[rows * count] = {};
  for (int64_t begin = 0; begin < shape.padded_c; begin += kBlock) {
    Vec<A> block[rows * count] = {};
    for (int64_t c = begin; c < std::min(begin + kBlock, shape.padded_c); c += kLanes<A>) {
      Vec<A> v[count];
      for (int k = 0; k < count; ++k) v[k] = load(vectors[k] + c);
      for (int r = 0; r < rows; ++r) {
        const Vec<A> row = load(matrix + r * shape.padded_c + c);
        for (int k = 0; k < count; ++k) block[r * count + k] += row * v[k];
      }
    }
    for (int i = 0; i < rows * count; ++i) sum[i] += block[i];
  }
  return reduce_lanes<Add, rows * count>(sum);
}

// Calls f(r, sums) for every row of a matrix [R, padded C], sums[k] as above.
template <int count, class A, class F>
inline void each_row_times_vectors(const Shape& shape, const A* matrix,
                                   const A* const (&vectors)[count], F&& f) {
  constexpr int kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= shape.hidden; r += kRows) {
    const auto sums = rows_times_vectors<kRows>(shape, matrix + r * shape.padded_c, vectors);
    for (int i = 0; i < kRows; ++i) f(r + i, sums.data() + i * count);
  }
  for (; r < shape.hidden; ++r) {
    f(r, rows_times_vectors<1>(shape, matrix + r * shape.padded_c, vectors).data());
  }
}

// What one sample's MLP keeps. The average and the maximum have hidden units of their own.
template <class A>
struct HiddenUnits {
  HiddenUnits(Arena& arena, const Shape& shape)
      : average(arena.take<A>(shape.hidden)),
        maximum(arena.take<A>(shape.hidden)),
        sum(arena.take<A>(shape.hidden)) {}
  A* average;  // [R] W1 avg + b1
  A* maximum;  // [R] W1 max + b1
  A* sum;      // [R] relu of both, added
};

template <class A>
inline A relu(A value) {
  return value <= 0 ? 0 : value;  // NaN stays NaN
}

template <class A>
inline void mlp_hidden_units(const Shape& shape, const Weights<A>& weights, const A* average,
                             const A* maximum, const HiddenUnits<A>& units) {
  const A* const pooled[2] = {average, maximum};
  each_row_times_vectors(shape, weights.fc1, pooled, [&](int64_t r, const A* sums) {
    units.average[r] = sums[0] + weights.fc1_bias[r];
    units.maximum[r] = sums[1] + weights.fc1_bias[r];
    units.sum[r] = relu(units.average[r]) + relu(units.maximum[r]);
  });
}

// Calls f(c, sums) for every vector of channels, where sums[k] is the sum over r of
// factors[k][r] * matrix[r][c]. Several vectors at a time, for the reason above.
template <int count, class A, class F>
inline void combine_rows(const Shape& shape, const A* matrix, const A* const (&factors)[count],
                         F&& f) {
  const auto columns_from = [&](auto columns, int64_t c) {
    constexpr int K = decltype(columns)::value;
    Vec<A> sum[K][count] = {};
    for (int64_t r = 0; r < shape.hidden; ++r) {
      const A* row = matrix + r * shape.padded_c + c;
      for (int i = 0; i < K; ++i) {
        const Vec<A> v = load(row + i * kLanes<A>);
        for (int k = 0; k < count; ++k) sum[i][k] += factors[k][r] * v;
      }
    }
    for (int i = 0; i < K; ++i) f(c + i * kLanes<A>, sum[i]);
  };
  constexpr int kColumns = 4;
  int64_t c = 0;
  for (; c + kColumns * kLanes<A> <= shape.padded_c; c += kColumns * kLanes<A>) {
    columns_from(std::integral_constant<int, kColumns>{}, c);
  }
  for (; c < shape.padded_c; c += kLanes<A>) columns_from(std::integral_constant<int, 1>{}, c);
}

// ca = sigmoid(W2 units + 2 b2), padded with zeros.
template <class A>
inline void mlp_gate(const Shape& shape, const Weights<A>& weights, const HiddenUnits<A>& units,
                     A* ca) {
  const A* const factors[1] = {units.sum};
  combine_rows(shape, weights.fc2, factors, [&](int64_t c, const Vec<A>* sums) {
    store(ca + c, sigmoid(sums[0] + A{2} * load(weights.fc2_bias + c)));
  });
  std::fill(ca + shape.c, ca + shape.padded_c, A{0});
}

// The gradients that one sample contributes, kept until all samples are done (their sums over the
// batch are the weights' gradients).
template <class A>
struct MlpGrads {
  MlpGrads(Arena& arena, const Shape& shape)
      : average(arena.channels<A>(shape)),
        maximum(arena.channels<A>(shape)),
        dz(arena.channels<A>(shape)),
        hidden_units(arena.take<A>(shape.hidden)),
        dunits_average(arena.take<A>(shape.hidden)),
        dunits_maximum(arena.take<A>(shape.hidden)) {}
  A* average;         // [padded C] the pooled maps
  A* maximum;         // [padded C]
  A* dz;              // [padded C] gradient of the gate's logits
  A* hidden_units;    // [R] HiddenUnits::sum
  A* dunits_average;  // [R] gradient of HiddenUnits::average
  A* dunits_maximum;  // [R] gradient of HiddenUnits::maximum
};

// From dz to the gradients of both pooled maps.
template <class A>
inline void mlp_backward(const Shape& shape, const Weights<A>& weights, const HiddenUnits<A>& units,
                         const MlpGrads<A>& grads, A* daverage, A* dmaximum) {
  const A* const dz[1] = {grads.dz};
  each_row_times_vectors(shape, weights.fc2, dz, [&](int64_t r, const A* dunits) {
    // relu'(0) = 0; a NaN lets the gradient through, as PyTorch's threshold_backward does.
    grads.dunits_average[r] = units.average[r] <= 0 ? 0 : dunits[0];
    grads.dunits_maximum[r] = units.maximum[r] <= 0 ? 0 : dunits[0];
  });
  std::copy_n(units.sum, shape.hidden, grads.hidden_units);
  const A* const factors[2] = {grads.dunits_average, grads.dunits_maximum};
  combine_rows(shape, weights.fc1, factors, [&](int64_t c, const Vec<A>* sums) {
    store(daverage + c, sums[0]);
    store(dmaximum + c, sums[1]);
  });
}
