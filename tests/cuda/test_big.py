"""Offsets beyond 32 bits, without a GPU and without the time that a big tensor takes.

The emulation runs the first and the last sample of a batch of more than 2^31 elements, in memory
that is never touched but there. (On a GPU, test_cuda.py runs all of it.)
"""

from __future__ import annotations

import os

import pytest
import torch

from support.samples import Problem, assert_close, assert_gradients_close, draw, truth

pytestmark = pytest.mark.slow

SAMPLE = (1, 512, 32, 32)  # 2^19 elements
BATCH = 2**12 + 1  # the last sample begins at 2^31


@pytest.mark.skipif(
    os.environ.get("CBAM_TEST_DETERMINISTIC") == "1", reason="fresh memory is filled in that mode"
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_last_sample(layout: str, emulation: None, generator: torch.Generator) -> None:
    from emulation import operators

    device, ops = operators(), torch.ops.cbam_emulated
    arguments = draw(Problem(SAMPLE, 3, 4, torch.float16, layout), generator, torch.device("cpu"))
    parameters = arguments[1:]

    def batch_with(sample: torch.Tensor) -> torch.Tensor:
        format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        # Reserved and not touched, except for the last sample.
        batch = torch.empty((BATCH, *SAMPLE[1:]), dtype=sample.dtype, memory_format=format)
        batch[-1:].copy_(sample)
        return batch

    x = batch_with(arguments.input)
    assert x[:-1].numel() >= 2**31
    grad = torch.empty_like(arguments.input).normal_(generator=generator)
    g = batch_with(grad)
    device.configure(l2_bytes=1 << 50)  # all samples in one chunk
    try:
        with device.end_parts(BATCH):
            y, channel_gate, spatial_gate = ops._forward_train(x, *parameters)
            (dx, *_) = ops._backward(
                g, x, channel_gate, spatial_gate, *parameters, True, False, False
            )
    finally:
        device.configure()
    assert_close(y[-1:], truth(arguments).output, "output")
    gradients = [dx[-1:], *(None for _ in parameters)]
    assert_gradients_close(gradients, arguments, grad)
