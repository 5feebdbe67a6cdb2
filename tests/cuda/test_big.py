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

from emulation import Emulation
from support.samples import (
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

# 2^19 elements; fewer parameters than samples of a chunk, so that their last launch runs whole.
SAMPLE = (1, 128, 64, 64)
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
    arguments = draw(Problem(SAMPLE, 3, 2, torch.float16, layout, biases="12c"), generator)
    upstream = draw_like(arguments.input, generator)
    parameters = arguments[1:]
    x, g = (untouched(t, BATCH, *SAMPLE[1:]) for t in (arguments.input, upstream))
    x[-1:], g[-1:] = arguments.input, upstream
    assert x[:-1].numel() >= 2**31
    samples = BATCH // chunks

    def on_chunks(maps: int) -> None:
        # A chunk is what half of the L2 cache holds of the maps.
        device.configure(l2_bytes=2 * maps * samples * arguments.input.nbytes, fill=0)

    on_chunks(1)
    with device.end_parts(samples), device.record() as recording:
        y, channel_gate, spatial_gate = ops._forward_train(x, *parameters)
    assert sum("Pool<" in launch.kernel for launch in recording.launches) == chunks
    channel_gate[:-1] = spatial_gate[:-1] = 0  # most of which nobody wrote
    on_chunks(2)
    with device.end_parts(samples), device.record() as recording:
        gradients = ops._backward(g, x, channel_gate, spatial_gate, *parameters, True, True, True)
    assert sum("InputGrad<" in launch.kernel for launch in recording.launches) == chunks
    assert_close(y[-1:], truth(arguments).output, "output")
    found = [gradients[0][-1:], *gradients[1:]]
    assert_gradients_close(found, arguments, upstream)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_end_of_a_large_sample(layout: str, device: Emulation, generator: torch.Generator) -> None:
    """Of 2^31 elements, of which the last block of a sweep reads the end."""
    ops = torch.ops.cbam_emulated
    height, width, rows = 2**15 + 1, 2**15, 2
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    end = torch.randn(1, 2, rows, width, generator=generator).half()
    x = untouched(end.contiguous(memory_format=format), 1, 2, height, width)
    x[:, :, -rows:] = end
    assert x.numel() > 2**31

    device.configure(fill=0)
    with device.end_parts(512):
        pooled = ops._pool(x)
    exact = end.double()
    average = exact.sum((2, 3)) / (height * width)
    torch.testing.assert_close(pooled[:, 0].double(), average, rtol=1e-4, atol=1e-12)
    assert torch.equal(pooled[:, 1].double(), exact.amax((2, 3)))
