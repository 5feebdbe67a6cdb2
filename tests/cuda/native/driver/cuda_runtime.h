// Stands in for CUDA's header of this name where csrc/cuda/device.cu is compiled as plain C++: a
// runtime that answers what the test has told it to.
#pragma once

#include <cstddef>

#define CUDART_VERSION 13000
#define __global__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaFuncAttributes {
  int ptxVersion;
};
struct dim3 {
  explicit dim3(unsigned x = 1) : x(x) {}
  unsigned x;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

// What the test sets.
struct Answers {
  int driver;             // 12040 for CUDA 12.4
  cudaError_t attribute;  // of cudaDeviceGetAttribute
  cudaError_t function;   // of cudaFuncGetAttributes
  cudaError_t launch;     // of cudaLaunchKernelEx
  cudaError_t left;       // what cudaGetLastError() has to tell
};
extern Answers answers;

inline cudaError_t left_behind(cudaError_t error) {
  if (error != cudaSuccess) answers.left = error;
  return error;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = answers.driver;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? 8 : 6;
  return left_behind(answers.attribute);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 80;
  return left_behind(answers.function);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Parameters...), Arguments&&...) {
  return left_behind(answers.launch);
}
inline cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = answers.left;
  answers.left = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "CUDA's own words"; }
