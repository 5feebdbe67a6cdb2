// How a sample is cut into pieces: tiles of pixels, and the bands of rows that follow them.
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
