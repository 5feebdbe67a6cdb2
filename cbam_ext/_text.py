"""How numbers and names are written for people, the same everywhere."""

from __future__ import annotations

import torch


def count(number: int, thing: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def in_bytes(number: int, sign: str = "") -> str:
    """``1.5 MiB``, in the largest binary unit of which there is one; ``sign`` as in formats."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size:
            return f"{number / size:{sign}.1f} {unit}"
    return f"{number:{sign}} B"


def name_of(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")
