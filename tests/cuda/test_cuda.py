"""What only a GPU can show: streams, graphs, devices, memory, and tensors of billions of elements.

Everything that the CUDA kernels share with the others stands in the other files, for all backends.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cbam_ext
from cbam_ext import reference

from support.leaks import calls_of_the_operators, left_behind
from support.samples import (
    NAMES,
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    same_bits,
    true_gradients,
    truth,
)


def _obstacle() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    if not cbam_ext.ops.has_kernels("cuda"):
        return cbam_ext.building.library.no_kernel_reason("cuda")
    return ""


pytestmark = pytest.mark.skipif(bool(_obstacle()), reason=_obstacle() or "there is a GPU")

# Vector paths and scalar ones, both layouts, from one block to many.
CASES = [
    Problem((4, 64, 56, 56), 7, 4, torch.bfloat16),
    Problem((4, 64, 56, 56), 7, 4, torch.bfloat16, "nhwc"),
    Problem((1, 65, 47, 61), 7, 4),
    Problem((1, 65, 47, 61), 7, 4, layout="nhwc"),
    Problem((3, 33, 40, 41), 5, 2, torch.float64, "nhwc"),
    Problem((40, 512, 7, 7), 7, 32, torch.float16),
]
SLEEP = 1_000_000_000  # cycles: half a second, longer than launching takes on a busy machine


def make(problem: Problem, device: torch.device | str = "cuda") -> Arguments:
    """Arguments drawn on the device, biases and all; float32 parameters for a half input.

    Unlike ``samples.draw``, which compares with float64, it does not look for pairs of channels too
    close to tell apart. Gates are near one half.
    """
    channels, hidden, kernel = problem.shape[1], problem.hidden, problem.kernel
    dtype = reference.accumulator_dtype(problem.dtype)

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, dtype=dtype, device=device)

    x = torch.randn(problem.shape, dtype=problem.dtype, device=device)
    return Arguments(
        x.contiguous(memory_format=problem.memory_format),
        normal(hidden, channels, scale=channels**-0.5),
        normal(hidden, scale=0.5),
        normal(channels, hidden, scale=0.05 * hidden**-0.5),
        normal(channels, scale=0.05),
        normal(1, 2, kernel, kernel, scale=1 / kernel),
        normal(1, scale=1),
    )


def everything(arguments: Sequence[Tensor | None], grad_output: Tensor) -> list[Tensor]:
    """The output, then all gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    output = torch.ops.cbam.forward(*leaves)
    present = [t for t in leaves if t is not None]
    return [output.detach(), *torch.autograd.grad(output, present, grad_output)]


def assert_same(expected: Sequence[Tensor], found: Sequence[Tensor], what: str) -> None:
    for name, a, b in zip(("output", *NAMES), expected, found, strict=True):
        assert same_bits(a, b), f"{what}: {name} differs"


# ---------------------------------------------------------------------- streams, graphs, devices


@pytest.mark.parametrize("problem", CASES, ids=str)
def test_200_repeats_give_the_same_bits(problem: Problem) -> None:
    arguments = make(problem)
    grad_output = torch.randn_like(arguments.input)
    expected = everything(arguments, grad_output)
    for i in range(200):
        assert_same(expected, everything(arguments, grad_output), f"repeat {i}")


@pytest.mark.parametrize("kind", ["null", "side"])
@pytest.mark.parametrize("problem", CASES, ids=str)
def test_work_goes_to_the_current_stream(problem: Problem, kind: str) -> None:
    """Inputs that arrive late, behind a sleep: a launch on another stream would read the old."""
    arguments = make(problem)
    late = torch.randn_like(arguments.input), torch.randn_like(arguments.input)
    expected = everything((late[0], *arguments[1:]), late[1])
    grad_output = torch.zeros_like(arguments.input)
    # The default stream of PyTorch is the NULL stream of CUDA.
    stream = torch.cuda.default_stream() if kind == "null" else torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        arguments.input.copy_(late[0])
        grad_output.copy_(late[1])
        found = everything(arguments, grad_output)
        assert not stream.query(), "the operator waited for the device"
    stream.synchronize()
    assert_same(expected, found, f"on the {kind} stream")


def test_streams_do_not_share_scratch_memory() -> None:
    drawn = [make(problem) for problem in CASES]
    calls = [(arguments, torch.randn_like(arguments.input)) for arguments in drawn]
    expected = [everything(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[] for _ in calls]
    for _ in range(10):
        for i, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[i].append(everything(*call))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        for result in results:
            assert_same(expected[i], result, f"stream {i}")


# Pairs of sizes of the convolution. The last ones need different amounts of dynamic shared memory,
# beyond what a kernel has unless it asks, so that each thread asks for another limit.
@pytest.mark.parametrize("sizes", [(7, 7), (3, 7), (49, 61)], ids=str)
def test_threads_launch_at_once(sizes: tuple[int, int]) -> None:
    """Two threads that launch at the same time, again and again."""
    calls = []
    for size in sizes:
        arguments = make(Problem((2, 16, 64, 64), size, 2))
        calls.append((arguments, torch.randn_like(arguments.input)))
    expected = [everything(*call) for call in calls]
    torch.cuda.synchronize()
    together = threading.Barrier(len(calls))

    def work(number: int) -> list[list[Tensor]]:
        found = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                together.wait(timeout=60)
                found.append(everything(*calls[number]))
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(work, range(len(calls))))
    for number, found in enumerate(results):
        for i, result in enumerate(found):
            assert_same(expected[number], result, f"thread {number}, call {i}")


@pytest.mark.parametrize("problem", CASES, ids=str)
def test_a_captured_graph_replays_with_new_inputs(problem: Problem) -> None:
    """Capture fails on anything that waits for the device, reads from it or allocates outside."""
    arguments = make(problem)
    grad_output = torch.randn_like(arguments.input)
    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        everything(arguments, grad_output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(arguments, grad_output)
    for i in range(3):
        for tensor, value in zip((*arguments, grad_output), (*make(problem), None), strict=True):
            tensor.copy_(torch.randn_like(tensor) if value is None else value)
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        assert_same(everything(arguments, grad_output), captured, f"replay {i}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts_and_not_the_current_one() -> None:
    arguments = make(CASES[2], "cuda:1")
    grad_output = torch.randn_like(arguments.input)
    with torch.cuda.device(1):
        expected = everything(arguments, grad_output)
    with torch.cuda.device(0):
        found = everything(arguments, grad_output)
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in found)
    assert_same(expected, found, "from another device")


@pytest.mark.parametrize("problem", CASES, ids=str)
def test_no_second_full_size_tensor(problem: Problem) -> None:
    problem = Problem((64, *problem.shape[1:]), 7, 4, problem.dtype, problem.layout)
    arguments = make(problem)
    x = arguments.input.requires_grad_()
    parameters = [t.requires_grad_() for t in arguments[1:]]
    grad_output = torch.randn_like(x)

    def peak() -> float:
        return (torch.cuda.max_memory_allocated() - before) / x.nbytes

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = torch.ops.cbam.forward(x, *parameters)
    assert peak() < 1.3  # the output
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(output, [x, *parameters], grad_output)
    assert peak() < 1.3  # the gradient


def test_no_memory_is_left_behind() -> None:
    """By calls of every kind, errors included."""

    def count() -> int:
        gc.collect()  # transforms of torch.func leave cycles
        return torch.cuda.memory_allocated()

    left = {
        name: left_behind(call, count, times // 10)
        for name, (times, call) in calls_of_the_operators("cuda").items()
    }
    assert not {name: size for name, size in left.items() if size}


# ------------------------------------------------------------------------------------ large sizes


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_samples_than_a_grid_dimension(layout: str, generator: torch.Generator) -> None:
    """10,001 times the same seven samples."""
    small = draw(Problem((7, 3, 4, 5), 3, 2, layout=layout, biases="12c"), generator, "cuda")
    upstream = draw_like(small.input, generator)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def many(t: Tensor) -> Tensor:
        return t.repeat(10_001, 1, 1, 1).contiguous(memory_format=memory_format)

    output, *gradients = everything((many(small.input), *small[1:]), many(upstream))
    assert_close(output, many(truth(small).output), "output")
    expected = true_gradients(small, upstream)
    assert_close(gradients[0], many(expected[0]), "gradient of input", 3)
    for name, found, true in zip(NAMES[1:], gradients[1:], expected[1:], strict=True):
        assert true is not None
        torch.testing.assert_close(
            found.cpu().double() / 10_001,
            true,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, n=name: f"{n} {m}",
        )


# Where many channels nearly cancel, only float64 knows the gradients.
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "dtype", "values"),
    [
        ((1, 1, 70_001, 3), torch.float32, "normal"),
        ((1, 1, 3, 70_001), torch.float32, "normal"),
        ((1, 4, 70_001, 2), torch.float32, "constant"),
        ((1, 70_001, 3, 2), torch.float64, "normal"),
    ],
    ids=["rows", "columns", "rows of planes", "channels"],
)
def test_sizes_over_a_grid_dimension(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    values: str,
    layout: str,
    generator: torch.Generator,
) -> None:
    problem = Problem(shape, 3, 1, dtype, layout, biases="12c", values=values)
    arguments = draw(problem, generator, "cuda")
    grad_output = draw_like(arguments.input, generator)
    output, *gradients = everything(arguments, grad_output)
    assert_close(output, truth(arguments).output, "output")
    assert_gradients_close(gradients, arguments, grad_output)


def need_memory(gibibytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes:.0f} GiB of free GPU memory, there are {free:.0f}")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("samples", "dtype"),
    [
        (2047, torch.float16),
        (2048, torch.float16),
        (2049, torch.float16),
        (573, torch.float32),  # 0.6e9 elements: bytes beyond 2**31, elements not
    ],
    ids=["below", "at", "above", "0.6e9 float32"],
)
def test_large_batch(samples: int, dtype: torch.dtype, layout: str) -> None:
    """Samples of 2**20 elements; what the operator makes of few of them is proven elsewhere."""
    need_memory(28 if dtype == torch.float16 else 16)
    arguments = make(Problem((samples, 16, 256, 256), 7, 2, dtype, layout))
    grad_output = torch.randn_like(arguments.input)
    output, grad_input, *found = everything(arguments, grad_output)
    totals = [torch.zeros(t.shape, dtype=torch.float64, device="cuda") for t in found]
    for begin in range(0, samples, 256):
        part = slice(begin, begin + 256)
        few = everything((arguments.input[part], *arguments[1:]), grad_output[part])
        assert_mostly_close(output[part], few[0])
        assert_mostly_close(grad_input[part], few[1])
        for total, gradient in zip(totals, few[2:], strict=True):
            total += gradient
    for name, gradient, total in zip(NAMES[1:], found, totals, strict=True):
        assert relative_distance(gradient, total) < 1e-3, name


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("width", [8191, 8192, 8193], ids=["below", "at", "above"])
def test_large_sample(width: int, layout: str) -> None:
    """One sample of 2**31 elements, against the definition in float64, strip by strip."""
    need_memory(32)
    channels, height = 64, 4096
    arguments = make(Problem((1, channels, height, width), 7, 2, torch.float16, layout))
    x = arguments.input
    arguments.fc1_weight.abs_().mul_(0.1)  # no ReLU is dead, whose gradient would be nothing,
    arguments.fc1_bias.abs_()
    arguments.fc2_weight.mul_(0.25)  # and the gates stay together
    peaks = plant_maxima(x)
    grad_output = torch.randn_like(x)
    output, grad_input, *found = everything(arguments, grad_output)

    # Every tensor of the definition that is not full-size, as a leaf of its own.
    strips = [slice(row, min(row + 256, height)) for row in range(0, height, 256)]
    exact = [t.double().requires_grad_() for t in arguments[1:]]
    w1, b1, w2, b2, conv_weight, conv_bias = exact
    average = sum(x[:, :, strip].double().sum((2, 3)) for strip in strips) / (height * width)
    maximum = torch.stack([x[:, :, strip].double().amax((2, 3)) for strip in strips]).amax(0)
    average.requires_grad_(), maximum.requires_grad_()
    z = sum(F.linear(F.relu(F.linear(pooled, w1, b1)), w2, b2) for pooled in (average, maximum))
    gate = torch.sigmoid(z)[..., None, None]
    ca = gate.detach()
    assert ca.max() < 2 * ca.min(), "planted maxima would not be maxima of u"

    stats = torch.empty(1, 2, height, width, dtype=torch.float64, device="cuda")
    winner = torch.empty(1, 1, height, width, dtype=torch.int64, device="cuda")
    for strip in strips:
        u = ca * x[:, :, strip].double()
        stats[:, :1, strip] = u.mean(1, keepdim=True)
        stats[:, 1:, strip], winner[:, :, strip] = u.max(1, keepdim=True)
    stats.requires_grad_()
    spatial = torch.sigmoid(F.conv2d(stats, conv_weight, conv_bias, padding=3))
    sa = spatial.detach()
    grad_sa = torch.empty_like(sa)
    for strip in strips:
        u, g = ca * x[:, :, strip].double(), grad_output[:, :, strip].double()
        assert_mostly_close(output[:, :, strip], sa[:, :, strip] * u)
        grad_sa[:, :, strip] = (g * u).sum(1, keepdim=True)
    ds, *d_conv = torch.autograd.grad(spatial, [stats, conv_weight, conv_bias], grad_sa)

    def grad_u(strip: slice) -> Tensor:
        du = grad_output[:, :, strip].double() * sa[:, :, strip] + ds[:, :1, strip] / channels
        return du.scatter_add_(1, winner[:, :, strip], ds[:, 1:, strip])

    grad_gate = sum(
        (grad_u(strip) * x[:, :, strip].double()).sum((2, 3), keepdim=True) for strip in strips
    )
    grad_average, grad_maximum, *d_mlp = torch.autograd.grad(
        gate, [average, maximum, w1, b1, w2, b2], grad_gate
    )
    for strip in strips:
        dx = ca * grad_u(strip) + grad_average[..., None, None] / (height * width)
        rows = peaks // width - strip.start
        here = ((rows >= 0) & (rows < dx.shape[2])).nonzero()[:, 0]
        dx[0, here, rows[here], peaks[here] % width] += grad_maximum[0, here]
        assert_mostly_close(grad_input[:, :, strip], dx)
    for name, gradient, expected in zip(NAMES[1:], found, (*d_mlp, *d_conv), strict=True):
        assert relative_distance(gradient, expected) < 1e-3, name


def plant_maxima(x: Tensor) -> Tensor:
    """Makes maxima clear: 4 for one channel of each pixel, 8 for one pixel of each channel.

    The rest is from [0, 1). Returns the pixels with 8, by channel; the last is the tensor's last.
    """
    _, channels, height, width = x.shape
    pixels = height * width
    x.uniform_(0, 1)
    for row in range(0, height, 256):
        strip = x[:, :, row : row + 256]
        place = torch.arange(strip[0, 0].numel(), device=x.device) + row * width
        strip.scatter_(1, (place * 7 % channels).view(1, 1, -1, width), 4.0)
    order = torch.arange(channels, device=x.device)
    peaks = pixels - 1 - (channels - 1 - order) * (pixels // channels)
    x[0, order, peaks // width, peaks % width] = 8.0
    return peaks


def assert_mostly_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, but for a few in a million.

    In billions of elements there are a few pixels with two channels too close to tell apart.
    """
    limit = 4 * torch.finfo(actual.dtype).eps if actual.dtype == torch.float16 else 1e-5
    expected = expected.to(torch.promote_types(actual.dtype, torch.float32))
    allowed = limit * (expected.abs() + 0.1)
    wrong = int((~((actual - expected).abs() <= allowed)).sum())
    assert wrong <= 1e-5 * actual.numel(), f"{wrong} of {actual.numel()} elements are off"


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())
