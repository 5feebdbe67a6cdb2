"""Offsets beyond 32 bits, without a GPU and without the time that a big tensor takes.

The emulation runs the first and the last samples of a batch of more than 2^31 elements, or the ends
of a sample of that size, in memory that is never touched but there and reads as zeros. What lies
between adds nothing to any sum, so all results are known. (On a GPU, test_cuda.py runs all of it.)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emulation import Emulation
from support.large import LargeSample, fresh_memory_is_zero, untouched
from support.samples import (
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    truth,
)

pytestmark = [pytest.mark.slow, fresh_memory_is_zero]

# 2^19 elements; fewer parameters than samples of a chunk, so that their last launch runs whole.
SAMPLE = (1, 128, 64, 64)
CHUNK = 1025
BATCH = 5 * CHUNK  # the last chunk begins beyond 2^31


@pytest.fixture
def device(emulation: None) -> Iterator[Emulation]:
    from emulation import operators

    device = operators()
    yield device
    device.configure()


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_last_sample(
    layout: str, chunks: int, device: Emulation, generator: torch.Generator
) -> None:
    ops = torch.ops.cbam_emulated
    arguments = draw(Problem(SAMPLE, 3, 2, torch.float16, layout, biases="12c"), generator)
    upstream = draw_like(arguments.input, generator)
    parameters = arguments[1:]
    x, g = (untouched((BATCH, *SAMPLE[1:]), layout) for _ in range(2))
    x[-1:], g[-1:] = arguments.input, upstream
    assert x[:-CHUNK].numel() >= 2**31
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
    """Of 2^31 elements, of which the last blocks of each sweep read the end."""
    ops = torch.ops.cbam_emulated
    sample = LargeSample(layout, generator)
    device.configure(fill=0)
    # The last blocks have more than two rows of tiles of the gate's kernels, which have 16 rows.
    with device.end_parts(256), device.record() as recording:
        y, *gates = ops._forward_train(sample.input, *sample.parameters)
        upstream, last = sample.draw()
        found = ops._backward(upstream, sample.input, *gates, *sample.parameters, True, True, True)
    assert sum(launch.grid >= 256 for launch in recording.launches) == 8  # all large ones
    sample.assert_close(gates[0], sample.channel_gate)
    sample.assert_close(gates[1], sample.spatial_gate)
    sample.assert_close(y, sample.output)
    for each, expected in zip(found, sample.gradients(last), strict=True):
        sample.assert_close(each, expected)
