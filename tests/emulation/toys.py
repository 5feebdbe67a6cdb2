"""The toy kernels of toys.cu: right ones, and one for each fault that is to be found."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import Emulation

# As in toys.cu.
FAULTS = (
    "missing barrier",
    "missing syncwarp",
    "barrier in a branch",
    "two barriers",
    "return before a barrier",
    "warp returns before a barrier",
    "uninitialised",
    "shuffle in a branch",
    "two shuffles",
    "return before a shuffle",
    "shuffle meets barrier",
    "shuffle from nowhere",
    "part of a warp",
    "misaligned",
    "misaligned, wide",
    "shared overrun",
    "store out of bounds",
    "load out of bounds",
    "shared read out of bounds",
    "order of blocks",
    "deep stack",
)


class Toys(Emulation):
    """Calls toy_<name>; tensors go as pointers. Raises what the launch threw."""

    def __call__(self, name: str, *arguments: Tensor | int | ctypes._SimpleCData) -> None:
        entry = self.library[f"toy_{name}"]
        entry.restype = ctypes.c_char_p
        message = entry(*map(_c_argument, arguments))
        if message not in (None, b"no error"):
            raise RuntimeError(message.decode())

    def fault(self, name: str, grid: int = 2, block: int = 96) -> Tensor:
        out = torch.zeros(grid * block + 1)
        self("fault", grid, block, FAULTS.index(name), out)
        return out[:-1]


def _c_argument(value: Tensor | int | ctypes._SimpleCData) -> ctypes._SimpleCData:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    # A 64-bit word serves narrower parameters too, where both are passed in registers.
    return ctypes.c_int64(value) if isinstance(value, int) else value
