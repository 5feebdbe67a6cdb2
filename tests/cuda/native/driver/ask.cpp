// What csrc/cuda/device.cu says to the answers of a runtime.
#include <cstdint>
#include <exception>
#include <string>

#include "../../../../csrc/cuda/device.h"
#include "cuda_runtime.h"

namespace cbam::cuda {
int32_t running_arch(int32_t* out, cudaStream_t stream);
}

Answers answers;

// The text of what is thrown, empty for nothing. `device`: an index not used before, since answers
// are kept.
extern "C" const char* ask(int device, int driver, int attribute, int function, int launch) {
  static std::string text;
  answers = {driver, cudaError_t(attribute), cudaError_t(function), cudaError_t(launch),
             cudaSuccess};
  text.clear();
  try {
    cbam::cuda::device_properties(device);
    int32_t arch = 0;
    cbam::cuda::running_arch(&arch, nullptr);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

// An error that was told must not be told to the next who asks CUDA.
extern "C" int left() { return answers.left; }
