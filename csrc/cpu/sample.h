// One sample cut into pieces: tiles of pixels, the bands of rows that follow them, bordered maps,
// scratch memory.
//
// Everything here depends on the problem alone, never on the number of threads: partial sums are
// taken over the same tiles however the work is spread, so the results are the same bits.
//
// Included once per instruction set by isa.inl.

struct Shape {
  explicit Shape(const Problem& p)
      : n(p.n), c(p.c), h(p.h), w(p.w), hidden(p.hidden), kernel(p.kernel) {
    pixels = h * w;
    const int64_t fitting = kTileBytes / (c * element_size(p.dtype));
    const int64_t most = std::min(kMaxTile, std::max(kMinTile, fitting));
    tile = round_up(divide_up(pixels, divide_up(pixels, most)), kMaxLanes);
    tiles = divide_up(pixels, tile);
    padded_c = round_up(c, kMaxLanes);
    row_step = kMaxLanes / std::min(w & -w, kMaxLanes);
    halo = kernel / 2;
    stride = round_up(w + halo, kMaxLanes);
    interior = halo * stride + round_up(halo, kMaxLanes);
    bordered = interior + (h + halo) * stride + round_up(halo, kMaxLanes);
  }

  static constexpr int64_t kMaxLanes = 16;  // of any instruction set, so that all cut alike
  // What is read of x for a tile, small enough that a tile, the band behind it and what is written
  // share a second-level cache.
  static constexpr int64_t kTileBytes = 256 * 1024;
  // Shorter pieces of a row are over before the hardware has begun to fetch ahead.
  static constexpr int64_t kMinTile = 256;
  static constexpr int64_t kMaxTile = 4096;

  static int64_t divide_up(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
  }
  static int64_t round_up(int64_t value, int64_t multiple) {
    return divide_up(value, multiple) * multiple;
  }

  int64_t n, c, h, w, hidden, kernel;
  int64_t pixels;
  int64_t tile, tiles;  // pixels in a tile (the last may have fewer), tiles in a sample
  int64_t padded_c;     // channels rounded up to whole vectors
  int64_t row_step;     // rows that make up whole vectors
  // Bordered maps have k // 2 zeros on every side of the H x W pixels (at least: the zeros right of
  // a row are also those left of the next, and rows begin at whole vectors).
  int64_t halo;      // k // 2
  int64_t stride;    // of a row
  int64_t interior;  // where the first pixel stands
  int64_t bordered;  // elements in all
};

// The pixels [begin, end) of a sample.
struct Tile {
  Tile(int64_t begin, int64_t end) : begin(begin), end(end) {}
  Tile(const Shape& shape, int64_t index)
      : begin(index * shape.tile), end(std::min(begin + shape.tile, shape.pixels)) {}
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The rows that can be convolved once the tiles up to one are known, and could not be before. The
// bands of all tiles cover the sample.
struct Band {
  Band(const Shape& shape, int64_t index)
      : first_row(rows_known(shape, index - 1)),
        last_row(rows_known(shape, index)),
        pixels(first_row * shape.w, last_row * shape.w) {}
  int64_t first_row, last_row;
  Tile pixels;

 private:
  static int64_t rows_known(const Shape& shape, int64_t tile) {
    if (tile + 1 >= shape.tiles) return shape.h;
    const int64_t rows = std::max<int64_t>(0, (tile + 1) * shape.tile / shape.w - shape.halo);
    return rows / shape.row_step * shape.row_step;
  }
};

// Calls first(t) for all tiles and second(t) for all bands, t ascending. A thread that has the
// sample to itself lets each band follow its tile closely, to find its pixels in the cache.
template <class First, class Second>
inline void each_tile_and_band(const Shape& shape, bool parallel, First&& first, Second&& second) {
  if (parallel) {
    for_each_unit(true, shape.tiles, first);
    for_each_unit(true, shape.tiles, second);
    return;
  }
  for (int64_t t = 0; t < shape.tiles; ++t) {
    first(t);
    second(t);
  }
}

// Calls f(t) for all tiles, from the last to the first: a sweep that begins where the one before it
// ended finds more in the cache.
template <class F>
inline void each_tile_backwards(const Shape& shape, bool parallel, F&& f) {
  for_each_unit(parallel, shape.tiles, [&](int64_t i) { f(shape.tiles - 1 - i); });
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
  template <class T>
  T* zeros(int64_t count) {
    T* taken = take<T>(count);
    if (taken != nullptr) std::fill_n(taken, count, T{0});
    return taken;
  }
  // [rows, padded C], the padding zero.
  template <class T>
  T* channels(const Shape& shape, int64_t rows = 1) {
    const int64_t count = rows * shape.padded_c;
    return shape.c == shape.padded_c ? take<T>(count) : zeros<T>(count);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

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

// Some objects that take their memory from arenas (one for each worker, say), and the one block
// behind them. T is constructed from (Arena&, const Shape&).
template <class T>
class Prepared {
 public:
  Prepared(int64_t count, const Shape& shape) {
    Arena needed;
    T(needed, shape);
    const size_t bytes = static_cast<size_t>(count * needed.used());
    memory_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
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
