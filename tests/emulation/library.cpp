// The operators of cbam under the namespace cbam_emulated, for CPU tensors: the CUDA kernels on the
// emulated device, reached as on a GPU. `operators()` in control.py sets that device and reads its
// counters.
#include "../../csrc/torch/cuda_backend.h"

#include "../../csrc/torch/operators.h"
#include "../../csrc/torch/schemas.h"
#include "runtime/device.h"
#include "runtime/host.h"

namespace cbam {

cuda::Device cuda::device_properties(int index) {
  emulation::expect_device(index, "the properties of a device");
  const emulation::Properties& emulated = emulation::properties();
  Device device;
  device.multiprocessors = emulated.multiprocessors;
  device.l2_bytes = emulated.l2_bytes;
  device.dependent_launch = emulated.dependent_launch;
  return device;
}

namespace {

STABLE_TORCH_LIBRARY(cbam_emulated, m) { define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(cbam_emulated, CPU, m) { implement_operators<Cuda>(m); }

}  // namespace
}  // namespace cbam
