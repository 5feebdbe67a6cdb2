"""Races in emulated kernels: ``with detect(device) as found: ...``, then ``found.conflicts``.

What orders accesses, and what does not, is in ``runtime/races.h``. Shared memory is seen in a
library of the instrumented build alone, global memory in any.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .control import Emulation

# As in runtime/races.h.
SYNCS = ("barrier", "syncwarp", "fence", "wait", "launch", "memset")


@dataclass(frozen=True)
class Sync:
    """A place in a kernel of something that puts accesses in an order."""

    what: str  # one of SYNCS
    kernel: str  # "memset" for one
    file: str  # empty for launches and memsets, which are all of that kernel
    line: int

    def __str__(self) -> str:
        at = f" at {Path(self.file).name}:{self.line}" if self.file else ""
        return f"{self.what} of {self.kernel}{at}"


@dataclass(frozen=True)
class Access:
    """One of two accesses that nothing puts in an order."""

    kernel: str
    launch: int  # counted from the beginning of the search
    block: int
    thread: int
    access: str  # ldg, ldca, ldcs, ldcg, stwb, stcs, atomic; in shared memory read, write
    lines: tuple[str, ...]  # "mlp.cuh:53": where, and from where that was inlined

    def __str__(self) -> str:
        at = " < ".join(self.lines) or "?"
        return (
            f"{self.access} by {self.kernel} (launch {self.launch}), block {self.block}, "
            f"thread {self.thread}, at {at}"
        )


@dataclass(frozen=True)
class Conflict:
    """What was found.

    race            nothing puts the two accesses in an order
    stale L1        another block of the launch wrote what is loaded through L1
    read-only path  __ldg of what is written while the kernel may already run
    uninitialised   nobody wrote what is read of a call's workspace
    overlap         a launch that may overlap follows what is no kernel
    """

    finding: str
    where: str  # "shared memory + 16", "x + 4": bytes
    count: int  # how often, between these places in the sources
    first: Access
    second: Access

    def __str__(self) -> str:
        return f"{self.finding} in {self.where} ({self.count}x):\n  {self.first}\n  {self.second}"


@dataclass
class Detection:
    """What was found inside ``with detect(...)``; complete after it."""

    device: Emulation
    conflicts: list[Conflict] = field(default_factory=list)
    syncs: dict[Sync, int] = field(default_factory=dict)  # all that ran, and how often

    def foreign_launch(self, name: str, writes: Tensor) -> None:
        """As if now a kernel of somebody else were launched that writes a dense tensor."""
        self.device.library.emulation_foreign_launch(
            name.encode(), ctypes.c_void_p(writes.data_ptr()), ctypes.c_int64(_bytes(writes))
        )


@contextlib.contextmanager
def detect(
    device: Emulation,
    names: Mapping[str, Tensor] | None = None,
    without: Iterable[Sync] = (),
) -> Iterator[Detection]:
    """Looks for races in what the device runs inside.

    ``names`` are those of dense tensors in what is found. What ``without`` has still happens there,
    but orders nothing.
    """
    library = device.library
    library.emulation_start_detecting()
    for sync in without:
        library.emulation_remove_sync(
            ctypes.c_int(SYNCS.index(sync.what)),
            sync.kernel.encode(),
            sync.file.encode(),
            ctypes.c_int(sync.line),
        )
    detection = Detection(device)
    try:
        yield detection
    finally:
        library.emulation_stop_detecting.restype = ctypes.c_char_p
        result = json.loads(library.emulation_stop_detecting())
        detection.syncs = {
            Sync(sync["what"], sync["kernel"], sync["file"], sync["line"]): sync["count"]
            for sync in result["syncs"]
        }
        detection.conflicts = _conflicts(result["conflicts"], names or {}, library._name)


def _conflicts(
    found: list[dict[str, Any]], names: Mapping[str, Tensor], library: str
) -> list[Conflict]:
    codes = {conflict[key]["code"] for conflict in found for key in ("first", "second")}
    lines = _lines(library, sorted(codes - {0}))

    def access(record: dict[str, Any]) -> Access:
        code = record.pop("code")
        return Access(**record, lines=lines.get(code, ()))

    return [
        Conflict(
            conflict["finding"],
            _where(conflict, names),
            conflict["count"],
            access(conflict["first"]),
            access(conflict["second"]),
        )
        for conflict in found
    ]


def _where(conflict: dict[str, Any], names: Mapping[str, Tensor]) -> str:
    address = conflict["address"]
    if conflict["memory"] == "shared":
        return f"shared memory + {address}"
    if conflict["workspace"] is not None:
        return f"the workspace + {conflict['workspace']}"
    for name, tensor in names.items():
        if tensor.data_ptr() <= address < tensor.data_ptr() + _bytes(tensor):
            return f"{name} + {address - tensor.data_ptr()}"
    return f"global memory at {address:#x}" if address else "global memory"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _lines(library: str, codes: list[int]) -> dict[int, tuple[str, ...]]:
    """The lines of the calls that return to these places, less those of the stand-in headers."""
    if not codes:
        return {}
    command = ["addr2line", "-a", "-i", "-e", library, *(f"{code - 1:#x}" for code in codes)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = output.split("0x")[1:]  # each begins with its address
    found = {}
    for code, block in zip(codes, blocks, strict=True):
        places = [line.partition(" (")[0] for line in block.splitlines()[1:]]
        ours = [Path(place).name for place in places if "/emulation/include/" not in f"/{place}"]
        found[code] = tuple(ours)
    return found
