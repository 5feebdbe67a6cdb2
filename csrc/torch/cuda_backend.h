// What stands between an operator and the kernels on CUDA: device, stream and memory.
// tests/emulation compiles it as well, with a device and streams of its own behind abi.h.
#pragma once

#include "abi.h"

#include <cuda_runtime.h>

#include "../cuda/kernels.h"

namespace cbam {

inline cudaStream_t stream_of(const Tensor& tensor) {
  return static_cast<cudaStream_t>(current_stream(tensor));
}

// A backend of operators.h.
struct Cuda {
  static constexpr int64_t kAlignment = 16;
  struct Scope {
    explicit Scope(const Tensor& input) : guard(input.get_device_index()) {}
    DeviceGuard guard;
  };

  template <class Args>
  static void run(const Tensor& input, const Args& args) {
    const cuda::Device device = cuda::device_properties(input.get_device_index());
    // The allocator hands this memory only to later work of the same stream.
    const Tensor workspace = empty(input, {cuda::workspace_bytes(args, device)}, ScalarType::Byte);
    cuda::run(args, {device, stream_of(input), workspace.mutable_data_ptr()});
  }
};

}  // namespace cbam
