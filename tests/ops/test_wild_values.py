"""Infinities and NaN on their way back: an element, a plane, a pixel, a sample.

Weights are positive, so that what is wild reaches every gate: with random signs, infinities of both
signs meet in the MLP, everything becomes NaN, and an argmax that points nowhere goes unnoticed. The
expected is the plain chain, NaN and infinity where that has them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cbam_ext import reference

from support import operators
from support.backends import Backend
from support.samples import NAMES, Arguments, same_bits

WILD = {"inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "element": lambda x: x[1, 3, 2, 2],
    "last element": lambda x: x[1, -1, -1, -1],
    "plane": lambda x: x[1, 5],
    "pixel": lambda x: x[1, :, 2, 2],
    "sample": lambda x: x[1],
}


# Less than a tile, and several.
SHAPES = [(3, 19, 5, 7), (3, 7, 70, 71)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    """A gate for every hidden unit and channel. Of three samples, two stay tame: a step over either
    end of the one between them would show there."""
    x, c = torch.randn(shape, dtype=dtype), shape[1]
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    shapes = ((3, c), (3,), (c, 3), (c,), (1, 2, 3, 3), (1,))
    return [x, *(0.05 + 0.2 * torch.rand(shape, dtype=dtype) for shape in shapes)]


def results(function: Callable[..., Tensor], given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [t.detach().requires_grad_() for t in given]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=7)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_around_wild_values(
    backend: Backend,
    dtype: torch.dtype,
    wild: str,
    place: str,
    layout: str,
    shape: tuple[int, ...],
) -> None:
    given = arguments(shape, dtype, layout)
    upstream = torch.randn_like(given[0])
    tame_alone = [t[::2].clone() if t is given[0] else t for t in given]
    PLACES[place](given[0]).fill_(WILD[wild])
    on_device = [t.to(backend.device) for t in given]

    found = results(backend.ops.forward, on_device, upstream.to(backend.device))
    # In float64, because the convolution for float32 multiplies infinities by the zeros around a
    # map, which are not part of the sum.
    expected = results(reference.cbam, [t.double() for t in given], upstream.double())
    for name, one, other in zip(("output", *NAMES), found, expected, strict=True):
        torch.testing.assert_close(
            one.cpu().double(),
            other,
            rtol=1e-3,
            atol=1e-4,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    # The other samples know nothing of it.
    tame = [t.to(backend.device) for t in tame_alone]
    alone = results(backend.ops.forward, tame, upstream[::2].to(backend.device))
    assert found[1][::2].isfinite().all()
    torch.testing.assert_close(found[1][::2], alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("wild", WILD)
def test_every_operator_survives_nothing_but_wild_values(
    backend: Backend, wild: str, layout: str, generator: torch.Generator
) -> None:
    """All that it is given. What comes out is not asked, but that nothing is touched beside it:
    a call with tame values gives the same bits before and after."""
    given = [t.to(backend.device) for t in arguments(SHAPES[0], torch.float32, layout)]
    calls = operators.calls(backend.ops, Arguments(*given), generator)
    for name, call in calls.items():
        operator = getattr(backend.ops, name)
        before = operator(*call)
        operator(*(torch.full_like(a, WILD[wild]) if isinstance(a, Tensor) else a for a in call))
        after = operator(*call)
        for one, other in zip(tree_leaves(before), tree_leaves(after), strict=True):
            assert same_bits(one, other), name
