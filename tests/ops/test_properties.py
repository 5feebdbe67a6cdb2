"""Shapes and strides that Hypothesis makes up, and symmetries of the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.backends import SEED, Backend
from support.samples import (
    DTYPES,
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    truth,
)

T = TypeVar("T", bound=Callable[..., None])


def rules(backend: Backend) -> Callable[[T], T]:
    """How Hypothesis goes about it."""
    # Without a database: a failure is repeated by the run's seed, like all others.
    chosen = settings(
        max_examples=12 if backend.emulated else 60,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda check: seed(SEED)(chosen(check))


@st.composite
def problems(pick: Any, smallest_batch: int = 1) -> Problem:
    values = pick(st.sampled_from(["normal", "relu", "quantised", "constant", "equal", "zeros"]))
    return Problem(
        shape=(
            pick(st.integers(smallest_batch, 4)),
            pick(st.integers(1, 40)),
            pick(st.integers(1, 20)),
            pick(st.integers(1, 20)),
        ),
        kernel=pick(st.sampled_from([1, 3, 5, 7, 9, 11])),
        hidden=pick(st.integers(1, 4)),
        dtype=pick(st.sampled_from(DTYPES)),
        layout=pick(st.sampled_from(["nchw", "nhwc"])),
        parameters=pick(st.sampled_from(["input", "accumulator", "mixed"])),
        biases=pick(st.sampled_from(["", "1", "2", "c", "12", "12c"])),
        values=values,
    )


@st.composite
def views(pick: Any) -> tuple[tuple[int, ...], list[int], list[int], int]:
    """How a tensor lies in memory: order of dimensions, steps, padding behind each, offset."""
    order = tuple(pick(st.permutations(range(4))))
    steps = pick(st.lists(st.integers(1, 2), min_size=4, max_size=4))
    paddings = pick(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    return order, steps, paddings, pick(st.integers(0, 5))


def lay_out(x: Tensor, view: tuple[tuple[int, ...], list[int], list[int], int]) -> Tensor:
    """The same numbers with other strides; whatever lies between them is NaN."""
    order, steps, paddings, offset = view
    strides, step = [0] * 4, 1
    for dim in order:  # innermost first
        strides[dim] = step * steps[dim]
        step = strides[dim] * (x.shape[dim] + paddings[dim])
    memory = x.new_full((max(step, 1) + offset,), torch.nan)
    return memory.as_strided(x.shape, strides, offset).copy_(x)


@pytest.mark.every_isa
def test_values_and_gradients_for_any_strides(backend: Backend) -> None:
    @rules(backend)
    @given(problem=problems(), view=views(), grad_view=views(), number=st.integers(0, 2**31))
    def check(problem: Problem, view: Any, grad_view: Any, number: int) -> None:
        check_values_and_gradients(backend, problem, view, grad_view, number)

    check()


def check_values_and_gradients(
    backend: Backend, problem: Problem, view: Any, grad_view: Any, number: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    arguments = draw(problem, generator, backend.device)
    arguments = arguments._replace(input=lay_out(arguments.input, view))
    grad_output = lay_out(draw_like(arguments.input, generator), grad_view)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    present = [t for t in leaves if t is not None]

    output = backend.ops.forward(*leaves)
    found = iter(torch.autograd.grad(output, present, grad_output))
    gradients = [None if t is None else next(found) for t in leaves]

    assert gradients[0] is not None
    assert_layout(output, arguments.input)
    assert_layout(gradients[0], arguments.input)
    assert_close(output.detach(), truth(arguments).output, "output")
    assert_gradients_close(gradients, arguments, grad_output)


def assert_layout(result: Tensor, x: Tensor) -> None:
    """Contiguous and channels_last inputs keep their layout, the others give NCHW-contiguous."""
    if x.is_contiguous():
        assert result.is_contiguous()
    elif x.is_contiguous(memory_format=torch.channels_last):
        assert result.is_contiguous(memory_format=torch.channels_last)
    else:
        assert result.is_contiguous()


def test_fake_strides_are_the_real_ones(backend: Backend) -> None:
    @rules(backend)
    @given(problem=problems(smallest_batch=0), view=views(), number=st.integers(0, 2**31))
    def check(problem: Problem, view: Any, number: int) -> None:
        arguments = draw(problem, torch.Generator().manual_seed(number), backend.device)
        arguments = arguments._replace(input=lay_out(arguments.input, view))
        with FakeTensorMode() as mode:
            fakes = [None if t is None else mode.from_tensor(t) for t in arguments]
            fake = [backend.ops.forward(*fakes), *backend.ops.gates(*fakes)]
        real = [backend.ops.forward(*arguments), *backend.ops.gates(*arguments)]
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)

    check()


# --------------------------------------------------------------------------------- symmetries


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_channels_may_change_places(
    backend: Backend, layout: str, generator: torch.Generator
) -> None:
    problem = Problem((2, 23, 9, 8), 3, 3, torch.float64, layout, biases="12c")
    x, w1, b1, w2, b2, conv, conv_bias = draw(problem, generator, backend.device)
    assert b2 is not None
    order = torch.randperm(23, generator=generator)
    plain = backend.ops.forward(x, w1, b1, w2, b2, conv, conv_bias)
    moved = backend.ops.forward(
        x[:, order], w1[:, order], b1, w2[order], b2[order], conv, conv_bias
    )
    torch.testing.assert_close(moved, plain[:, order])


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)], ids=str)
def test_maps_may_be_flipped(
    backend: Backend, dims: tuple[int, ...], layout: str, generator: torch.Generator
) -> None:
    problem = Problem((2, 5, 13, 10), 7, 2, torch.float64, layout)
    arguments = draw(problem, generator, backend.device)
    flipped = arguments._replace(
        input=arguments.input.flip(dims), conv_weight=arguments.conv_weight.flip(dims)
    )
    plain = backend.ops.forward(*arguments)
    torch.testing.assert_close(backend.ops.forward(*flipped), plain.flip(dims))


@pytest.mark.every_isa
def test_maps_may_be_transposed(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(Problem((2, 5, 13, 10), 5, 2, torch.float64), generator, backend.device)
    turned = Arguments(
        arguments.input.mT, *arguments[1:5], arguments.conv_weight.mT, arguments.conv_bias
    )
    plain = backend.ops.forward(*arguments)
    torch.testing.assert_close(backend.ops.forward(*turned), plain.mT)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_kernel_padded_with_zeros_is_the_same_kernel(
    backend: Backend, layout: str, generator: torch.Generator
) -> None:
    problem = Problem((2, 4, 9, 11), 3, 2, torch.float64, layout)
    arguments = draw(problem, generator, backend.device)
    plain = backend.ops.forward(*arguments)
    for margin in (1, 2, 3, 6):
        wide = torch.nn.functional.pad(arguments.conv_weight, (margin,) * 4)
        torch.testing.assert_close(
            backend.ops.forward(*arguments._replace(conv_weight=wide)), plain
        )


@pytest.mark.every_isa
def test_without_convolution_the_output_is_half_the_refined_input(
    backend: Backend, generator: torch.Generator
) -> None:
    arguments = draw(Problem((2, 9, 6, 7), 3, 2, torch.float64), generator, backend.device)
    silent = arguments._replace(conv_weight=torch.zeros_like(arguments.conv_weight))
    channel_gate, spatial_gate = backend.ops.gates(*silent)
    assert (spatial_gate == 0.5).all()
    torch.testing.assert_close(backend.ops.forward(*silent), 0.5 * channel_gate * arguments.input)
