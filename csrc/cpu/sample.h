// One sample cut into pieces: tiles of pixels, bordered maps, scratch memory.
//
// Everything here depends on the problem alone, never on the number of threads: partial sums are
// taken over the same tiles however the work is spread, so the results are the same bits.
//
// Included once per instruction set by isa.inl.

struct Shape {
  explicit Shape(const Problem& p)
      : n(p.n), c(p.c), h(p.h), w(p.w), hidden(p.hidden), kernel(p.kernel) {
    pixels = h * w;
    // Four tiles in a sample of middling size give several threads something to do; a kilopixel is
    // what leaves room for a row of x beside a tile's own maps in the first-level cache.
    tile = std::min(kMaxTile, std::max<int64_t>(kMinTile, round_up((pixels + 3) / 4, kMaxLanes)));
    tiles = (pixels + tile - 1) / tile;
    padded_c = round_up(c, kMaxLanes);
    stride = w + kernel - 1;
    bordered = (h + kernel - 1) * stride;
    rows_per_unit = std::max<int64_t>(1, kMinTile * 8 / stride);
    row_units = (h + rows_per_unit - 1) / rows_per_unit;
  }

  static constexpr int64_t kMaxLanes = 16;  // of any instruction set, so that all cut alike
  static constexpr int64_t kMinTile = 64;
  static constexpr int64_t kMaxTile = 1024;

  static int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }

  int64_t n, c, h, w, hidden, kernel;
  int64_t pixels;
  int64_t tile, tiles;    // pixels in a tile (the last may have fewer), tiles in a sample
  int64_t padded_c;       // channels rounded up to whole vectors
  int64_t stride;         // of a row in a bordered map: k // 2 zeros on both sides of the W pixels
  int64_t bordered;       // size of a bordered map
  int64_t rows_per_unit;  // rows that one unit of the convolutions computes
  int64_t row_units;
};

// The pixels [begin, end) of a sample.
struct Tile {
  Tile(const Shape& shape, int64_t index)
      : index(index), begin(index * shape.tile), end(std::min(begin + shape.tile, shape.pixels)) {}
  int64_t index, begin, end;
  int64_t size() const { return end - begin; }
};

// Calls f(pixel, row, column, count) for the pieces of rows that make up the pixels [begin, end).
template <class F>
inline void each_row_piece(const Shape& shape, int64_t begin, int64_t end, F&& f) {
  int64_t row = begin / shape.w, column = begin % shape.w;
  for (int64_t p = begin; p < end;) {
    const int64_t count = std::min(shape.w - column, end - p);
    f(p, row, column, count);
    p += count;
    ++row;
    column = 0;
  }
}

// Copies the pixels [begin, end), which lie densely at `dense`, into the interior of a bordered
// map.
template <class A>
inline void copy_to_bordered(const Shape& shape, int64_t begin, int64_t end, const A* dense,
                             A* bordered) {
  A* interior = bordered + (shape.kernel / 2) * (shape.stride + 1);
  each_row_piece(shape, begin, end, [&](int64_t p, int64_t row, int64_t column, int64_t count) {
    const A* from = dense + (p - begin);
    A* to = interior + row * shape.stride + column;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  });
}

// Memory for one worker, handed out in order. With no memory behind it, it only counts, so that one
// description of what is needed serves for measuring and for taking.
class Arena {
 public:
  Arena() = default;
  explicit Arena(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* taken = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    // A vector more than asked for: whole vectors are read and written at the end of an array.
    used_ += Shape::round_up(count * static_cast<int64_t>(sizeof(T)) + kAlignment, kAlignment);
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

// Some objects that take their memory from arenas (one for each worker, say), and the one zeroed
// block behind them. T is constructed from (Arena&, const Shape&).
template <class T>
class Prepared {
 public:
  Prepared(int64_t count, const Shape& shape) {
    Arena needed;
    T(needed, shape);
    const size_t bytes = static_cast<size_t>(count * needed.used());
    memory_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
    std::memset(memory_.get(), 0, bytes);
    objects_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      Arena arena(memory_.get() + i * needed.used());
      objects_.emplace_back(arena, shape);
    }
  }

  const T& operator[](int64_t i) const { return objects_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<char, Free> memory_;
  std::vector<T> objects_;
};

// Threads that take whole samples. Below some size waking one costs more than it brings.
inline int64_t count_workers(const Shape& shape) {
  constexpr int64_t kMinElementsPerThread = 16384;
  const int64_t elements = shape.n * shape.c * shape.pixels;
  return std::max<int64_t>(1, std::min(num_threads(), elements / kMinElementsPerThread));
}

// Scratch memories that each_sample needs: where no worker gets a whole sample, one serves all.
inline int64_t count_scratches(const Shape& shape, int64_t workers) {
  return shape.n < workers ? 1 : workers;
}

// Runs sample(worker, n, parallel) for every n. As long as each thread gets a sample, a thread
// takes whole samples (parallel is false); the samples left over are spread over the threads piece
// by piece (parallel is true).
template <class F>
inline void each_sample(const Shape& shape, int64_t workers, F&& sample) {
  const int64_t whole = shape.n / workers * workers;
  if (whole > 0) {
    for_each_unit(workers > 1, workers, [&](int64_t worker) {
      for (int64_t n = worker; n < whole; n += workers) sample(worker, n, false);
    });
  }
  for (int64_t n = whole; n < shape.n; ++n) sample(0, n, true);
}
