// The one place that launches kernels.
#pragma once

#include "errors.cuh"
#include "kernels.h"
#include "platform.cuh"

namespace cbam::cuda {

// Launches of one operator call, in order, on one stream.
class Launcher {
 public:
  explicit Launcher(const Queue& queue) : queue_(queue) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes,
              Arguments&&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = queue_.stream;
    // Only behind a kernel of ours: all of these wait for what came before them.
    cudaLaunchAttribute dependent = {};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    if (queue_.device.dependent_launch && after_kernel_) {
      config.attrs = &dependent;
      config.numAttrs = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
          "launch of a kernel");
    after_kernel_ = true;
  }

  // A kernel that shares its elements out by each_in_grid: a thread takes several where they are
  // many.
  template <class... Parameters, class... Arguments>
  void launch_each(void (*kernel)(Parameters...), int64_t elements, Arguments&&... arguments) {
    constexpr int64_t kMaxBlocks = 4096;
    const int64_t wanted = divide_up(elements, kThreads);
    launch(kernel, wanted < kMaxBlocks ? wanted : kMaxBlocks, 0,
           std::forward<Arguments>(arguments)...);
  }

 private:
  const Queue& queue_;
  bool after_kernel_ = false;
};

}  // namespace cbam::cuda
