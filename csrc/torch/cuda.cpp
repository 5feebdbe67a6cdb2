// The operators for CUDA tensors: registration, and what the diagnostics ask.
#include "cuda_backend.h"

#include "operators.h"

namespace cbam {
namespace {

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
