// What the launch plan and the launches need to know of a GPU.
#pragma once

#include <cstdint>

namespace cbam::cuda {

struct Device {
  int multiprocessors = 1;
  int64_t l2_bytes = 0;
  bool dependent_launch = false;  // programmatic dependent launch may be used
};

// Properties of a device, which must be the current one; asked once and kept. Throws
// std::runtime_error, with the way out, where this library has no code for it.
Device device_properties(int index);

}  // namespace cbam::cuda
