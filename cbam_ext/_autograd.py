"""Gradients of the operators: the ``torch.autograd.Function`` behind each, and how to get there.

Each Function calls a private operator, which also returns the small maps that backward needs. There
are two of each kind. One has a ``setup_context`` and a ``vmap``, as ``torch.func`` wants; for that
PyTorch binds the arguments by their signature, which takes longer than all else around a small
feature map. The other, ``Eager`` in its name, has the same derivatives without that, for ordinary
eager calls (:func:`is_ordinary`).

The tests register their emulation of the CUDA kernels as a second namespace with the same schemas;
so the Functions take the name of the operators' namespace as their first argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from . import reference

PARAMETERS = 6  # fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias

# Of an operator's arguments. Any other subclass of Tensor may override what a call does.
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None), bool))

# Looking an operator up in torch.ops takes microseconds on every call.
_overloads: dict[str, dict[str, torch._ops.OpOverload]] = {}


def operators(namespace: str) -> Any:
    return getattr(torch.ops, namespace)


def remember_overloads(namespace: str, names: Iterable[str]) -> None:
    """Has to come before :func:`below_autograd` of that namespace."""
    packets = operators(namespace)
    _overloads[namespace] = {name: getattr(packets, name).default for name in names}


def is_ordinary(arguments: Sequence[Any]) -> bool:
    """Whether only autograd stands between a call with these arguments and the kernels.

    Otherwise someone watches or rewrites calls of operators (a compiler, a transform, a mode, a
    tracer, a subclass of Tensor) and has to be shown the operator, or wants forward mode.
    """
    return not (
        torch.compiler.is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or _get_tracing_state()
        or forward_ad._current_level >= 0
    ) and _PLAIN_TYPES.issuperset(map(type, arguments))


def wants_gradient(arguments: Sequence[Any]) -> bool:
    """Whether reverse mode wants the derivative with respect to any of the arguments."""
    if torch.is_grad_enabled():
        for value in arguments:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def below_autograd(namespace: str, name: str, *arguments: Any) -> Any:
    """Calls an operator without derivatives, past the Python function under its Autograd key."""
    with _AutoDispatchBelowAutograd():
        return _overloads[namespace][name](*arguments)


def _call(namespace: str, name: str, *arguments: Any) -> Any:
    """Calls a private operator from within a Function."""
    if is_ordinary(arguments) and not torch.is_grad_enabled():
        return below_autograd(namespace, name, *arguments)
    return getattr(operators(namespace), name)(*arguments)


class _Forward(Function):
    """(input, parameters) -> (output, channel gate, spatial gate); the gates are for backward."""

    @staticmethod
    def forward(
        namespace: str, input: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _call(namespace, "_forward_train", input, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, channel_gate, spatial_gate = output
        ctx.namespace, *arguments = inputs
        ctx.mark_non_differentiable(channel_gate, spatial_gate)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, channel_gate, spatial_gate)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * (2 + PARAMETERS)
        input, *parameters, channel_gate, spatial_gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        arguments = (grad_output, input, channel_gate, spatial_gate, *parameters, *_groups(wanted))
        if _are_functorch_transforms_active():
            gradients = _Backward.apply(ctx.namespace, *arguments)
        else:
            gradients = _call(ctx.namespace, "_backward", *arguments)
        return None, *_select(gradients, wanted)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        namespace: str,
        input: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if any(dim is not None for dim in in_dims[2:]):
            arguments = (namespace, input, *parameters)
            return _vmap_by_loop(_Forward, info.batch_size, in_dims, arguments)
        # Only the input is batched: the samples of all examples are one batch.
        input = input.movedim(in_dims[1], 0)
        outputs = _Forward.apply(namespace, input.flatten(0, 1), *parameters)
        return tuple(out.unflatten(0, input.shape[:2]) for out in outputs), (0, 0, 0)


class _Backward(Function):
    """The gradients of :class:`_Forward`; their own gradients are those of the reference."""

    @staticmethod
    def forward(namespace: str, *arguments: Any) -> tuple[Tensor, ...]:
        return _call(namespace, "_backward", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, grad_output, input, _, _, *parameters = inputs
        ctx.groups = parameters[PARAMETERS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, *parameters[:PARAMETERS])

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = [i for i, grad in enumerate(grad_gradients) if grad is not None]
        if not asked:
            return (None,) * (5 + PARAMETERS + 3)
        grad_output, *leaves = ctx.saved_tensors
        present = [i for i, leaf in enumerate(leaves) if leaf is not None]

        # torch.func and not autograd.grad: this also has to run inside transforms.
        def first_order(grad_output: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            def output(*values: Tensor) -> Tensor:
                given = dict(zip(present, values, strict=True))
                return reference.cbam(*(given.get(i) for i in range(1 + PARAMETERS)))

            _, pull = torch.func.vjp(output, *values)
            gradients = dict(zip(present, pull(grad_output), strict=True))
            return tuple(gradients[i] for i in asked)

        _, pull = torch.func.vjp(first_order, grad_output, *(leaves[i] for i in present))
        second = pull(tuple(grad_gradients[i] for i in asked))
        by_index = dict(zip(present, second[1:], strict=True))
        grads = [by_index.get(i) for i in range(1 + PARAMETERS)]
        return (None, second[0], grads[0], None, None, *grads[1:], None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        # Gradients of the parameters sum over a batch, so examples cannot share one.
        return _vmap_by_loop(_Backward, info.batch_size, in_dims, arguments)


class _SpatialLogits(Function):
    """(input, parameters) -> (channel gate, logits, carriers); see :func:`spatial_logits`."""

    @staticmethod
    def forward(namespace: str, input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        channel_gate, logits = _call(namespace, "_logits", input, *parameters)
        carriers = (like.new_empty(()).expand_as(like) for like in (input, logits))
        return channel_gate, logits, *carriers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.namespace, *arguments = inputs
        ctx.save_for_backward(*arguments, output[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap_by_loop(_SpatialLogits, info.batch_size, in_dims, arguments)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_channel_gate: Tensor,
        grad_logits: Tensor,
        grad_output: Tensor,
        spatial_gate: Tensor,
    ) -> tuple[Tensor | None, ...]:
        input, *parameters, channel_gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        gradients = _call(
            ctx.namespace,
            "_logits_backward",
            grad_output,
            input,
            channel_gate,
            spatial_gate,
            grad_channel_gate,
            grad_logits,
            *parameters,
            *_groups(wanted),
        )
        return None, *_select(gradients, wanted)


class _ApplyGates(Function):
    """(input, channel gate, logits, carriers) -> output."""

    @staticmethod
    def forward(
        namespace: str, input: Tensor, channel_gate: Tensor, logits: Tensor, *carriers: Tensor
    ) -> Tensor:
        return _call(namespace, "_apply", input, channel_gate, logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.namespace = inputs[0]
        ctx.save_for_backward(*inputs[1:4])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        (output,), _ = _vmap_by_loop(_ApplyGates, info.batch_size, in_dims, arguments)
        return output, 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_channel_gate, grad_logits, spatial_gate = _call(
            ctx.namespace, "_apply_backward", grad_output, *ctx.saved_tensors
        )
        return None, None, grad_channel_gate, grad_logits, grad_output, spatial_gate


def _groups(wanted: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Which gradients the kernels compute: of the input, of the MLP, of the convolution."""
    return wanted[0], any(wanted[1:5]), any(wanted[5:7])


def _select(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if want else None for grad, want in zip(gradients, wanted, strict=True))


def _vmap_by_loop(
    function: type[Function], batch_size: int, in_dims: tuple[int | None, ...], arguments: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
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
