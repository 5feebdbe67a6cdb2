"""What counters of FLOPs count for the operators: PyTorch's own, and fvcore's.

As for every operator of PyTorch, that is the multiplications and additions of matrix products and
convolutions: here of the MLP and of the spatial convolution. So the numbers are those of plain
PyTorch's CBAM. Pooling and gating count nothing, although all of the time goes there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"


def register(namespace: str) -> None:
    """Makes the counter know the operators of a namespace; once for each."""
    if _COUNTER in sys.modules:
        _register(namespace, sys.modules[_COUNTER])
    else:
        # Importing the counter would bring Triton along: longer than all else of this package.
        sys.meta_path.insert(0, _OnImport(namespace))


def _register(namespace: str, counter: ModuleType) -> None:
    operators = getattr(torch.ops, namespace)
    first = (operators.forward, operators.gates, operators._forward_train, operators._logits)
    formulas = dict.fromkeys(first, _forward) | {
        operators._backward: _backward,
        operators._logits_backward: _logits_backward,
    }
    for operator, formula in formulas.items():
        # An earlier import of this package has left its own, and a second is an error.
        counter.flop_registry.pop(operator, None)
        counter.register_flop_formula(operator)(formula)


class _OnImport(importlib.abc.MetaPathFinder):
    """Waits until somebody imports the counter, and registers the formulas right after."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # by those who come after
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(self.namespace, module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """What ``fvcore.nn.FlopCountAnalysis`` has to know of the operators.

    For code that calls ``cbam_ext.cbam`` or ``torch.ops.cbam.forward`` itself. A
    :class:`cbam_ext.CBAM` needs no handles, because fvcore looks at every layer of a model, and so
    its layers are called. As everywhere in fvcore, a multiplication and the addition after it count
    as one.

    Returns:
        Names of operators to functions of the traced inputs and outputs. It is a new dict, for
        ``set_op_handle`` or, with handles of other operators, for ``flop_count``.

    Example:
        >>> from fvcore.nn import FlopCountAnalysis  # doctest: +SKIP
        >>> analysis = FlopCountAnalysis(model, images)  # doctest: +SKIP
        >>> analysis.set_op_handle(**cbam_ext.fvcore_handles()).total()  # doctest: +SKIP
    """

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        values = (inputs[0].type(), inputs[1].type(), inputs[3].type(), inputs[5].type())
        shapes = (value.sizes() if value.kind() == "TensorType" else None for value in values)
        input, fc1_weight, fc2_weight, conv_weight = shapes
        return _forward(input, fc1_weight, None, fc2_weight, None, conv_weight) // 2

    return {f"cbam::{name}": count for name in ("forward", "gates", "_logits", "_forward_train")}


def _forward(
    input: Shape,
    fc1_weight: Shape | None,
    fc1_bias: Shape | None,
    fc2_weight: Shape | None,
    fc2_bias: Shape | None,
    conv_weight: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _layer(input, fc1_weight) + _convolution(input, conv_weight)


def _backward(
    grad_output: Shape,
    input: Shape,
    channel_gate: Shape,
    spatial_gate: Shape,
    fc1_weight: Shape | None,
    fc1_bias: Shape | None,
    fc2_weight: Shape | None,
    fc2_bias: Shape | None,
    conv_weight: Shape | None,
    conv_bias: Shape | None,
    input_grad: bool,
    mlp_grads: bool,
    conv_grads: bool,
    **_: Any,
) -> int:
    # To the hidden units and to the maps that the convolution saw, on the way to the input as well
    # as to the MLP; then to the pooled values, and to the weights.
    through = input_grad or mlp_grads
    layers = through + input_grad + 2 * mlp_grads
    return layers * _layer(input, fc1_weight) + (through + conv_grads) * _convolution(
        input, conv_weight
    )


def _logits_backward(
    grad_output: Shape,
    input: Shape,
    channel_gate: Shape,
    spatial_gate: Shape,
    grad_channel_gate: Shape,
    grad_logits: Shape,
    *parameters_and_groups: Any,
    **_: Any,
) -> int:
    return _backward(grad_output, input, channel_gate, spatial_gate, *parameters_and_groups)


def _layer(input: Shape, weight: Shape | None) -> int:
    """One layer of the MLP, for both pooled vectors of every sample; nothing without a gate."""
    if weight is None:
        return 0
    hidden, channels = weight
    return 2 * 2 * input[0] * channels * hidden


def _convolution(input: Shape, weight: Shape | None) -> int:
    if weight is None:
        return 0
    n, _, height, width = input
    _, maps, kernel, _ = weight
    return 2 * n * height * width * maps * kernel * kernel
