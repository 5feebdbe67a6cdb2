"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from emulation import build
from emulation.build import Build
from emulation.toys import FAULTS

pytestmark = pytest.mark.slow

# Without torch, which takes its time to load under AddressSanitizer.
TOYS_ALONE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])

def call(name, *arguments):
    entry = library["toy_" + name]
    entry.restype = ctypes.c_char_p
    return entry(*arguments)

def floats(*values):
    return (ctypes.c_float * len(values))(*values)
"""


def _run_toys_alone(program: str, kind: Build) -> subprocess.CompletedProcess[str]:
    path = build.build_toys(kind)
    return subprocess.run(
        [sys.executable, "-c", TOYS_ALONE + textwrap.dedent(program), str(path)],
        env=build.sanitizer_environment() if kind is Build.SANITIZED else None,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_right_kernels_are_clean_under_sanitizers() -> None:
    done = _run_toys_alone(
        f"""
        n = 1003
        a, b, out = floats(*range(n)), floats(*range(0, 2 * n, 2)), floats(*[0] * n)
        def good():
            for order in range(3):
                library.emulation_order(order, ctypes.c_uint64(order))
                assert call("add", 3, 33, ctypes.c_int64(n), a, b, out, 0) is None
                assert list(out) == list(range(0, 3 * n, 3))
                for shuffles in (0, 1):
                    partials, arrived, total = floats(*[0] * 200), ctypes.c_uint(9), floats(0)
                    message = call("sum", 3, 512, ctypes.c_int64(n), a, partials,
                                   ctypes.byref(arrived), total, shuffles, 0)
                    assert message is None and total[0] == n * (n - 1) / 2, (message, total[0])
        good()
        for fault in ({FAULTS.index("two barriers")}, {FAULTS.index("return before a shuffle")}):
            for _ in range(3):  # leaves fibres in the middle of a kernel
                print(call("fault", 2, 96, fault, out))
            good()
        print("done")
        """,
        Build.SANITIZED,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "divergent barrier" in done.stdout
    assert done.stdout.endswith("done\n")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("store out of bounds", "WRITE of size 4"),
        ("load out of bounds", "READ of size 4"),
        ("shared overrun", "WRITE of size 4"),
        ("shared read out of bounds", "READ of size 4"),
    ],
)
def test_out_of_bounds_is_found_by_sanitizers(fault: str, error: str) -> None:
    program = f"call('fault', 3, 96, {FAULTS.index(fault)}, floats(*[0] * 3 * 96))"
    done = _run_toys_alone(program, Build.SANITIZED)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert error in done.stderr
    assert "toys.cu" in done.stderr


def test_operators_are_clean_under_sanitizers() -> None:
    program = Path(build.__file__).with_name("sanitized.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no complaint" in done.stdout


def test_a_stack_that_overflows_is_stopped() -> None:
    """By the page under it, not by writing into the next stack."""
    program = f"call('fault', 1, 1, {FAULTS.index('deep stack')}, floats(0, 0))"
    assert _run_toys_alone(program, Build.FAST).returncode == -signal.SIGSEGV
