"""Pooling and channel statistics apart: what the kernels do around layers that are called.

Forward is ``pool``, the MLP, ``channel_stats``, the convolution, ``apply_gates``. Each of those
hands its successor carriers: tensors without data that bring back in backward what the gradient of
the feature map depends on (not gradients of the carriers in the sense of calculus), so that
``pool`` writes it once where autograd would add up three parts of full size.

Only ordinary calls run in kernels. A compiler, an exporter, a transform or a tracer is shown plain
PyTorch, which it can handle as well as the layers between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import reference
from .calls import below_autograd, call, is_ordinary, wants_gradient

# None: plain PyTorch from here on.
Carriers = Sequence[Tensor | None] | None


def pool(input: Tensor, *, namespace: str = "cbam") -> tuple[Tensor, Carriers]:
    """Average and maximum over the pixels, ``[N, 2, C]`` in the accumulator dtype."""
    if not is_ordinary((input,)):
        return reference.pool(input), None
    if not wants_gradient((input,)):
        return below_autograd(namespace, "_pool", input), (None,) * 4
    pooled, *carriers = _Pool.apply(namespace, input)
    return pooled, carriers


def channel_stats(
    input: Tensor, channel_gate: Tensor, carriers: Carriers, *, namespace: str = "cbam"
) -> tuple[Tensor, Carriers]:
    """Average and maximum over the channels of the refined map, ``[N, 2, H, W]``, likewise."""
    n, c, *_ = input.shape
    fits = channel_gate.shape == (n, c, 1, 1)
    if carriers is None or not fits or not is_ordinary((input, channel_gate)):
        return reference.channel_stats(input, channel_gate), None
    stats, *onward = _ChannelStats.apply(namespace, input, channel_gate, *carriers)
    return stats, onward


class _Pool(Function):
    """input -> (pooled maps, carriers); backward is everything that the input receives."""

    @staticmethod
    def forward(ctx: Any, namespace: str, input: Tensor) -> tuple[Tensor, ...]:
        pooled = below_autograd(namespace, "_pool", input)
        ctx.namespace = namespace
        ctx.save_for_backward(input)
        n, c, h, w = input.shape
        shapes = ((n, c, 1, 1), (n, 1, h, w), (n, 2, h, w))
        maps = (pooled.new_empty(()).expand(shape) for shape in shapes)
        return pooled, input.new_empty(()).expand_as(input), *maps

    @staticmethod
    def backward(
        ctx: Any,
        grad_pooled: Tensor,
        grad_output: Tensor,
        channel_gate: Tensor,
        spatial_gate: Tensor,
        grad_stats: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        known = (grad_pooled, grad_output, input, channel_gate, spatial_gate, grad_stats)
        return None, call(ctx.namespace, "_pool_backward", *known)


class _ChannelStats(Function):
    """(input, channel gate, carriers of the pooling) -> (statistics, carriers)."""

    @staticmethod
    def forward(
        ctx: Any, namespace: str, input: Tensor, channel_gate: Tensor, *carriers: Tensor | None
    ) -> tuple[Tensor, ...]:
        stats = below_autograd(namespace, "_channel_stats", input, channel_gate)
        ctx.namespace = namespace
        ctx.save_for_backward(input, channel_gate)
        return (
            stats,
            input.new_empty(()).expand_as(input),
            stats.new_empty(()).expand_as(stats[:, :1]),
        )

    @staticmethod
    def backward(
        ctx: Any, grad_stats: Tensor, grad_output: Tensor, spatial_gate: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, channel_gate = ctx.saved_tensors
        _, _, wants_gate, *wants_carriers = ctx.needs_input_grad
        grad_gate = None
        if wants_gate:
            known = (grad_stats, input, channel_gate)
            grad_gate = call(ctx.namespace, "_channel_stats_backward", *known)
        onward = (grad_output, channel_gate, spatial_gate, grad_stats)
        return (
            *(None, None, grad_gate),
            *(grad if want else None for grad, want in zip(onward, wants_carriers, strict=True)),
        )
