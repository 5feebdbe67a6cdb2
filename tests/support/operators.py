"""Every operator with arguments for it."""

from __future__ import annotations

from typing import Any

import torch

from .samples import Arguments, draw_like

FIRST = ("forward", "gates", "_forward_train", "_logits")
PHASES = ("_backward", "_apply", "_apply_backward", "_logits_backward")
PIECES = ("_pool", "_channel_stats", "_channel_stats_backward", "_pool_backward")
NAMES = (*FIRST, *PHASES, *PIECES)


def calls(ops: Any, arguments: Arguments, generator: torch.Generator) -> dict[str, tuple[Any, ...]]:
    """Valid arguments of every operator in ``ops``; those of later ones come from the earlier."""
    x, *parameters = arguments
    g = draw_like(x, generator)
    channel_gate, spatial_gate = ops.gates(*arguments)
    _, logits = ops._logits(*arguments)
    gate_gradient = draw_like(channel_gate, generator)
    logit_gradient = draw_like(logits, generator)
    stats = ops._channel_stats(x, channel_gate)
    grad_stats, grad_pooled = (draw_like(t, generator) for t in (stats, ops._pool(x)))
    flags = (True, True, True)
    return {
        **{name: tuple(arguments) for name in FIRST},
        "_backward": (g, x, channel_gate, spatial_gate, *parameters, *flags),
        "_apply": (x, channel_gate, logits),
        "_apply_backward": (g, x, channel_gate, logits),
        "_logits_backward": (
            *(g, x, channel_gate, spatial_gate, gate_gradient, logit_gradient),
            *parameters,
            *flags,
        ),
        "_pool": (x,),
        "_channel_stats": (x, channel_gate),
        "_channel_stats_backward": (grad_stats, x, channel_gate),
        "_pool_backward": (grad_pooled, g, x, channel_gate, spatial_gate, grad_stats),
    }
