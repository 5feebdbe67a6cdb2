"""What the compiled operators mean to PyTorch: gradients, fake kernels, errors where no kernel is.

The library registers schemas and kernels (csrc/operators.h); the stable ABI leaves the rest to
Python. Each differentiable operator has a Python function under its ``Autograd`` key. Where a
gradient is wanted, it applies a ``torch.autograd.Function`` that calls a private operator, which
also returns the small maps that backward needs; elsewhere it goes straight to the kernel. So
``cbam::forward`` stays one node in a graph, and inference computes and keeps nothing for backward.

While transforms of ``torch.func`` are active, :func:`cbam` applies the Function directly, because
those transforms do not look inside an operator.

The tests register their emulation of the CUDA kernels as a second namespace with the same schemas;
so the Functions take the name of the operators' namespace as their first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import _library, reference
from ._checks import check_arguments

_PARAMETERS = 6  # fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias

# Kept alive for as long as the process runs: a Library takes its registrations along when it dies.
_registrations: dict[str, torch.library.Library] = {}
_device_types: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """Whether the operators have kernels for this type of device ("cpu", "cuda", ...)."""
    return device_type in _device_types


def cbam(input: Tensor, *parameters: Tensor | None, namespace: str = "cbam") -> Tensor:
    """``torch.ops.cbam.forward``, differentiable under the transforms of ``torch.func`` as well."""
    if torch._C._are_functorch_transforms_active():
        return _Forward.apply(namespace, input, *parameters)[0]
    return _operators(namespace).forward(input, *parameters)


def spatial_logits(
    input: Tensor, *parameters: Tensor | None, namespace: str = "cbam"
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """First phase of the operator around a norm: channel gate, spatial logits, and two carriers.

    The carriers hold no data. In backward they bring the gradient of the second phase's output and
    its spatial gate here (not gradients of the carriers in the sense of calculus), so that the
    gradient of ``input`` is written once, by this phase, instead of in two full-size parts that
    autograd would have to add. Hand them to :func:`apply_gates` and use them for nothing else.
    """
    channel_gate, logits, *carriers = _SpatialLogits.apply(namespace, input, *parameters)
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
    return _ApplyGates.apply(namespace, input, channel_gate, logits, *carriers)


def _operators(namespace: str) -> Any:
    return getattr(torch.ops, namespace)


# ------------------------------------------------------------------------------------- autograd


class _Forward(Function):
    """(input, parameters) -> (output, channel gate, spatial gate); the gates are for backward."""

    @staticmethod
    def forward(
        namespace: str, input: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _operators(namespace)._forward_train(input, *parameters)

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
            return (None,) * (2 + _PARAMETERS)
        input, *parameters, channel_gate, spatial_gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        arguments = (grad_output, input, channel_gate, spatial_gate, *parameters, *_groups(wanted))
        if torch._C._are_functorch_transforms_active():
            gradients = _Backward.apply(ctx.namespace, *arguments)
        else:
            gradients = _operators(ctx.namespace)._backward(*arguments)
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
        return _operators(namespace)._backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, grad_output, input, _, _, *parameters = inputs
        ctx.groups = parameters[_PARAMETERS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, *parameters[:_PARAMETERS])

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = [i for i, grad in enumerate(grad_gradients) if grad is not None]
        if not asked:
            return (None,) * (5 + _PARAMETERS + 3)
        grad_output, *leaves = ctx.saved_tensors
        present = [i for i, leaf in enumerate(leaves) if leaf is not None]

        # torch.func and not autograd.grad: this also has to run inside transforms.
        def first_order(grad_output: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            def output(*values: Tensor) -> Tensor:
                given = dict(zip(present, values, strict=True))
                return reference.cbam(*(given.get(i) for i in range(1 + _PARAMETERS)))

            _, pull = torch.func.vjp(output, *values)
            gradients = dict(zip(present, pull(grad_output), strict=True))
            return tuple(gradients[i] for i in asked)

        _, pull = torch.func.vjp(first_order, grad_output, *(leaves[i] for i in present))
        second = pull(tuple(grad_gradients[i] for i in asked))
        by_index = dict(zip(present, second[1:], strict=True))
        grads = [by_index.get(i) for i in range(1 + _PARAMETERS)]
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
        channel_gate, logits = _operators(namespace)._logits(input, *parameters)
        carriers = (like.new_empty(()).expand(like.shape) for like in (input, logits))
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
        gradients = _operators(ctx.namespace)._logits_backward(
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
        return _operators(namespace)._apply(input, channel_gate, logits)

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
        operator = _operators(ctx.namespace)._apply_backward
        grad_channel_gate, grad_logits, spatial_gate = operator(grad_output, *ctx.saved_tensors)
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


# --------------------------------------------------------------------------------- fake kernels


def _like_output(input: Tensor) -> Tensor:
    """An empty tensor of the strides that the kernels give output and input gradient."""
    channels_last = input.is_contiguous(memory_format=torch.channels_last)
    if statically_known_true(input.shape[0] == 0):
        # An empty tensor counts as contiguous whatever its strides, and keeps them in empty_like.
        last = channels_last and input.stride(1) == 1 and input.shape[1] > 1
        return input.new_empty(input.shape).contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
    native = channels_last or input.is_contiguous()
    return torch.empty_like(
        input, memory_format=torch.preserve_format if native else torch.contiguous_format
    )


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
        input, parameters_and_groups[:_PARAMETERS], parameters_and_groups[_PARAMETERS:]
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
        input, parameters_and_groups[:_PARAMETERS], parameters_and_groups[_PARAMETERS:]
    )


# --------------------------------------------------------------------------------- registration

_FAKES = {
    "forward": _fake_forward,
    "gates": _fake_gates,
    "_forward_train": _fake_forward_train,
    "_backward": _fake_backward,
    "_logits": _fake_gates,
    "_apply": _fake_apply,
    "_apply_backward": _fake_apply_backward,
    "_logits_backward": _fake_logits_backward,
}

_PUBLIC = ("forward", "gates")

# The functions that stand under the Autograd key where a gradient is wanted. The others are not
# differentiable: gates by contract, the phases because _SpatialLogits and _ApplyGates wrap them.
_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "forward": lambda namespace, *arguments: _Forward.apply(namespace, *arguments)[0],
    "_forward_train": _Forward.apply,
    "_backward": _Backward.apply,
}


def register(namespace: str = "cbam") -> None:
    """Registers the Python half of the operators once the library is loaded; idempotent.

    A namespace other than ``cbam`` has operators of the same names and schemas.
    """
    if namespace == "cbam":
        for name in _PUBLIC:
            if vars(torch.ops.cbam).get(name) is _explain_missing_library:
                delattr(torch.ops.cbam, name)
    if namespace not in _registrations:
        registrations = torch.library.Library(namespace, "IMPL")
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=registrations)
            registrations.impl(name, _autograd_kernel(namespace, name), "Autograd")
            registrations.impl(name, _missing_kernel(namespace), "CompositeExplicitAutograd")
        _registrations[namespace] = registrations
    if namespace == "cbam":
        for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"), ("meta", "Meta")):
            if torch._C._dispatch_has_kernel_for_dispatch_key("cbam::forward", key):
                _device_types.add(device_type)


def explain_absence() -> None:
    """Makes ``torch.ops.cbam.forward`` and ``gates`` explain themselves while nothing is compiled.

    Without this PyTorch only says that the namespace has no such attribute. :func:`register`
    clears the way for the operators, once :func:`cbam_ext.load` has built them.
    """
    for name in _PUBLIC:
        setattr(torch.ops.cbam, name, _explain_missing_library)


def _autograd_kernel(namespace: str, name: str) -> Callable[..., Any]:
    operator = getattr(_operators(namespace), name).default
    differentiable = _DIFFERENTIABLE.get(name)

    def kernel(*arguments: Any) -> Any:
        if differentiable is not None and _wants_derivative(arguments):
            return differentiable(namespace, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return kernel


def _wants_derivative(arguments: Sequence[Any]) -> bool:
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    # Forward mode: the Functions refuse it, where the kernels would drop the tangents in silence.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _explain_missing_library(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError(f"torch.ops.cbam: {_library.no_kernel_reason('cpu')}")


def _missing_kernel(namespace: str) -> Callable[..., Any]:
    """What stands in for the kernels that a device lacks: an explanation."""

    def explain(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.layout != torch.strided:
                raise RuntimeError(
                    f"torch.ops.{namespace} takes dense (strided) tensors, got {tensor.layout}"
                )
        types = [tensor.device.type for tensor in tensors]
        missing = next((type for type in types if not has_kernels(type)), types[0])
        raise RuntimeError(f"torch.ops.{namespace}: {_library.no_kernel_reason(missing)}")

    return explain
