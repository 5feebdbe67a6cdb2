// Sums of many terms by the threads of a block: neighbouring threads take neighbouring columns,
// and those that are left share the terms of a column. They meet in an order that depends on the
// number of terms and columns alone.
#pragma once

#include "reduce.cuh"

namespace cbam::cuda {

// Thread t has K values for column t % width, a power of two up to kThreads. Those of the threads
// from `used` on count for nothing. Afterwards the threads below `width` have the totals. `scratch`
// is shared memory for K kThreads accumulators, which nobody else is using.
template <int K, class Accumulator>
__device__ void meet_in_block(Accumulator (&values)[K], int width, int used, Accumulator* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int offset = kWarp / 2; offset >= width; offset /= 2) {
    if (offset >= used) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) values[k].combine(values[k].shuffle(offset));
  }
  const int step = width < kWarp ? kWarp : width;  // to the next thread that has another part
  if (used <= step) return;
#pragma unroll
  for (int k = 0; k < K; ++k) scratch[k * kThreads + thread] = values[k];
  __syncthreads();
  if (thread >= width) return;
  for (int other = thread + step; other < used; other += step) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k].combine(scratch[k * kThreads + other]);
  }
}

// Combines the terms n, n + step, ... below `count` with a total, `batch` of them in flight. Those
// of a batch meet first, which bounds the rounding error of long sums.
//
//   load(n)   what a term is made of, as it comes from memory: nobody waits for it in between
//   make(it)  the term
template <int batch, class Accumulator, class Index, class Load, class Make>
__device__ void add_terms(Index n, Index step, Index count, Load&& load, Make&& make,
                          Accumulator& total) {
#pragma unroll 1
  for (; n < count; n += batch * step) {
    if (n + step >= count) {  // as often as not there is one
      total.combine(make(load(n)));
      return;
    }
    decltype(load(n)) loaded[batch];
    // A term that is not there is loaded from where one is, so that no branch stands between loads.
#pragma unroll
    for (int i = 0; i < batch; ++i) loaded[i] = load(n + i * step < count ? n + i * step : n);
    Accumulator terms[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      terms[i] = n + i * step < count ? make(loaded[i]) : Accumulator::none();
    }
#pragma unroll
    for (int half = batch / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) terms[i].combine(terms[i + half]);
    }
    total.combine(terms[0]);
  }
}

// Totals of partial results [spans, columns] for up to `width` columns, with `batch` loads of a
// thread in flight.
//
//   load(span, column)     a partial result
//   keep(column, total)    called by the thread of that number
template <int batch, class Accumulator, class Load, class Keep>
__device__ void add_spans(int columns, int width, int spans, Accumulator* scratch, Load&& load,
                          Keep&& keep) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread & (width - 1);
  Accumulator total[1] = {Accumulator::none()};
  if (column < columns) {
    add_terms<batch>(
        thread / width, kThreads / width, spans, [&](int span) { return load(span, column); },
        [](const Accumulator& partial) { return partial; }, total[0]);
  }
  meet_in_block(total, width, smaller(spans, kThreads / width) * width, scratch);
  if (thread < columns) keep(thread, total[0]);
}

}  // namespace cbam::cuda
