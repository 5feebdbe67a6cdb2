"""The operators as Python functions: the shortest way that shows each call to whom it concerns.

Each takes the two ways of the operator's Autograd key (registration.py) without calling the
operator, if nobody is there to see it: around a small feature map, that call takes longer than the
kernels. While transforms of ``torch.func`` are active they apply the Functions directly, because
those transforms do not look inside an operator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import reference
from .autograd import EagerForward, EagerGates, Forward
from .batch_norm import BatchNorm, EagerBatchNorm
from .calls import (
    below_autograd,
    is_ordinary,
    is_recorded,
    operators,
    wants_derivative,
    wants_gradient,
)
from .phases import ApplyGates, EagerApplyGates, EagerSpatialLogits, SpatialLogits


def cbam(input: Tensor, *parameters: Tensor | None, namespace: str = "cbam") -> Tensor:
    """``torch.ops.cbam.forward``, differentiable under the transforms of ``torch.func`` as well."""
    arguments = (input, *parameters)
    if torch._C._are_functorch_transforms_active():
        return Forward.apply(namespace, *arguments)[0]
    if not is_ordinary(arguments):
        return operators(namespace).forward(*arguments)
    if wants_gradient(arguments):
        return EagerForward.apply(namespace, *arguments)
    return below_autograd(namespace, "forward", *arguments)


def gates(
    input: Tensor, *parameters: Tensor | None, namespace: str = "cbam"
) -> tuple[Tensor, Tensor]:
    """``torch.ops.cbam.gates``, but differentiable."""
    arguments = (input, *parameters)
    if torch._C._are_functorch_transforms_active() or wants_derivative(arguments):
        if _is_reverse_mode_alone():
            return EagerGates.apply(namespace, *arguments)
        channel_gate, logits, _ = spatial_logits(*arguments, namespace=namespace)
        return channel_gate, torch.sigmoid(logits)
    if is_ordinary(arguments):
        return below_autograd(namespace, "gates", *arguments)
    return operators(namespace).gates(*arguments)


def _is_reverse_mode_alone() -> bool:
    """Whether a Function without ``setup_context`` has all that is asked of it."""
    return not (
        torch.compiler.is_compiling()
        or is_recorded()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def spatial_logits(
    input: Tensor, *parameters: Tensor | None, namespace: str = "cbam"
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """First phase of the operator around a norm: channel gate, spatial logits, and two carriers.

    The carriers hold no data. In backward they bring the gradient of the second phase's output and
    its spatial gate here (not gradients of the carriers in the sense of calculus), so that the
    gradient of ``input`` is written once, by this phase, instead of in two full-size parts that
    autograd would have to add. Hand them to :func:`apply_gates` and use them for nothing else.
    """
    arguments = (input, *parameters)
    ordinary = is_ordinary(arguments)
    if ordinary and not wants_gradient(arguments):
        channel_gate, logits = below_autograd(namespace, "_logits", *arguments)
        return channel_gate, logits, (input, logits)  # nothing will come back through them
    if is_recorded():
        channel_gate, logits = operators(namespace)._logits(*arguments)
        return channel_gate, logits, (input, logits)
    # Dynamo traces what it is given here, and refuses a jvp.
    plain = ordinary or torch.compiler.is_compiling()
    function = EagerSpatialLogits if plain else SpatialLogits
    channel_gate, logits, *carriers = function.apply(namespace, *arguments)
    return channel_gate, logits, tuple(carriers)


def apply_gates(
    input: Tensor,
    channel_gate: Tensor,
    logits: Tensor,
    carriers: tuple[Tensor, Tensor],
    *,
    namespace: str = "cbam",
) -> Tensor:
    """Second phase: ``sigmoid(logits) * channel_gate * input``."""
    arguments = (input, channel_gate, logits, *carriers)
    ordinary = is_ordinary(arguments)
    if ordinary and not wants_gradient(arguments):
        return below_autograd(namespace, "_apply", input, channel_gate, logits)
    if is_recorded():
        return operators(namespace)._apply(input, channel_gate, logits)
    plain = ordinary or torch.compiler.is_compiling()
    return (EagerApplyGates if plain else ApplyGates).apply(namespace, *arguments)


def around_batch_norm(
    norm: nn.BatchNorm2d, input: Tensor, *parameters: Tensor | None, namespace: str = "cbam"
) -> Tensor | None:
    """Both phases around a BatchNorm that trains; None where they have to be called for themselves.

    The norm is not called: the caller has made sure that nobody looks at it.
    """
    weight, bias = norm.weight, norm.bias
    statistics = norm.running_mean, norm.running_var
    dtypes = {t.dtype for t in (weight, bias, *statistics) if t is not None}
    arguments = (weight, bias, input, *parameters)
    if (
        norm.momentum is None
        or len(dtypes) > 1
        # One number has no variance, which the norm explains.
        or input.dim() != 4
        or input.numel() <= input.size(1)
        or not is_ordinary((*arguments, *statistics))
        or not wants_gradient(arguments)
    ):
        return None
    dtype = dtypes.pop() if dtypes else reference.accumulator_dtype(input.dtype)
    settings = BatchNorm(dtype, statistics, norm.momentum, norm.eps)
    output = EagerBatchNorm.apply(namespace, settings, *arguments)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return output
