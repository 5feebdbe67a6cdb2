// What the rules of floating point ask of the compiler, one thing a kernel, for
// tests/cuda/test_float_rules.py. The sources are those of the product.

#include "../../../csrc/cuda/reduce.cuh"

__global__ void maximum_kernel(const float* a, const float* b, float* out) {
  out[threadIdx.x] = cbam::cuda::maximum(a[threadIdx.x], b[threadIdx.x]);
}

__global__ void sum_kernel(const float* a, const float* b, float* out) {
  out[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}

__global__ void quotient_kernel(const float* a, const float* b, float* out) {
  out[threadIdx.x] = a[threadIdx.x] / b[threadIdx.x];
}
