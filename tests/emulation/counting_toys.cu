// Kernels of a known number of rounds of loads, on which tests/cuda/test_rounds.py tries their
// counter. In the counted build alone, where double is what counts.
#include "toys.cuh"

namespace {

__device__ double several(const double* data, int at, int count) {
  double values[8];
  for (int i = 0; i < count; ++i) values[i] = __ldca(data + at + i);
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i];
  return sum;
}

__global__ void rounds(int kind, const double* data, const int* indices, double* out) {
  const int thread = static_cast<int>(threadIdx.x);
  double* const memory = shared<double>();
  double sum = 0;
  switch (kind) {
    case 0:  // none
      break;
    case 1:  // one: eight loads that nobody waits for in between
      sum = several(data, thread, 8);
      break;
    case 2:  // two: the second batch is asked for when the first has been added up
      sum = several(data, thread, 8);
      sum += several(data, thread + 8, 8);
      break;
    case 3:  // eight, each used before the next
      for (int i = 0; i < 8; ++i) sum += __ldca(data + thread + i);
      break;
    case 4:  // two: what is in shared memory at a barrier has come
      memory[thread] = __ldca(data + thread);
      __syncthreads();
      sum = memory[thread] + __ldca(data + thread + 1);
      break;
    case 5:  // three, by one thread of the second block alone
      sum = __ldca(data + thread) + 0.5;
      if (blockIdx.x == 1 && thread == 17) {
        sum += __ldca(data + 1);
        sum += __ldca(data + 2);
      }
      break;
    case 6:  // one: an index beside a number
      sum = __ldca(data + thread + (__ldca(indices) & 1)) * 2;
      break;
    case 7:  // two: a comparison waits as well
      sum = __ldca(data + thread);
      if (sum > 0.5) sum += __ldca(data + thread + 1);
      break;
    case 8:  // two: and so does a shuffle
      sum = __ldca(data + thread);
      sum = __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __ldca(data + thread + 1);
      break;
    case 9:  // two: of 16 bytes
      for (int i = 0; i < 2; ++i) {
        double pair[2];
        const uint4 bits = __ldca(reinterpret_cast<const uint4*>(data) + thread + i);
        memcpy(pair, &bits, sizeof(bits));
        sum += pair[i];
      }
      break;
    case 10:  // one: what is stored is waited for, and nothing comes after it
      __stwb(out + blockIdx.x * blockDim.x + threadIdx.x, __ldca(data + thread));
      return;
  }
  __stwb(out + blockIdx.x * blockDim.x + threadIdx.x, sum);
}

}  // namespace

TOY toy_rounds(int kind, const double* data, const int* indices, double* out) {
  return run(2, 64, 64 * sizeof(double), false, rounds, kind, data, indices, out);
}
