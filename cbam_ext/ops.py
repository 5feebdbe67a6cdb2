"""What the compiled operators mean to PyTorch: gradients, fake kernels, errors where no kernel is.

The library registers schemas and kernels (csrc/torch); the stable ABI leaves the rest to
Python. Each differentiable operator has a Python function under its ``Autograd`` key. Where a
gradient is wanted, it applies a ``torch.autograd.Function`` (_autograd.py); elsewhere it goes
straight to the kernel. So ``cbam::forward`` stays one node in a graph, and inference computes and
keeps nothing for backward.

The functions below take the same two ways without calling the operator, if nobody is there to see
it: around a small feature map, the call takes longer than the kernels. While transforms of
``torch.func`` are active they apply the Functions directly, because those transforms do not look
inside an operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import _flops, _formulas, _library, reference
from ._autograd import (
    BACKWARD,
    PARAMETERS,
    BatchNorm,
    _Apply,
    _ApplyGates,
    _EagerApplyGates,
    _EagerBatchNorm,
    _EagerForward,
    _EagerGates,
    _EagerSpatialLogits,
    _Forward,
    _Logits,
    _SpatialLogits,
)
from ._calls import (
    below_autograd,
    is_ordinary,
    is_recorded,
    operators,
    remember_overloads,
    wants_gradient,
)
from ._checks import check_arguments, check_input

# Kept alive for as long as the process runs: a Library takes its registrations along when it dies.
_registrations: dict[str, torch.library.Library] = {}
_device_types: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """Whether the operators have kernels for this type of device ("cpu", "cuda", ...)."""
    return device_type in _device_types


def cbam(input: Tensor, *parameters: Tensor | None, namespace: str = "cbam") -> Tensor:
    """``torch.ops.cbam.forward``, differentiable under the transforms of ``torch.func`` as well."""
    arguments = (input, *parameters)
    if torch._C._are_functorch_transforms_active():
        return _Forward.apply(namespace, *arguments)[0]
    if not is_ordinary(arguments):
        return operators(namespace).forward(*arguments)
    if wants_gradient(arguments):
        return _EagerForward.apply(namespace, *arguments)
    return below_autograd(namespace, "forward", *arguments)


def gates(
    input: Tensor, *parameters: Tensor | None, namespace: str = "cbam"
) -> tuple[Tensor, Tensor]:
    """``torch.ops.cbam.gates``, but differentiable."""
    arguments = (input, *parameters)
    if torch._C._are_functorch_transforms_active() or _wants_derivative(arguments):
        if _is_reverse_mode_alone():
            return _EagerGates.apply(namespace, *arguments)
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
    function = _EagerSpatialLogits if plain else _SpatialLogits
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
    return (_EagerApplyGates if plain else _ApplyGates).apply(namespace, *arguments)


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
    output = _EagerBatchNorm.apply(namespace, settings, *arguments)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return output


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
    "_pool": _fake_pool,
    "_channel_stats": _fake_channel_stats,
    "_channel_stats_backward": _fake_channel_stats_backward,
    "_pool_backward": _fake_pool_backward,
}

_PUBLIC = ("forward", "gates")


def _differentiable_forward(namespace: str, *arguments: Tensor | None) -> Tensor:
    if is_ordinary(arguments):
        return _EagerForward.apply(namespace, *arguments)
    return _Forward.apply(namespace, *arguments)[0]


def _without_namespace(
    formula: Callable[..., Tensor], namespace: str, *arguments: Tensor
) -> Tensor:
    return formula(*arguments)


# The functions that stand under the Autograd key where a gradient is wanted. gates, by contract,
# is not differentiable.
_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "forward": _differentiable_forward,
    "_forward_train": _Forward.apply,
    "_logits": _Logits.apply,
    "_apply": _Apply.apply,
    **{name: function.apply for name, function in BACKWARD.items()},
    # Around layers that are called (_pieces.py): what differentiates these a second time.
    **{
        name: functools.partial(_without_namespace, formula)
        for name, formula in _formulas.PIECES.items()
    },
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
        remember_overloads(namespace, _FAKES)
        registrations = torch.library.Library(namespace, "IMPL")
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=registrations)
            registrations.impl(name, _autograd_kernel(namespace, name), "Autograd")
            registrations.impl(name, _missing_kernel(namespace), "CompositeExplicitAutograd")
        _flops.register(namespace)
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
    differentiable = _DIFFERENTIABLE.get(name)

    def kernel(*arguments: Any) -> Any:
        if differentiable is not None and _wants_derivative(arguments):
            return differentiable(namespace, *arguments)
        return below_autograd(namespace, name, *arguments)

    return kernel


def _wants_derivative(arguments: Sequence[Any]) -> bool:
    if wants_gradient(arguments):
        return True
    # Forward mode: the Functions refuse it, where the kernels would drop the tangents in silence.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None
        for value in arguments
        if isinstance(value, Tensor)
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
