"""Random problems, 200 per backend: values and all gradients against the float64 reference."""

from __future__ import annotations

import random

import pytest
import torch

from support.backends import SEED, Backend
from support.samples import (
    DTYPES,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    truth,
)

pytestmark = pytest.mark.every_isa

COUNT = 200
LARGEST_MAP = 2500  # pixels; the sample list has larger ones
LARGEST_EMULATED_MAP = 400


def random_problem(index: int, largest_map: int) -> Problem:
    choose = random.Random(SEED * 1000 + index)

    def up_to(largest: int) -> int:
        """Small numbers as often as large ones."""
        return choose.randint(1, choose.choice((2, 9, largest)))

    channels = up_to(130)
    height = up_to(90)
    width = min(up_to(90), max(1, largest_map // height))
    # Exact ties in half of the problems.
    values = choose.choice(("normal",) * 5 + ("relu", "quantised", "constant", "equal", "zeros"))
    return Problem(
        shape=(choose.randint(1, 3), channels, height, width),
        kernel=choose.choice((1, 3, 5, 7, 9)),
        hidden=choose.randint(1, 9),
        dtype=DTYPES[index % 4],
        layout=choose.choice(("nchw", "nhwc")),
        parameters=choose.choice(("input", "accumulator", "mixed")),
        biases="".join(bias for bias in "12c" if choose.random() < 0.5),
        values=values,
    )


@pytest.mark.emulate(one_in=5)
@pytest.mark.parametrize("index", range(COUNT))
def test_random_problem(backend: Backend, index: int, generator: torch.Generator) -> None:
    problem = random_problem(index, LARGEST_EMULATED_MAP if backend.emulated else LARGEST_MAP)
    print(problem)  # pytest shows it when the test fails
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    present = [t for t in leaves if t is not None]

    output = backend.ops.forward(*leaves)
    found = iter(torch.autograd.grad(output, present, grad_output))

    assert output.dtype == problem.dtype
    assert output.is_contiguous(memory_format=problem.memory_format)
    assert_close(output.detach(), truth(arguments).output, "output")
    gradients = [None if t is None else next(found) for t in leaves]
    assert_gradients_close(gradients, arguments, grad_output)
