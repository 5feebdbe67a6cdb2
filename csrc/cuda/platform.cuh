// What the kernels use of CUDA beyond plain C++: the shape of a block, its shared memory, the
// order of launches, and talk between threads.
//
// The kernels keep to a small part of CUDA, so that tests/emulation can compile the same sources as
// plain C++ and run them on any machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "plan.h"

namespace cbam::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Blocks on a multiprocessor that registers are left for: half of the threads that it can hold. In
// double precision half of that.
template <class A>
constexpr int kResidentBlocks = sizeof(A) == 8 ? 2 : 4;

// The dynamic shared memory of the block, 16-byte aligned.
template <class T>
__device__ T* shared_memory(int64_t offset_bytes = 0) {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
#else
  unsigned char* memory = emulation::shared_memory();
#endif
  return reinterpret_cast<T*>(memory + offset_bytes);
}

// Every kernel calls this before it reads what a launch before it may have written, and before it
// writes. With programmatic dependent launch its blocks may be scheduled while the launch before
// still runs; here they wait until that has finished and its writes are seen. Since every kernel
// waits, so have all launches before it. Only then may the next launch come as far: never are more
// than two at work or waiting.
inline __device__ void wait_for_previous_launches() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// number / what the host made `by` of; see plan.h.
inline __device__ int quotient(int number, const Divisor& by) {
  return static_cast<int>((static_cast<unsigned>(number) * uint64_t{by.multiplier}) >> by.shift);
}

template <class T>
__device__ T smaller(T a, T b) {
  return a < b ? a : b;
}

// The threads of the grid take the elements [0, count) in turn.
template <class F>
__device__ void each_in_grid(int64_t count, F&& f) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) f(i);
}

template <class T>
__device__ T shuffle_xor(T value, int offset) {
  return __shfl_xor_sync(kFullWarp, value, offset);
}

}  // namespace cbam::cuda
