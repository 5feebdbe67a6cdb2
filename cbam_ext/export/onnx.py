"""The operators in ONNX, for PyTorch's own exporter where it is given an exported program.

Models need none of it: while one is exported, CBAM is plain PyTorch (``functional.py``). The
operators become what :mod:`cbam_ext.reference` computes, in operators of ONNX's standard opset
alone: what runs the file needs nothing of this package. Importing this module does not need
onnxscript.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..building import library

__all__ = ["onnx_translation_table"]

# An onnxscript.ir.Value. The exporter evaluates the annotations of the functions below; a name that
# only type checkers import would make it log a warning for each of them.
Value: TypeAlias = Any


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export`` has to know to write an exported program with CBAM.

    It needs nothing for a model: the operators stand in what :func:`torch.export.export` has made,
    and where a model calls ``torch.ops.cbam`` itself.

    Sums, gates and logits are in the accumulator dtype there too, and the sizes of the batch and of
    the images may be dynamic. The nodes are of opset 18, which the exporter turns into any newer
    one. As for any export, call ``eval()`` first; that also folds a BatchNorm of the spatial gate
    into its convolution.

    Where the operators are not compiled, CBAM runs and is exported as plain PyTorch. That needs no
    translation: the table is empty.

    Returns:
        The ``custom_translation_table``: for each operator the function that writes its nodes. It
        is a new dict; join it with another table by ``|``.

    Raises:
        ImportError: onnx or onnxscript is not installed; the exporter needs both.

    Example:
        >>> model = CBAM(64).eval()  # doctest: +SKIP
        >>> program = torch.export.export(model, (torch.rand(2, 64, 56, 56),))  # doctest: +SKIP
        >>> torch.onnx.export(  # doctest: +SKIP
        ...     program,
        ...     (),
        ...     "cbam.onnx",
        ...     custom_translation_table=onnx_translation_table(),
        ... )
    """
    _import_onnxscript()
    if not library.is_loaded():
        return {}
    operators = torch.ops.cbam
    # Those that inference can meet: _forward_train comes with _backward only.
    return {
        operators.forward.default: _forward,
        operators.gates.default: _gates,
        operators._logits.default: _logits,
        operators._apply.default: _apply,
    }


# ------------------------------------------------------------------------------------ operators
#
# The arguments are those of the schemas in csrc/torch/schemas.h, an absent one None.
# Each call of an operator of the opset adds a node to the exporter's graph.


def _forward(
    input: Value,
    fc1_weight: Value | None,
    fc1_bias: Value | None,
    fc2_weight: Value | None,
    fc2_bias: Value | None,
    conv_weight: Value | None,
    conv_bias: Value | None,
) -> Value:
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    _, refined, logits = _attend(input, *parameters)
    return _gate(refined, logits, input)


def _gates(
    input: Value,
    fc1_weight: Value | None,
    fc1_bias: Value | None,
    fc2_weight: Value | None,
    fc2_bias: Value | None,
    conv_weight: Value | None,
    conv_bias: Value | None,
) -> tuple[Value, Value]:
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    channel_gate, logits = _gate_and_logits(input, *parameters)
    return channel_gate, _opset().Sigmoid(logits)


def _logits(
    input: Value,
    fc1_weight: Value | None,
    fc1_bias: Value | None,
    fc2_weight: Value | None,
    fc2_bias: Value | None,
    conv_weight: Value | None,
    conv_bias: Value | None,
) -> tuple[Value, Value]:
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    return _gate_and_logits(input, *parameters)


def _apply(input: Value, channel_gate: Value, logits: Value) -> Value:
    refined = _opset().Mul(channel_gate, _widen(input, input))
    return _gate(refined, logits, input)


# ---------------------------------------------------------------------------------------- steps


def _attend(input: Value, *parameters: Value | None) -> tuple[Value | None, Value, Value | None]:
    """Channel gate, input times channel gate, and spatial logits, in the accumulator dtype.

    None stands for what is not there.
    """
    op = _opset()
    refined = x = _widen(input, input)
    w1, b1, w2, b2, conv_weight, conv_bias = (_widen(value, input) for value in parameters)
    channel_gate = logits = None

    def mlp(pooled: Value) -> Value:
        hidden = op.Relu(op.Gemm(pooled, w1, b1, transB=1))
        return op.Gemm(hidden, w2, b2, transB=1)

    if w1 is not None:
        mean, largest = op.ReduceMean(x, [2, 3], keepdims=0), op.ReduceMax(x, [2, 3], keepdims=0)
        channel_gate = op.Unsqueeze(op.Sigmoid(op.Add(mlp(mean), mlp(largest))), [2, 3])
        refined = op.Mul(channel_gate, x)
    if conv_weight is not None:
        padding = parameters[4].shape[-1] // 2  # what _widen gives has no shape yet
        stats = op.Concat(op.ReduceMean(refined, [1]), op.ReduceMax(refined, [1]), axis=1)
        logits = op.Conv(stats, conv_weight, conv_bias, pads=[padding] * 4)
    return channel_gate, refined, logits


def _gate_and_logits(input: Value, *parameters: Value | None) -> tuple[Value, Value]:
    """The same, with a map for a gate that is not there: of ones, or of infinite logits."""
    op = _opset()
    x = _widen(input, input)
    channel_gate, _, logits = _attend(input, *parameters)
    if channel_gate is None:
        channel_gate = _filled(op.ReduceMax(x, [2, 3]), 1.0)
    return channel_gate, _filled(op.ReduceMax(x, [1]), math.inf) if logits is None else logits


def _filled(like: Value, number: float) -> Value:
    op = _opset()
    filled = op.Expand(op.Constant(value_float=number), op.Shape(like))
    return op.CastLike(filled, like)


def _gate(refined: Value, logits: Value | None, input: Value) -> Value:
    """The spatial gate on top, rounded once, to the dtype of ``input``."""
    op = _opset()
    output = refined if logits is None else op.Mul(op.Sigmoid(logits), refined)
    return output if input.dtype == _accumulator(input) else op.Cast(output, to=input.dtype)


def _widen(value: Value | None, input: Value) -> Value | None:
    """``value`` in the accumulator dtype of ``input``."""
    dtype = _accumulator(input)
    return value if value is None or value.dtype == dtype else _opset().Cast(value, to=dtype)


def _accumulator(input: Value) -> Any:
    types = _import_onnxscript().ir.DataType
    return types.DOUBLE if input.dtype == types.DOUBLE else types.FLOAT


def _opset() -> Any:
    # That of PyTorch's own translations: the exporter converts all to the version asked for.
    return _import_onnxscript().opset18


def _import_onnxscript() -> Any:
    try:
        import onnxscript
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxscript"):
            raise  # both are there; something that they need is not
        raise ImportError(
            "exporting to ONNX needs onnx and onnxscript; install them with "
            "`pip install onnx onnxscript`, or with this package as `cbam_ext[onnx]`",
            name=error.name,
        ) from error
    return onnxscript
