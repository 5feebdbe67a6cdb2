"""Calls leave nothing behind: counted over more than 10,000 of them, of every kind.

Run as a program, this file makes the calls named on the command line and prints what they left.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cbam_ext

from support.leaks import calls_of_the_operators

Figures = dict[str, int]

PACKAGE = Path(cbam_ext.__file__).parent.parent
TESTS = Path(__file__).resolve().parents[1]
LIBC = ctypes.CDLL(None)
PAGE = mmap.PAGESIZE
# torch.func leaves reference cycles in each of its own calls as well.
CYCLES = {"double backward", "torch.func.grad", "torch.vmap"}


# -------------------------------------------------------------------------------------- the calls


def calls_that_leak() -> dict[str, tuple[int, Callable[[], object]]]:
    """By what has to show it."""
    kept: list[Any] = []
    x = torch.randn(2, 6, 5, 4)
    module = cbam_ext.CBAM(6)

    def cycle() -> None:
        loop: list[object] = [module(x)]
        loop.append(loop)

    def pages() -> None:
        kept.append(mmap.mmap(-1, PAGE))
        kept[-1].write(b"1")

    def with_call(leak: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            module(x)
            leak()

        return call

    return {
        "bytes": (1000, with_call(lambda: LIBC.malloc(1))),
        "blocks": (1000, with_call(lambda: kept.append(bytes(64)))),
        "objects": (1000, with_call(lambda: kept.append([]))),
        "tensors": (1000, lambda: kept.append(module(x))),
        "garbage": (1000, cycle),
        "resident": (1000, with_call(pages)),
    }


# ------------------------------------------------------------------------------------ the counting


class _Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def count() -> Figures:
    """What there is at present.

    Resident memory alone would not do: the heap has room that was free before, and takes a leak of
    a megabyte without growing. So what is in use is counted, which comes out the same to a few
    blocks; resident memory shows what is held elsewhere.
    """
    garbage = gc.collect()
    info = LIBC.mallinfo2()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(thing), Tensor) for thing in objects)
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "bytes": info.uordblks + info.hblkhd,  # of malloc; objects of Python up to 512 are not
        "blocks": sys.getallocatedblocks(),  # but these
        "objects": len(objects),
        "tensors": tensors,
        "garbage": garbage,
        "resident": resident * PAGE,
    }


def growth(times: int, call: Callable[[], object]) -> Figures:
    for _ in range(times // 2):
        call()
    before = count()
    for _ in range(times):
        call()
    after = count()
    return {name: after[name] - before[name] for name in after} | {"garbage": after["garbage"]}


def leaks(figures: Figures, times: int) -> set[str]:
    """The figures that grew by more than the counting itself and what fills up some cache.

    The least that a leak in every call adds is a block, of which malloc's smallest takes 32 bytes.
    A thousand calls show that with room to spare, and the transforms, which take too long for so
    many, a leak of some blocks or of one tensor.
    """
    limits = {
        "bytes": max(16 * times, 16_000),
        "blocks": max(times // 2, 800),
        "objects": times // 10,
        "tensors": 0,
        "garbage": times // 10,
        "resident": 512 * 1024,
    }
    return {name for name, limit in limits.items() if figures.get(name, 0) > limit}


def main(kind: str) -> None:
    torch.set_num_threads(1)
    LIBC.mallinfo2.restype = _Mallinfo
    calls = {"operators": calls_of_the_operators, "leaks": calls_that_leak}[kind]()
    gc.collect()
    gc.freeze()  # what was there before is not looked at, which would take most of the time
    result = {}
    for name, (times, call) in calls.items():
        (gc.enable if name in CYCLES else gc.disable)()
        result[name] = times, growth(times, call)
        if name in CYCLES:
            del result[name][1]["garbage"]
    print(json.dumps(result))


# -------------------------------------------------------------------------------------- the tests


def measured(kind: str) -> dict[str, tuple[int, Figures]]:
    """What main() prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, kind],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(LIBC, "mallinfo2"), reason="counts with a function of glibc 2.33"
    ),
]


def test_calls_leave_nothing_behind() -> None:
    found = measured("operators")
    assert sum(times for times, _ in found.values()) > 10_000
    left = [
        f"{name}, {times} times: {figures}"
        for name, (times, figures) in found.items()
        if leaks(figures, times)
    ]
    assert not left, "\n".join(left)


def test_leaks_are_found() -> None:
    for name, (times, figures) in measured("leaks").items():
        assert name in leaks(figures, times), f"{name}: {figures}"


if __name__ == "__main__":
    main(*sys.argv[1:])
