// The device: what the launch plan asks of it, and whether this library has code for it.

#include <array>
#include <mutex>
#include <optional>

#include "launch.cuh"

namespace cbam::cuda {
namespace {

// Writes the architecture that the code which runs was compiled for (900 for sm_90).
__global__ void arch_kernel(int32_t* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

Device query(int index) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  cudaFuncAttributes code = {};
  const cudaError_t found =
      cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(arch_kernel));
  if (found != cudaSuccess) {
    cudaGetLastError();  // or the next to ask would be told
    const std::string number = std::to_string(major) + "." + std::to_string(minor);
    throw std::runtime_error(
        "cbam: this GPU has compute capability " + number +
        ", but cbam_ext's CUDA kernels were built for " CBAM_CUDA_ARCHS " (" +
        cudaGetErrorString(found) +
        "). Build them for it, in a checkout of cbam_ext: FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=\"" +
        number + "\" pip install --no-build-isolation --force-reinstall --no-deps .");
  }
  Device device;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  // Code that was compiled for less does not wait for the launch before it, see platform.cuh.
  // Drivers before 12.3 cannot capture dependent launches into graphs.
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  device.dependent_launch = major >= 9 && code.ptxVersion >= 90 && driver >= 12030;
  return device;
}

}  // namespace

Device device_properties(int index) {
  constexpr size_t kMaxDevices = 64;
  static std::mutex mutex;
  static std::array<std::optional<Device>, kMaxDevices> known;
  const std::lock_guard<std::mutex> lock(mutex);
  std::optional<Device>& device = known.at(static_cast<size_t>(index));
  if (!device) device = query(index);
  return *device;
}

int32_t running_arch(int32_t* out, cudaStream_t stream) {
  arch_kernel<<<1, 1, 0, stream>>>(out);
  check(cudaGetLastError(), "launch of a kernel");
  int32_t arch = 0;
  check(cudaMemcpyAsync(&arch, out, sizeof(arch), cudaMemcpyDeviceToHost, stream), "copy to host");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return arch;
}

}  // namespace cbam::cuda
