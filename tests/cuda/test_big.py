"""Offsets beyond 32 bits, without a GPU and without the time that a big tensor takes.

The emulation runs the first and the last samples of a batch of more than 2^31 elements, or the ends
of a sample of that size, in memory that is never touched but there and reads as zeros. What lies
between adds nothing to any sum, so all results are known. (On a GPU, test_cuda.py runs all of it.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emulation import Emulation
from support.samples import (
    NAMES,
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    truth,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("CBAM_TEST_DETERMINISTIC") == "1",
        reason="fresh memory is filled in that mode",
    ),
]

SAMPLE = (1, 512, 32, 32)  # 2^19 elements
CHUNK = 1025
BATCH = 4 * CHUNK  # the last samples begin beyond 2^31


@pytest.fixture
def device(emulation: None) -> Iterator[Emulation]:
    from emulation import operators

    device = operators()
    yield device
    device.configure()


def untouched(like: Tensor, *shape: int) -> Tensor:
    """Reserved, and zeros where it is read."""
    last = not like.is_contiguous()
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=format)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_last_sample(
    layout: str, chunks: int, device: Emulation, generator: torch.Generator
) -> None:
    ops = torch.ops.cbam_emulated
    arguments = draw(Problem(SAMPLE, 3, 4, torch.float16, layout, biases="12c"), generator)
    upstream = draw_like(arguments.input, generator)
    parameters = arguments[1:]
    x, g = (untouched(t, BATCH, *SAMPLE[1:]) for t in (arguments.input, upstream))
    x[-1:], g[-1:] = arguments.input, upstream
    assert x[:-1].numel() >= 2**31
    samples = BATCH // chunks

    def on_chunks(maps: int) -> None:
        # A chunk is what half of the L2 cache holds of the maps.
        device.configure(l2_bytes=2 * maps * samples * arguments.input.nbytes, fill=-1)

    on_chunks(1)
    with device.end_parts(samples), device.record() as recording:
        y, channel_gate, spatial_gate = ops._forward_train(x, *parameters)
    assert len(recording.launches) == 6 * chunks
    on_chunks(2)
    with device.end_parts(samples), device.record() as recording:
        gradients = ops._backward(g, x, channel_gate, spatial_gate, *parameters, True, True, True)
    assert len(recording.launches) > 4 * chunks
    assert_close(y[-1:], truth(arguments).output, "output")
    found = [gradients[0][-1:], *gradients[1:]]
    assert_gradients_close(found, arguments, upstream)


HEIGHT, WIDTH, ROWS = 2**15 + 1, 2**15, 3


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_end_of_a_large_sample(layout: str, device: Emulation, generator: torch.Generator) -> None:
    """Of 2^31 elements in two channels: the last rows have all that is not zero."""
    ops = torch.ops.cbam_emulated
    end = (1, 2, ROWS, WIDTH)
    problem = Problem(end, 3, 2, torch.float16, layout, "accumulator", biases="12c")
    arguments = draw(problem, generator)
    arguments.input[:, :, 0] = 0  # as above it, so that the convolution sees no border there
    upstream = draw_like(arguments.input, generator)
    upstream[:, :, 0] = 0
    parameters = arguments[1:]
    x, g = (untouched(t, 1, 2, HEIGHT, WIDTH) for t in (arguments.input, upstream))
    x[:, :, -ROWS:], g[:, :, -ROWS:] = arguments.input, upstream
    assert x.numel() > 2**31

    device.configure(fill=-1)
    with device.end_parts(HEIGHT // (2 * ROWS)):
        y, channel_gate, spatial_gate = ops._forward_train(x, *parameters)
        gradients = ops._backward(g, x, channel_gate, spatial_gate, *parameters, True, True, True)

    output, *expected = of_the_end(arguments, upstream)
    assert_near(y[:, :, -ROWS:], output, "output")
    found = (gradients[0][:, :, -ROWS:], *gradients[1:])
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert_near(one, other, name)


def of_the_end(arguments: Arguments, upstream: Tensor) -> list[Tensor]:
    """Output and gradients in float64; averages are over the whole sample, and so over zeros."""
    leaves = [t.double().requires_grad_() for t in arguments]
    x, w1, b1, w2, b2, conv_weight, conv_bias = leaves
    average, maximum = x.sum((2, 3)) / (HEIGHT * WIDTH), x.amax((2, 3))
    z = sum(F.linear(F.relu(F.linear(pooled, w1, b1)), w2, b2) for pooled in (average, maximum))
    u = torch.sigmoid(z)[..., None, None] * x
    stats = torch.stack([u.mean(1), u.max(1).values], 1)
    output = u * torch.sigmoid(F.conv2d(stats, conv_weight, conv_bias, padding=1))
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.double())]


def assert_near(actual: Tensor, expected: Tensor, name: str) -> None:
    distance = (actual.double() - expected).norm() / expected.norm()
    assert distance < 1e-3, f"{name}: {distance}"
