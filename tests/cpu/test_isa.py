"""Which instruction set the CPU kernels run on: the best one, the one wished for when the library
is loaded, the one chosen at run time. That each gives right results is what the backends show."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from support import instruction_sets
from support.backends import Backend, backends
from support.instruction_sets import NUMBERS, using
from support.samples import (
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    same_bits,
    truth,
)

HERE = instruction_sets.named_by_torch()

# ------------------------------------------------------------------------- before the first call

# The library chooses at the first call of an operator, so that each child of one process may.
WISHES = """
import os, sys, torch, cbam_ext
for wish in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["CBAM_CPU_ISA"] = wish
        print(torch.ops.cbam._cpu_isa(), flush=True)
        os._exit(0)
    os.wait()
    print("---", flush=True)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What a fresh library prints, on both streams, when asked for its set under each wish."""
    wishes = ["", "mmx", *NUMBERS]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WISHES, *wishes],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if name != "CBAM_CPU_ISA"},
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return dict(zip(wishes, done.stdout.split("---\n")[:-1], strict=True))


def test_without_a_wish_the_best_one_runs(answers: dict[str, str]) -> None:
    assert answers[""] == f"{NUMBERS[HERE[0]]}\n"


@pytest.mark.parametrize("name", HERE)
def test_a_wish_is_fulfilled(answers: dict[str, str], name: str) -> None:
    assert answers[name] == f"{NUMBERS[name]}\n"


@pytest.mark.parametrize("name", ["mmx", *(name for name in NUMBERS if name not in HERE)])
def test_a_wish_that_cannot_be_fulfilled_is_no_crash(answers: dict[str, str], name: str) -> None:
    warning, number = answers[name].splitlines()
    assert f"CBAM_CPU_ISA={name}" in warning
    assert number == str(NUMBERS[HERE[0]])


# ----------------------------------------------------------------------------------- the backends


def test_every_set_of_this_machine_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """None may go untested where it could be, as torch sees this machine."""
    monkeypatch.delenv("CBAM_TEST_BACKENDS", raising=False)
    found = [backend for backend in backends() if backend.family == "cpu"]
    assert found[0].name == "cpu"
    assert found[0].isa is None
    others = [name for name in HERE if name != instruction_sets.in_use()]
    assert [backend.isa for backend in found[1:]] == others
    assert [backend.name for backend in found[1:]] == [f"cpu-{name}" for name in others]


@pytest.mark.on("cpu")
@pytest.mark.every_isa
def test_a_backend_runs_on_its_own_set(backend: Backend) -> None:
    wish = os.environ.get("CBAM_CPU_ISA")
    assert instruction_sets.in_use() == (backend.isa or (wish if wish in HERE else HERE[0]))


def test_the_set_is_put_back_after_an_error() -> None:
    before = instruction_sets.in_use()
    for name in HERE:
        with contextlib.suppress(ZeroDivisionError), using(name):
            assert instruction_sets.in_use() == name
            raise ZeroDivisionError
        assert instruction_sets.in_use() == before


# ------------------------------------------------------------------------------------ at run time


def test_choosing_tells_what_was_in_use() -> None:
    before = torch.ops.cbam._cpu_isa()
    expected = before
    try:
        for name in [*HERE, *HERE]:
            assert torch.ops.cbam._use_cpu_isa(NUMBERS[name]) == expected
            expected = NUMBERS[name]
            assert torch.ops.cbam._cpu_isa() == expected
    finally:
        torch.ops.cbam._use_cpu_isa(before)


@pytest.mark.parametrize("number", [-1, max(NUMBERS.values()) + 1, 2**40, -(2**63)])
def test_an_unknown_set_is_an_error_and_changes_nothing(number: int) -> None:
    before = torch.ops.cbam._cpu_isa()
    with pytest.raises(RuntimeError, match=rf"_use_cpu_isa: .* no instruction set {number}\b"):
        torch.ops.cbam._use_cpu_isa(number)
    assert torch.ops.cbam._cpu_isa() == before


def test_a_set_that_the_machine_lacks_is_an_error() -> None:
    for name in NUMBERS.keys() - set(HERE):
        with pytest.raises(RuntimeError, match="no instruction set"), using(name):
            pass


def large(generator: torch.Generator) -> tuple[Arguments, Tensor]:
    """A problem with enough sums for their order to show, and a gradient of its output."""
    arguments = draw(Problem((2, 40, 31, 33), 7, 5, biases="12c"), generator)
    return arguments, draw_like(arguments.input, generator)


def everything(arguments: Arguments, grad_output: Tensor) -> list[Tensor]:
    """Output, gates and all gradients, each of a call of an operator of its own."""
    ops = torch.ops.cbam
    gates = ops.gates(*arguments)
    flags = (True, True, True)
    gradients = ops._backward(grad_output, arguments.input, *gates, *arguments[1:], *flags)
    return [ops.forward(*arguments), *gates, *gradients]


def test_the_kernels_are_other_ones(generator: torch.Generator) -> None:
    """Each set adds in another order: were the results the same bits, it would be the same code."""
    problem = large(generator)
    results = []
    for name in HERE:
        with using(name):
            results.append(everything(*problem))
    for i, one in enumerate(results):
        for other in results[:i]:
            assert not all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("there", HERE)
@pytest.mark.parametrize("back", HERE)
def test_forward_and_backward_need_not_run_on_the_same(
    there: str, back: str, layout: str, generator: torch.Generator
) -> None:
    """What forward keeps has the same meaning on every set, and its sizes are the same."""
    problem = Problem((2, 19, 13, 23), 5, 3, layout=layout, biases="12c", values="relu")
    arguments = draw(problem, generator)
    grad_output = draw_like(arguments.input, generator)
    leaves = [t.requires_grad_() for t in arguments if t is not None]
    with using(there):
        output = torch.ops.cbam.forward(*leaves)
    with using(back):
        found = torch.autograd.grad(output, leaves, grad_output)
    assert_close(output.detach(), truth(arguments).output, "output")
    assert_gradients_close(found, arguments, grad_output)


def test_the_choice_holds_in_all_threads() -> None:
    seen = []
    for name in HERE:
        thread = threading.Thread(target=lambda: seen.append(instruction_sets.in_use()))
        with using(name):
            thread.start()
            thread.join()
    assert seen == HERE


@pytest.mark.usefixtures("thread_count")
def test_a_choice_amid_calls_of_other_threads(generator: torch.Generator) -> None:
    """Each call runs on one set from begin to end, whatever is chosen meanwhile."""
    arguments, grad_output = large(generator)
    possible = []
    for name in HERE:
        with using(name):
            possible.append(everything(arguments, grad_output)[0])
    torch.set_num_threads(2)
    stop, wrong, calls = threading.Event(), [], [0, 0, 0]

    def call(place: int) -> None:
        while not stop.is_set():
            output = torch.ops.cbam.forward(*arguments)
            if not any(same_bits(output, one) for one in possible):
                wrong.append(output)
            calls[place] += 1

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
    with using(HERE[0]):
        for thread in threads:
            thread.start()
        while min(calls) < 20 and not wrong:
            for name in HERE:
                torch.ops.cbam._use_cpu_isa(NUMBERS[name])
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
