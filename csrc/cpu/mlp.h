// The MLP of the channel gate, one sample at a time, forward and backward.
//
// Weights are packed as rows over the channels for both layers ([R, C], the second layer
// transposed), padded with zeros to whole vectors, so that no loop here has a tail.
//
// Included once per instruction set by isa.inl.

template <class A>
struct Weights {
  Weights(Arena& arena, const Shape& shape)
      : fc1(arena.take<A>(shape.hidden * shape.padded_c)),
        fc1_bias(arena.take<A>(shape.hidden)),
        fc2(arena.take<A>(shape.hidden * shape.padded_c)),
        fc2_bias(arena.take<A>(shape.padded_c)),
        conv(arena.take<A>(2 * shape.kernel * shape.kernel)),
        conv_flipped(arena.take<A>(2 * shape.kernel * shape.kernel)),
        conv_bias(arena.take<A>(1)) {}

  // Absent biases stay zero.
  void pack_from(const Parameters& from, const Shape& shape) const {
    const int64_t taps = shape.kernel * shape.kernel;
    pack(from.fc1_weight, shape.padded_c, fc1);
    pack(transposed(from.fc2_weight), shape.padded_c, fc2);
    pack(from.conv_weight, shape.kernel, conv);
    if (from.fc1_bias.data != nullptr) pack(from.fc1_bias, 0, fc1_bias);
    if (from.fc2_bias.data != nullptr) pack(from.fc2_bias, 0, fc2_bias);
    if (from.conv_bias.data != nullptr) pack(from.conv_bias, 0, conv_bias);
    for (int map = 0; map < 2; ++map) {
      std::reverse_copy(conv + map * taps, conv + (map + 1) * taps, conv_flipped + map * taps);
    }
  }

  A* fc1;           // [R, padded C]
  A* fc1_bias;      // [R]
  A* fc2;           // [R, padded C], transposed
  A* fc2_bias;      // [padded C]
  A* conv;          // [2, k, k]
  A* conv_flipped;  // [2, k, k], each map turned by half a turn
  A* conv_bias;     // [1]
};

template <class A>
inline A dot(int64_t n, const A* a, const A* b) {
  constexpr int64_t kBlock = 4096;  // bounds the rounding error of long sums
  Vec<A> sum = Vec<A>{};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec<A> block = Vec<A>{};
    for (int64_t i = begin; i < std::min(begin + kBlock, n); i += kLanes<A>) {
      block += load(a + i) * load(b + i);
    }
    sum += block;
  }
  return reduce_lanes<Add>(sum);
}

// What one sample's MLP keeps. The average and the maximum have hidden units of their own.
template <class A>
struct Hidden {
  Hidden(Arena& arena, const Shape& shape)
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
inline void mlp_hidden(const Shape& shape, const Weights<A>& weights, const A* average,
                       const A* maximum, const Hidden<A>& hidden) {
  for (int64_t r = 0; r < shape.hidden; ++r) {
    const A* row = weights.fc1 + r * shape.padded_c;
    hidden.average[r] = dot(shape.padded_c, row, average) + weights.fc1_bias[r];
    hidden.maximum[r] = dot(shape.padded_c, row, maximum) + weights.fc1_bias[r];
    hidden.sum[r] = relu(hidden.average[r]) + relu(hidden.maximum[r]);
  }
}

// Calls f(c, sums) for every vector of channels, with up to `count` sums over r of
// factors[k][r] * matrix[r][c].
template <class A, int count, class F>
inline void row_combinations(const Shape& shape, const A* matrix, const A* const (&factors)[count],
                             F&& f) {
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    Vec<A> sums[count] = {};
    for (int64_t r = 0; r < shape.hidden; ++r) {
      const Vec<A> row = load(matrix + r * shape.padded_c + c);
      for (int k = 0; k < count; ++k) sums[k] += factors[k][r] * row;
    }
    f(c, sums);
  }
}

// ca = sigmoid(W2 hidden + 2 b2), padded with zeros.
template <class A>
inline void mlp_gate(const Shape& shape, const Weights<A>& weights, const Hidden<A>& hidden,
                     A* ca) {
  row_combinations<A, 1>(shape, weights.fc2, {hidden.sum}, [&](int64_t c, const Vec<A>* sums) {
    store(ca + c, sigmoid(sums[0] + A{2} * load(weights.fc2_bias + c)));
  });
  std::fill(ca + shape.c, ca + shape.padded_c, A{0});
}

// The gradients that one sample contributes, kept until all samples are done (their sums over the
// batch are the weights' gradients).
template <class A>
struct MlpGrads {
  MlpGrads(Arena& arena, const Shape& shape)
      : average(arena.take<A>(shape.padded_c)),
        maximum(arena.take<A>(shape.padded_c)),
        dz(arena.take<A>(shape.padded_c)),
        hidden(arena.take<A>(shape.hidden)),
        dhidden_average(arena.take<A>(shape.hidden)),
        dhidden_maximum(arena.take<A>(shape.hidden)) {}
  A* average;          // [padded C] the pooled maps
  A* maximum;          // [padded C]
  A* dz;               // [padded C] gradient of the gate's logits
  A* hidden;           // [R] Hidden::sum
  A* dhidden_average;  // [R] gradient of Hidden::average
  A* dhidden_maximum;  // [R] gradient of Hidden::maximum
};

// From dz to the gradients of both pooled maps.
template <class A>
inline void mlp_backward(const Shape& shape, const Weights<A>& weights, const Hidden<A>& hidden,
                         const MlpGrads<A>& grads, A* daverage, A* dmaximum) {
  for (int64_t r = 0; r < shape.hidden; ++r) {
    const A dhidden = dot(shape.padded_c, weights.fc2 + r * shape.padded_c, grads.dz);
    // relu'(0) = 0; a NaN lets the gradient through, as PyTorch's threshold_backward does.
    grads.dhidden_average[r] = hidden.average[r] <= 0 ? 0 : dhidden;
    grads.dhidden_maximum[r] = hidden.maximum[r] <= 0 ? 0 : dhidden;
  }
  std::copy_n(hidden.sum, shape.hidden, grads.hidden);
  row_combinations<A, 2>(shape, weights.fc1, {grads.dhidden_average, grads.dhidden_maximum},
                         [&](int64_t c, const Vec<A>* sums) {
                           store(daverage + c, sums[0]);
                           store(dmaximum + c, sums[1]);
                         });
}

// Sums over the batch: row r of dW1 and of the transposed dW2. Blocks of samples bound the rounding
// error of long sums.
template <class A>
inline void mlp_weight_grads(const Shape& shape, const Prepared<MlpGrads<A>>& samples, int64_t r,
                             A* dfc1, A* dfc2) {
  constexpr int64_t kBlock = 64;
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    Vec<A> fc1 = Vec<A>{}, fc2 = Vec<A>{};
    for (int64_t begin = 0; begin < shape.n; begin += kBlock) {
      Vec<A> fc1_block = Vec<A>{}, fc2_block = Vec<A>{};
      for (int64_t n = begin; n < std::min(begin + kBlock, shape.n); ++n) {
        const MlpGrads<A>& s = samples[n];
        fc1_block +=
            s.dhidden_average[r] * load(s.average + c) + s.dhidden_maximum[r] * load(s.maximum + c);
        fc2_block += s.hidden[r] * load(s.dz + c);
      }
      fc1 += fc1_block;
      fc2 += fc2_block;
    }
    store(dfc1 + c, fc1);
    store(dfc2 + c, fc2);
  }
}
