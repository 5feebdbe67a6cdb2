// A sweep: one walk over the feature map (or two of the same shape) that adds up values per pixel
// and per channel at once, or writes a feature map.
//
// Both layouts are a matrix for each sample: the rows are channels and the columns pixels in
// contiguous tensors, the other way round in channels_last. A thread owns W neighbouring columns,
// `lanes` threads side by side make a row of a tile, and the groups of lanes in a block take
// different rows. So loads are coalesced in both layouts; values per column stay in registers, and
// values per row meet by shuffles.
//
//   launch   one block for each (sample, row span, column span); see plan.h
//   traffic  each input once; per row and per column span (and the other way round) one partial
//            result, which the launch that needs it adds up in the order of the spans
//
// What is added up is a Body:
//
//   Body::A, Body::Storage     accumulator and storage
//   Body::Pixel, Channel       accumulators (reduce.cuh), or Nothing
//   Body::PixelFactor, ChannelFactor   what an element needs of its pixel's and channel's maps
//   Body::kInputs, kUse        1 or 2 feature maps to read, and whether for the last time
//   Body::kRows                rows that a thread has in flight
//   Body::kWrites              whether it writes a feature map
//   x, g, output               feature maps
//   pixel_factors<W>, channel_factors<W>(place, first, to)     W of them, from the block's `first`
//   start_pixel(channel), start_channel(pixel)
//                              accumulators, given the first index that they will meet
//   visit(...)                 one element
//   store_pixel, store_channel  a partial result
#pragma once

#include "launch.cuh"
#include "reduce.cuh"

namespace cbam::cuda {

// Where a block works. What counts blocks, channels, or pixels of a block fits into 32 bits; pixels
// of a sample and offsets in tensors need 64. A Body's accumulators count channels from the
// sample's first, and pixels from the block's.
struct alignas(16) Place {
  int sample;  // of the chunk
  int64_t first_pixel;
  int first_channel;
  int pixel_span, channel_span;  // index of the block's spans in the sample
  // Of the block's first in maps [chunk, P] and [chunk, C].
  int64_t pixel_origin, channel_origin;
  int64_t origin;  // of its first element in the feature map
  int row_count, column_count;
};
static_assert(sizeof(Place) <= kPlaceBytes, "what the plan counts with");

// A block's part of the matrix.
struct Cut {
  int sample, row_span, column_span;
  int64_t first_row, first_column;
  int row_count, column_count;
};

inline __device__ Cut cut_of(const Sweep& sweep, int block, int64_t rows, int64_t columns) {
  const int blocks = static_cast<int>(sweep.blocks);
  const int column_spans = static_cast<int>(sweep.column_spans);
  Cut cut;
  cut.sample = block / blocks;
  const int in_sample = block - cut.sample * blocks;
  cut.row_span = in_sample / column_spans;
  cut.column_span = in_sample - cut.row_span * column_spans;
  cut.first_row = cut.row_span * sweep.row_span;
  cut.first_column = cut.column_span * sweep.column_span;
  cut.row_count = static_cast<int>(smaller(sweep.row_span, rows - cut.first_row));
  cut.column_count = static_cast<int>(smaller(sweep.column_span, columns - cut.first_column));
  return cut;
}

// The factors that are plain numbers have no index.
template <class T>
__device__ void move_index(T& factor, int by) {
  if constexpr (!std::is_arithmetic_v<T>) factor.move_index(by);
}

// Rows and columns of a layout in terms of pixels and channels.
template <class Body, Layout layout>
struct Axes {
  static constexpr bool kRowsAreChannels = layout == Layout::kNCHW;
  template <class OfChannel, class OfPixel>
  using RowOf = std::conditional_t<kRowsAreChannels, OfChannel, OfPixel>;
  template <class OfChannel, class OfPixel>
  using ColumnOf = std::conditional_t<kRowsAreChannels, OfPixel, OfChannel>;

  using A = typename Body::A;
  using Row = RowOf<typename Body::Channel, typename Body::Pixel>;
  using Column = ColumnOf<typename Body::Channel, typename Body::Pixel>;
  using RowFactor = RowOf<typename Body::ChannelFactor, typename Body::PixelFactor>;
  using ColumnFactor = ColumnOf<typename Body::ChannelFactor, typename Body::PixelFactor>;

  static __device__ int64_t rows(const Body& body) {
    return kRowsAreChannels ? body.channels : body.pixels;
  }
  static __device__ int64_t columns(const Body& body) {
    return kRowsAreChannels ? body.pixels : body.channels;
  }

  static __device__ Place place(const Body& body, const Sweep& sweep, int block) {
    const Cut cut = cut_of(sweep, block, rows(body), columns(body));
    const int64_t first_channel = kRowsAreChannels ? cut.first_row : cut.first_column;
    const int64_t first_pixel = kRowsAreChannels ? cut.first_column : cut.first_row;
    Place at;
    at.sample = cut.sample;
    at.first_channel = static_cast<int>(first_channel);
    at.first_pixel = first_pixel;
    at.channel_span = kRowsAreChannels ? cut.row_span : cut.column_span;
    at.pixel_span = kRowsAreChannels ? cut.column_span : cut.row_span;
    at.channel_origin = cut.sample * body.channels + first_channel;
    at.pixel_origin = cut.sample * body.pixels + first_pixel;
    const int64_t row_origin = kRowsAreChannels ? at.channel_origin : at.pixel_origin;
    at.origin = row_origin * columns(body) + cut.first_column;
    at.row_count = cut.row_count;
    at.column_count = cut.column_count;
    return at;
  }

  // What an index along the columns of the block counts from.
  static __device__ int first_column(const Place& at) {
    return kRowsAreChannels ? 0 : at.first_channel;
  }

  static __device__ Row start_row(const Body& body) {
    if constexpr (kRowsAreChannels) {
      return body.start_channel(0);
    } else {
      return body.start_pixel(0);
    }
  }
  static __device__ Column start_column(const Body& body, const Place& at, int row) {
    if constexpr (kRowsAreChannels) {
      return body.start_pixel(at.first_channel + row);
    } else {
      return body.start_channel(row);
    }
  }

  static __device__ void row_factor(const Body& body, const Place& at, int row,
                                    RowFactor (&to)[1]) {
    if constexpr (kRowsAreChannels) {
      body.channel_factors(at, row, to);
    } else {
      body.pixel_factors(at, row, to);
    }
  }
  template <int W>
  static __device__ void column_factors(const Body& body, const Place& at, int column,
                                        ColumnFactor (&to)[W]) {
    if constexpr (kRowsAreChannels) {
      body.pixel_factors(at, column, to);
    } else {
      body.channel_factors(at, column, to);
    }
  }

  static __device__ A visit(const Body& body, const Place& at, A x, A g, int row, int column,
                            const RowFactor& row_factor, const ColumnFactor& column_factor,
                            Row& of_row, Column& of_column) {
    if constexpr (kRowsAreChannels) {
      return body.visit(x, g, column, at.first_channel + row, column_factor, row_factor, of_column,
                        of_row);
    } else {
      return body.visit(x, g, row, column, row_factor, column_factor, of_row, of_column);
    }
  }

  static __device__ void store_row(const Body& body, const Place& at, int row, const Row& total) {
    if constexpr (kRowsAreChannels) {
      body.store_channel(at, row, total);
    } else {
      body.store_pixel(at, row, total);
    }
  }
  static __device__ void store_column(const Body& body, const Place& at, int column,
                                      const Column& total) {
    if constexpr (kRowsAreChannels) {
      body.store_pixel(at, column, total);
    } else {
      body.store_channel(at, column, total);
    }
  }
};

// Bytes of shared memory before the scratch of the column sums: the totals of the block's rows.
template <class Row>
__host__ __device__ int64_t row_total_bytes(const Sweep& sweep) {
  if constexpr (std::is_same_v<Row, Nothing>) return 0;
  return (sweep.row_span * static_cast<int64_t>(sizeof(Row)) + 15) / 16 * 16;
}

template <class Body, Layout layout, int W>
int64_t sweep_shared_bytes(const Sweep& sweep) {
  using In = Axes<Body, layout>;
  using Column = typename In::Column;
  const int64_t place = kPlaceBytes + row_total_bytes<typename In::Row>(sweep);
  const int64_t columns = std::is_same_v<Column, Nothing> ? 0 : kThreads / 2 * W * sizeof(Column);
  return place + columns;
}

template <class Body, Layout layout, int W>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename Body::A>)
    sweep_kernel(const __grid_constant__ Body body, const Sweep sweep) {
  using A = typename Body::A;
  using S = typename Body::Storage;
  using In = Axes<Body, layout>;
  using Row = typename In::Row;
  using Column = typename In::Column;
  constexpr bool kSumsRows = !std::is_same_v<Row, Nothing>;
  constexpr bool kSumsColumns = !std::is_same_v<Column, Nothing>;
  constexpr int U = Body::kRows;
  wait_for_previous_launches();

  // Kept in shared memory, where it takes no registers.
  Place& at = *shared_memory<Place>();
  if (threadIdx.x == 0) at = In::place(body, sweep, static_cast<int>(blockIdx.x));
  __syncthreads();
  const int row_count = at.row_count, column_count = at.column_count;
  const int lanes = sweep.lanes, groups = sweep.groups;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int group = static_cast<int>(threadIdx.x) / lanes;

  // Several lanes hold the total of one row after reduce_rows; the first of them keeps it.
  const int share = lanes / U;
  const bool owns_row = (lane & (share - 1)) == 0;
  const int owned_row = (U == 1 ? 0 : lane / share * groups) + group;

  // Row totals over the tiles of the block; a row belongs to one group, so this needs no barrier
  // until they are stored.
  Row* const row_totals = shared_memory<Row>(kPlaceBytes);
  Column* const scratch = shared_memory<Column>(kPlaceBytes + row_total_bytes<Row>(sweep));

  for (int tile = 0; tile < column_count; tile += lanes * W) {
    const int column = tile + lane * W;
    const bool active = column < column_count;
    typename In::ColumnFactor column_factors[W];
    Column of_columns[W];
    if (active) In::column_factors(body, at, column, column_factors);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      of_columns[i] = In::start_column(body, at, group);
      if (!active || group >= row_count) of_columns[i].retire();
    }

    const int own_column = In::first_column(at) + column;
    const int64_t step = sweep.row_step;
    int64_t offset = at.origin + group * In::columns(body) + column;
    // All threads of a warp make the same number of turns: they meet in shuffles.
#pragma unroll 1
    for (int base = 0; base < row_count; base += groups * U, offset += U * step) {
      Packed<S, W> x[U], g[U];
      typename In::RowFactor row_factors[U][1];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int row = base + u * groups + group;
        if (!active || row >= row_count) continue;
        x[u] = load_packed<S, W, Body::kUse>(body.x + offset + u * step);
        if constexpr (Body::kInputs == 2) {
          g[u] = load_packed<S, W, Body::kUse>(body.g + offset + u * step);
        }
        In::row_factor(body, at, row, row_factors[u]);
      }
      Row of_rows[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int row = base + u * groups + group;
        const bool present = active && row < row_count;
        of_rows[u] = In::start_row(body);
        if (!present) {
          of_rows[u].retire();
          continue;
        }
        // Along its own columns a thread counts from its first: indices that are known when the
        // kernel is compiled take no registers.
        move_index(row_factors[u][0], -own_column);
        A values[W], others[W] = {};
        unpack<S, W>(x[u], values);
        if constexpr (Body::kInputs == 2) unpack<S, W>(g[u], others);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          values[i] = In::visit(body, at, values[i], others[i], row, i, row_factors[u][0],
                                column_factors[i], of_rows[u], of_columns[i]);
        }
        of_rows[u].move_index(own_column);
        if constexpr (Body::kWrites) store_output<S, W>(body.output + offset + u * step, values);
      }
      if constexpr (kSumsRows) {
        const Row total = reduce_rows<U>(of_rows, lanes);
        const int row = base + owned_row;
        if (owns_row && row < row_count) {
          if (tile == 0) {
            row_totals[row] = total;
          } else {
            row_totals[row].combine(total);
          }
        }
      }
    }
    if constexpr (kSumsColumns) {
      reduce_groups<W>(of_columns, lanes, scratch);
      const int count = smaller(lanes * W, column_count - tile);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        In::store_column(body, at, tile + i, scratch[i % W * (kThreads / 2) + i / W]);
      }
    }
  }
  if constexpr (kSumsRows) {
    __syncthreads();
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < row_count; row += kThreads) {
      In::store_row(body, at, row, row_totals[row]);
    }
  }
}

template <Layout layout, int W, class Body>
void launch_sweep(Launcher& launcher, const Sweep& sweep, int64_t samples, const Body& body) {
  launcher.launch(sweep_kernel<Body, layout, W>, samples * sweep.blocks,
                  sweep_shared_bytes<Body, layout, W>(sweep), body, sweep);
}

}  // namespace cbam::cuda
