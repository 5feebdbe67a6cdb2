#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

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
constexpr int64_t kMaxBlocks = 2147483647;  // of a grid
constexpr int64_t kMinTile = 128, kMaxTile = 1024;  // pixels of a tile, within reason

int64_t sample_bytes(const Problem& p) { return p.c * p.pixels() * element_size(p.dtype); }

int64_t power_of_two_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

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

// A vector of pixels must lie in one tile: its rows are a multiple of the vector, or the tile has
// whole rows of the map and a multiple of the vector in all. Zero rows mean that neither is
// possible.
Tiling cut_tiles(const Problem& p, int pixel_vector) {
  constexpr int64_t kWide = 64;  // columns that make a tile wide enough for its halo
  int64_t pixels = std::clamp(2 * kBlockBytes / (p.c * element_size(p.dtype)), kMinTile, kMaxTile);
  if (samples_together(p) * divide_up(p.pixels(), pixels) < kFill) pixels = kMinTile;
  const int64_t multiple = pixel_vector / std::gcd<int64_t, int64_t>(pixel_vector, p.w);
  Tiling t{};
  int64_t columns, rows, row_multiple;
  if (p.w <= kWide || multiple > 1) {
    columns = p.w;
    row_multiple = multiple;
    if (columns * multiple > 4 * kMaxTile) return t;
  } else {
    columns = round_up(divide_up(p.w, divide_up(p.w, kWide)), pixel_vector);
    row_multiple = 1;
  }
  rows = std::max<int64_t>(pixels / columns, 1);
  if (rows > kRun) rows = rows / kRun * kRun;
  rows = round_up(rows, row_multiple);
  if (rows >= p.h) rows = p.h;
  t.rows = static_cast<int>(rows);
  t.columns = static_cast<int>(columns);
  t.row_tiles = divide_up(p.h, rows);
  t.column_tiles = divide_up(p.w, columns);
  t.tiles = t.row_tiles * t.column_tiles;
  t.reciprocal = (uint64_t{1} << 32) / static_cast<uint64_t>(columns) + 1;
  return t;
}

Gate cut_gate(const Problem& p, int vector, const Tiling& tiling) {
  const bool nchw = p.layout == Layout::kNCHW;
  Gate g{};
  g.vector = vector;
  const int64_t wanted =
      std::max<int64_t>(1, kFill / (samples_together(p) * std::max<int64_t>(tiling.tiles, 1)));
  constexpr int64_t kMinSpan = 16;  // channels that repay computing the gates once more
  g.channel_span = std::min(round_up(std::max(divide_up(p.c, wanted), kMinSpan), kMinSpan), p.c);
  g.channel_spans = divide_up(p.c, g.channel_span);
  const int64_t row = nchw ? int64_t{tiling.rows} * tiling.columns : g.channel_span;
  g.lanes =
      static_cast<int>(std::min<int64_t>(power_of_two_from(divide_up(row, vector)), kThreads));
  g.groups = kThreads / g.lanes;
  return g;
}

int64_t count_chunk(const Problem& p, Pass pass, const Plan& plan, const Device& device) {
  const int64_t tensors = pass == Pass::kForward ? 1 : 2;
  // Less would not fill the device, and a cache that small cannot hold a launch anyway.
  const int64_t budget = std::max(device.l2_bytes / 2, device.multiprocessors * 64 * kKiB);
  const int64_t samples =
      std::clamp<int64_t>(budget / (tensors * sample_bytes(p)), 1, std::max<int64_t>(p.n, 1));
  const int64_t blocks = std::max(plan.sweep.blocks, plan.tiling.tiles * plan.gate.channel_spans);
  const int64_t most = std::clamp<int64_t>(kMaxBlocks / blocks, 1, samples);
  // Chunks of like size: a small last one would not fill the device.
  const int64_t all = std::max<int64_t>(p.n, 1);
  return divide_up(all, divide_up(all, most));
}

}  // namespace

int64_t staged_bytes(const Tiling& tiling, const Problem& p, int maps, int64_t values) {
  const int64_t border = p.kernel - 1;
  const int64_t map = (round_up(tiling.rows, kRun) + border) * (tiling.columns + border);
  return kPlaceBytes + (2 * p.kernel * p.kernel + maps * map + values) * accumulator_size(p.dtype);
}

Plan make_plan(const Problem& p, Pass pass, const Device& device) {
  Plan plan{};
  plan.vector = choose_vector(p);
  plan.sweep = cut_sweep(p, plan.vector);
  int gate_vector = plan.vector;
  plan.tiling = cut_tiles(p, p.layout == Layout::kNCHW ? gate_vector : 1);
  if (plan.tiling.rows == 0) {
    gate_vector = 1;
    plan.tiling = cut_tiles(p, gate_vector);
  }
  const int64_t needed =
      std::max(staged_bytes(plan.tiling, p, 2, int64_t{plan.tiling.rows} * plan.tiling.columns),
               staged_bytes(plan.tiling, p, 3, 0));
  plan.tiling.staged = needed <= device.shared_bytes;
  plan.gate = cut_gate(p, gate_vector, plan.tiling);
  plan.chunk = count_chunk(p, pass, plan, device);
  return plan;
}

}  // namespace cbam::cuda
