// Kernels whose loops are known, for the tests of bench/machine_code. Each is named like one that
// walks over a feature map 16 bytes at once, so that all limits apply to it.

#include <cuda_runtime.h>

enum class Layout { kNCHW };

namespace {

__device__ float sum(float4 value) { return value.x + value.y + value.z + value.w; }

// Nothing may be moved past it.
__device__ void fence() { asm volatile("" ::: "memory"); }

__device__ float4 load_ordered(const float4* from) {
  float4 value;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from));
  return value;
}

}  // namespace

// Four loads, then the stores of all.
template <class S, Layout layout, int W>
__global__ void four_kernel(const float4* from, float4* to, int count) {
#pragma unroll 1
  for (int i = 0; i < count; i += 4) {
    float4 values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = load_ordered(from + i + j);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = values[j];
  }
}

// Two loads, each used before the next is issued.
template <class S, Layout layout, int W>
__global__ void one_by_one_kernel(const float4* from, float4* to, int count) {
#pragma unroll 1
  for (int i = 0; i < count; i += 2) {
    const float4 first = load_ordered(from + i);
    to[i] = first;
    fence();
    to[i + 1] = load_ordered(from + i + 1);
  }
}

// A load is used two turns later: three are on their way at each use.
template <class S, Layout layout, int W>
__global__ void ahead_kernel(const float4* from, float* to, int count) {
  float4 next = load_ordered(from), after = load_ordered(from + 1);
  float total = 0;
#pragma unroll 3
  for (int i = 2; i < count; ++i) {
    const float4 last = load_ordered(from + i);
    total += sum(next);
    next = after;
    after = last;
  }
  *to = total + sum(next) + sum(after);
}

// More values than 32 registers hold.
template <class S, Layout layout, int W>
__global__ void __launch_bounds__(1024, 2)
    spilling_kernel(const float4* from, float* to, int count) {
  float totals[48] = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float value = sum(load_ordered(from + i));
#pragma unroll
    for (int j = 0; j < 48; ++j) totals[j] = totals[j] * value + value;
  }
#pragma unroll
  for (int j = 0; j < 48; ++j) to[j] = totals[j];
}

__device__ __noinline__ float load_elsewhere(const float4* from) { return sum(load_ordered(from)); }

// The loop's loads are in a function that it calls.
template <class S, Layout layout, int W>
__global__ void calling_kernel(const float4* from, float* to, int count) {
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) total += load_elsewhere(from + i);
  *to = total;
}

// The loop loads four bytes at once; 16 are loaded before it only.
template <class S, Layout layout, int W>
__global__ void narrow_kernel(const float4* from, const float* more, float* to, int count) {
  float total = sum(load_ordered(from));
#pragma unroll 1
  for (int i = 0; i < count; ++i) total += more[i];
  *to = total;
}

// Much arithmetic for one load.
template <class S, Layout layout, int W>
__global__ void costly_kernel(const float4* from, float* to, int count) {
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float value = sum(load_ordered(from + i));
#pragma unroll
    for (int j = 0; j < 400; ++j) total = total * value + 1.0f;
  }
  *to = total;
}

// A loop without loads inside the one with them.
template <class S, Layout layout, int W>
__global__ void nested_kernel(const float4* from, float* to, int count) {
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float value = sum(load_ordered(from + i));
#pragma unroll 1
    for (int j = 0; j < count; ++j) total = total * value + 1.0f;
  }
  *to = total;
}

// Copies into shared memory, of which the last but one is waited for.
template <class S, Layout layout, int W>
__global__ void async_kernel(const float4* from, float* to, int count) {
  extern __shared__ float4 stages[];
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(stages + threadIdx.x));
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + 4096 * (i & 1)),
                 "l"(from + i));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    total += sum(stages[threadIdx.x + 256 * (~i & 1)]);
  }
  *to = total;
}

#if __CUDA_ARCH__ >= 900
// What a bulk copy brings, 16 bytes of it for each thread and turn.
template <class S, Layout layout, int W>
__global__ void bulk_kernel(const float4* from, float* to, int count) {
  extern __shared__ float4 stages[];
  __shared__ unsigned long long arrived;
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(stages));
  const unsigned barrier = static_cast<unsigned>(__cvta_generic_to_shared(&arrived));
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4096;" ::"r"(barrier));
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 4096, "
          "[%2];" ::"r"(target),
          "l"(from + 256 * i), "r"(barrier)
          : "memory");
    }
    unsigned done = 0;
    while (done == 0) {
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p;}"
          : "=r"(done)
          : "r"(barrier), "r"(i & 1)
          : "memory");
    }
    total += sum(stages[threadIdx.x]);
    __syncthreads();
  }
  *to = total;
}
template __global__ void bulk_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
#endif

template __global__ void four_kernel<float, Layout::kNCHW, 4>(const float4*, float4*, int);
template __global__ void one_by_one_kernel<float, Layout::kNCHW, 4>(const float4*, float4*, int);
template __global__ void ahead_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
template __global__ void spilling_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
template __global__ void calling_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
template __global__ void narrow_kernel<float, Layout::kNCHW, 4>(const float4*, const float*, float*,
                                                                int);
template __global__ void costly_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
template __global__ void nested_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
template __global__ void async_kernel<float, Layout::kNCHW, 4>(const float4*, float*, int);
