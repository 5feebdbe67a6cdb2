#include "plan.h"

#include <algorithm>
#include <cmath>

namespace cbam::cuda {
namespace {

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

constexpr int64_t kLine = 128;              // bytes that memory gives at once
constexpr int64_t kFill = 512;              // blocks that keep a big GPU busy
constexpr int64_t kSweepFill = 448;         // of a sweep: more than 3 on each of 132
constexpr int64_t kTogether = 16 * kMiB;    // samples of this size are launched together at least
constexpr int64_t kBlockBytes = 32 * kKiB;  // work that repays the beginning and end of a block
constexpr int64_t kLeastBytes = 8 * kKiB;   // less is not worth a block
constexpr int64_t kMaxRowSpan = 1024;       // rows whose totals a block keeps in shared memory
constexpr int64_t kMaxPixelSpans = 512;     // each a partial result of every channel
constexpr int64_t kMaxChannelSpans = 16;    // each a partial result of every pixel
// Of a chunk for each multiprocessor, for reading it from memory again to take longer than its
// launches: six at 2 us, where a multiprocessor's share of the bandwidth is 16 bytes a nanosecond
// and two reads are saved. (Modelled; between 5, of an L4, and 25, of an H100.)
constexpr int64_t kChunkBytes = 96 * kKiB;
constexpr int64_t kMaxBlocks = 2147483647;                // of a grid
constexpr int64_t kTileColumns = 64, kTilePixels = 1024;  // of a tile: wide enough for its border
constexpr int64_t kSpread = 64;                           // tiles that small GPUs share out
constexpr int kMinPartBits = 2, kMaxPartBits = 4;         // of threads that share a run
constexpr int64_t kSharedBytes = 48 * kKiB;  // that every GPU gives a block without being asked

int64_t sample_bytes(const Problem& p) { return p.c * p.pixels() * element_size(p.dtype); }

// Samples that are surely launched together, on any device.
int64_t samples_together(const Problem& p) {
  return std::clamp<int64_t>(kTogether / sample_bytes(p), 1, std::max<int64_t>(p.n, 1));
}

int choose_vector(const Problem& p) {
  const int64_t wide = 16 / element_size(p.dtype);
  const int64_t contiguous = p.layout == Layout::kNCHW ? p.pixels() : p.c;
  return contiguous % wide == 0 ? static_cast<int>(wide) : 1;
}

int bits_of(int64_t power) {
  int bits = 0;
  while (power >>= 1) ++bits;
  return bits;
}

Divisor divisor(int64_t by) {
  const int bits = bits_of(power_of_two_from(by));
  return {static_cast<uint32_t>(divide_up(int64_t{1} << (31 + bits), by)), 31 + bits};
}

Team make_team(int64_t lanes, int64_t columns) {
  Team team{};
  team.lanes = static_cast<int>(lanes);
  team.lane_bits = bits_of(lanes);
  team.groups = kThreads / team.lanes;
  team.row_step = team.groups * columns;
  return team;
}

// Blocks are as many as fill a GPU, where they are not too small for it. Every span of pixels
// leaves a partial result for each channel, every span of channels one for each pixel.
Sweep cut_sweep(const Problem& p, int vector) {
  const bool nchw = p.layout == Layout::kNCHW;
  const int64_t rows = nchw ? p.c : p.pixels(), columns = nchw ? p.pixels() : p.c;
  const int64_t size = element_size(p.dtype);
  const int64_t area =  // elements of a block
      std::clamp(samples_together(p) * sample_bytes(p) / kSweepFill, kLeastBytes, kBlockBytes) /
      size;
  const int64_t most_rows = std::min(rows, kMaxRowSpan);
  Sweep s{};
  int64_t height;
  if (nchw) {
    // About twice as high as wide: that makes the fewest partial results, of which those for pixels
    // weigh more. Cut where lines of memory end.
    const int64_t line = vector == 1 ? 1 : kLine / size;
    const int64_t square = static_cast<int64_t>(std::sqrt(static_cast<double>(area) / 2));
    const int64_t width = std::max(
        {square, area / most_rows, divide_up(columns, kMaxPixelSpans), vector == 1 ? kWarp : line});
    const int64_t lines = divide_up(columns, line), wanted = (width + line / 2) / line;
    const int64_t spans = std::max<int64_t>((lines + wanted / 2) / wanted, 1);
    s.column_span = std::min(divide_up(lines, spans) * line, round_up(columns, vector));
    // Channels are not cut further where spans of pixels must be long.
    const int64_t least = divide_up(rows, kMaxChannelSpans);
    height = std::max({area / s.column_span, width > square ? std::min(rows, square) : 0, least});
  } else {
    s.column_span = std::min(round_up(columns, vector), int64_t{kWarp} * vector);
    height = std::max(area / s.column_span, divide_up(rows, kMaxPixelSpans));
  }
  const int64_t fewest = divide_up(rows, kMaxRowSpan);
  s.row_span = divide_up(rows, std::max(rows / std::min(height, rows), fewest));
  // Down the columns one tile is as wide as the block, where a warp can be. Along the rows a lane
  // has some pieces of a row, and 8 lanes read whole lines.
  const int64_t pieces = divide_up(s.column_span, vector);
  const int64_t down = std::clamp<int64_t>(power_of_two_from(pieces), kMinLanes, kWarp);
  const int64_t along =
      std::min(down, std::clamp<int64_t>(power_of_two_from(pieces / 8), 8, kWarp));
  s.down = make_team(down, columns);
  s.along = make_team(along, columns);
  s.row_spans = divide_up(rows, s.row_span);
  s.column_spans = divide_up(columns, s.column_span);
  s.blocks = s.row_spans * s.column_spans;
  s.span_pixels = nchw ? s.column_span : s.row_span;
  s.pixel_spans = nchw ? s.column_spans : s.row_spans;
  s.channel_spans = nchw ? s.row_spans : s.column_spans;
  s.by_blocks = divisor(s.blocks);
  s.by_column_spans = divisor(s.column_spans);
  return s;
}

// Threads that share a run: as many as make the fewest steps, of a column of weights each and one
// to add up.
int choose_part_bits(const Tiling& tiling, int64_t kernel) {
  const auto steps = [&](int bits) {
    const int64_t parts = int64_t{1} << bits, runs = int64_t{tiling.rows} / kRun * tiling.columns;
    return divide_up(runs * parts, kThreads) * (divide_up(2 * kernel, parts) + 1);
  };
  int best = kMinPartBits;
  for (int bits = best + 1; bits <= kMaxPartBits; ++bits) {
    if (steps(bits) < steps(best)) best = bits;
  }
  return best;
}

// Tiles of 64 columns or fewer, of whole runs. Where tiles are few they get smaller, but no smaller
// than their border wherever the map allows that; where they are so few that multiprocessors have
// none, work that is done twice costs nothing, and they get as small as can be.
Tiling cut_tiles(const Problem& p) {
  const int64_t border = p.kernel - 1;
  const int64_t columns = divide_up(p.w, divide_up(p.w, kTileColumns));
  const int64_t most = std::max<int64_t>(round_up(kTilePixels / columns, kRun), kRun);
  // rows * columns > (rows + border) * (columns + border) - rows * columns
  const int64_t least = columns > border
                            ? round_up(border * (columns + border) / (columns - border) + 1, kRun)
                            : most;
  Tiling t{};
  t.columns = static_cast<int>(columns);
  t.column_tiles = divide_up(p.w, columns);
  const auto set_rows = [&](int64_t rows) {
    const int64_t alike = round_up(divide_up(p.h, divide_up(p.h, rows)), kRun);
    const int64_t enough = std::min({rows, least, round_up(p.h, kRun)});
    t.rows = static_cast<int>(std::max(alike, enough));
    t.row_tiles = divide_up(p.h, t.rows);
    t.tiles = t.row_tiles * t.column_tiles;
  };
  const auto in_flight = [&] { return samples_together(p) * t.tiles; };
  const auto fits = [&] { return staged_bytes(t, p, Pass::kBackward) <= kSharedBytes; };
  set_rows(most);
  if (in_flight() < kFill) set_rows(std::min(least, most));
  while (t.rows > kRun && (in_flight() < kSpread || !fits())) set_rows(t.rows - kRun);
  t.staged = fits();
  t.part_bits = choose_part_bits(t, p.kernel);
  t.by_columns = divisor(columns);
  t.by_window_columns = divisor(columns + border);
  return t;
}

// A block's work are partial results of its channels, and weights: the more there are of either for
// a channel, the fewer channels. But the fewer these are, the more parts the hidden units have,
// which every block of the next launch adds up.
Mlp cut_mlp(const Problem& p, int64_t pixel_spans) {
  constexpr int64_t kPartials = 4096;      // per block: 16 for each thread
  constexpr int64_t kMinSpan = 8;          // 32 bytes of accumulators: what memory moves at least
  constexpr int64_t kWeights = 16 * 2048;  // per block, if 16 channels have one hidden unit
  constexpr int64_t kMinWeights = 32;      // side by side
  constexpr int64_t kParts = 32;           // of a hidden unit
  int64_t span = kMaxMlpSpan;
  while (span > kMinWeights && span * p.c > kWeights) span /= 2;
  while (span > kMinSpan && span * pixel_spans > kPartials) span /= 2;
  span = std::max(span, power_of_two_from(divide_up(p.c, kParts)));
  span = std::min({span, int64_t{kMaxMlpSpan}, power_of_two_from(p.c)});
  return {static_cast<int>(span), static_cast<int>(divide_up(p.c, span))};
}

// Samples whose launches run together: as many as half of the L2 cache holds, if that is worth the
// launches of one more chunk.
int64_t count_chunk(const Problem& p, Pass pass, const Plan& plan, const Device& device) {
  const int64_t all = std::max<int64_t>(p.n, 1);
  const int64_t bytes = (pass == Pass::kForward ? 1 : 2) * sample_bytes(p);
  const int64_t budget = device.l2_bytes / 2;
  const bool pays = budget >= device.multiprocessors * kChunkBytes && bytes <= device.l2_bytes;
  const int64_t blocks = std::max({plan.sweep.blocks, plan.tiling.tiles, int64_t{plan.mlp.blocks}});
  const int64_t samples = std::clamp<int64_t>(pays ? budget / bytes : all, 1, all);
  const int64_t most = std::clamp<int64_t>(kMaxBlocks / blocks, 1, samples);
  // Chunks of like size: a small last one would not fill the device.
  return divide_up(all, divide_up(all, most));
}

}  // namespace

int64_t staged_bytes(const Tiling& tiling, const Problem& p, Pass pass) {
  const int64_t border = p.kernel - 1;
  const int64_t window = (tiling.rows + border) * (tiling.columns + border);
  const int64_t weights = 2 * p.kernel * round_up(p.kernel, kColumnStep);
  const int64_t maps = pass == Pass::kForward ? 2 : 3;
  const int64_t indices = pass == Pass::kForward ? 0 : window * static_cast<int64_t>(sizeof(int));
  return (weights + maps * window) * accumulator_size(p.dtype) + indices;
}

Plan make_plan(const Problem& p, Pass pass, const Device& device) {
  Plan plan{};
  plan.vector = choose_vector(p);
  plan.sweep = cut_sweep(p, plan.vector);
  plan.tiling = cut_tiles(p);
  plan.mlp = cut_mlp(p, plan.sweep.pixel_spans);
  plan.chunk = count_chunk(p, pass, plan, device);
  return plan;
}

}  // namespace cbam::cuda
