"""Gradients of the operator in two phases, around a norm that is called or layers of others.

In eager calls and transforms the phases are tied by two carriers (:func:`dispatch.spatial_logits`);
in graphs that hold the operators each stands for itself. See autograd.py for what all Functions
have in common.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..reference import backward as formulas
from .calls import call
from .derivatives import Results, push
from .gradients import call_backward, groups, select, vmap_by_loop

# -------------------------------------------------------------- in two phases, tied by two carriers


class SpatialLogits(Function):
    """(input, parameters) -> (channel gate, logits, carriers); see dispatch.spatial_logits."""

    @staticmethod
    def forward(namespace: str, input: Tensor, *parameters: Tensor | None) -> Results:
        channel_gate, logits = call(namespace, "_logits", input, *parameters)
        carriers = (like.new_empty(()).expand_as(like) for like in (input, logits))
        return channel_gate, logits, *carriers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.namespace, *arguments = inputs
        ctx.save_for_backward(*arguments, output[0])
        ctx.save_for_forward(*arguments)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Results:
        channel_gate, logits = push(formulas.gate_and_logits, ctx.saved_tensors, tangents)
        carriers = (like.new_zeros(()).expand_as(like) for like in (ctx.saved_tensors[0], logits))
        return channel_gate, logits, *carriers

    @staticmethod
    def backward(
        ctx: Any,
        grad_channel_gate: Tensor,
        grad_logits: Tensor,
        grad_output: Tensor,
        spatial_gate: Tensor,
    ) -> tuple[Tensor | None, ...]:
        input, *parameters, channel_gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        gradients = call_backward(
            ctx.namespace,
            "_logits_backward",
            *(grad_output, input, channel_gate, spatial_gate, grad_channel_gate, grad_logits),
            *(*parameters, *groups(wanted)),
        )
        return None, *select(gradients, wanted)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[Results, tuple[int, ...]]:
        return vmap_by_loop(SpatialLogits, info.batch_size, in_dims, arguments)


class ApplyGates(Function):
    """(input, channel gate, logits, carriers) -> output."""

    @staticmethod
    def forward(
        namespace: str, input: Tensor, channel_gate: Tensor, logits: Tensor, *carriers: Tensor
    ) -> Tensor:
        return call(namespace, "_apply", input, channel_gate, logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.namespace = inputs[0]
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        (tangent,) = push(_gated, ctx.saved_tensors, tangents[:3])
        return tangent

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_channel_gate, grad_logits, spatial_gate = call_backward(
            ctx.namespace, "_apply_backward", grad_output, *ctx.saved_tensors
        )
        return None, None, grad_channel_gate, grad_logits, grad_output, spatial_gate

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        (output,), _ = vmap_by_loop(ApplyGates, info.batch_size, in_dims, arguments)
        return output, 0


def _eager(function: type[Function]) -> type[Function]:
    """The same Function without a ``setup_context``."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(f"_Eager{function.__name__.lstrip('_')}", (Function,), methods)


EagerSpatialLogits = _eager(SpatialLogits)
EagerApplyGates = _eager(ApplyGates)


# ---------------------------------------------------------- in two phases, each operator for itself


class Logits(Function):
    """(input, parameters) -> (channel gate, logits), for graphs that hold the operator.

    Tied by carriers, the phases write the gradient of the input once and not in two parts.
    """

    @staticmethod
    def forward(namespace: str, *arguments: Tensor | None) -> Results:
        return call(namespace, "_logits", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.namespace, *arguments = inputs
        ctx.save_for_backward(*arguments, *output)

    @staticmethod
    def backward(
        ctx: Any, grad_channel_gate: Tensor, grad_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, *parameters, channel_gate, logits = ctx.saved_tensors
        no_output = input.new_zeros(()).expand_as(input)
        wanted = ctx.needs_input_grad[1:]
        gradients = call_backward(
            ctx.namespace,
            "_logits_backward",
            *(no_output, input, channel_gate, logits.sigmoid(), grad_channel_gate, grad_logits),
            *(*parameters, *groups(wanted)),
        )
        return None, *select(gradients, wanted)


class Apply(Function):
    """(input, channel gate, logits) -> output, for graphs that hold the operator."""

    @staticmethod
    def forward(namespace: str, *arguments: Tensor) -> Tensor:
        return call(namespace, "_apply", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.namespace, *arguments = inputs
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, channel_gate, logits = ctx.saved_tensors
        # The output is linear in the input.
        grad_input = call(ctx.namespace, "_apply", grad_output, channel_gate, logits)
        grad_channel_gate, grad_logits, _ = call_backward(
            ctx.namespace, "_apply_backward", grad_output, input, channel_gate, logits
        )
        gradients = (grad_input, grad_channel_gate, grad_logits)
        return None, *select(gradients, ctx.needs_input_grad[1:])


def _gated(input: Tensor, channel_gate: Tensor, logits: Tensor) -> Results:
    return (reference.apply_gates(input, channel_gate, logits),)
