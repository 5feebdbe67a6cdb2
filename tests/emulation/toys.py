"""The toy kernels of toys.cu and racing_toys.cu: right ones, and one for each fault that is to be
found."""

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

# As in racing_toys.cu.
STEPS = (
    "read",
    "write",
    "read-byte",
    "write-byte",
    "add-shared",
    "ldg",
    "ldca",
    "ldcg",
    "store",
    "add",
    "barrier",
    "syncwarp",
    "shuffle",
    "fence",
    "wait",
    "trigger",
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

    def follow(
        self, program: str, data: Tensor, grid: int = 2, block: int = 64, dependent: bool = False
    ) -> None:
        """Launches threads that take the steps of a program, which ";" parts.

        "0.33 store 5": thread 33 of block 0 stores to word 5 of ``data``; "0 barrier": all of its
        threads; "barrier": all of the grid. A place in shared memory is a word or a byte.
        """
        steps = torch.tensor([_step(step) for step in program.split(";")], dtype=torch.int32)
        out = torch.empty(grid * block, dtype=torch.int32)
        self("follow", grid, block, dependent, len(steps), steps, data, out)


def _step(text: str) -> list[int]:
    words = text.split()
    block = thread = place = -1
    if words[0] not in STEPS:
        block, _, thread = words.pop(0).partition(".")
    if len(words) == 2:
        place = words[1]
    return [int(block), int(thread or -1), STEPS.index(words[0]), int(place)]


def _c_argument(value: Tensor | int | ctypes._SimpleCData) -> ctypes._SimpleCData:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    # A 64-bit word serves narrower parameters too, where both are passed in registers.
    return ctypes.c_int64(value) if isinstance(value, int) else value
