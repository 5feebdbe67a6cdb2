// The one door to PyTorch: no other file includes torch's headers, and only this one names what
// lies under the typed API (torch::stable::detail, the C functions aoti_torch_*).
//
// Only the LibTorch Stable ABI is used, so one binary runs on torch 2.10 and everything newer. The
// target version stands here and not on the command line, because the pybind11 headers that torch
// bundled before 2.13 refuse to compile where it is defined.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include <initializer_list>
#include <optional>

namespace cbam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Library = torch::stable::detail::StableLibrary;  // what the registration macros hand out

// Throws what a function of the shim says went wrong.
inline void check_shim(AOTITorchError libtorch_call) {
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
  STABLE_TORCH_ERROR_CODE_CHECK(libtorch_call);
#else  // torch 2.10, which keeps the reason to itself
  TORCH_ERROR_CODE_CHECK(libtorch_call);
#endif
}

// Whether this copy of a library is the first in the process. A C++ extension that links its own
// and the Python package bring two, of which one is to register the operators; and it is an error
// in torch to define one twice. Each library asks in one place, by an operator that it alone
// defines.
class FirstCopy {
 public:
  explicit FirstCopy(const char* schema) {
    check_shim(aoti_torch_library_init_fragment("cbam", __FILE__, __LINE__, &library_));
    is_first_ = aoti_torch_library_def(library_, schema) == AOTI_TORCH_SUCCESS;
  }
  ~FirstCopy() { aoti_torch_delete_library_object(library_); }
  FirstCopy(const FirstCopy&) = delete;
  FirstCopy& operator=(const FirstCopy&) = delete;

  explicit operator bool() const { return is_first_; }

 private:
  TorchLibraryHandle library_ = nullptr;
  bool is_first_ = false;
};

// Of libcbam_cpu, which defines operators in two files.
bool is_first_cpu_copy();

// A new tensor on the device of another. torch::stable::new_empty finds its operator by name on
// every call, which takes as long again.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  check_shim(aoti_torch_aten_new_empty(
      like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()), &number, /*layout=*/nullptr,
      /*device=*/nullptr, /*device_index=*/0, /*pin_memory=*/nullptr, &result));
  return Tensor(result);
}

#ifdef USE_CUDA

using torch::stable::accelerator::DeviceGuard;

// The cudaStream_t that PyTorch queues work on now, on the device of a tensor. The typed API has it
// from torch 2.13 on.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  check_shim(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

#endif  // USE_CUDA

}  // namespace cbam
