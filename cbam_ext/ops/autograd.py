"""Gradients of the operators: the ``torch.autograd.Function`` of the operator in one piece.

Each Function calls an operator of the library, which knows no derivatives. Backward calls another
operator; what that one computes is differentiated again by a formula in plain PyTorch
(gradients.py), and so is everything in forward mode.

There are two of some. One has a ``setup_context`` and a ``vmap``, as ``torch.func`` wants; for that
PyTorch binds the arguments by their signature, which takes longer than all else around a small
feature map. The other, ``Eager`` in its name, has the same derivatives without that, for ordinary
eager calls (:func:`calls.is_ordinary`).

Every Function takes the name of the operators' namespace as its first argument (see calls.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import reference
from .calls import below_autograd, call
from .derivatives import Results, push
from .gradients import PARAMETERS, call_backward, groups, select, vmap_by_loop


class Forward(Function):
    """(input, parameters) -> (output, channel gate, spatial gate); the gates are for backward."""

    @staticmethod
    def forward(namespace: str, input: Tensor, *parameters: Tensor | None) -> Results:
        return call(namespace, "_forward_train", input, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, channel_gate, spatial_gate = output
        ctx.namespace, *arguments = inputs
        ctx.mark_non_differentiable(channel_gate, spatial_gate)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, channel_gate, spatial_gate)
        ctx.save_for_forward(*arguments)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        (tangent,) = push(_output, ctx.saved_tensors, tangents)
        return tangent, None, None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * (2 + PARAMETERS)
        input, *parameters, channel_gate, spatial_gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        gradients = call_backward(
            ctx.namespace,
            "_backward",
            *(grad_output, input, channel_gate, spatial_gate),
            *(*parameters, *groups(wanted)),
        )
        return None, *select(gradients, wanted)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        namespace: str,
        input: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Results, tuple[int, ...]]:
        if any(dim is not None for dim in in_dims[2:]):
            arguments = (namespace, input, *parameters)
            return vmap_by_loop(Forward, info.batch_size, in_dims, arguments)
        # Only the input is batched: the samples of all examples are one batch.
        input = input.movedim(in_dims[1], 0)
        outputs = Forward.apply(namespace, input.flatten(0, 1), *parameters)
        return tuple(out.unflatten(0, input.shape[:2]) for out in outputs), (0, 0, 0)


class EagerForward(Function):
    """(input, parameters) -> output. The gates are no results: nobody outside wants them."""

    @staticmethod
    def forward(ctx: Any, namespace: str, *arguments: Tensor | None) -> Tensor:
        output, *gates = below_autograd(namespace, "_forward_train", *arguments)
        ctx.namespace = namespace
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, *gates)
        return output

    backward = staticmethod(Forward.backward)


class EagerGates(Function):
    """(input, parameters) -> both gates. Their gradient is that of forward without an output."""

    @staticmethod
    def forward(ctx: Any, namespace: str, *arguments: Tensor | None) -> Results:
        gates = call(namespace, "gates", *arguments)
        ctx.namespace = namespace
        ctx.save_for_backward(*arguments, *gates)
        return gates

    @staticmethod
    def backward(
        ctx: Any, grad_channel_gate: Tensor, grad_spatial_gate: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, *parameters, channel_gate, spatial_gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        gradients = call_backward(
            ctx.namespace,
            "_logits_backward",
            *(input.new_zeros(()).expand_as(input), input, channel_gate, spatial_gate),
            *(grad_channel_gate, grad_spatial_gate * spatial_gate * (1 - spatial_gate)),
            *(*parameters, *groups(wanted)),
        )
        return None, *select(gradients, wanted)


def _output(*arguments: Tensor | None) -> Results:
    return (reference.cbam(*arguments),)
