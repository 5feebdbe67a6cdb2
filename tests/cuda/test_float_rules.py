"""NaN, subnormal numbers and divisions in the machine code of the CUDA kernels: what no test on a
CPU can see, because there the compiler is another one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cbam_ext.building import decisions

from bench.machine_code.compilation import kernels_of
from bench.machine_code.sass import Kernel
from support.machine_code import missing_tool
from support.packages import CHECKOUT

RULES = Path(__file__).parent / "native" / "float_rules.cu"
# What lets a compiler pass over NaN, subnormal numbers or the order of operations.
LOOSE = re.compile(
    r"fast[-_]math|-Ofast|-ftz[= ]true|-prec-(?:div|sqrt)[= ]false|finite-math|associative-math"
    r"|unsafe-math|no-signed-zeros"
)


def needs_nvcc(test: Callable[..., None]) -> Callable[..., None]:
    missing = missing_tool()
    skip = pytest.mark.skipif(bool(missing), reason=missing or "nothing is missing")
    return pytest.mark.slow(skip(test))


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, Kernel]]:
    """By name and architecture, compiled with the flags of the build."""
    found: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels_of([RULES], ["7.5", "8.0", "9.0"]):
        name = re.search(r"\d+([a-z]+)_kernel", kernel.name)
        assert name is not None
        found.setdefault(name[1], {})[kernel.arch] = kernel
    return found


def operations(kernel: Kernel) -> list[str]:
    return [instruction.operation for instruction in kernel.instructions]


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nan_wins_by_an_instruction(kernels: dict[str, dict[str, Kernel]], arch: str) -> None:
    """From 8.0 on; without .NAN the same instruction drops it."""
    maxima = [name for name in operations(kernels["maximum"][arch]) if name.startswith("FMNMX")]
    assert len(maxima) == 1 and "NAN" in maxima[0].split("."), maxima


@needs_nvcc
def test_nan_wins_by_comparisons_before(kernels: dict[str, dict[str, Kernel]]) -> None:
    names = operations(kernels["maximum"]["sm_75"])
    assert not any(name.startswith("FMNMX") for name in names), names
    assert any(name.startswith("FSETP") for name in names), names


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_arithmetic_is_exact(kernels: dict[str, dict[str, Kernel]], arch: str) -> None:
    """Sums keep subnormal numbers; a quotient is the nearest number, for which it asks first
    whether a product with the reciprocal is enough."""
    sums = [name for name in operations(kernels["sum"][arch]) if name.startswith("FADD")]
    assert len(sums) == 1 and "FTZ" not in sums[0].split("."), sums
    assert any(name.startswith("FCHK") for name in operations(kernels["quotient"][arch]))


def test_no_flag_is_loose() -> None:
    """Of setup.py, the JIT and CMake, and of whoever builds the tests."""
    flags = [*decisions.CXX_FLAGS, *decisions.NVCC_FLAGS]
    assert [flag for flag in flags if LOOSE.search(flag)] == []
    for path in ("CMakeLists.txt", "cmake", "setup.py", "Makefile", "cbam_ext/building"):
        files = [CHECKOUT / path]
        if files[0].is_dir():
            files = [file for file in files[0].rglob("*") if file.suffix in {".py", ".cmake"}]
        for file in files:
            assert LOOSE.search(file.read_text()) is None, file
