#include "plan.h"

#include <algorithm>
#include <numeric>

namespace cbam::cuda {
namespace {

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

constexpr int64_t kLine = 128;              // bytes that memory gives at once
constexpr int64_t kFill = 512;              // blocks that keep a big GPU busy
constexpr int64_t kTogether = 16 * kMiB;    // samples of this size are launched together at least
constexpr int64_t kBlockBytes = 32 * kKiB;  // work that repays the beginning and end of a block
constexpr int64_t kMaxRowSpan = 1024;       // rows whose totals a block keeps in shared memory
constexpr int64_t kMaxPartials = 512;       // per channel, for the MLP to add up
constexpr int64_t kMaxBlocks = 2147483647;  // of a grid
constexpr int64_t kMinTile = 128, kMaxTile = 1024;  // pixels of a tile, within reason

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
  plan.mlp = cut_mlp(p, plan.sweep.pixel_spans);
  plan.chunk = count_chunk(p, pass, plan, device);
  return plan;
}

}  // namespace cbam::cuda
