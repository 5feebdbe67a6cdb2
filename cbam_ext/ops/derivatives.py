"""Derivatives of functions in plain PyTorch, some of whose arguments may be None.

By torch.func and not autograd.grad: these have to run inside transforms as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

Results = tuple[Tensor, ...]


def pull(
    function: Callable[..., Results],
    arguments: Sequence[Tensor | None],
    gradients: Results,
) -> tuple[Tensor | None, ...]:
    """Reverse mode: gradients of results to gradients of arguments."""
    present, call = _without_none(function, arguments)
    _, pull_back = torch.func.vjp(call, *(arguments[i] for i in present))
    found = dict(zip(present, pull_back(gradients), strict=True))
    return tuple(found.get(i) for i in range(len(arguments)))


def push(
    function: Callable[..., Results],
    arguments: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> Results:
    """Forward mode: tangents of arguments to tangents of results."""
    arguments = [None if a is None else forward_ad.unpack_dual(a).primal for a in arguments]
    present, call = _without_none(function, arguments)
    # Reverse mode twice, since forward mode does not nest: `pull_back` is linear in its argument,
    # and its own gradient there is the product looked for.
    results, pull_back = torch.func.vjp(call, *(arguments[i] for i in present))
    _, push_forward = torch.func.vjp(pull_back, tuple(map(torch.zeros_like, results)))
    given = (
        torch.zeros_like(argument) if (tangent := tangents[i]) is None else tangent
        for i in present
        if (argument := arguments[i]) is not None
    )
    return push_forward(tuple(given))[0]


def _without_none(
    function: Callable[..., Results], arguments: Sequence[Tensor | None]
) -> tuple[list[int], Callable[..., Results]]:
    """Which arguments are there, and ``function`` of those alone."""
    present = [i for i, argument in enumerate(arguments) if argument is not None]

    def call(*values: Tensor) -> Results:
        given = dict(zip(present, values, strict=True))
        return function(*(given.get(i) for i in range(len(arguments))))

    return present, call
