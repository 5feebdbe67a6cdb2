"""Gradients of both phases around a BatchNorm that trains, as one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .calls import BelowAutograd, below_autograd_if_unobserved, call, overloads
from .gradients import PARAMETERS, groups, select

_native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


class BatchNorm(NamedTuple):
    """What there is to a BatchNorm beside its weight and bias."""

    dtype: torch.dtype
    statistics: tuple[Tensor | None, Tensor | None]  # running mean and variance
    momentum: float
    eps: float


class EagerBatchNorm(Function):
    """(weight and bias of the norm, input, parameters) -> output, around a BatchNorm that trains.

    What :class:`SpatialLogits`, the norm and :class:`ApplyGates` do together, as one node: for a
    small feature map those three take longer than the kernels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        namespace: str,
        norm: BatchNorm,
        weight: Tensor | None,
        bias: Tensor | None,
        input: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        operators = overloads(namespace)
        with BelowAutograd():
            channel_gate, logits = operators["_logits"](input, *parameters)
            logits = logits.to(norm.dtype)
            normed, *moments = torch.native_batch_norm(
                logits, weight, bias, *norm.statistics, True, norm.momentum, norm.eps
            )
            normed = normed.to(channel_gate.dtype)
            output = operators["_apply"](input, channel_gate, normed)
        ctx.namespace, ctx.norm = namespace, norm
        ctx.save_for_backward(
            *(weight, bias, input, *parameters, channel_gate, logits, normed, *moments)
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *EagerBatchNorm._differentiable(ctx, grad_output, wanted)
        saved = ctx.saved_tensors  # can be read once only where activations are checkpointed
        weight, _, input, *parameters, channel_gate, logits, normed, mean, deviation = saved
        operators = overloads(ctx.namespace)
        with below_autograd_if_unobserved((grad_output, *saved)):
            grad_channel_gate, grad_normed, spatial_gate = operators["_apply_backward"](
                grad_output, input, channel_gate, normed
            )
            grad_logits, *grad_norm = _native_batch_norm_backward(
                *(grad_normed.to(logits.dtype), logits, weight, None, None, mean, deviation),
                *(True, ctx.norm.eps, [True, wanted[0], wanted[1]]),
            )
            grad_logits = grad_logits.to(grad_normed.dtype)
            gradients = operators["_logits_backward"](
                *(grad_output, input, channel_gate, spatial_gate, grad_channel_gate, grad_logits),
                *(*parameters, *groups(wanted[2:])),
            )
        return None, None, *select((*grad_norm, *gradients), wanted)

    @staticmethod
    def _differentiable(
        ctx: Any, grad_output: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients as functions of everything, to be differentiated again."""
        arguments = ctx.saved_tensors[: 3 + PARAMETERS]
        weight, bias, input, *parameters = arguments
        channel_gate, logits = call(ctx.namespace, "_logits", input, *parameters)
        normed = F.batch_norm(
            logits.to(ctx.norm.dtype), None, None, weight, bias, True, eps=ctx.norm.eps
        )
        output = call(ctx.namespace, "_apply", input, channel_gate, normed.to(logits.dtype))
        leaves = [t for t, want in zip(arguments, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(output, leaves, grad_output, create_graph=True))
        return tuple(next(found) if want else None for want in wanted)
