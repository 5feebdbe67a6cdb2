// A sweep: one walk over the feature map (or two of the same shape) that adds up values per pixel
// and per channel at once, or writes a feature map.
//
// Both layouts are a matrix for each sample: the rows are channels and the columns pixels in
// contiguous tensors, the other way round in channels_last. A block has some rows and some columns
// of it. A thread reads pieces of W neighbouring columns, `lanes` threads side by side share a row,
// and the groups of lanes in a block take different rows: loads are coalesced in both layouts. The
// block's threads go
//
//   along the rows     where only sums per row are wanted. What belongs to a row stays in registers
//                      to its end; then its lanes meet, by shuffles. Few lanes share a row, so that
//                      each has several pieces of it. What belongs to a column is read by all rows,
//                      from shared memory.
//   down the columns   else. What belongs to a thread's columns stays in registers. Where both sums
//                      are wanted, lanes meet for every row; columns meet at the end, in shared
//                      memory.
//
//   launch   one block for each (sample, row span, column span); see plan.h
//   traffic  each input once; per row and per column span (and the other way round) one partial
//            result, which the launch that needs it adds up in the order of the spans
//
// No launch writes what a sweep reads as x and g. So a block reads the first of it before it waits
// for the launches before.
//
// What is added up is a Body:
//
//   Body::A, Body::Storage     accumulator and storage
//   Body::Pixel, Channel       accumulators (reduce.cuh), or Nothing
//   Body::PixelFactor, ChannelFactor   what an element needs of its pixel's and channel's maps
//   Body::kInputs, kUse        1 or 2 feature maps to read, and whether for the last time
//   Body::kRowsDown<layout>    rows that a thread has in flight, down the columns
//   Body::kRowsAlong, kPieces  rows, and pieces of each, along the rows
//   Body::kEarly               whether it reads before it waits: it needs some registers more
//   Body::kReversed            whether blocks begin at the end: what the launch before read last is
//                              still in the L2 cache
//   Body::kWrites              whether it writes a feature map
//   x, g, output               feature maps
//   pixel_factors<W>, channel_factors<W>(place, first, to)     W of them, from the block's `first`
//   start_pixel(channel), start_channel(pixel)
//                              accumulators, given the first index that they will meet
//   visit(...)                 one element
//   store_pixel, store_channel  a partial result
#pragma once

#include <algorithm>

#include "axes.cuh"
#include "launch.cuh"

namespace cbam::cuda {

// Shared memory: the place; the totals of the block's rows; then what columns need along the rows,
// for so many of them at once, or what they leave down the columns.
constexpr int kStaged = 512;

template <class Row>
__host__ __device__ int64_t row_total_bytes(const Sweep& sweep) {
  if constexpr (std::is_same_v<Row, Nothing>) return 0;
  return (sweep.row_span * static_cast<int64_t>(sizeof(Row)) + 15) / 16 * 16;
}

template <class Body, Layout layout, int W>
int64_t sweep_shared_bytes(const Sweep& sweep) {
  using In = Axes<Body, layout>;
  int64_t bytes = kPlaceBytes + row_total_bytes<typename In::Row>(sweep);
  if constexpr (In::kSumsColumns) bytes += kThreads / 2 * W * sizeof(typename In::Column);
  if constexpr (In::kAlongRows && !std::is_same_v<typename In::ColumnFactor, Nothing>) {
    bytes += std::min<int64_t>(kStaged, sweep.column_span) * sizeof(typename In::ColumnFactor);
  }
  return bytes;
}

// Where `here` goes is in shared memory, where it takes no registers. What launches before wrote
// may be read after this.
inline __device__ void begin_block(const Place& here, Place& at) {
  if (threadIdx.x == 0) at = here;
  wait_for_previous_launches();
  __syncthreads();
}

// Lanes of a group hold parts of U rows, `groups` apart, the first of them being `row`. Their
// totals are kept in shared memory, where they meet those of other columns of the block. A row
// belongs to one group, so this needs no barrier until they are stored.
template <int U, class Row>
__device__ void keep_rows(Row (&rows)[U], const Team& team, int row, int row_count, bool first,
                          Row* totals) {
  const Row total = reduce_rows<U>(rows, team.lanes);
  // Several lanes hold the total of one row; the first of them keeps it.
  const int lane = lane_of(team), share = team.lanes / U;
  const int owned = row + (U == 1 ? 0 : lane / share * team.groups);
  if ((lane & (share - 1)) == 0 && owned < row_count) {
    if (first) {
      totals[owned] = total;
    } else {
      totals[owned].combine(total);
    }
  }
}

template <class Body, Layout layout, int W>
__device__ void go_along_rows(const Body& body, const Sweep& sweep, const Place& here, Place& at) {
  using In = Axes<Body, layout>;
  using A = typename In::A;
  using S = typename In::S;
  using Row = typename In::Row;
  using ColumnFactor = typename In::ColumnFactor;
  static_assert(std::is_same_v<typename In::RowFactor, Nothing>,
                "no body that goes along the rows has these");
  constexpr bool kStages = !std::is_same_v<ColumnFactor, Nothing>;
  constexpr int U = Body::kRowsAlong, P = Body::kPieces;

  const Team& team = sweep.along;
  const int group = group_of(team);
  const int row_count = here.row_count, column_count = here.column_count;
  const int step = team.lanes * W;  // to the next piece
  Row* const row_totals = shared_memory<Row>(kPlaceBytes);
  ColumnFactor* const staged =
      shared_memory<ColumnFactor>(kPlaceBytes + row_total_bytes<Row>(sweep));

  // Where there are no more rows, what is left in these is added to totals that nobody keeps.
  Packed<S, W> x[U][P] = {}, g[U][P] = {};
  const auto load = [&](const S* from, int rows_left, int columns_left) {
#pragma unroll
    for (int u = 0; u < U; ++u, from += team.row_step) {
      const S* piece = from;
#pragma unroll
      for (int j = 0; j < P; ++j, piece += step) {
        if (u * team.groups < rows_left && j * step < columns_left) {
          x[u][j] = load_packed<S, W, Body::kUse>(piece);
          if constexpr (Body::kInputs == 2) {
            g[u][j] = load_packed<S, W, Body::kUse>(body.g + (piece - body.x));
          }
        }
      }
    }
  };
  const int own = lane_of(team) * W;
  const S* row_from = body.x + here.origin + group * In::columns(body) + own;
  const int first_end = kStages ? smaller(kStaged, column_count) : column_count;
  load(row_from, row_count - group, first_end - own);
  begin_block(here, at);

#pragma unroll 1
  for (int begin = 0, end = first_end; begin < column_count;
       row_from += end - begin, begin = end, end = smaller(end + kStaged, column_count)) {
    if constexpr (kStages) {
      if (begin > 0) __syncthreads();
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < end - begin; i += kThreads) {
        ColumnFactor factor[1];
        In::column_factors(body, at, begin + i, factor);
        staged[i] = factor[0];
      }
      __syncthreads();
    }
    const S* from = row_from;
    // All threads of a warp make the same number of turns: they meet in shuffles.
#pragma unroll 1
    for (int base = 0; base < row_count; base += U * team.groups, from += U * team.row_step) {
      Row of_rows[U];
#pragma unroll
      for (int u = 0; u < U; ++u) of_rows[u] = In::start_row(body, at);
      const int row = base + group;
      const S* piece = from;
#pragma unroll 1
      for (int column = begin + own; column < end; column += P * step, piece += P * step) {
        if (base > 0 || column > own) load(piece, row_count - row, end - column);
#pragma unroll
        for (int j = 0; j < P; ++j) {
          const int first = column + j * step;
          if (first >= end) break;
          ColumnFactor factors[W];
          if constexpr (kStages) read_shared<W>(staged + (first - begin), factors);
          // Indices are counted from the piece, where they are known when the kernel is compiled.
          const int origin = In::first_column(at) + first;
#pragma unroll
          for (int u = 0; u < U; ++u) {
            A values[W], others[W] = {};
            unpack<S, W>(x[u][j], values);
            if constexpr (Body::kInputs == 2) unpack<S, W>(g[u][j], others);
            of_rows[u].move_index(-origin);
#pragma unroll
            for (int i = 0; i < W; ++i) {
              typename In::Column of_column;
              In::visit(body, at, values[i], others[i], row + u * team.groups, i,
                        typename In::RowFactor{}, factors[i], of_rows[u], of_column);
            }
            of_rows[u].move_index(origin);
          }
        }
      }
      keep_rows<U>(of_rows, team, row, row_count, begin == 0, row_totals);
    }
  }
}

template <class Body, Layout layout, int W>
__device__ void go_down_columns(const Body& body, const Sweep& sweep, const Place& here,
                                Place& at) {
  using In = Axes<Body, layout>;
  using A = typename In::A;
  using S = typename In::S;
  using Row = typename In::Row;
  using Column = typename In::Column;
  constexpr int U = Body::template kRowsDown<layout>;

  const Team& team = sweep.down;
  const int group = group_of(team);
  const int row_count = here.row_count;
  Row* const row_totals = shared_memory<Row>(kPlaceBytes);
  Column* const scratch = shared_memory<Column>(kPlaceBytes + row_total_bytes<Row>(sweep));

  struct InFlight {
    Packed<S, W> x[U], g[U];
  };
  const auto load = [&](InFlight& to, int64_t offset, int rows_left) {
    const S* from = body.x + offset;
    const S* from_g = body.g + offset;
#pragma unroll
    for (int u = 0; u < U; ++u, from += team.row_step, from_g += team.row_step) {
      if (u * team.groups < rows_left) {
        to.x[u] = load_packed<S, W, Body::kUse>(from);
        if constexpr (Body::kInputs == 2) to.g[u] = load_packed<S, W, Body::kUse>(from_g);
      }
    }
  };
  const int own = lane_of(team) * W;
  InFlight early;
  if constexpr (Body::kEarly) {
    load(early, here.origin + group * In::columns(body) + own,
         own < here.column_count ? row_count - group : 0);
  }
  begin_block(here, at);

#pragma unroll 1
  for (int tile = 0; tile < at.column_count; tile += team.lanes * W) {
    const int column = tile + own;
    const bool active = column < at.column_count;
    typename In::ColumnFactor column_factors[W];
    Column of_columns[W];
    if (active) In::column_factors(body, at, column, column_factors);
#pragma unroll
    for (int i = 0; i < W; ++i) of_columns[i] = In::start_column(body, at);

    const int origin = In::first_column(at) + column;
    int64_t offset = at.origin + group * In::columns(body) + column;
    int rows_left = active ? row_count - group : 0;
    // All threads of a warp make the same number of turns: they meet in shuffles.
#pragma unroll 1
    for (int base = 0; base < row_count; base += U * team.groups) {
      const int first_row = base + group;
      InFlight late;
      InFlight& now = Body::kEarly ? early : late;
      if (!Body::kEarly || base + tile > 0) load(now, offset, rows_left);
      typename In::RowFactor row_factors[U][1];
      // Where there are no more rows those of the last, so that no branch stands between loads.
#pragma unroll
      for (int u = 0; u < U; ++u) {
        In::row_factor(body, at, smaller(first_row + u * team.groups, row_count - 1),
                       row_factors[u]);
      }
      Row of_rows[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        of_rows[u] = In::start_row(body, at);
        if (u * team.groups < rows_left) {
          // Along its own columns a thread counts from its first: indices that are known when the
          // kernel is compiled take no registers.
          move_index(row_factors[u][0], -origin);
          of_rows[u].move_index(-origin);
          A values[W], others[W] = {};
          unpack<S, W>(now.x[u], values);
          if constexpr (Body::kInputs == 2) unpack<S, W>(now.g[u], others);
#pragma unroll
          for (int i = 0; i < W; ++i) {
            values[i] = In::visit(body, at, values[i], others[i], first_row + u * team.groups, i,
                                  row_factors[u][0], column_factors[i], of_rows[u], of_columns[i]);
          }
          of_rows[u].move_index(origin);
          if constexpr (Body::kWrites) {
            store_output<S, W>(body.output + offset + u * team.row_step, values);
          }
        }
      }
      if constexpr (In::kSumsRows) {
        keep_rows<U>(of_rows, team, first_row, row_count, tile == 0, row_totals);
      }
      offset += U * team.row_step;
      rows_left -= U * team.groups;
    }
    if constexpr (In::kSumsColumns) {
      if (tile > 0) __syncthreads();
      reduce_groups<W>(of_columns, team.lanes, smaller(team.lanes * W, at.column_count - tile),
                       scratch, [&](int element, const Column& total) {
                         In::store_column(body, at, tile + element, total);
                       });
    }
  }
}

template <class Body, Layout layout, int W>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename Body::A>)
    sweep_kernel(const __grid_constant__ Body body, const Sweep sweep) {
  using In = Axes<Body, layout>;
  using Row = typename In::Row;
  const int block = static_cast<int>(Body::kReversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const Place here = In::place(body, sweep, block);
  Place& at = *shared_memory<Place>();
  if constexpr (In::kAlongRows) {
    go_along_rows<Body, layout, W>(body, sweep, here, at);
  } else {
    go_down_columns<Body, layout, W>(body, sweep, here, at);
  }
  if constexpr (In::kSumsRows) {
    const Row* const row_totals = shared_memory<Row>(kPlaceBytes);
    if constexpr (!In::kSumsColumns) __syncthreads();  // whose sums end with one
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < at.row_count; row += kThreads) {
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
