// The host side of the stand-in cuda_runtime.h: launches, memset, errors.
//
// A launch runs at once and to its end. What goes wrong in it is thrown as a std::runtime_error
// that names the kernel, block and thread. Only a call that a test has told to fail returns an
// error, and leaves it behind for cudaGetLastError.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/intrinsics.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  // No call here returns these.
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
namespace emulation {
cudaError_t begin_call();  // cudaSuccess unless this call is to fail
cudaError_t take_error();
}  // namespace emulation
inline cudaError_t cudaGetLastError() { return emulation::take_error(); }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaSuccess ? "no error" : "invalid argument";
}

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
union cudaLaunchAttributeValue {
  char pad[64];
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulation {
// body(context) is the kernel with its arguments, for one thread.
void launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
            const void* context);
void memset(void* address, int value, size_t bytes, cudaStream_t stream);
// The host hands out memory whose content nobody may rely on.
void fresh(void* address, size_t bytes);
bool allow_shared_memory(const void* kernel, size_t bytes);
}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t error = emulation::begin_call(); error != cudaSuccess) return error;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  emulation::launch(
      *config, reinterpret_cast<const void*>(kernel),
      [](const void* context) {
        const auto& call = *static_cast<const Call*>(context);
        std::apply(call.kernel, call.arguments);
      },
      &call);
  return cudaSuccess;
}

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  const bool allowed = bytes >= 0 && emulation::allow_shared_memory(
                                         reinterpret_cast<const void*>(kernel), size_t(bytes));
  return allowed ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = emulation::begin_call(); error != cudaSuccess) return error;
  emulation::memset(address, value, bytes, stream);
  return cudaSuccess;
}
