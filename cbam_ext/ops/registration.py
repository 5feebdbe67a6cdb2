"""What the compiled operators mean to PyTorch: gradients, fake kernels, errors where no kernel is.

The library registers schemas and kernels (csrc/); the stable ABI leaves the rest to Python. Each
differentiable operator has a Python function under its ``Autograd`` key. Where a gradient is
wanted, it applies a ``torch.autograd.Function``; elsewhere it goes straight to the kernel. So
``cbam::forward`` stays one node in a graph, and inference computes and keeps nothing for backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..building import library
from ..reference import backward as formulas
from . import flops
from .autograd import EagerForward, Forward
from .calls import (
    below_autograd,
    has_kernels,
    is_ordinary,
    remember_kernels,
    remember_overloads,
    wants_derivative,
)
from .fakes import FAKES
from .gradients import BACKWARD
from .phases import Apply, Logits

# Of torch.ops.<namespace>: the Library with the Python half of its operators, which takes its
# registrations along when it dies. There it lives as long as the process, and is found by a second
# import of this package (whose modules somebody took out of sys.modules).
_OF_NAMESPACE = "_registered_by_cbam_ext"
_registered: set[str] = set()  # by this import

_PUBLIC = ("forward", "gates")


def _differentiable_forward(namespace: str, *arguments: Tensor | None) -> Tensor:
    if is_ordinary(arguments):
        return EagerForward.apply(namespace, *arguments)
    return Forward.apply(namespace, *arguments)[0]


def _without_namespace(
    formula: Callable[..., Tensor], namespace: str, *arguments: Tensor
) -> Tensor:
    return formula(*arguments)


# The functions that stand under the Autograd key where a gradient is wanted. gates, by contract,
# is not differentiable.
_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "forward": _differentiable_forward,
    "_forward_train": Forward.apply,
    "_logits": Logits.apply,
    "_apply": Apply.apply,
    **{name: function.apply for name, function in BACKWARD.items()},
    # Around layers that are called (pieces.py): what differentiates these a second time.
    **{
        name: functools.partial(_without_namespace, formula)
        for name, formula in formulas.PIECES.items()
    },
}


def register(namespace: str = "cbam") -> None:
    """Registers the Python half of the operators once the library is loaded; idempotent.

    A namespace other than ``cbam`` has operators of the same names and schemas.
    """
    if namespace == "cbam":
        for name in _PUBLIC:
            explained = vars(torch.ops.cbam).get(name)
            if getattr(explained, "__name__", None) == _explain_missing_library.__name__:
                delattr(torch.ops.cbam, name)
    if namespace not in _registered:
        operators = getattr(torch.ops, namespace)
        # What is newly imported counts: it may have been edited in between.
        vars(operators).pop(_OF_NAMESPACE, None)
        remember_overloads(namespace, FAKES)
        registrations = torch.library.Library(namespace, "IMPL")
        for name, fake in FAKES.items():
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=registrations)
            registrations.impl(name, _autograd_kernel(namespace, name), "Autograd")
            registrations.impl(name, _missing_kernel(namespace), "CompositeExplicitAutograd")
        flops.register(namespace)
        setattr(operators, _OF_NAMESPACE, registrations)
        _registered.add(namespace)
    if namespace == "cbam":
        for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"), ("meta", "Meta")):
            if torch._C._dispatch_has_kernel_for_dispatch_key("cbam::forward", key):
                remember_kernels(device_type)


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
        if differentiable is not None and wants_derivative(arguments):
            return differentiable(namespace, *arguments)
        return below_autograd(namespace, name, *arguments)

    return kernel


def _explain_missing_library(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError(f"torch.ops.cbam: {library.no_kernel_reason('cpu')}")


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
        raise RuntimeError(f"torch.ops.{namespace}: {library.no_kernel_reason(missing)}")

    return explain
