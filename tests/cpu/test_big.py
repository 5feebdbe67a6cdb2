"""Offsets beyond 32 bits on the CPU: batches and samples of more than 2^31 elements.

Inputs are reserved and read as zeros that take no memory; the last sample, or the end of a sample,
has all that is not zero, so that results are known. What is written takes memory.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from support.backends import Backend
from support.samples import (
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    same_bits,
    truth,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.on("cpu"),
    pytest.mark.skipif(
        os.environ.get("CBAM_TEST_DETERMINISTIC") == "1",
        reason="fresh memory is filled in that mode",
    ),
]

SAMPLE = (1, 512, 32, 32)  # 2^19 elements
BATCH = 2**12 + 1  # the last sample begins at 2^31
GIB = 2**30


def untouched(sample: Tensor, batch: int) -> Tensor:
    """Zeros, but for the last sample."""
    last = not sample.is_contiguous()
    format = torch.channels_last if last else torch.contiguous_format
    reserved = torch.empty((batch, *sample.shape[1:]), dtype=sample.dtype, memory_format=format)
    reserved[-1:] = sample
    return reserved


def available_memory() -> int:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return max(pages, 1024 * int(lines["MemAvailable"].split()[0]))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_last_sample_is_read(backend: Backend, layout: str, generator: torch.Generator) -> None:
    """By all that reads the map and writes little: gates, gradients of parameters, pieces."""
    arguments = draw(Problem(SAMPLE, 3, 4, torch.float16, layout, biases="12c"), generator)
    upstream = draw_like(arguments.input, generator)
    parameters = arguments[1:]
    x, g = untouched(arguments.input, BATCH), untouched(upstream, BATCH)
    assert x[:-1].numel() >= 2**31
    ops = backend.ops

    channel_gate, spatial_gate = ops.gates(x, *parameters)
    few = ops.gates(arguments.input, *parameters)
    assert same_bits(channel_gate[-1:], few[0]) and same_bits(spatial_gate[-1:], few[1])
    assert same_bits(ops._pool(x)[-1:], ops._pool(arguments.input))
    stats = ops._channel_stats(x, channel_gate)
    assert same_bits(stats[-1:], ops._channel_stats(arguments.input, few[0]))
    _, *found = ops._backward(g, x, channel_gate, spatial_gate, *parameters, False, True, True)
    assert_gradients_close([None, *found], arguments, upstream)
    _, logits = ops._logits(arguments.input, *parameters)
    all_logits = logits.new_zeros(BATCH, *logits.shape[1:])
    all_logits[-1:] = logits
    for all, one in zip(
        ops._apply_backward(g, x, channel_gate, all_logits),
        ops._apply_backward(upstream, arguments.input, few[0], logits),
        strict=True,
    ):
        assert same_bits(all[-1:], one)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_last_sample_is_written(backend: Backend, layout: str, generator: torch.Generator) -> None:
    if available_memory() < 6 * GIB:
        pytest.skip("needs 6 GiB of memory for an output of 4 GiB")
    arguments = draw(Problem(SAMPLE, 3, 4, torch.float16, layout, biases="12c"), generator)
    upstream = draw_like(arguments.input, generator)
    x, g = untouched(arguments.input, BATCH), untouched(upstream, BATCH)
    output = backend.ops.forward(x, *arguments[1:])
    assert_close(output[-1:], truth(arguments).output, "output")
    assert not output[0].any()
    del output
    gates = backend.ops.gates(x, *arguments[1:])
    (dx, *_) = backend.ops._backward(g, x, *gates, *arguments[1:], True, False, False)
    assert_gradients_close([dx[-1:], *[None] * 6], arguments, upstream)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_end_of_a_large_sample(backend: Backend, layout: str, generator: torch.Generator) -> None:
    """Of 2^31 elements: the tiles of it are shared out, and the last has all that is not zero."""
    channels, height, width = 64, 2**12, 2**13 + 1
    parameters = draw(Problem((1, channels, 2, 2), 3, 4, biases="12c"), generator)[1:]
    end = torch.randn(1, channels, 1, 64, generator=generator).half()
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.empty((1, channels, height, width), dtype=torch.float16, memory_format=format)
    x[:, :, -1:, -64:] = end
    assert x.numel() > 2**31

    pooled = backend.ops._pool(x)
    exact = end.double().flatten(2)
    average, maximum = exact.sum(2) / (height * width), exact.amax(2).clamp_min(0)
    torch.testing.assert_close(pooled[:, 0].double(), average, rtol=1e-5, atol=1e-12)
    assert torch.equal(pooled[:, 1].double(), maximum)
    channel_gate, spatial_gate = backend.ops.gates(x, *parameters)
    # The corner of what is not zero, of which a map of its rows has the same neighbours.
    rows = torch.zeros(1, channels, 4, 128, dtype=torch.float16)
    rows[:, :, -1:, -64:] = end
    stats = backend.ops._channel_stats(rows, channel_gate).double()
    found = backend.ops._channel_stats(x, channel_gate)[:, :, -4:, -128:]
    torch.testing.assert_close(found.double(), stats)
    logits = torch.nn.functional.conv2d(
        stats, parameters[4].double(), parameters[5].double(), padding=1
    )
    expected = torch.sigmoid(logits)[..., 1:, 1:]
    torch.testing.assert_close(
        spatial_gate[:, :, -3:, -127:].double(), expected, rtol=1e-4, atol=1e-5
    )
