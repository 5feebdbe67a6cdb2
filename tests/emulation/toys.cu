// Small kernels, right ones and faulty ones, on which tests/cuda/test_emulation.py tries the
// emulation.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "toys.cuh"

namespace {

// ------------------------------------------------------------------------------- right kernels

__global__ void add(int64_t n, const float* a, const float* b, float* out) {
  const int64_t step = int64_t{4} * blockDim.x * gridDim.x;
  for (int64_t i = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x); i < n; i += step) {
    if (i + 4 <= n) {
      const uint4 left = __ldg(reinterpret_cast<const uint4*>(a + i));
      const uint4 right = __ldcs(reinterpret_cast<const uint4*>(b + i));
      const auto sum = [](unsigned x, unsigned y) {
        return __float_as_uint(__uint_as_float(x) + __uint_as_float(y));
      };
      __stcs(reinterpret_cast<uint4*>(out + i),
             make_uint4(sum(left.x, right.x), sum(left.y, right.y), sum(left.z, right.z),
                        sum(left.w, right.w)));
    } else {
      for (int64_t j = i; j < n; ++j) __stwb(out + j, __ldg(a + j) + __ldcs(b + j));
    }
  }
}

// The sum of a block, in every thread of it.
template <class T>
__device__ T sum_by_shuffles(T value, T* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += scratch[warp];
  return __shfl_sync(kFullWarp, total, 7);
}

template <class T>
__device__ T sum_in_shared_memory(T value, T* scratch) {
  scratch[threadIdx.x] = value;
  for (unsigned stride = blockDim.x / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (threadIdx.x < stride) scratch[threadIdx.x] += scratch[threadIdx.x + stride];
  }
  __syncthreads();
  return scratch[0];
}

// The last block to arrive adds what all blocks have left in `partials`.
template <class T, bool kShuffles>
__global__ void sum(int64_t n, const T* values, T* partials, unsigned* arrived, T* out) {
  T* const scratch = shared<T>();
  auto* const flag = reinterpret_cast<unsigned*>(scratch + blockDim.x);
  T value = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += int64_t{blockDim.x} * gridDim.x) {
    value += __ldcs(values + i);
  }
  value = kShuffles ? sum_by_shuffles(value, scratch) : sum_in_shared_memory(value, scratch);
  if (threadIdx.x == 0) {
    __stwb(partials + blockIdx.x, value);
    __threadfence();
    *flag = atomicAdd(arrived, 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (*flag == 0 || threadIdx.x != 0) return;
  T total = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) total += __ldcg(partials + block);
  __stwb(out, total);
}

// Every thread notes when it ran: before a barrier, between it and a __syncwarp, after that.
__global__ void note_order(unsigned* clock, int* out) {
  int* const mine = out + 3 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  __stwb(mine, static_cast<int>(atomicAdd(clock, 1u)));
  __syncthreads();
  __stwb(mine + 1, static_cast<int>(atomicAdd(clock, 1u)));
  __syncwarp();
  __stwb(mine + 2, static_cast<int>(atomicAdd(clock, 1u)));
}

__global__ void wait_often(int barriers, int shuffles, int* out) {
  int value = static_cast<int>(threadIdx.x);
  for (int i = 0; i < barriers; ++i) __syncthreads();
  for (int i = 0; i < shuffles; ++i) value = __shfl_xor_sync(kFullWarp, value, 1 + i % 31);
  __stwb(out + threadIdx.x, value);
}

// A parameter of every type of a shuffle, and each source lane.
template <class T>
__global__ void shuffle_all(T* out) {
  const T mine = static_cast<T>(1000 * blockIdx.x + threadIdx.x);
  for (int lane = 0; lane < 32; ++lane) {
    __stwb(out + 64 * threadIdx.x + lane, __shfl_sync(kFullWarp, mine, lane));
    __stwb(out + 64 * threadIdx.x + 32 + lane, __shfl_xor_sync(kFullWarp, mine, lane));
  }
}

// One thread, a list of accesses to whole floats: which of the intrinsics, and where.
__global__ void access(int count, const int* kinds, const int* places, float* data) {
  for (int i = 0; i < count; ++i) {
    float* const at = data + places[i];
    switch (kinds[i]) {
      case 0:
        *at = __ldg(at);
        break;
      case 1:
        *at = __ldcs(at);
        break;
      case 2:
        *at = __ldcg(at);
        break;
      case 3:
        __stwb(at, 1.0f);
        break;
      default:
        __stcs(at, 2.0f);
    }
  }
}

// 32 lanes read neighbouring floats, one after another in a loop: lockstep shares their sectors.
__global__ void stream(int steps, const float* data, float* out) {
  float total = 0;
  for (int i = 0; i < steps; ++i) total += __ldcs(data + 32 * i + threadIdx.x);
  if (total == 1.5f) __stcs(out, total);
}

// ------------------------------------------------------------------------------ faulty kernels

enum Fault {
  kMissingBarrier,
  kMissingSyncWarp,
  kBarrierInBranch,
  kTwoBarriers,
  kReturnBeforeBarrier,
  kWarpReturnsBeforeBarrier,
  kUninitialised,
  kShuffleInBranch,
  kTwoShuffles,
  kReturnBeforeShuffle,
  kShuffleMeetsBarrier,
  kShuffleFromNowhere,
  kPartOfWarp,
  kMisaligned,
  kMisalignedWide,
  kSharedOverrun,
  kStoreOutOfBounds,
  kLoadOutOfBounds,
  kSharedReadOutOfBounds,
  kOrderOfBlocks,
  kDeepStack,
};

__device__ int deep(int n) {
  volatile char frame[1024];
  frame[n % 1024] = static_cast<char>(n);
  return n == 0 ? frame[0] : deep(n - 1) + frame[n % 1024];
}

// Shared memory of one float for every thread; `out` as long as there are threads in all.
__global__ void faulty(int fault, float* out) {
  float* const scratch = shared<float>();
  const unsigned i = threadIdx.x;
  float* const mine = out + int64_t{blockIdx.x} * blockDim.x + i;
  float value = static_cast<float>(i);
  switch (fault) {
    case kMissingBarrier:
      scratch[i] = value;
      value = scratch[(i + 1) % blockDim.x] + scratch[(i + blockDim.x - 1) % blockDim.x];
      break;
    case kMissingSyncWarp:
      scratch[i] = value;
      __syncthreads();
      if (i < 32) scratch[i] += 1;  // __syncwarp() is missing
      if (i < 32) value = scratch[i ^ 1];
      __syncthreads();
      break;
    case kBarrierInBranch:
      if (i < blockDim.x / 2 + 3) __syncthreads();
      break;
    case kTwoBarriers:
      if (i < blockDim.x / 2) {
        __syncthreads();
      } else {
        value += 1;
        __syncthreads();
      }
      break;
    case kReturnBeforeBarrier:
      if (i == blockDim.x - 1) return;
      __syncthreads();
      break;
    case kWarpReturnsBeforeBarrier:
      if (i < 32) return;
      __syncthreads();
      break;
    case kUninitialised:
      scratch[i] = i % 2 == 0 ? value : scratch[i];
      __syncthreads();
      value = scratch[i ^ 1];
      break;
    case kShuffleInBranch:
      if (i % 32 < 16) value = __shfl_xor_sync(kFullWarp, value, 1);
      break;
    case kTwoShuffles:
      if (i % 2 == 0) {
        value = __shfl_xor_sync(kFullWarp, value, 2);
      } else {
        value = __shfl_xor_sync(kFullWarp, value, 4);
      }
      break;
    case kReturnBeforeShuffle:
      if (i == 33) return;
      value = __shfl_xor_sync(kFullWarp, value, 1);
      break;
    case kShuffleMeetsBarrier:
      if (i == 5) {
        __syncthreads();
      } else {
        value = __shfl_xor_sync(kFullWarp, value, 1);
      }
      break;
    case kShuffleFromNowhere:
      value = __shfl_xor_sync(kFullWarp, value, 16);
      break;
    case kPartOfWarp:
      value = __shfl_xor_sync(0xffffu, value, 1);
      break;
    case kMisaligned:
      value = __ldg(reinterpret_cast<const float*>(reinterpret_cast<const char*>(out) + 2));
      break;
    case kMisalignedWide:
      value = static_cast<float>(__ldg(reinterpret_cast<const uint4*>(out + 1)).x);
      break;
    case kSharedOverrun:
      scratch[i + 1] = value;
      break;
    case kStoreOutOfBounds:
      __stwb(mine + 1, value);
      break;
    case kLoadOutOfBounds:
      value = __ldcg(mine + 1);
      break;
    case kSharedReadOutOfBounds:
      value = scratch[i + 1];
      break;
    case kOrderOfBlocks:
      value = blockIdx.x == 0 ? 1.0f : __ldcg(mine - blockDim.x) + 1;
      break;
    case kDeepStack:
      value = static_cast<float>(deep(1 << 20));
      break;
  }
  __stwb(mine, value);
}

}  // namespace

// ------------------------------------------------------------------------------------- entries

TOY toy_add(unsigned grid, unsigned block, int64_t n, const float* a, const float* b, float* out,
            int dependent) {
  return run(grid, block, 0, dependent != 0, add, n, a, b, out);
}

TOY toy_sum(unsigned grid, unsigned block, int64_t n, const void* values, void* partials,
            unsigned* arrived, void* out, int shuffles, int doubles) {
  cudaMemsetAsync(arrived, 0, sizeof(*arrived), nullptr);
  const size_t bytes = (doubles ? 8 : 4) * size_t{block} + 4;
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    return run(grid, block, bytes, false, shuffles ? sum<T, true> : sum<T, false>, n,
               static_cast<const T*>(values), static_cast<T*>(partials), arrived,
               static_cast<T*>(out));
  };
  return doubles ? launch(0.0) : launch(0.0f);
}

TOY toy_order(unsigned grid, unsigned block, unsigned* clock, int* out) {
  return run(grid, block, 0, false, note_order, clock, out);
}

TOY toy_wait(unsigned grid, unsigned block, int barriers, int shuffles, int* out) {
  return run(grid, block, 0, false, wait_often, barriers, shuffles, out);
}

// type: 0 float, 1 double, 2 int, 3 unsigned, 4 long long
TOY toy_shuffle(int type, void* out) {
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    return run(1, 32, 0, false, shuffle_all<T>, static_cast<T*>(out));
  };
  switch (type) {
    case 0:
      return launch(0.0f);
    case 1:
      return launch(0.0);
    case 2:
      return launch(0);
    case 3:
      return launch(0u);
    default:
      return launch(0ll);
  }
}

TOY toy_access(int count, const int* kinds, const int* places, float* data) {
  return run(1, 1, 0, false, access, count, kinds, places, data);
}

TOY toy_stream(int steps, const float* data, float* out) {
  return run(1, 32, 0, false, stream, steps, data, out);
}

TOY toy_fault(unsigned grid, unsigned block, int fault, float* out) {
  return run(grid, block, 4 * size_t{block}, false, faulty, fault, out);
}

// Shared memory beyond what a block has without asking; `ask` what cudaFuncSetAttribute is told.
TOY toy_shared(unsigned grid, unsigned block, size_t bytes, int ask, float* out) {
  if (ask >= 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(faulty, cudaFuncAttributeMaxDynamicSharedMemorySize, ask);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return run(grid, block, bytes, false, faulty, -1, out);
}

TOY toy_memset(void* address, int value, size_t bytes) {
  return cudaGetErrorString(cudaMemsetAsync(address, value, bytes, nullptr));
}

// To half and back; kind: 0 float16, 1 bfloat16.
TOY toy_convert(int kind, int64_t n, const float* in, unsigned short* half) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = kind == 0 ? __half_as_ushort(__float2half_rn(in[i]))
                        : __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
  }
  return nullptr;
}

TOY toy_widen(int kind, int64_t n, const unsigned short* half, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = kind == 0 ? __half2float(__ushort_as_half(half[i]))
                       : __bfloat162float(__ushort_as_bfloat16(half[i]));
  }
  return nullptr;
}
