"""Gradients of the operators: the ``torch.autograd.Function`` behind each.

Each Function calls an operator of the library, which knows no derivatives. Backward calls another
operator; what that one computes is differentiated again by a formula in plain PyTorch, and so is
everything in forward mode.

There are two of some. One has a ``setup_context`` and a ``vmap``, as ``torch.func`` wants; for that
PyTorch binds the arguments by their signature, which takes longer than all else around a small
feature map. The other, ``Eager`` in its name, has the same derivatives without that, for ordinary
eager calls (:func:`_calls.is_ordinary`).

Every Function takes the name of the operators' namespace as its first argument (see _calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function
from torch.nn import functional as F

from . import _formulas, reference
from ._calls import below_autograd, call
from ._derivatives import Results, pull, push

PARAMETERS = 6  # fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias


# ------------------------------------------------------------------------ the operator in one piece


class _Forward(Function):
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
        gradients = _call_backward(
            ctx.namespace,
            "_backward",
            *(grad_output, input, channel_gate, spatial_gate),
            *(*parameters, *_groups(wanted)),
        )
        return None, *_select(gradients, wanted)

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
            return _vmap_by_loop(_Forward, info.batch_size, in_dims, arguments)
        # Only the input is batched: the samples of all examples are one batch.
        input = input.movedim(in_dims[1], 0)
        outputs = _Forward.apply(namespace, input.flatten(0, 1), *parameters)
        return tuple(out.unflatten(0, input.shape[:2]) for out in outputs), (0, 0, 0)


class _EagerForward(Function):
    """(input, parameters) -> output. The gates are no results: nobody outside wants them."""

    @staticmethod
    def forward(ctx: Any, namespace: str, *arguments: Tensor | None) -> Tensor:
        output, *gates = below_autograd(namespace, "_forward_train", *arguments)
        ctx.namespace = namespace
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, *gates)
        return output

    backward = staticmethod(_Forward.backward)


class _EagerGates(Function):
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
        gradients = _call_backward(
            ctx.namespace,
            "_logits_backward",
            *(input.new_zeros(()).expand_as(input), input, channel_gate, spatial_gate),
            *(grad_channel_gate, grad_spatial_gate * spatial_gate * (1 - spatial_gate)),
            *(*parameters, *_groups(wanted)),
        )
        return None, *_select(gradients, wanted)


# -------------------------------------------------------------- in two phases, tied by two carriers


class _SpatialLogits(Function):
    """(input, parameters) -> (channel gate, logits, carriers); see :func:`ops.spatial_logits`."""

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
        channel_gate, logits = push(_formulas.gate_and_logits, ctx.saved_tensors, tangents)
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
        gradients = _call_backward(
            ctx.namespace,
            "_logits_backward",
            *(grad_output, input, channel_gate, spatial_gate, grad_channel_gate, grad_logits),
            *(*parameters, *_groups(wanted)),
        )
        return None, *_select(gradients, wanted)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[Results, tuple[int, ...]]:
        return _vmap_by_loop(_SpatialLogits, info.batch_size, in_dims, arguments)


class _ApplyGates(Function):
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
        grad_channel_gate, grad_logits, spatial_gate = _call_backward(
            ctx.namespace, "_apply_backward", grad_output, *ctx.saved_tensors
        )
        return None, None, grad_channel_gate, grad_logits, grad_output, spatial_gate

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        (output,), _ = _vmap_by_loop(_ApplyGates, info.batch_size, in_dims, arguments)
        return output, 0


def _eager(function: type[Function]) -> type[Function]:
    """The same Function without a ``setup_context``."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(f"_Eager{function.__name__.lstrip('_')}", (Function,), methods)


_EagerSpatialLogits = _eager(_SpatialLogits)
_EagerApplyGates = _eager(_ApplyGates)


class BatchNorm(NamedTuple):
    """What there is to a BatchNorm beside its weight and bias."""

    dtype: torch.dtype
    statistics: tuple[Tensor | None, Tensor | None]  # running mean and variance
    momentum: float
    eps: float


class _EagerBatchNorm(Function):
    """(weight and bias of the norm, input, parameters) -> output, around a BatchNorm that trains.

    What :class:`_SpatialLogits`, the norm and :class:`_ApplyGates` do together, as one node: for a
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
        channel_gate, logits = below_autograd(namespace, "_logits", input, *parameters)
        logits = logits.to(norm.dtype)
        normed, *moments = torch.native_batch_norm(
            logits, weight, bias, *norm.statistics, True, norm.momentum, norm.eps
        )
        normed = normed.to(channel_gate.dtype)
        output = below_autograd(namespace, "_apply", input, channel_gate, normed)
        ctx.namespace, ctx.norm = namespace, norm
        ctx.save_for_backward(
            *(weight, bias, input, *parameters, channel_gate, logits, normed, *moments)
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_EagerBatchNorm._differentiable(ctx, grad_output, wanted)
        weight, _, input, *parameters, channel_gate, logits, normed, mean, deviation = (
            ctx.saved_tensors
        )
        grad_channel_gate, grad_normed, spatial_gate = call(
            ctx.namespace, "_apply_backward", grad_output, input, channel_gate, normed
        )
        grad_logits, *grad_norm = torch.ops.aten.native_batch_norm_backward(
            *(grad_normed.to(logits.dtype), logits, weight, None, None, mean, deviation),
            *(True, ctx.norm.eps, [True, wanted[0], wanted[1]]),
        )
        grad_logits = grad_logits.to(grad_normed.dtype)
        gradients = call(
            ctx.namespace,
            "_logits_backward",
            *(grad_output, input, channel_gate, spatial_gate, grad_channel_gate, grad_logits),
            *(*parameters, *_groups(wanted[2:])),
        )
        return None, None, *_select((*grad_norm, *gradients), wanted)

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


# ---------------------------------------------------------- in two phases, each operator for itself


class _Logits(Function):
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
        gradients = _call_backward(
            ctx.namespace,
            "_logits_backward",
            *(no_output, input, channel_gate, logits.sigmoid(), grad_channel_gate, grad_logits),
            *(*parameters, *_groups(wanted)),
        )
        return None, *_select(gradients, wanted)


class _Apply(Function):
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
        grad_channel_gate, grad_logits, _ = _call_backward(
            ctx.namespace, "_apply_backward", grad_output, input, channel_gate, logits
        )
        gradients = (grad_input, grad_channel_gate, grad_logits)
        return None, *_select(gradients, ctx.needs_input_grad[1:])


# --------------------------------------------------------------------- operators that are gradients


def _groups(wanted: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Which gradients the kernels compute: of the input, of the MLP, of the convolution."""
    return wanted[0], any(wanted[1:5]), any(wanted[5:7])


def _select(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if want else None for grad, want in zip(gradients, wanted, strict=True))


def _call_backward(namespace: str, name: str, *arguments: Any) -> Results:
    if _are_functorch_transforms_active():
        return BACKWARD[name].apply(namespace, *arguments)
    return call(namespace, name, *arguments)


def _backward_function(
    name: str, formula: Callable[..., tuple[Tensor | None, ...]]
) -> type[Function]:
    """A Function for an operator that computes gradients; ``formula`` has its derivatives.

    The formula takes the tensors among the operator's arguments and returns its results.
    """

    def is_computed(result: Tensor) -> bool:
        return result.shape != (0,)  # the kernels' way to leave a gradient out

    def results(asked: Sequence[int]) -> Callable[..., Results]:
        def function(*tensors: Tensor | None) -> Results:
            found = formula(*tensors)
            return tuple(result for i in asked if (result := found[i]) is not None)

        return function

    class Backward(Function):
        @staticmethod
        def forward(namespace: str, *arguments: Any) -> Results:
            return call(namespace, name, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Results) -> None:
            _, *arguments = inputs
            ctx.flags = [argument for argument in arguments if isinstance(argument, bool)]
            ctx.computed = [i for i, result in enumerate(output) if is_computed(result)]
            ctx.mark_non_differentiable(*(result for result in output if not is_computed(result)))
            ctx.set_materialize_grads(False)
            tensors = arguments[: len(arguments) - len(ctx.flags)]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.results = len(output)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            found = push(results(ctx.computed), tensors, tangents[: len(tensors)])
            by_index = dict(zip(ctx.computed, found, strict=True))
            return tuple(by_index.get(i) for i in range(ctx.results))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            asked = [i for i, gradient in enumerate(gradients) if gradient is not None]
            tensors, no_flags = ctx.saved_tensors, [None] * len(ctx.flags)
            if not asked:
                return (None, *[None] * len(tensors), *no_flags)
            given = tuple(gradient for gradient in gradients if gradient is not None)
            return (None, *pull(results(asked), tensors, given), *no_flags)

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], *arguments: Any
        ) -> tuple[Results, tuple[int, ...]]:
            # Gradients of the parameters sum over a batch, so examples cannot share one.
            return _vmap_by_loop(Backward, info.batch_size, in_dims, arguments)

    Backward.__name__ = "".join(word.capitalize() for word in name.split("_"))
    return Backward


def _vmap_by_loop(
    function: type[Function], batch_size: int, in_dims: tuple[int | None, ...], arguments: tuple
) -> tuple[Results, tuple[int, ...]]:
    results = [
        function.apply(
            *(
                argument if dim is None else argument.select(dim, i)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(batch_size)
    ]
    rows = [(result,) if isinstance(result, Tensor) else result for result in results]
    outputs = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)


# --------------------------------------------------------------------- derivatives of plain PyTorch


def _output(*arguments: Tensor | None) -> Results:
    return (reference.cbam(*arguments),)


def _gated(input: Tensor, channel_gate: Tensor, logits: Tensor) -> Results:
    return (reference.apply_gates(input, channel_gate, logits),)


BACKWARD = {
    "_backward": _backward_function("_backward", _formulas.backward),
    "_logits_backward": _backward_function("_logits_backward", _formulas.logits_backward),
    "_apply_backward": _backward_function("_apply_backward", _formulas.apply_backward),
}
