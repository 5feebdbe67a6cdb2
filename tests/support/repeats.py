"""Problems whose results have to be the same bits every time, and all of these results."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend
from .samples import Arguments, Problem, same_bits

# From fewer samples than threads (tiles of a sample are shared out) to more, with tails everywhere.
CASES = [
    Problem((1, 65, 47, 61), 7, 4, biases="12c"),
    Problem((1, 65, 47, 61), 7, 4, layout="nhwc", biases="12c"),
    Problem((2, 7, 70, 71), 7, 1, torch.bfloat16),
    Problem((3, 33, 40, 41), 5, 2, torch.float64, "nhwc"),
    Problem((5, 130, 13, 7), 3, 8, torch.float16, "nhwc", "accumulator"),
    Problem((9, 20, 12, 17), 3, 2, values="relu"),
    Problem((1, 3000, 1, 3), 1, 5),
    Problem((1, 1, 120, 90), 9, 1),
]


def everything(backend: Backend, arguments: Arguments, grad_output: Tensor) -> list[Tensor]:
    """Every result of the operator: output, gates, gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    output = backend.ops.forward(*leaves)
    present = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(output, present, grad_output)
    return [output.detach(), *backend.ops.gates(*arguments), *gradients]


def assert_same(expected: list[Tensor], found: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert same_bits(a, b), f"{what}: result {i} differs"
