// What the files of toy kernels share. Each entry returns null or the message of the error; memory
// is the caller's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <exception>
#include <string>

#define TOY extern "C" __attribute__((visibility("default"))) const char*

namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__device__ T* shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
#else
  unsigned char* memory = emulation::shared_memory();
#endif
  return reinterpret_cast<T*>(memory);
}

template <class... Parameters, class... Arguments>
const char* run(unsigned grid, unsigned block, size_t shared_bytes, bool dependent,
                void (*kernel)(Parameters...), Arguments... arguments) {
  static std::string message;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  try {
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error == cudaSuccess) return nullptr;
    message = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace
