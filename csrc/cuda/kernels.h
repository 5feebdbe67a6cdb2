// The CUDA kernels' front door: the operators on one device and stream. Knows nothing of PyTorch.
//
// All calls only enqueue work. They throw std::runtime_error where CUDA reports an error.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../problem.h"
#include "device.h"

namespace cbam::cuda {

struct Queue {
  Device device;
  cudaStream_t stream;
  void* workspace;  // workspace_bytes() of memory, 16-byte aligned, in any state
};

int64_t workspace_bytes(const ForwardArgs& args, const Device& device);
int64_t workspace_bytes(const ApplyArgs& args, const Device& device);
int64_t workspace_bytes(const ApplyBackwardArgs& args, const Device& device);
int64_t workspace_bytes(const BackwardArgs& args, const Device& device);
int64_t workspace_bytes(const PoolArgs& args, const Device& device);
int64_t workspace_bytes(const ChannelStatsArgs& args, const Device& device);
int64_t workspace_bytes(const ChannelStatsBackwardArgs& args, const Device& device);
int64_t workspace_bytes(const PoolBackwardArgs& args, const Device& device);

void run(const ForwardArgs& args, const Queue& queue);
void run(const ApplyArgs& args, const Queue& queue);
void run(const ApplyBackwardArgs& args, const Queue& queue);
void run(const BackwardArgs& args, const Queue& queue);
void run(const PoolArgs& args, const Queue& queue);
void run(const ChannelStatsArgs& args, const Queue& queue);
void run(const ChannelStatsBackwardArgs& args, const Queue& queue);
void run(const PoolBackwardArgs& args, const Queue& queue);

// Diagnostics: runs a kernel on the current device and returns the architecture that its machine
// code was compiled for (900 for sm_90). It waits for the stream; `out` is memory of the device.
int32_t running_arch(int32_t* out, cudaStream_t stream);

}  // namespace cbam::cuda
