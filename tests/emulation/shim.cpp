// What csrc/torch asks of PyTorch where that has a GPU: the functions of torch's shim behind abi.h,
// for the emulated device. The library is linked so that it calls these and not torch's.
#include "../../csrc/torch/abi.h"

#include <dlfcn.h>

#include <memory>

#include "runtime/host.h"

namespace {

// Launches that PyTorch's operators make have a device and a stream; those of the toys have none.
const bool kDemanded = emulation::demand_scopes();

int64_t count(const int64_t* sizes, int64_t dimensions) {
  int64_t product = 1;
  for (int64_t i = 0; i < dimensions; ++i) product *= sizes[i];
  return product;
}

}  // namespace

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new emulation::DeviceScope(index));
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  delete reinterpret_cast<emulation::DeviceScope*>(guard);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = emulation::current_stream(index);
  return AOTI_TORCH_SUCCESS;
}

// Torch's own; what is asked for in bytes is workspace, whose content nobody may rely on.
AOTITorchError aoti_torch_aten_new_empty(AtenTensorHandle like, const int64_t* sizes,
                                         int64_t dimensions, int32_t* dtype, int32_t* layout,
                                         int32_t* device, int32_t device_index, int32_t* pinned,
                                         AtenTensorHandle* result) {
  static const auto of_torch = reinterpret_cast<decltype(&aoti_torch_aten_new_empty)>(
      dlsym(RTLD_NEXT, "aoti_torch_aten_new_empty"));
  const AOTITorchError error =
      of_torch(like, sizes, dimensions, dtype, layout, device, device_index, pinned, result);
  const int64_t bytes = count(sizes, dimensions);
  if (error == AOTI_TORCH_SUCCESS && *dtype == aoti_torch_dtype_uint8() && bytes > 0) {
    void* data = nullptr;
    aoti_torch_get_data_ptr(*result, &data);
    emulation::fresh(data, static_cast<size_t>(bytes));
  }
  return error;
}
