"""Fake kernels: shapes, dtypes and strides of the operators' results, without computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import check_arguments, check_input
from .gradients import PARAMETERS


def _like_output(input: Tensor) -> Tensor:
    """An empty tensor of the strides that the kernels give output and input gradient."""
    # Brings sympy along, which takes longer than all else of this package's import.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    channels_last = input.is_contiguous(memory_format=torch.channels_last)
    if statically_known_true(input.shape[0] == 0):
        # An empty tensor counts as contiguous whatever its strides, and keeps them in empty_like.
        last = channels_last and input.stride(1) == 1 and input.shape[1] > 1
        return input.new_empty(input.shape).contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
    if channels_last or input.is_contiguous():
        # Strides of dimensions of size 1 too, which empty_like of a fake tensor does not keep.
        return input.new_empty_strided(input.shape, input.stride())
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _like_gates(input: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    dtype = reference.accumulator_dtype(input.dtype)
    return input.new_empty((n, c, 1, 1), dtype=dtype), input.new_empty((n, 1, h, w), dtype=dtype)


def _like_gradients(
    input: Tensor, parameters: Sequence[Tensor | None], groups: Sequence[bool]
) -> tuple[Tensor, ...]:
    wanted = [groups[1]] * 4 + [groups[2]] * 2
    return (
        _like_output(input) if groups[0] else input.new_empty(0),
        *(
            torch.empty_like(parameter) if parameter is not None and want else input.new_empty(0)
            for parameter, want in zip(parameters, wanted, strict=True)
        ),
    )


def _fake_forward(input: Tensor, *parameters: Tensor | None) -> Tensor:
    check_arguments(input, *parameters)
    return _like_output(input)


def _fake_gates(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    check_arguments(input, *parameters)
    return _like_gates(input)


def _fake_forward_train(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    return _fake_forward(input, *parameters), *_like_gates(input)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    *parameters_and_groups: Any,
) -> tuple[Tensor, ...]:
    return _like_gradients(
        input, parameters_and_groups[:PARAMETERS], parameters_and_groups[PARAMETERS:]
    )


def _fake_apply(input: Tensor, channel_gate: Tensor, logits: Tensor) -> Tensor:
    return _like_output(input)


def _fake_apply_backward(
    grad_output: Tensor, input: Tensor, channel_gate: Tensor, logits: Tensor
) -> tuple[Tensor, ...]:
    channel_gate, spatial_gate = _like_gates(input)
    return channel_gate, spatial_gate, torch.empty_like(spatial_gate)


def _fake_logits_backward(
    grad_output: Tensor,
    input: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    grad_channel_gate: Tensor,
    grad_logits: Tensor,
    *parameters_and_groups: Any,
) -> tuple[Tensor, ...]:
    return _like_gradients(
        input, parameters_and_groups[:PARAMETERS], parameters_and_groups[PARAMETERS:]
    )


def _fake_pool(input: Tensor) -> Tensor:
    check_input(input)
    dtype = reference.accumulator_dtype(input.dtype)
    return input.new_empty((input.shape[0], 2, input.shape[1]), dtype=dtype)


def _fake_channel_stats(input: Tensor, channel_gate: Tensor) -> Tensor:
    check_input(input)
    n, _, h, w = input.shape
    return channel_gate.new_empty((n, 2, h, w))


def _fake_channel_stats_backward(grad_stats: Tensor, input: Tensor, channel_gate: Tensor) -> Tensor:
    return _like_gates(input)[0]


def _fake_pool_backward(grad_pooled: Tensor, grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return _like_output(input)


FAKES = {
    "forward": _fake_forward,
    "gates": _fake_gates,
    "_forward_train": _fake_forward_train,
    "_backward": _fake_backward,
    "_logits": _fake_gates,
    "_apply": _fake_apply,
    "_apply_backward": _fake_apply_backward,
    "_logits_backward": _fake_logits_backward,
    "_pool": _fake_pool,
    "_channel_stats": _fake_channel_stats,
    "_channel_stats_backward": _fake_channel_stats_backward,
    "_pool_backward": _fake_pool_backward,
}
