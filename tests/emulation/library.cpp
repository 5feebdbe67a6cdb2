// The operators of cbam under the namespace cbam_emulated, for CPU tensors: the CUDA kernels on the
// emulated device. `operators()` in control.py sets that device and reads its counters.
#include "../../csrc/torch/operators.h"

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/torch/schemas.h"
#include "runtime/device.h"

namespace cbam {
namespace {

struct Emulated {
  static constexpr int64_t kAlignment = 16;
  struct Scope {
    explicit Scope(const Tensor&) {}
  };

  template <class Args>
  static void run(const Tensor& input, const Args& args) {
    const emulation::Properties& device = emulation::properties();
    cuda::Queue queue{};
    queue.device.multiprocessors = device.multiprocessors;
    queue.device.l2_bytes = device.l2_bytes;
    queue.device.dependent_launch = device.dependent_launch;
    const int64_t bytes = cuda::workspace_bytes(args, queue.device);
    const Tensor workspace = empty(input, {bytes}, ScalarType::Byte);
    queue.workspace = workspace.mutable_data_ptr();
    if (bytes > 0) emulation::fresh(queue.workspace, static_cast<size_t>(bytes));
    cuda::run(args, queue);
  }
};

STABLE_TORCH_LIBRARY(cbam_emulated, m) { define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(cbam_emulated, CPU, m) { implement_operators<Emulated>(m); }

}  // namespace
}  // namespace cbam
