"""How the Python half calls the operators: past autograd where it may, in sight where it must.

The tests register their emulation of the CUDA kernels as a second namespace with the same schemas;
so everything here takes the name of the operators' namespace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch.autograd import forward_ad

# Of an operator's arguments. Any other subclass of Tensor may override what a call does.
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None), bool))

# Looking an operator up in torch.ops takes microseconds on every call.
_overloads: dict[str, dict[str, torch._ops.OpOverload]] = {}
_device_types: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """Whether the operators have kernels for this type of device ("cpu", "cuda", ...)."""
    return device_type in _device_types


def remember_kernels(device_type: str) -> None:
    """There are kernels for this type of device."""
    _device_types.add(device_type)


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
    return _is_unobserved(arguments) and forward_ad._current_level < 0


def _is_unobserved(arguments: Sequence[Any]) -> bool:
    return not (
        torch.compiler.is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or _get_tracing_state()
    ) and _PLAIN_TYPES.issuperset(map(type, arguments))


def is_recorded() -> bool:
    """Whether a graph is being made that will run without these Python functions."""
    return torch.compiler.is_exporting() or _get_tracing_state() is not None


def wants_gradient(arguments: Sequence[Any]) -> bool:
    """Whether reverse mode wants the derivative with respect to any of the arguments."""
    if torch.is_grad_enabled():
        for value in arguments:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def wants_derivative(arguments: Sequence[Any]) -> bool:
    """The same of reverse or forward mode."""
    if wants_gradient(arguments):
        return True
    # Forward mode: the Functions refuse it, where the kernels would drop the tangents in silence.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None
        for value in arguments
        if isinstance(value, Tensor)
    )


def overloads(namespace: str) -> dict[str, torch._ops.OpOverload]:
    """The operators by their names, for several calls within ``BelowAutograd`` or the guard below.

    A guard takes as long as a kernel does for a small feature map.
    """
    return _overloads[namespace]


def below_autograd(namespace: str, name: str, *arguments: Any) -> Any:
    """Calls an operator without derivatives, past the Python function under its Autograd key."""
    with BelowAutograd():
        return _overloads[namespace][name](*arguments)


def below_autograd_if_unobserved(arguments: Sequence[Any]) -> AbstractContextManager[Any]:
    """A guard for calls whose arguments are these or computed from these, as in :func:`call`."""
    unobserved = _is_unobserved(arguments) and not torch.is_grad_enabled()
    return BelowAutograd() if unobserved else nullcontext()


def call(namespace: str, name: str, *arguments: Any) -> Any:
    """Calls a private operator from within a Function."""
    # Not is_ordinary(): what forward mode wants, the Function gives by its jvp.
    if _is_unobserved(arguments) and not torch.is_grad_enabled():
        return below_autograd(namespace, name, *arguments)
    return getattr(operators(namespace), name)(*arguments)
