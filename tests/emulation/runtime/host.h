// The calling thread as CUDA sees it: its current device and stream, and the error that its last
// call has left.
#pragma once

#include <string>

#include "emulation/launch.h"

namespace emulation {

// As long as it lives, a device is the thread's current one. No other index is that of a tensor.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_;
};

// From now on launches need a DeviceScope of their device, and its current stream. Returns true.
bool demand_scopes();

// Each thread has a stream of its own on each device. It is only compared.
void* current_stream(int device);

// Throws std::runtime_error unless the device is the current one.
void expect_device(int device, const std::string& what);

// What is wrong about the place where the thread launches; empty if nothing is.
std::string misplaced(cudaStream_t stream);

// For control.cpp: the thread's DeviceScopes, and its call after so many others that is to fail.
int scopes();
void fail_call_after(int others);
cudaError_t left_error();

}  // namespace emulation
