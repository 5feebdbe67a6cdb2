"""CBAM in plain PyTorch: the readable specification, the test oracle and the fallback.

``forward`` is what the operators compute, ``backward`` their gradients written out, ``checks`` what
they accept. Nothing here knows of kernels.
"""

from . import backward
from .checks import DTYPES, MAX_CHANNELS, check_arguments, check_input, untraced
from .forward import (
    accumulator_dtype,
    apply_gates,
    cbam,
    channel_gate,
    channel_stats,
    gates,
    in_dtype,
    pool,
    spatial_logits,
    without_autocast,
)

__all__ = [
    "DTYPES",
    "MAX_CHANNELS",
    "accumulator_dtype",
    "apply_gates",
    "backward",
    "cbam",
    "channel_gate",
    "channel_stats",
    "check_arguments",
    "check_input",
    "gates",
    "in_dtype",
    "pool",
    "spatial_logits",
    "untraced",
    "without_autocast",
]
