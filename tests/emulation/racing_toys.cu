// A kernel that does what it is told, on which tests/cuda/test_races.py tries the detector.
#include "toys.cuh"

namespace {

// As in toys.py.
enum Do {
  kReadShared,
  kWriteShared,
  kReadSharedByte,
  kWriteSharedByte,
  kAddShared,  // atomicAdd
  kLoadReadOnly,
  kLoadL1,
  kLoadL2,
  kStore,
  kAdd,  // atomicAdd
  kBarrier,
  kSyncWarp,
  kShuffle,
  kFence,
  kWait,
  kTrigger,
};

struct Step {
  int block, thread;  // -1: all
  int what, place;
};

// Every thread takes the steps that are its own, in their order.
__global__ void follow(int count, const Step* steps, unsigned* data, unsigned* out) {
  unsigned* const words = shared<unsigned>();
  auto* const bytes = reinterpret_cast<volatile unsigned char*>(words);
  unsigned total = 0;
  for (int i = 0; i < count; ++i) {
    const Step step = steps[i];
    if (step.block >= 0 && step.block != static_cast<int>(blockIdx.x)) continue;
    if (step.thread >= 0 && step.thread != static_cast<int>(threadIdx.x)) continue;
    switch (step.what) {
      case kReadShared:
        total += words[step.place];
        break;
      case kWriteShared:
        words[step.place] = total;
        break;
      case kReadSharedByte:
        total += bytes[step.place];
        break;
      case kWriteSharedByte:
        bytes[step.place] = static_cast<unsigned char>(total);
        break;
      case kAddShared:
        total += atomicAdd(words + step.place, 1u);
        break;
      case kLoadReadOnly:
        total += __ldg(data + step.place);
        break;
      case kLoadL1:
        total += __ldca(data + step.place);
        break;
      case kLoadL2:
        total += __ldcg(data + step.place);
        break;
      case kStore:
        __stwb(data + step.place, total);
        break;
      case kAdd:
        total += atomicAdd(data + step.place, 1u);
        break;
      case kBarrier:
        __syncthreads();
        break;
      case kSyncWarp:
        __syncwarp();
        break;
      case kShuffle:
        total += __shfl_sync(kFullWarp, total, 0);
        break;
      case kFence:
        __threadfence();
        break;
      case kWait:
        cudaGridDependencySynchronize();
        break;
      case kTrigger:
        cudaTriggerProgrammaticLaunchCompletion();
        break;
    }
  }
  // Past the intrinsics: this is to keep the loads above, and none of the program's business.
  out[int64_t{blockIdx.x} * blockDim.x + threadIdx.x] = total;
}

}  // namespace

// Blocks have 64 words of shared memory.
TOY toy_follow(unsigned grid, unsigned block, int dependent, int count, const Step* steps,
               unsigned* data, unsigned* out) {
  return run(grid, block, 64 * sizeof(unsigned), dependent != 0, follow, count, steps, data, out);
}

// Hands out memory of a call.
TOY toy_fresh(void* address, size_t bytes) {
  emulation::fresh(address, bytes);
  return nullptr;
}
