"""The operators as plain ATen, for tools that know no operators but PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import reference
from ..building import library
from ..reference import backward as formulas


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """How to write each operator of ``torch.ops.cbam`` in PyTorch's own operators.

    For ``run_decompositions`` of an exported program, and every other place that takes a table of
    decompositions. What comes out computes the same and is as slow as plain PyTorch; it runs where
    cbam_ext is not installed.

    Returns:
        Operators to Python functions; empty where the operators are not compiled, since a model is
        plain PyTorch there to begin with.

    Example:
        >>> model = cbam_ext.CBAM(16).eval()
        >>> program = torch.export.export(model, (torch.rand(1, 16, 8, 8),))
        >>> program = program.run_decompositions(cbam_ext.decompositions())
        >>> any("cbam" in str(node.target) for node in program.graph.nodes)
        False
    """
    if not library.is_loaded():
        return {}
    functions: dict[str, Callable[..., Any]] = {
        "forward": reference.cbam,
        "gates": reference.gates,
        "_forward_train": _forward_train,
        "_backward": _gradients(formulas.backward),
        "_logits": formulas.gate_and_logits,
        "_apply": reference.apply_gates,
        "_apply_backward": formulas.apply_backward,
        "_logits_backward": _gradients(formulas.logits_backward),
        **formulas.PIECES,
    }
    return {getattr(torch.ops.cbam, name).default: f for name, f in functions.items()}


def _forward_train(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    channel_gate, logits = formulas.gate_and_logits(input, *parameters)
    output = reference.apply_gates(input, channel_gate, logits)
    return output, channel_gate, torch.sigmoid(logits)


def _gradients(formula: Callable[..., formulas.Gradients]) -> Callable[..., Any]:
    """A formula with the operator's flags, and empty tensors for what those leave out."""

    def function(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, input_grad, mlp_grads, conv_grads = arguments
        wanted = (input_grad, *[mlp_grads] * 4, *[conv_grads] * 2)
        return tuple(
            gradient if gradient is not None and want else grad_output.new_empty(0)
            for gradient, want in zip(formula(grad_output, *tensors), wanted, strict=True)
        )

    return function
