"""The core tests once more on each instruction set that this CPU has and the kernels know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
NUMBERS = {"generic": 0, "avx2": 1, "avx512": 2}
# Where vector bodies, tails, tiles, conversions and ties may differ by instruction set. The random
# problems compare values and all gradients; the named shapes span several tiles.
CORE = "random_problem or ties or equal_logits or nan_anywhere or misaligned or 70x90 or 128x65"
FILES = ("test_random.py", "test_values.py", "test_gradients.py")


def best() -> int:
    """What the machine has, asked of torch rather than of the library under test."""
    return {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 0)


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"CBAM_CPU_ISA": isa, "CBAM_TEST_BACKENDS": "cpu"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


PRINT = "import torch, cbam_ext; print(torch.ops.cbam._cpu_isa())"


@pytest.mark.parametrize("isa", NUMBERS)
def test_core_on_each_instruction_set(isa: str) -> None:
    if NUMBERS[isa] > best():
        pytest.skip(f"this CPU has no {isa}")
    assert run(isa, "-c", PRINT).stdout.strip() == str(NUMBERS[isa])
    if NUMBERS[isa] == torch.ops.cbam._cpu_isa():
        return  # that is what the suite itself has just run on
    arguments = ("-q", "-x", "-p", "no:cacheprovider", "-k", f"cpu and ({CORE})")
    done = run(isa, "-m", "pytest", *arguments, *(str(TESTS / name) for name in FILES))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_without_a_wish_the_best_one_runs() -> None:
    assert run("", "-c", PRINT).stdout.strip() == str(best())


def test_an_unknown_wish_is_no_crash() -> None:
    done = run("mmx", "-c", PRINT)
    assert done.returncode == 0
    assert done.stdout.strip() == str(best())
    assert "CBAM_CPU_ISA=mmx" in done.stderr
