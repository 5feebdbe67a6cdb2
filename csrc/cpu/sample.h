// The samples of a call, and the threads that take them.
//
// Included once per instruction set by isa.inl.

// Threads that take whole samples. Below some size waking one costs more than it brings.
inline int64_t count_workers(const Shape& shape) {
  constexpr int64_t kMinElementsPerThread = 16384;
  const int64_t elements = shape.n * shape.c * shape.pixels;
  return std::max<int64_t>(1, std::min(num_threads(), elements / kMinElementsPerThread));
}

// Memories that each_sample needs: where no worker gets a whole sample, one serves all.
inline int64_t count_memories(const Shape& shape, int64_t workers) {
  return shape.n < workers ? 1 : workers;
}

// One sample. As long as each thread gets a sample of its own, it is done by one thread; the
// samples left over are spread over the threads piece by piece (parallel is true).
template <class S>
struct Sample {
  using A = Acc<S>;

  // The sample's part of an array with so many elements for each sample. Null stays null.
  template <class T>
  T* part(T* batch, int64_t elements) const {
    return batch == nullptr ? nullptr : batch + n * elements;
  }
  // Of a feature map, and of accumulators, as the arguments have them.
  const S* features(const void* map) const {
    return part(static_cast<const S*>(map), shape.c * shape.pixels);
  }
  S* features(void* map) const { return part(static_cast<S*>(map), shape.c * shape.pixels); }
  const A* values(const void* batch, int64_t elements) const {
    return part(static_cast<const A*>(batch), elements);
  }
  A* values(void* batch, int64_t elements) const { return part(static_cast<A*>(batch), elements); }

  const Shape& shape;
  int64_t n;
  bool parallel;
};

// Calls f(sample, memory) for every sample, each thread with a Memory of its own.
template <class S, class Memory, class F>
inline void each_sample(const Shape& shape, F&& f) {
  const int64_t workers = count_workers(shape);
  const Prepared<Memory> memories(count_memories(shape, workers), shape);
  const int64_t whole = shape.n / workers * workers;
  if (whole > 0) {
    for_each_unit(workers > 1, workers, [&](int64_t worker) {
      for (int64_t n = worker; n < whole; n += workers) {
        f(Sample<S>{shape, n, false}, memories[worker]);
      }
    });
  }
  for (int64_t n = whole; n < shape.n; ++n) f(Sample<S>{shape, n, true}, memories[0]);
}
