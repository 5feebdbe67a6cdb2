"""Sizes beyond 65,535, the limit of a grid in some dimensions, emulated: samples, rows, columns,
channels. (test_cuda.py has them for a GPU.)"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emulation import Emulation
from support.samples import (
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    truth,
)


@pytest.fixture
def device(emulation: None) -> Iterator[Emulation]:
    from emulation import operators

    device = operators()
    yield device
    device.configure()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_samples_than_a_grid_dimension(
    layout: str, device: Emulation, generator: torch.Generator
) -> None:
    """70,000 samples in one chunk, of which the first and the last are not zero, and run."""
    ops = torch.ops.cbam_emulated
    few = draw(Problem((2, 3, 4, 5), 3, 2, layout=layout, biases="12c"), generator)
    upstream = draw_like(few.input, generator)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    samples = 70_000

    def many(ends: torch.Tensor) -> torch.Tensor:
        batch = ends.new_zeros(samples, *ends.shape[1:]).contiguous(memory_format=memory_format)
        batch[0], batch[-1] = ends
        return batch

    x, g = many(few.input), many(upstream)
    device.configure(l2_bytes=1 << 40, fill=0)
    with device.end_parts(samples), device.record() as recording:
        y, *gates = ops._forward_train(x, *few[1:])
        gradients = ops._backward(g, x, *gates, *few[1:], True, True, True)
    assert max(launch.grid for launch in recording.launches) >= samples
    assert_close(y[:: samples - 1], truth(few).output, "output")
    assert_gradients_close([gradients[0][:: samples - 1], *gradients[1:]], few, upstream)


# Where many channels nearly cancel, only float64 knows the gradients.
@pytest.mark.one_quick
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "dtype", "values"),
    [
        ((1, 1, 70_001, 3), torch.float32, "normal"),
        ((1, 1, 3, 70_001), torch.float32, "normal"),
        ((1, 2, 300, 301), torch.float32, "constant"),
        ((1, 70_001, 2, 1), torch.float64, "normal"),
    ],
    ids=["rows", "columns", "pixels of planes", "channels"],
)
def test_sizes_over_a_grid_dimension(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    values: str,
    layout: str,
    device: Emulation,
    generator: torch.Generator,
) -> None:
    ops = torch.ops.cbam_emulated
    arguments = draw(Problem(shape, 3, 1, dtype, layout, biases="12c", values=values), generator)
    upstream = draw_like(arguments.input, generator)
    y, *gates = ops._forward_train(*arguments)
    gradients = ops._backward(upstream, arguments.input, *gates, *arguments[1:], True, True, True)
    assert_close(y, truth(arguments).output, "output")
    assert_gradients_close(gradients, arguments, upstream)
