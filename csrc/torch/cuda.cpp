// The operators for CUDA tensors: device, stream and memory for the kernels, and registration.
#include "abi.h"

#include <cuda_runtime.h>

#include "../cuda/kernels.h"
#include "operators.h"

namespace cbam {
namespace {

cudaStream_t stream_of(const Tensor& tensor) {
  return static_cast<cudaStream_t>(current_stream(tensor));
}

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

// Diagnostics: the architecture of the machine code that runs on the device of `probe` (900 for
// sm_90).
int64_t cuda_arch(const Tensor& probe) {
  STD_TORCH_CHECK(probe.scalar_type() == ScalarType::Int && probe.numel() == 1,
                  "_cuda_arch: probe must be an int32 tensor of one element");
  const Cuda::Scope scope(probe);
  cuda::device_properties(probe.get_device_index());
  return cuda::running_arch(static_cast<int32_t*>(probe.mutable_data_ptr()), stream_of(probe));
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CUDA, m) {
  static const FirstCopy first("_cuda_arch(Tensor(a!) probe) -> int");
  if (!first) return;
  implement_operators<Cuda>(m);
  m.impl("_cuda_arch", TORCH_BOX(&cuda_arch));
}

}  // namespace
}  // namespace cbam
