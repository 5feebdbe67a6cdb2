"""Same input, same bits: over repeats and numbers of threads. Calls from several threads are in
test_processes.py."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from samples import LARGE, Arguments, Problem, draw, draw_like, same_bits
from torch import Tensor

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


def _prepare(
    problem: Problem, backend: Backend, generator: torch.Generator
) -> tuple[Arguments, Tensor]:
    arguments = draw(problem, generator, backend.device)
    return arguments, draw_like(arguments.input, generator)


@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", CASES, ids=str)
def test_repeats(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    call = (backend, *_prepare(problem, backend, generator))
    expected = everything(*call)
    for i in range(2 if backend.emulated else 8):
        assert_same(expected, everything(*call), f"repeat {i}")


@pytest.mark.on("cpu")
@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize("problem", [*CASES, *LARGE], ids=str)
def test_number_of_threads(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    call = (backend, *_prepare(problem, backend, generator))
    torch.set_num_threads(1)
    expected = everything(*call)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(expected, everything(*call), f"{threads} threads")


@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", CASES, ids=str)
def test_deterministic_algorithms_change_nothing(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    """The mode fills fresh memory with NaN, so this also finds elements that nobody wrote."""
    call = (backend, *_prepare(problem, backend, generator))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        expected = everything(*call)
        torch.use_deterministic_algorithms(True)
        found = everything(*call)
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same(expected, found, "under deterministic algorithms")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_sample_does_not_depend_on_its_batch(
    backend: Backend, layout: str, generator: torch.Generator
) -> None:
    """Work may be shared out otherwise in a larger batch; the result is the same to rounding."""
    problem = Problem((6, 19, 23, 9), 5, 2, torch.float64, layout)
    arguments = draw(problem, generator, backend.device)
    together = backend.ops.forward(*arguments)
    for i in range(6):
        alone = backend.ops.forward(arguments.input[i : i + 1], *arguments[1:])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-14)
