// The feature map of a sample as a matrix, in both layouts: where a block of a sweep works, and
// rows and columns in terms of channels and pixels.
#pragma once

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
  Cut cut;
  cut.sample = quotient(block, sweep.by_blocks);
  const int in_sample = block - cut.sample * static_cast<int>(sweep.blocks);
  cut.row_span = quotient(in_sample, sweep.by_column_spans);
  cut.column_span = in_sample - cut.row_span * static_cast<int>(sweep.column_spans);
  cut.first_row = cut.row_span * sweep.row_span;
  cut.first_column = cut.column_span * sweep.column_span;
  cut.row_count = static_cast<int>(smaller(sweep.row_span, rows - cut.first_row));
  cut.column_count = static_cast<int>(smaller(sweep.column_span, columns - cut.first_column));
  return cut;
}

inline __device__ int lane_of(const Team& team) {
  return static_cast<int>(threadIdx.x) & (team.lanes - 1);
}
inline __device__ int group_of(const Team& team) {
  return static_cast<int>(threadIdx.x) >> team.lane_bits;
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
  using S = typename Body::Storage;
  using Row = RowOf<typename Body::Channel, typename Body::Pixel>;
  using Column = ColumnOf<typename Body::Channel, typename Body::Pixel>;
  using RowFactor = RowOf<typename Body::ChannelFactor, typename Body::PixelFactor>;
  using ColumnFactor = ColumnOf<typename Body::ChannelFactor, typename Body::PixelFactor>;
  static constexpr bool kSumsRows = !std::is_same_v<Row, Nothing>;
  static constexpr bool kSumsColumns = !std::is_same_v<Column, Nothing>;
  static constexpr bool kAlongRows = kSumsRows && !kSumsColumns;

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

  static __device__ Row start_row(const Body& body, const Place& at) {
    if constexpr (kRowsAreChannels) {
      return body.start_channel(0);
    } else {
      return body.start_pixel(at.first_channel);
    }
  }
  static __device__ Column start_column(const Body& body, const Place& at) {
    if constexpr (kRowsAreChannels) {
      return body.start_pixel(at.first_channel);
    } else {
      return body.start_channel(0);
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

}  // namespace cbam::cuda
