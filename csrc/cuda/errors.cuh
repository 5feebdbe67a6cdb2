// CUDA errors become exceptions that say what to do.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cbam::cuda {

// Of an error that only tells that these kernels and this machine do not go together.
inline bool is_unfit(cudaError_t error) {
  return error == cudaErrorInsufficientDriver || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
         error == cudaErrorInvalidKernelImage;
}

inline const char* remedy(cudaError_t error) {
  if (is_unfit(error)) {
    return "cbam_ext's CUDA kernels do not fit this GPU or its driver; python -m cbam_ext tells "
           "what they were built for and what is here";
  }
  if (error == cudaErrorMemoryAllocation) return "the GPU has no memory left for it";
  return "something that ran on the GPU before may have failed: with CUDA_LAUNCH_BLOCKING=1 in the "
         "environment the error comes from where it happens";
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next to ask would be told
  throw std::runtime_error(std::string("cbam: ") + what + ": " + cudaGetErrorString(error) + " (" +
                           remedy(error) + ")");
}

}  // namespace cbam::cuda
