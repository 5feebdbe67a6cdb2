"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import compilation

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


def test_operators_are_clean() -> None:
    """Each of them, on each instruction set, in all dtypes and layouts."""
    done = subprocess.run(
        [sys.executable, HERE / "sanitized.py"], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no complaint" in done.stdout


def threads() -> Path:
    """Generic kernels alone: who shares what with whom is the same on all instruction sets."""
    csrc = compilation.CSRC
    library = compilation.Library(
        "threads",
        (HERE / "native" / "threads.cpp", csrc / "cpu" / "isa_generic.cpp"),
        compilation.headers_in(csrc),
        compilation.product_flags(
            *("-O0", "-g1", "-fsanitize=thread", f"-I{csrc}"), without=("-O", "-g")
        ),
        ("-lpthread",),
        program=True,
    )
    return compilation.build(library, compilation.CHECKOUT / "build" / "native")


def test_threads_have_no_races() -> None:
    done = subprocess.run(
        [threads()],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's layout of memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "18 of 18 calls gave the bits of one thread\n"
