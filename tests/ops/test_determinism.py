"""Same input, same bits: over repeats and numbers of threads. Calls from several threads are in
test_processes.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.backends import Backend
from support.repeats import CASES, assert_same, everything
from support.samples import LARGE, Arguments, Problem, draw, draw_like

pytestmark = pytest.mark.every_isa


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
