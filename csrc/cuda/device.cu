// Diagnostics: which of this library's machine codes runs on a device.
//
// cbam::_cuda_arch(Tensor probe) -> int launches one thread on the device of `probe` and returns
// the architecture that the code which ran was compiled for (900 for sm_90). An error instead
// means that the library holds no code for that device.

#include "../torch_abi.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

namespace {

using torch::stable::Tensor;

__global__ void arch_kernel(int32_t* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int64_t cuda_arch(const Tensor& probe) {
  STD_TORCH_CHECK(probe.scalar_type() == torch::headeronly::ScalarType::Int && probe.numel() == 1,
                  "_cuda_arch: probe must be an int32 tensor of one element");
  const torch::stable::accelerator::DeviceGuard guard(probe.get_device_index());
  const cudaStream_t stream = current_stream(probe.get_device_index());
  auto* out = static_cast<int32_t*>(probe.mutable_data_ptr());
  arch_kernel<<<1, 1, 0, stream>>>(out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  int32_t arch = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&arch, out, sizeof(arch), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return arch;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cbam, m) { m.def("_cuda_arch(Tensor(a!) probe) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(cbam, CUDA, m) { m.impl("_cuda_arch", TORCH_BOX(&cuda_arch)); }
