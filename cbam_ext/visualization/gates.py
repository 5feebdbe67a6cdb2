"""What is looked at."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gates(NamedTuple):
    """The two gates of one call of a CBAM, on the CPU, values in [0, 1].

    Both are float32, or float64 where the CBAM's input was; None where the CBAM has no such gate.
    """

    channel_gate: Tensor | None
    """``[N, C, 1, 1]``"""
    spatial_gate: Tensor | None
    """``[N, 1, H, W]``, at the size of the CBAM's input"""
