// The device: what the launch plan asks of it, and whether this library has code for it.

#include "device.h"

#include <array>
#include <mutex>
#include <optional>

#include "errors.cuh"
#include "kernels.h"

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

std::string version_text(int version) {  // 12040 for CUDA 12.4
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

[[noreturn]] void refuse(const std::string& problem, const std::string& settings) {
  throw std::runtime_error("cbam: " + problem + ", in a checkout of cbam_ext: FORCE_CUDA=1 " +
                           settings +
                           " pip install --no-build-isolation --force-reinstall --no-deps .");
}

// The runtime is linked in, so it is as new as the toolkit was.
int check_driver() {
  constexpr int kMajor = CUDART_VERSION / 1000;
  const std::string needed = kMajor == 12   ? "a driver of the 525 series or newer"
                             : kMajor == 13 ? "a driver of the 580 series or newer"
                                            : "a newer driver";
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver / 1000 < kMajor) {
    refuse("cbam_ext's CUDA kernels were built with CUDA " + version_text(CUDART_VERSION) +
               " and need " + needed + ", but the one here is for CUDA up to " +
               version_text(driver) + ". Update it, or build with a toolkit of CUDA " +
               std::to_string(driver / 1000),
           "CUDA_HOME=TOOLKIT");
  }
  return driver;
}

Device query(int index) {
  const int driver = check_driver();
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  cudaFuncAttributes code = {};
  const cudaError_t found =
      cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(arch_kernel));
  if (is_unfit(found)) {
    cudaGetLastError();  // or the next to ask would be told
    const std::string number = std::to_string(major) + "." + std::to_string(minor);
    refuse("this GPU has compute capability " + number +
               ", but cbam_ext's CUDA kernels were built for " CBAM_CUDA_ARCHS " (" +
               cudaGetErrorString(found) + "). Build them for it",
           "TORCH_CUDA_ARCH_LIST=\"" + number + "\"");
  }
  check(found, "cudaFuncGetAttributes");
  Device device;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  // Code that was compiled for less does not wait for the launch before it, see platform.cuh.
  // Drivers before 12.3 cannot capture dependent launches into graphs.
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
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(1);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, arch_kernel, out), "launch of a kernel");
  int32_t arch = 0;
  check(cudaMemcpyAsync(&arch, out, sizeof(arch), cudaMemcpyDeviceToHost, stream), "copy to host");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return arch;
}

}  // namespace cbam::cuda
