"""The gradients of CBAM in plain PyTorch, written out.

``g`` is the gradient of the output, ``ca`` and ``sa`` are the gates, ``s0`` and ``s1`` the maps
that the convolution sees (average and maximum over the channels of ``u = ca * x``)::

    dl = sa (1 - sa) sum_c g u                 ds0, ds1 = transposed convolution of dl
    du = g sa + ds0 / C + [c is the first largest at p] ds1
    dz = ca (1 - ca) sum_p du x                gradient of the sum that the sigmoid is taken of
    dx = ca du + davg / P + [p is the first largest of c] dmax

A gate that is not there is one, and nothing goes through it: ``dz``, or ``dl``, counts as zero.

The kernels compute the same in fewer passes. This is what they are differentiated by a second time,
and what they decompose to. Arguments and results are those of the operators (csrc/torch/schemas.h)
but for the flags that say which gradients are wanted; None stands for the gradient of an absent
parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import forward as reference
from .forward import accumulator_dtype, without_autocast

Gradients = tuple[Tensor | None, ...]


def gate_and_logits(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    """Channel gate and spatial logits: the first phase of the operator."""
    channel_gate = reference.channel_gate(input, *parameters[:4])
    return channel_gate, reference.spatial_logits(input, channel_gate, *parameters[4:])


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    *parameters: Tensor | None,
) -> Gradients:
    """``_backward``: the gradients of input and parameters.

    Its gates are no variables: they are computed again, so that its derivative goes through them.
    """
    channel_gate, logits = gate_and_logits(input, *parameters)
    gate_grads = apply_backward(grad_output, input, channel_gate, logits)
    grad_channel_gate, grad_logits, spatial_gate = gate_grads
    return logits_backward(
        *(grad_output, input, channel_gate, spatial_gate, grad_channel_gate, grad_logits),
        *parameters,
    )


@without_autocast
def apply_backward(
    grad_output: Tensor, input: Tensor, channel_gate: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``_apply_backward``: the gradients of both gates' arguments, and the spatial gate."""
    dtype = accumulator_dtype(input.dtype)
    spatial_gate = torch.sigmoid(logits)
    product = grad_output.to(dtype) * input.to(dtype)
    grad_channel_gate = (product * spatial_gate).sum((2, 3), keepdim=True)
    grad_spatial_gate = (product * channel_gate).sum(1, keepdim=True)
    grad_logits = spatial_gate * (1 - spatial_gate) * grad_spatial_gate
    return grad_channel_gate, grad_logits, spatial_gate


@without_autocast
def channel_stats_backward(grad_stats: Tensor, input: Tensor, channel_gate: Tensor) -> Tensor:
    """``_channel_stats_backward``: the gradient of the channel gate, ``[N, C, 1, 1]``."""
    x = input.to(accumulator_dtype(input.dtype))
    return (_through_stats(grad_stats, channel_gate * x) * x).sum((2, 3), keepdim=True)


@without_autocast
def pool_backward(
    grad_pooled: Tensor,
    grad_output: Tensor,
    input: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    grad_stats: Tensor,
) -> Tensor:
    """``_pool_backward``: all of the input's gradient, once what is behind the gates is known."""
    dtype = accumulator_dtype(input.dtype)
    x = input.to(dtype)
    du = grad_output.to(dtype) * spatial_gate + _through_stats(grad_stats, channel_gate * x)
    grad_average, grad_maximum = (grad[..., None] for grad in grad_pooled.unbind(1))
    pixels = x.flatten(2)
    dx = (channel_gate * du).flatten(2) + grad_average / pixels.shape[2]
    dx = dx.scatter_add(2, pixels.max(2, keepdim=True).indices, grad_maximum)
    return dx.view_as(x).to(input.dtype)


def _through_stats(grad_stats: Tensor, u: Tensor) -> Tensor:
    """The gradient of ``u`` from that of its mean and maximum over the channels."""
    through_mean = (grad_stats[:, :1] / u.shape[1]).expand_as(u)
    return through_mean.scatter_add(1, u.max(1, keepdim=True).indices, grad_stats[:, 1:])


@without_autocast
def logits_backward(
    grad_output: Tensor,
    input: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    grad_channel_gate: Tensor,
    grad_logits: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
) -> Gradients:
    """``_logits_backward``: what came back through gate and logits, and all of the input's."""
    dtype = accumulator_dtype(input.dtype)
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    w1, b1, w2, _, conv, _ = (None if p is None else p.to(dtype) for p in parameters)
    n, c, h, w = input.shape

    gradients: list[Tensor | None] = [None] * 6
    if conv is None:
        grad_stats = input.new_zeros((n, 2, h, w), dtype=dtype)
        grad_gate = grad_channel_gate
    else:
        padding = conv.shape[-1] // 2
        stats = reference.channel_stats(input, channel_gate)
        grad_stats, grad_conv, _ = torch.ops.aten.convolution_backward(
            *(grad_logits, stats, conv, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1),
            [True, True, False],
        )
        gradients[4:] = grad_conv, grad_logits.sum().view(1)
        grad_gate = grad_channel_gate + channel_stats_backward(grad_stats, input, channel_gate)

    if w1 is None or w2 is None:
        grad_pooled = input.new_zeros((n, 2, c), dtype=dtype)
    else:
        dz = (channel_gate * (1 - channel_gate) * grad_gate).flatten(1)
        pooled = reference.pool(input).unbind(1)
        before = [F.linear(value, w1, b1) for value in pooled]
        hidden = [F.relu(value) for value in before]
        grad_before = [(dz @ w2) * (value > 0) for value in before]
        grad_pooled = torch.stack([value @ w1 for value in grad_before], 1)
        gradients[:4] = (
            grad_before[0].T @ pooled[0] + grad_before[1].T @ pooled[1],
            (grad_before[0] + grad_before[1]).sum(0),
            dz.T @ (hidden[0] + hidden[1]),
            2 * dz.sum(0),
        )

    dx = pool_backward(grad_pooled, grad_output, input, channel_gate, spatial_gate, grad_stats)
    return dx, *(
        None if parameter is None or gradient is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    )


# The operators that do what is around layers, in their own words.
PIECES: dict[str, Callable[..., Tensor]] = {
    "_pool": reference.pool,
    "_channel_stats": reference.channel_stats,
    "_channel_stats_backward": channel_stats_backward,
    "_pool_backward": pool_backward,
}
