// The launch plan: how a problem is cut into launches, blocks and threads. Host code without CUDA.
//
// A plan decides about speed only. How it cuts a sample depends on the problem and never on the
// device, so that results are the same bits on every GPU of one architecture; the device decides
// how many samples make a chunk.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "device.h"

namespace cbam::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;        // of every block
constexpr int kMinLanes = 4;         // that share a row of a sweep: it has up to 4 in flight
constexpr int64_t kPlaceBytes = 80;  // of shared memory, where a block keeps what is its part
constexpr int kRunBits = 2;
constexpr int kRun = 1 << kRunBits;  // pixels of a column that a thread convolves together
constexpr int kColumnStep = 4;       // columns of weights in shared memory are multiples of it
constexpr int kMaxMlpSpan = 128;     // channels of a block of the MLP

// Division by a number that the host knows: (n * multiplier) >> shift, exact for n < 2^31.
struct Divisor {
  uint32_t multiplier;
  int shift;
};

// Threads of a block that read a matrix: `lanes` share a row, groups of lanes have different rows.
struct Team {
  int lanes, lane_bits;  // a power of two, kMinLanes to kWarp, and its logarithm
  int groups;
  int64_t row_step;  // elements from a row of a group to its next
};

// How a sweep (sweep.cuh) cuts a sample, which it sees as a matrix: channels by pixels in
// contiguous tensors, pixels by channels in channels_last.
struct Sweep {
  Team down, along;                    // where threads go down the columns, or along the rows
  int64_t row_span, column_span;       // rows and columns of a block
  int64_t row_spans, column_spans;     // of a sample
  int64_t blocks;                      // of a sample: their product
  int64_t span_pixels;                 // of a span of pixels
  int64_t pixel_spans, channel_spans;  // row_spans and column_spans as the layout has them
  Divisor by_blocks, by_column_spans;
};

// How the convolutions cut a sample: tiles of pixels with a border.
struct Tiling {
  int rows, columns;  // of a tile: whole runs, which may reach past the map
  int64_t row_tiles, column_tiles;
  int64_t tiles;  // of a sample: their product
  int part_bits;  // 2^part_bits threads share a run: kRun or more
  bool staged;    // whether maps with their border and weights fit into shared memory
  Divisor by_columns, by_window_columns;  // of a tile, and of it with its border
};

// The launches of the MLP cut its matrices along the channels, of which there are more than hidden
// units.
struct Mlp {
  int span;    // channels of a block: a power of two
  int blocks;  // of a sample
};

struct Plan {
  int vector;     // elements of an access to feature maps: 16 bytes, or 1
  int64_t chunk;  // samples whose launches run together, so that they meet in the L2 cache
  Sweep sweep;    // of all sums, and of the input's gradient
  Mlp mlp;
  Tiling tiling;
};

enum class Pass { kForward, kBackward };

// All feature maps and gates begin at multiples of 16 bytes.
Plan make_plan(const Problem& problem, Pass pass, const Device& device);

// Bytes of shared memory for the convolution of a staged tile, or for its gradients.
int64_t staged_bytes(const Tiling& tiling, const Problem& problem, Pass pass);

}  // namespace cbam::cuda
