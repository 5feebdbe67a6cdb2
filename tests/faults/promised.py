"""Faults against what docs/supported.md promises of devices, streams, threads, sizes and wild
values: what goes wrong far from where somebody looks."""

from __future__ import annotations

from .fault import Fault

PROMISED = (
    Fault(
        "torch-no-device-guard",
        "csrc/torch/cuda_backend.h",
        "explicit Scope(const Tensor& input) : guard(input.get_device_index()) {}\n"
        "    DeviceGuard guard;",
        "explicit Scope(const Tensor&) {}",
    ),
    Fault(
        "torch-guard-of-the-first-device",
        "csrc/torch/cuda_backend.h",
        "guard(input.get_device_index())",
        "guard(0)",
    ),
    Fault(
        "torch-work-goes-to-the-null-stream",
        "csrc/torch/cuda_backend.h",
        "stream_of(input), workspace",
        "nullptr, workspace",
    ),
    Fault(
        "torch-stream-of-the-first-device",
        "csrc/torch/abi.h",
        "aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream)",
        "aoti_torch_get_current_cuda_stream(0, &stream)",
    ),
    Fault(
        "cuda-launches-without-a-stream",
        "csrc/cuda/launch.cuh",
        "    config.stream = queue_.stream;\n",
        "",
    ),
    Fault(
        "cuda-nobody-asks-whether-a-launch-failed",
        "csrc/cuda/launch.cuh",
        "    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),\n"
        '          "launch of a kernel");',
        "    cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);",
    ),
    Fault(
        "cuda-errors-are-left-for-the-next-to-ask",
        "csrc/cuda/errors.cuh",
        "  cudaGetLastError();  // or the next to ask would be told\n",
        "",
    ),
    Fault(
        "cuda-chunks-begin-within-32-bits",
        "csrc/cuda/call.cuh",
        "batch + first * elements;",
        "batch + static_cast<int>(first * elements);",
        slow_tests=("tests/cuda/test_big.py",),
    ),
    Fault(
        "cuda-blocks-begin-within-32-bits",
        "csrc/cuda/axes.cuh",
        "at.origin = row_origin * columns(body) + cut.first_column;",
        "at.origin = static_cast<int>(row_origin * columns(body) + cut.first_column);",
        slow_tests=("tests/cuda/test_big.py",),
    ),
    Fault(
        "cuda-maximum-drops-nan",
        "csrc/cuda/reduce.cuh",
        "max.NaN.f32",
        "max.f32",
    ),
    Fault(
        "cpu-samples-begin-within-32-bits",
        "csrc/cpu/sample.h",
        "batch + n * elements;",
        "batch + static_cast<int>(n * elements);",
        slow_tests=("tests/cpu/test_big.py",),
    ),
    Fault(
        "cpu-rows-begin-within-32-bits",
        "csrc/cpu/nchw.h",
        "return c * shape.pixels + p; }",
        "return static_cast<int>(c * shape.pixels + p); }",
        slow_tests=("tests/cpu/test_big.py",),
    ),
    Fault(
        "cpu-pixels-begin-within-32-bits",
        "csrc/cpu/nhwc.h",
        "return p * shape.c + c; }",
        "return static_cast<int>(p * shape.c + c); }",
        slow_tests=("tests/cpu/test_big.py",),
    ),
    Fault(
        "cpu-no-channel-where-all-are-minus-infinity",
        "csrc/cpu/nchw.h",
        "ChannelResults<A> channel) {\n    std::fill_n(pixel.sums, tile.size(), A{0});\n"
        "    std::fill_n(pixel.maxima, tile.size(), -kInfinity<A>);\n"
        "    std::fill_n(pixel.argmaxima, tile.size(), Int<A>{0});",
        "ChannelResults<A> channel) {\n    std::fill_n(pixel.sums, tile.size(), A{0});\n"
        "    std::fill_n(pixel.maxima, tile.size(), -kInfinity<A>);\n"
        "    std::fill_n(pixel.argmaxima, tile.size(), Int<A>{-(1 << 29)});",
    ),
    Fault(
        "cpu-memory-within-a-parallel-loop",
        "csrc/cpu/sample.h",
        "      for (int64_t n = worker; n < whole; n += workers) {\n",
        "      const Prepared<Memory> mine(1, shape);\n"
        "      for (int64_t n = worker; n < whole; n += workers) {\n",
    ),
    Fault(
        "building-nvcc-may-be-loose",
        "cbam_ext/building/decisions.py",
        'NVCC_FLAGS = ("-O3",',
        'NVCC_FLAGS = ("-O3", "-use_fast_math",',
    ),
    Fault(
        "ops-a-second-import-is-an-error",
        "cbam_ext/ops/flops.py",
        "        counter.flop_registry.pop(operator, None)\n",
        "",
    ),
)
