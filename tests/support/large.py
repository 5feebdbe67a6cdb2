"""Inputs of more than 2^31 elements in memory that is reserved, never touched, and reads as zeros.

What is not zero lies at the end, so that all results are known. Fresh memory must not be filled,
as torch does in deterministic mode.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from cbam_ext import reference

from .samples import Problem, draw

fresh_memory_is_zero = pytest.mark.skipif(
    os.environ.get("CBAM_TEST_DETERMINISTIC") == "1", reason="fresh memory is filled in that mode"
)


def untouched(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float16) -> Tensor:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


class LargeSample:
    """One sample of 2^31 elements, and in float64 what becomes of its last rows.

    Half of these are not zero; the others are as good as all that lies before them, which a filter
    of 3x3 cannot tell from the border of a map.
    """

    shape = (1, 64, 2**13 + 1, 2**12)
    rows = 4

    def __init__(self, layout: str, generator: torch.Generator) -> None:
        channels, pixels = self.shape[1], self.shape[2] * self.shape[3]
        problem = Problem((1, channels, 2, 2), 3, 4, torch.float16, layout, biases="12c")
        self.parameters = draw(problem, generator)[1:]
        self._layout, self._generator = layout, generator
        self.input, last = self.draw()
        assert self.input.numel() > 2**31
        self._leaves = [t.double().requires_grad_() for t in (last, *self.parameters)]
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias = self._leaves
        # The reference pools what it is given, and this is not all. Not amax, which splits its
        # gradient among equals: float16 has some.
        self.maximum = x.flatten(2).max(2).values.clamp_min(0)
        self.average = x.sum((2, 3)) / pixels
        logits = torch.zeros(1, channels, dtype=torch.float64)
        for pooled in (self.average, self.maximum):
            hidden = torch.relu(pooled @ fc1_weight.T + fc1_bias)
            logits = logits + hidden @ fc2_weight.T + fc2_bias
        self.channel_gate = torch.sigmoid(logits)[:, :, None, None]
        logits = reference.spatial_logits(x, self.channel_gate, conv_weight, conv_bias)
        self.spatial_gate = torch.sigmoid(logits)
        self.output = reference.apply_gates(x, self.channel_gate, logits)

    def draw(self) -> tuple[Tensor, Tensor]:
        """A map of the sample's shape, and its last rows."""
        large = untouched(self.shape, self._layout)
        last = torch.zeros(*self.shape[:2], self.rows, self.shape[3], dtype=large.dtype)
        half = self.rows // 2
        last[:, :, half:] = torch.randn(last[:, :, half:].shape, generator=self._generator).half()
        large[:, :, -half:] = last[:, :, half:]
        return large, last

    def gradients(self, upstream: Tensor) -> list[Tensor]:
        """Of the input's last rows and the parameters, where the upstream has these last rows."""
        return list(torch.autograd.grad(self.output, self._leaves, upstream.double()))

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        """Of what has been rounded to float16, and all rows of a map but the first, whose
        neighbours ``expected`` lacks."""
        if found.shape[2:] == self.shape[2:]:
            found, expected = found[:, :, -self.rows + 1 :], expected[:, :, 1:]
        error = (found.double() - expected).norm()
        assert error <= 2e-3 * expected.norm(), (tuple(found.shape), float(error))
