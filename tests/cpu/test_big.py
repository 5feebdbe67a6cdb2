"""Offsets beyond 32 bits on the CPU: batches and samples of more than 2^31 elements.

Inputs take no memory (support/large.py); what is written does.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from support.backends import Backend
from support.large import LargeSample, fresh_memory_is_zero, untouched
from support.samples import (
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    same_bits,
    truth,
)

pytestmark = [pytest.mark.slow, pytest.mark.on("cpu"), fresh_memory_is_zero]

SAMPLE = (1, 512, 32, 32)  # 2^19 elements
BATCH = 2**12 + 1  # the last sample begins at 2^31
GIB = 2**30


def ending_in(sample: Tensor, batch: int) -> Tensor:
    """Zeros, but for the last sample."""
    layout = "nchw" if sample.is_contiguous() else "nhwc"
    reserved = untouched((batch, *sample.shape[1:]), layout, sample.dtype)
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
    x, g = ending_in(arguments.input, BATCH), ending_in(upstream, BATCH)
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
    x, g = ending_in(arguments.input, BATCH), ending_in(upstream, BATCH)
    output = backend.ops.forward(x, *arguments[1:])
    assert_close(output[-1:], truth(arguments).output, "output")
    assert not output[0].any()
    del output
    gates = backend.ops.gates(x, *arguments[1:])
    (dx, *_) = backend.ops._backward(g, x, *gates, *arguments[1:], True, False, False)
    assert_gradients_close([dx[-1:], *[None] * 6], arguments, upstream)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_end_of_a_large_sample(backend: Backend, layout: str, generator: torch.Generator) -> None:
    """The tiles of it are shared out, and the last ones have all that is not zero."""
    sample = LargeSample(layout, generator)
    pooled = backend.ops._pool(sample.input)
    torch.testing.assert_close(pooled[:, 0].double(), sample.average, rtol=1e-5, atol=1e-12)
    assert torch.equal(pooled[:, 1].double(), sample.maximum)
    gates = backend.ops.gates(sample.input, *sample.parameters)
    sample.assert_close(gates[0], sample.channel_gate)
    sample.assert_close(gates[1], sample.spatial_gate)

    upstream, last = sample.draw()
    enough = available_memory() > 6 * GIB
    found = backend.ops._backward(
        upstream, sample.input, *gates, *sample.parameters, enough, True, True
    )
    for each, expected in zip(found, sample.gradients(last), strict=True):
        if each is not None:
            sample.assert_close(each, expected)
