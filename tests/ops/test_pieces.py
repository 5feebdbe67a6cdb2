"""The operators that do what is around layers which PyTorch runs: pooled maps, channel statistics,
and their gradients, on every backend.

The truth is plain PyTorch in float64, whose ``max(dim)`` takes the first of equals as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cbam_ext import reference

from support.backends import Backend
from support.samples import (
    DTYPES,
    INPUT_GRADIENT,
    LARGE,
    LIMITS,
    PROBLEMS,
    UNDECIDED,
    Problem,
    assert_close,
    draw,
    draw_like,
    same_bits,
    single_threaded,
)


class Sample(NamedTuple):
    """The feature map, its gates, and what comes from above."""

    x: Tensor
    channel_gate: Tensor
    spatial_gate: Tensor
    grad_pooled: Tensor
    grad_output: Tensor
    grad_stats: Tensor


def draw_sample(problem: Problem, generator: torch.Generator, backend: Backend) -> Sample:
    x = draw(problem, generator, backend.device).input
    n, c, h, w = x.shape
    dtype = reference.accumulator_dtype(problem.dtype)

    def normal(*shape: int) -> Tensor:
        return draw_like(torch.empty(shape, dtype=dtype, device=x.device), generator)

    return Sample(
        x,
        _draw_gate(problem, x, generator),
        torch.sigmoid(normal(n, 1, h, w)),
        normal(n, 2, c),
        draw_like(x, generator),
        normal(n, 2, h, w),
    )


@single_threaded
def _draw_gate(problem: Problem, x: Tensor, generator: torch.Generator) -> Tensor:
    """Some below zero, and none that leave open which channel is the maximum of a pixel."""
    n, channels = x.shape[:2]
    dtype = reference.accumulator_dtype(problem.dtype)
    for _ in range(200):
        # Where channels shall tie, so must their gates.
        size = (n, 1 if problem.values == "equal" else channels, 1, 1)
        gate = torch.rand(size, generator=generator, dtype=torch.float64) * 1.2 - 0.2
        gate = gate.to(dtype).expand(n, channels, 1, 1).contiguous()
        u = exact(gate) * exact(x)
        if n == 0 or channels == 1:
            return gate.to(x.device)
        top = u.amax(1, keepdim=True)
        rest = u.masked_fill(u == top, -torch.inf).amax(1, keepdim=True)
        if not (top - rest < UNDECIDED * torch.maximum(top.abs(), rest.abs())).any():
            return gate.to(x.device)
    raise AssertionError(f"no decided gate for {problem}")


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64).contiguous()


class Results(NamedTuple):
    pooled: Tensor
    stats: Tensor
    grad_channel_gate: Tensor
    grad_input: Tensor


def call(backend: Backend, s: Sample) -> Results:
    return Results(
        backend.ops._pool(s.x),
        backend.ops._channel_stats(s.x, s.channel_gate),
        backend.ops._channel_stats_backward(s.grad_stats, s.x, s.channel_gate),
        backend.ops._pool_backward(
            *(s.grad_pooled, s.grad_output, s.x, s.channel_gate, s.spatial_gate, s.grad_stats)
        ),
    )


# ------------------------------------------------------------------------------------------ truth


def true_pool(x: Tensor) -> Tensor:
    pixels = x.flatten(2)
    return torch.stack([pixels.mean(2), pixels.max(2).values], 1)


def true_stats(x: Tensor, channel_gate: Tensor) -> Tensor:
    u = channel_gate * x
    return torch.cat([u.mean(1, keepdim=True), u.max(1, keepdim=True).values], 1)


def true_input_grad(sample: Sample) -> Tensor:
    x, channel_gate, spatial_gate, grad_pooled, grad_output, grad_stats = map(exact, sample)
    x.requires_grad_()
    results = channel_gate * spatial_gate * x, true_stats(x, channel_gate), true_pool(x)
    (dx,) = torch.autograd.grad(results, x, (grad_output, grad_stats, grad_pooled))
    return dx


@single_threaded
def assert_true(found: Results, sample: Sample) -> None:
    x, channel_gate, grad_stats = map(exact, (sample.x, sample.channel_gate, sample.grad_stats))
    assert_close(found.pooled, true_pool(x), "pooled maps")
    assert_close(found.stats, true_stats(x, channel_gate), "channel statistics")

    # A gate for each element: its gradients are the terms of a sum, which may cancel.
    gates = channel_gate.expand_as(x).contiguous().requires_grad_()
    (terms,) = torch.autograd.grad(true_stats(x, gates), gates, grad_stats)
    total = terms.sum((2, 3), keepdim=True)
    size = torch.maximum(total.abs(), terms.square().sum((2, 3), keepdim=True).sqrt())
    error = (exact(found.grad_channel_gate) - total).abs()
    assert error.shape == size.shape
    limit = LIMITS[found.grad_channel_gate.dtype] * size.amax() if size.numel() else 0
    assert (error <= limit).all(), f"gradient of the channel gate: {error.max()}, not {limit}"

    dx = true_input_grad(sample)
    assert_close(found.grad_input, dx, "gradient of input", INPUT_GRADIENT)


def assert_shapes(found: Results, sample: Sample) -> None:
    n, c, h, w = sample.x.shape
    dtype = reference.accumulator_dtype(sample.x.dtype)
    for result, shape in zip(found, [(n, 2, c), (n, 2, h, w), (n, c, 1, 1)], strict=False):
        assert result.shape == shape
        assert result.dtype == dtype
        assert result.is_contiguous()
    assert found.grad_input.shape == sample.x.shape
    assert found.grad_input.dtype == sample.x.dtype
    assert found.grad_input.stride() == sample.x.stride()


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_values_and_gradients(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    sample = draw_sample(problem, generator, backend)
    found = call(backend, sample)
    assert_shapes(found, sample)
    assert_true(found, sample)


@pytest.mark.every_isa
@pytest.mark.on("cpu", "cuda")
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_many_tiles(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    sample = draw_sample(problem, generator, backend)
    assert_true(call(backend, sample), sample)


# Several spans of pixels and of channels, so that partial results meet in every launch.
SPANS = [
    Problem((1, 300, 9, 50), layout="nhwc"),
    Problem((2, 140, 30, 41), values="relu"),
    Problem((1, 160, 40, 32), dtype=torch.bfloat16),
    Problem((1, 520, 30, 16), dtype=torch.float16, layout="nhwc", values="quantised"),
]


@pytest.mark.on("emulated")
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", SPANS, ids=str)
def test_many_spans(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    sample = draw_sample(problem, generator, backend)
    assert_true(call(backend, sample), sample)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    sample = draw_sample(Problem((0, 5, 4, 3), dtype=dtype, layout=layout), generator, backend)
    assert_shapes(call(backend, sample), sample)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_closed_gates(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    """Where a gate is zero, its own gradient is not; where all are, the first channel wins."""
    problem = Problem((2, 21, 7, 6), dtype=dtype, layout=layout)
    sample = draw_sample(problem, generator, backend)
    sample.channel_gate[0] = 0
    sample.channel_gate[1, ::3] = 0
    assert_true(call(backend, sample), sample)


# ------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    """It wins every maximum, the first of several; nobody else changes."""
    problem = Problem((2, 19, 9, 11), dtype=dtype, layout=layout)
    sample = draw_sample(problem, generator, backend)
    clean = call(backend, sample)
    nan = [(0, 5, 40), (0, 5, 71), (0, 17, 40), (1, 18, 98), (1, 0, 0)]  # sample, channel, pixel
    for n, c, p in nan:
        sample.x[n, c, p // 11, p % 11] = torch.nan
    x = sample.x.flatten(2).isnan()
    found = call(backend, sample)

    in_channel = x.any(2)[:, None].expand_as(found.pooled)
    assert torch.equal(found.pooled.isnan(), in_channel)
    assert same_bits(found.pooled[~in_channel], clean.pooled[~in_channel])
    at_pixel = x.any(1)[:, None].expand(-1, 2, -1).reshape(found.stats.shape)
    assert torch.equal(found.stats.isnan(), at_pixel)
    assert same_bits(found.stats[~at_pixel], clean.stats[~at_pixel])
    # The gradient of a gate has a factor of x.
    assert torch.equal(found.grad_channel_gate.flatten(1).isnan(), x.any(2))

    # That of x has none: it only goes where the maxima are.
    ones = Sample(
        sample.x,
        torch.ones_like(sample.channel_gate),
        sample.spatial_gate,
        torch.zeros_like(sample.grad_pooled),
        torch.zeros_like(sample.grad_output),
        torch.zeros_like(sample.grad_stats),
    )
    ones.grad_pooled[:, 1] = 1
    to_pixels = call(backend, ones).grad_input.flatten(2)
    ones.grad_pooled.zero_()
    ones.grad_stats[:, 1] = 1
    to_channels = call(backend, ones).grad_input.flatten(2)
    for gradient, dim in ((to_pixels, 2), (to_channels, 1)):
        assert torch.equal(gradient.sum(dim), torch.ones_like(gradient.sum(dim)))
    for n, c, p in nan:
        assert to_pixels[n, c, p] == (p != 71)
        assert to_channels[n, c, p] == (c != 17)


@pytest.mark.every_isa
def test_infinities(backend: Backend, generator: torch.Generator) -> None:
    """Opposite ones have no mean but a maximum; nothing but the lowest has a first one too."""
    sample = draw_sample(Problem((1, 4, 6, 7)), generator, backend)
    x = sample.x[0].flatten(1)
    x[1, 10], x[1, 20] = torch.inf, -torch.inf
    x[2] = -torch.inf
    sample.channel_gate.fill_(1)
    found = call(backend, sample)
    assert found.pooled[0, 0, 1].isnan()
    assert found.pooled[0, 1, 1] == torch.inf
    assert found.pooled[0, :, 2].tolist() == [-torch.inf, -torch.inf]
    assert_close(found.grad_input, true_input_grad(sample), "gradient of input", INPUT_GRADIENT)


# --------------------------------------------------------------------------- arguments as they are


def test_odd_strides_everywhere(backend: Backend, generator: torch.Generator) -> None:
    """Autograd hands on expanded, transposed and sliced gradients; nothing but bits counts."""
    dense = draw_sample(Problem((3, 8, 5, 8)), generator, backend)
    dense.grad_pooled[:] = dense.grad_pooled[:1, :1, :1].clone()
    dense.grad_stats[:] = dense.grad_stats[:, :, :1, :1].clone()
    odd = Sample(
        dense.x.repeat_interleave(2, 3)[..., ::2],
        dense.channel_gate.repeat_interleave(2, 0)[::2],
        dense.spatial_gate.transpose(2, 3).contiguous().transpose(2, 3),
        dense.grad_pooled[:1, :1, :1].expand_as(dense.grad_pooled),
        dense.grad_output.contiguous(memory_format=torch.channels_last),
        dense.grad_stats[:, :, :1, :1].expand_as(dense.grad_stats),
    )
    assert not any(tensor.is_contiguous() for tensor in odd)
    expected = call(backend, dense)
    for found, wanted in zip(call(backend, odd), expected, strict=True):
        assert same_bits(found, wanted)
    # All that begins one element behind a multiple of 16 bytes.
    moved = Sample(*(torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in dense))
    for found, wanted in zip(call(backend, moved), expected, strict=True):
        assert same_bits(found, wanted)


OPERATORS: dict[str, tuple[str, ...]] = {
    "_pool": ("input",),
    "_channel_stats": ("input", "channel_gate"),
    "_channel_stats_backward": ("grad_stats", "input", "channel_gate"),
    "_pool_backward": (
        *("grad_pooled", "grad_output", "input", "channel_gate", "spatial_gate", "grad_stats"),
    ),
}


@pytest.mark.parametrize("wrong", ["dimensions", "dtype", "shape"])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, a) for name in OPERATORS for a in OPERATORS[name]]
)
def test_bad_arguments(
    backend: Backend, name: str, argument: str, wrong: str, generator: torch.Generator
) -> None:
    """These operators are private, but no call of theirs may read past the end of a tensor."""
    sample = draw_sample(Problem((2, 6, 4, 5)), generator, backend)._asdict()
    sample["input"] = sample.pop("x")
    tensor = sample[argument]
    if wrong == "dimensions":
        sample[argument], words = tensor[0], rf"\b{argument} must have .*, got shape"
    elif wrong == "dtype":
        sample[argument] = tensor.to(torch.int32)
        words = rf"\b{argument} must be float.*, got int32"
    else:
        sample[argument] = torch.cat([tensor, tensor], 1)
        # Any shape will do for the input, but then the others do not fit.
        blamed = r"(channel_gate|grad_\w+)" if argument == "input" else argument
        words = rf"\b{blamed} must have shape .*, got shape"
        if name == "_pool":
            assert backend.ops._pool(sample["input"]).shape == (2, 2, 12)
            return
    with pytest.raises(RuntimeError, match=words):
        getattr(backend.ops, name)(*(sample[a] for a in OPERATORS[name]))


# ------------------------------------------------------------------------------------ determinism

DETERMINISM = [
    Problem((1, 65, 47, 61)),
    Problem((1, 65, 47, 61), layout="nhwc"),
    Problem((3, 33, 40, 41), dtype=torch.bfloat16, layout="nhwc"),
    Problem((9, 20, 12, 17), dtype=torch.float64, values="relu"),
    Problem((1, 1, 120, 90)),
]


@pytest.mark.every_isa
@pytest.mark.on("cpu")
@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize("problem", [*DETERMINISM, *LARGE], ids=str)
def test_number_of_threads(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    sample = draw_sample(problem, generator, backend)
    torch.set_num_threads(1)
    expected = call(backend, sample)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for found, wanted in zip(call(backend, sample), expected, strict=True):
            assert same_bits(found, wanted), f"{threads} threads"


@pytest.fixture
def small_device(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Makes the emulated device one whose cache holds one sample."""
    request.getfixturevalue("emulation")
    from emulation import operators

    yield lambda: operators().configure(multiprocessors=1, l2_bytes=240 << 10)
    operators().configure()


@pytest.mark.on("emulated")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_chunks_of_samples(
    backend: Backend,
    layout: str,
    generator: torch.Generator,
    small_device: Callable[[], None],
) -> None:
    sample = draw_sample(Problem((3, 36, 24, 22), layout=layout), generator, backend)
    expected = call(backend, sample)
    small_device()
    from emulation import operators

    with operators().record() as recording:
        found = call(backend, sample)
    assert len(recording.kernels) == 3 * (2 + 2 + 4 + 5)
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one, other)


# ---------------------------------------------------------------------------------------- traffic


@pytest.mark.on("emulated")
@pytest.mark.parametrize(
    ("name", "of_x", "of_g", "written"),
    [
        ("_pool", 1, 0, 0),
        ("_channel_stats", 1, 0, 0),
        ("_channel_stats_backward", 2, 0, 0),
        ("_pool_backward", 2, 1, 1),
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_passes_over_the_feature_map(
    backend: Backend,
    layout: str,
    name: str,
    of_x: int,
    of_g: int,
    written: int,
    generator: torch.Generator,
) -> None:
    from emulation import operators

    problem = Problem((2, 40, 12, 16), dtype=torch.bfloat16, layout=layout)
    sample = draw_sample(problem, generator, backend)._asdict()
    sample["input"] = sample.pop("x")
    x, g = sample["input"], sample["grad_output"]
    size = x.numel() * x.element_size()
    with operators().record(watch=(x, g)) as recording:
        getattr(backend.ops, name)(*(sample[a] for a in OPERATORS[name]))
    assert recording.watched == [(of_x * size, 0), (of_g * size, 0)]
    # Nothing but the gradient of x leaves the cache first.
    assert sum(launch.stcs for launch in recording.kernels) == written * size
