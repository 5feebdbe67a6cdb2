// Gradients of the parameters: what the samples contributed, summed over the batch in the order of
// the samples, so that the result does not depend on threads.
//
// Included once per instruction set by isa.inl.

// Sums over the batch: `rows` rows from r of dW1 and of the transposed dW2. Blocks of samples bound
// the rounding error of long sums.
template <int rows, class A>
inline void mlp_weight_grads(const Shape& shape, const Prepared<MlpGrads<A>>& samples, int64_t r,
                             const Weights<A>& grads) {
  constexpr int64_t kBlock = 64;
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    Vec<A> fc1[rows] = {}, fc2[rows] = {};
    for (int64_t begin = 0; begin < shape.n; begin += kBlock) {
      Vec<A> fc1_block[rows] = {}, fc2_block[rows] = {};
      for (int64_t n = begin; n < std::min(begin + kBlock, shape.n); ++n) {
        const MlpGrads<A>& s = samples[n];
        const Vec<A> average = load(s.average + c), maximum = load(s.maximum + c);
        const Vec<A> dz = load(s.dz + c);
        for (int i = 0; i < rows; ++i) {
          fc1_block[i] += s.dunits_average[r + i] * average + s.dunits_maximum[r + i] * maximum;
          fc2_block[i] += s.hidden_units[r + i] * dz;
        }
      }
      for (int i = 0; i < rows; ++i) {
        fc1[i] += fc1_block[i];
        fc2[i] += fc2_block[i];
      }
    }
    for (int i = 0; i < rows; ++i) {
      store(grads.fc1 + (r + i) * shape.padded_c + c, fc1[i]);
      store(grads.fc2 + (r + i) * shape.padded_c + c, fc2[i]);
    }
  }
}

// Sums over the batch what the samples contributed to the MLP's weights.
template <class A>
inline void write_mlp_grads(const Shape& shape, bool parallel, const Prepared<MlpGrads<A>>& samples,
                            const Parameters& grads) {
  const Prepared<Weights<A>> memory(1, shape);
  const Weights<A>& sums = memory[0];
  constexpr int kRows = 4;
  for_each_unit(parallel, divide_up(shape.hidden, kRows), [&](int64_t unit) {
    const int64_t first = unit * kRows, last = std::min(first + kRows, shape.hidden);
    if (last - first == kRows) {
      mlp_weight_grads<kRows>(shape, samples, first, sums);
    } else {
      for (int64_t r = first; r < last; ++r) mlp_weight_grads<1>(shape, samples, r, sums);
    }
    for (int64_t r = first; r < last; ++r) {
      double bias = 0;
      for (int64_t n = 0; n < shape.n; ++n) {
        bias += double{samples[n].dunits_average[r]} + samples[n].dunits_maximum[r];
      }
      sums.fc1_bias[r] = static_cast<A>(bias);
    }
  });
  for (int64_t c = 0; c < shape.c; ++c) {
    double bias = 0;
    for (int64_t n = 0; n < shape.n; ++n) bias += samples[n].dz[c];
    sums.fc2_bias[c] = static_cast<A>(2 * bias);  // the MLP ran twice
  }
  unpack(sums.fc1, shape.padded_c, grads.fc1_weight);
  unpack(sums.fc1_bias, 0, grads.fc1_bias);
  const ParameterView& fc2 = grads.fc2_weight;
  if (fc2.data != nullptr && has_plain_rows<A>(fc2)) {
    transpose(shape.hidden, shape.c, sums.fc2, shape.padded_c, static_cast<A*>(fc2.data),
              shape.hidden);
  } else {
    unpack(sums.fc2, shape.padded_c, transposed(fc2));
  }
  unpack(sums.fc2_bias, 0, grads.fc2_bias);
}

template <class A>
inline void write_conv_grads(const Shape& shape, const std::vector<double>& samples,
                             const Parameters& grads) {
  const int64_t taps = 2 * shape.kernel * shape.kernel;
  std::vector<A> sums(taps + 1);
  for (int64_t i = 0; i <= taps; ++i) {
    double sum = 0;
    for (int64_t n = 0; n < shape.n; ++n) sum += samples[n * (taps + 1) + i];
    sums[i] = static_cast<A>(sum);
  }
  unpack(sums.data(), shape.kernel, grads.conv_weight);
  unpack(sums.data() + taps, 0, grads.conv_bias);
}
