"""CBAM in a few lines of plain PyTorch.

Woo, Park, Lee, Kweon: "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv:1807.06521.
Every kernel of this package is compared with these few lines in float64. They run on any device and
differentiate any number of times; they are what :func:`cbam_ext.cbam` falls back to where no kernel
is available.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_arguments

P = ParamSpec("P")
T = TypeVar("T")
OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, gates, pooled maps and logits for an input of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dtype(tensor: OptionalTensor, dtype: torch.dtype) -> OptionalTensor:
    """``tensor.to(dtype)`` where that does anything.

    A tracer notes down the call either way, and quantisers of its graphs take a weight that passes
    it for an activation.
    """
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _has_autocast(device: str) -> bool:
    # torch.compile of torch 2.10 cannot trace the question, so it is asked of rare devices alone.
    return device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Runs ``function`` outside autocast, which would round gates and logits to half."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        device = args[0].device.type
        if not _has_autocast(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def cbam(
    input: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """Refines ``input`` by channel attention, then spatial attention (paper, equation 1).

    Arguments, result and errors are those of :func:`cbam_ext.cbam`.
    """
    check_arguments(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    gate = logits = None
    if fc1_weight is not None:
        gate = channel_gate(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if conv_weight is not None:
        logits = spatial_logits(input, gate, conv_weight, conv_bias)
    return apply_gates(input, gate, logits)


def gates(
    input: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two gates of :func:`cbam`: ``[N, C, 1, 1]`` and ``[N, 1, H, W]``, accumulator dtype.

    One that is not there is one everywhere.
    """
    check_arguments(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    gate = channel_gate(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return gate, torch.sigmoid(spatial_logits(input, gate, conv_weight, conv_bias))


@without_autocast
def pool(input: Tensor) -> Tensor:
    """What the MLP sees: average (0) and maximum (1) over the pixels, ``[N, 2, C]``."""
    return torch.stack(_average_and_maximum(input), 1)


@without_autocast
def channel_gate(
    input: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
) -> Tensor:
    """Channel attention (paper, equation 2): ``[N, C, 1, 1]`` in the accumulator dtype.

    One MLP serves both pooled vectors, so the bias of its second layer counts twice. Without
    weights the gate is one.
    """
    dtype = accumulator_dtype(input.dtype)
    if fc1_weight is None or fc2_weight is None:
        return input.new_ones((*input.shape[:2], 1, 1), dtype=dtype)

    def mlp(pooled: Tensor) -> Tensor:
        hidden = F.relu(F.linear(pooled, in_dtype(fc1_weight, dtype), in_dtype(fc1_bias, dtype)))
        return F.linear(hidden, in_dtype(fc2_weight, dtype), in_dtype(fc2_bias, dtype))

    average, maximum = _average_and_maximum(input)
    return torch.sigmoid(mlp(average) + mlp(maximum))[..., None, None]


@without_autocast
def channel_stats(input: Tensor, channel_gate: Tensor | None) -> Tensor:
    """What the convolution sees of ``u = channel_gate * input``: ``[N, 2, H, W]``.

    Channel 0 is the average over the channels of ``u``, channel 1 the maximum.
    """
    refined = _refined(input, channel_gate)
    return torch.stack([refined.mean(1), refined.max(1).values], 1)


@without_autocast
def spatial_logits(
    input: Tensor,
    channel_gate: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
) -> Tensor:
    """Logits of the spatial attention (paper, equation 3): ``[N, 1, H, W]``, accumulator dtype.

    Without a weight they are infinite, and the gate is one.
    """
    dtype = accumulator_dtype(input.dtype)
    if conv_weight is None:
        n, _, h, w = input.shape
        return input.new_full((n, 1, h, w), math.inf, dtype=dtype)
    stats = channel_stats(input, channel_gate)
    padding = conv_weight.shape[-1] // 2
    return F.conv2d(
        stats, in_dtype(conv_weight, dtype), in_dtype(conv_bias, dtype), padding=padding
    )


@without_autocast
def apply_gates(input: Tensor, channel_gate: Tensor | None, logits: Tensor | None) -> Tensor:
    """``sigmoid(logits) * channel_gate * input``, rounded once to the dtype of ``input``.

    None stands for a gate of ones.
    """
    refined = _refined(input, channel_gate)
    return in_dtype(refined if logits is None else torch.sigmoid(logits) * refined, input.dtype)


def _refined(input: Tensor, channel_gate: Tensor | None) -> Tensor:
    wide = in_dtype(input, accumulator_dtype(input.dtype))
    return wide if channel_gate is None else channel_gate * wide


def _average_and_maximum(input: Tensor) -> list[Tensor]:
    pixels = in_dtype(input, accumulator_dtype(input.dtype)).flatten(2)  # [N, C, P]
    # max(dim) and not amax: ties send the whole gradient to the first maximum.
    return [pixels.mean(2), pixels.max(2).values]
