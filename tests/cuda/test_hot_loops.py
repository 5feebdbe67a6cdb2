"""bench/machine_code on kernels whose loops are known (native/hot_loops.cu), compiled by nvcc."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cbam_ext.building import decisions

from bench import inspect_cuda
from bench.machine_code.compilation import kernels_of
from bench.machine_code.limits import Inspected, Limits, complaints, inspect
from bench.machine_code.loops import HotLoop
from bench.machine_code.names import read_names
from support.machine_code import missing_tool

TOYS = Path(__file__).parent / "native" / "hot_loops.cu"
LIMITS = Limits(cost=100, mean_cost=50, uncounted=0)

Loops = Callable[[str], list[HotLoop]]


pytestmark = pytest.mark.skipif(bool(missing_tool()), reason=missing_tool() or "nothing is missing")


@pytest.fixture(scope="module")
def toys() -> list[Inspected]:
    found = kernels_of([TOYS], ["9.0"])
    names = read_names(kernel.name for kernel in found)
    return [inspect(kernel, names[kernel.name]) for kernel in found]


@pytest.fixture
def loops(toys: list[Inspected]) -> Loops:
    return {each.name.kernel: each.loops for each in toys}.__getitem__


def test_four_loads_before_their_uses(loops: Loops) -> None:
    (loop,) = loops("four")
    assert (loop.sixteens, loop.in_flight, loop.way) == (4, 4, "LDG")
    assert 8 < loop.instructions < 40  # loads, stores, and what counts the turns


def test_one_load_at_a_time(loops: Loops) -> None:
    (loop,) = loops("one_by_one")
    assert (loop.sixteens, loop.in_flight) == (2, 1)


def test_loads_ahead(loops: Loops) -> None:
    """Unrolled by three, as many are on their way; one by one, a copy waits for each."""
    main, rest = loops("ahead")
    assert (main.sixteens, main.in_flight) == (3, 3)
    assert (rest.sixteens, rest.in_flight) == (1, 1)


def test_loops_inside(loops: Loops) -> None:
    (loop,) = loops("nested")
    assert (loop.sixteens, loop.nested) == (1, 1)


def test_async_copies(loops: Loops) -> None:
    (loop,) = loops("async")
    assert (loop.sixteens, loop.in_flight, loop.way) == (1, 2, "LDGSTS")


def test_bulk_copies(loops: Loops) -> None:
    (loop,) = loops("bulk")
    assert (loop.sixteens, loop.way, loop.nested) == (1, "LDS", 0)


def test_arithmetic_is_counted(loops: Loops) -> None:
    (loop,) = loops("costly")
    assert 400 < loop.cost < 420


def test_complaints(toys: list[Inspected]) -> None:
    wrong = complaints(toys, LIMITS)
    for begin, end in {
        "spilling": "bytes of stack",
        "calling": "has 1 128-bit loads in functions that its loop",
        "narrow": "has no loop with 128-bit loads; 1 are elsewhere",
        "costly": "more than 100",
        "2 main kernels": "calling float32 NCHW W=4, nested float32 NCHW W=4",
    }.items():
        (found,) = [line for line in wrong if line.startswith(begin)]
        assert end in found
    assert len(wrong) == 5


def test_chosen_architectures_of_a_compiled_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = tmp_path / "toys.fatbin"
    archs = decisions.gencode_flags(("8.0", "9.0"))
    toolkit, _ = decisions.find_toolkit()
    command = [toolkit.nvcc, "-std=c++17", *archs, "-fatbin", TOYS, "-o", compiled]
    subprocess.run(command, check=True)
    assert {kernel.arch for kernel in kernels_of([compiled], ())} == {"sm_80", "sm_90"}
    assert {kernel.arch for kernel in kernels_of([compiled], (), ["9.0"])} == {"sm_90"}
    assert inspect_cuda.main([str(compiled), "--archs", "7.5"]) == 2
    assert f"{compiled} has no kernels for 7.5" in capsys.readouterr().err


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_cuda.main([str(TOYS), "--archs", "9.0", "--check"]) == 1
    out, err = capsys.readouterr()
    assert "four" in out
    assert "9.0: 10 hot loops" in out
    assert "inspect_cuda: spilling float32 NCHW W=4 (9.0) uses" in err
