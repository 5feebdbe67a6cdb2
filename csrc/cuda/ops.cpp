// The operators for CUDA tensors: device, stream and memory for the kernels, and registration.
#include "../torch_abi.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../operators.h"
#include "kernels.h"

namespace cbam {

namespace cuda {
void launch_arch_kernel(int32_t* out, cudaStream_t stream);  // device.cu
}

namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Cuda {
  static constexpr int64_t kAlignment = 16;
  struct Scope {
    explicit Scope(const Tensor& input) : guard(input.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  template <class Args>
  static void run(const Tensor& input, const Args& args) {
    const cuda::Device device = cuda::device_properties(input.get_device_index());
    // The allocator hands this memory only to later work of the same stream.
    const Tensor workspace = empty(input, {cuda::workspace_bytes(args, device)}, ScalarType::Byte);
    cuda::run(args, {device, current_stream(input), workspace.mutable_data_ptr()});
  }
};

// Diagnostics: the architecture of the machine code that runs on the device of `probe` (900 for
// sm_90).
int64_t cuda_arch(const Tensor& probe) {
  STD_TORCH_CHECK(probe.scalar_type() == ScalarType::Int && probe.numel() == 1,
                  "_cuda_arch: probe must be an int32 tensor of one element");
  const Cuda::Scope scope(probe);
  const cudaStream_t stream = current_stream(probe);
  cuda::device_properties(probe.get_device_index());
  auto* out = static_cast<int32_t*>(probe.mutable_data_ptr());
  cuda::launch_arch_kernel(out, stream);
  int32_t arch = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&arch, out, sizeof(arch), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return arch;
}

STABLE_TORCH_LIBRARY_FRAGMENT(cbam, m) { m.def("_cuda_arch(Tensor(a!) probe) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(cbam, CUDA, m) {
  implement_operators<Cuda>(m);
  m.impl("_cuda_arch", TORCH_BOX(&cuda_arch));
}

}  // namespace
}  // namespace cbam
