"""The instruction sets of the CPU kernels, chosen at run time: which there are, and with which in
use a test runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import cbam_ext

# Their numbers in the library, from the least to the most.
NUMBERS = {"generic": 0, "avx2": 1, "avx512": 2}
NAMES = {number: name for name, number in NUMBERS.items()}


def in_use() -> str:
    """What the kernels run on now; outside of using(), what users get."""
    return NAMES[torch.ops.cbam._cpu_isa()]


def accepted() -> list[str]:
    """Those that the library takes on this machine, the best one first."""
    if not cbam_ext.ops.has_kernels("cpu"):
        return []
    found = []
    for name in reversed(NUMBERS):
        with contextlib.suppress(RuntimeError), using(name):
            found.append(name)
    return found


def others() -> list[str]:
    """Those beside the one in use."""
    return [name for name in accepted() if name != in_use()]


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Runs what is inside on this set, in all threads; an error where the machine lacks it."""
    before = torch.ops.cbam._use_cpu_isa(NUMBERS[name])
    try:
        yield
    finally:
        torch.ops.cbam._use_cpu_isa(before)


def named_by_torch() -> list[str]:
    """Those that this machine has, as torch sees it; the best one first."""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability())
    return list(NUMBERS)[NUMBERS[best or "generic"] :: -1]
