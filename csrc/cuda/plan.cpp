#include "plan.h"

#include <algorithm>

namespace cbam::cuda {
namespace {

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

constexpr int64_t kLine = 128;              // bytes that memory gives at once
constexpr int64_t kFill = 512;              // blocks that keep a big GPU busy
constexpr int64_t kTogether = 16 * kMiB;    // samples of this size are launched together at least
constexpr int64_t kBlockBytes = 32 * kKiB;  // work that repays the beginning and end of a block
constexpr int64_t kMaxRowSpan = 1024;       // rows whose totals a block keeps in shared memory
constexpr int64_t kMaxPartials = 512;       // per channel, for the last block to add up
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

// Spans of pixels leave a few partial results for each channel, spans of channels some for each
// pixel.
Sweep cut_sweep(const Problem& p, int vector) {
  const bool nchw = p.layout == Layout::kNCHW;
  const int64_t rows = nchw ? p.c : p.pixels(), columns = nchw ? p.pixels() : p.c;
  Sweep s{};
  s.lanes = static_cast<int>(
      std::clamp<int64_t>(power_of_two_from(divide_up(columns, vector)), kMinLanes, kWarp));
  s.row_span = std::min(rows, kMaxRowSpan);
  const auto groups = [&] { return int64_t{kThreads} / s.lanes; };
  const auto tile = [&] { return int64_t{s.lanes} * vector; };
  const auto blocks = [&] {
    return samples_together(p) * divide_up(columns, tile()) * divide_up(rows, s.row_span);
  };
  if (nchw) {
    // Where blocks are few they get smaller, and stay about twice as high as wide: that makes the
    // fewest partial results, of which those of spans of channels weigh more.
    const int64_t narrowest = vector == 1 ? kWarp : kLine / (vector * element_size(p.dtype));
    while (blocks() < kFill * 3 / 4) {
      const bool narrows = s.lanes > narrowest && 2 * groups() <= rows;
      const bool splits = s.row_span > 2 * groups();
      if (narrows && (!splits || 2 * tile() >= s.row_span)) {
        s.lanes /= 2;
      } else if (splits) {
        s.row_span = std::min(round_up(divide_up(s.row_span, 2), groups()), rows);
      } else {
        break;
      }
    }
    const int64_t for_work = kBlockBytes / (s.row_span * tile() * element_size(p.dtype));
    const int64_t together = std::max({int64_t{1}, std::min(for_work, blocks() / kFill),
                                       divide_up(columns, tile()) / kMaxPartials});
    s.column_span = tile() * together;
  } else {
    const int64_t for_work = 2 * kBlockBytes / (tile() * element_size(p.dtype));
    const int64_t for_fill = rows * samples_together(p) * divide_up(columns, tile()) / kFill;
    const int64_t wanted = std::max(std::min(for_work, for_fill), rows / kMaxPartials);
    s.row_span = std::min(std::clamp(round_up(wanted, groups()), groups(), kMaxRowSpan), rows);
    s.column_span = tile();
  }
  s.groups = static_cast<int>(groups());
  s.row_step = s.groups * columns;
  s.row_spans = divide_up(rows, s.row_span);
  s.column_spans = divide_up(columns, s.column_span);
  s.blocks = s.row_spans * s.column_spans;
  s.span_pixels = nchw ? s.column_span : s.row_span;
  s.pixel_spans = nchw ? s.column_spans : s.row_spans;
  s.channel_spans = nchw ? s.row_spans : s.column_spans;
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
  const auto reciprocal = [](int64_t divisor) {
    return static_cast<uint32_t>(divide_up(int64_t{1} << kReciprocalBits, divisor));
  };
  t.run_reciprocal = reciprocal(columns);
  t.window_reciprocal = reciprocal(columns + border);
  return t;
}

// Samples whose launches run together: as many as half of the L2 cache holds, if that is worth the
// launches of one more chunk.
int64_t count_chunk(const Problem& p, Pass pass, const Plan& plan, const Device& device) {
  const int64_t all = std::max<int64_t>(p.n, 1);
  const int64_t bytes = (pass == Pass::kForward ? 1 : 2) * sample_bytes(p);
  const int64_t budget = device.l2_bytes / 2;
  const bool pays = budget >= device.multiprocessors * kChunkBytes && bytes <= device.l2_bytes;
  const int64_t blocks = std::max(plan.sweep.blocks, plan.tiling.tiles);
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
  plan.chunk = count_chunk(p, pass, plan, device);
  return plan;
}

}  // namespace cbam::cuda
