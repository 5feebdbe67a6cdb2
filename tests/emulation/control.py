"""Settings and counters of an emulated library, by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from . import build

ORDERS = ("forward", "reverse", "random")


@dataclass(frozen=True)
class Launch:
    """One launch or memset. What the intrinsics moved is in bytes, under their names."""

    kernel: str  # "memset" for one
    grid: int
    block: int
    shared_bytes: int
    dependent: bool  # carried the attribute of programmatic dependent launch
    memset_bytes: int
    ldg: int
    ldca: int
    ldcs: int
    ldcg: int
    stwb: int
    stcs: int
    wide_loads: int  # accesses of 16 bytes
    wide_stores: int
    atomics: int
    rounds: int  # of loads, the most of any thread; 0 but in the counted build
    memory_read: int  # by the model of L2; 0 without one
    memory_written: int

    @property
    def loaded(self) -> int:
        return self.ldg + self.ldca + self.ldcs + self.ldcg

    @property
    def stored(self) -> int:
        return self.stwb + self.stcs


@dataclass
class Recording:
    """What ran inside ``with Emulation.record()``; complete after it."""

    launches: list[Launch] = field(default_factory=list)  # kernels and memsets in their order
    memory_read: int = 0  # bytes, by the model of L2
    memory_written: int = 0  # the last flush included
    watched: list[tuple[int, int]] = field(default_factory=list)  # bytes loaded, stored

    @property
    def kernels(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel != "memset"]

    @property
    def memsets(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel == "memset"]

    @property
    def loaded(self) -> int:
        return sum(launch.loaded for launch in self.launches)

    @property
    def stored(self) -> int:
        return sum(launch.stored for launch in self.launches)


class Emulation:
    """One library of emulated kernels: its device, its orders, its counters."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_stop_recording.restype = ctypes.c_char_p

    def configure(
        self,
        multiprocessors: int = 132,
        l2_bytes: int = 50 << 20,
        shared_bytes: int = 227 << 10,
        dependent_launch: bool = True,
        fill: int = 0xFF,
    ) -> None:
        """The properties of the device; without arguments those of an H100.

        fill: what every byte of workspace is, so that reading it gives NaN. Negative: none is
        touched; what the system hands out for a large one is zeros.
        """
        self.library.emulation_configure(
            ctypes.c_int(multiprocessors),
            ctypes.c_int64(l2_bytes),
            ctypes.c_int64(shared_bytes),
            ctypes.c_int(dependent_launch),
            ctypes.c_int(fill),
        )

    def set_order(self, order: str = "forward", seed: int = 0) -> None:
        """In which order blocks, warps and lanes run: "forward", "reverse" or "random"."""
        self.library.emulation_order(ctypes.c_int(ORDERS.index(order)), ctypes.c_uint64(seed))

    @contextlib.contextmanager
    def end_parts(self, parts: int) -> Iterator[None]:
        """Inside, launches run the first and the last of so many parts of their blocks only.

        With the size of the batch this runs its first and last sample, in a tensor that is too big
        to run. (Both ends, for some launches go through a batch from its end.) Launches of fewer
        blocks, as those that sum over the batch, run as a whole.
        """
        self.library.emulation_end_parts(ctypes.c_uint64(parts))
        try:
            yield
        finally:
            self.library.emulation_end_parts(ctypes.c_uint64(1))

    @contextlib.contextmanager
    def failing_call(self, after: int = 0) -> Iterator[None]:
        """Inside, a launch or memset of this thread fails: the one after so many others."""
        self.library.emulation_fail_call_after(ctypes.c_int(after))
        try:
            yield
        finally:
            self.library.emulation_fail_call_after(ctypes.c_int(-1))

    @property
    def scopes(self) -> int:
        """Device guards of this thread that are alive."""
        return self.library.emulation_scopes()

    @property
    def left_error(self) -> int:
        """What cudaGetLastError would tell whoever asks next; 0 for nothing."""
        return self.library.emulation_left_error()

    @contextlib.contextmanager
    def order(self, order: str, seed: int = 0) -> Iterator[None]:
        """The order inside the block; plain forward after it."""
        self.set_order(order, seed)
        try:
            yield
        finally:
            self.set_order()

    @contextlib.contextmanager
    def record(self, l2_bytes: int = 0, watch: Sequence[Tensor] = ()) -> Iterator[Recording]:
        """Counts what runs inside; with an L2 of that size also what reaches memory.

        Accesses to the dense tensors of ``watch`` are also counted for each of them. Under the
        model of L2 blocks run in plain order, see ``runtime/l2.h``.
        """
        if not self.library.emulation_start_recording(ctypes.c_int64(l2_bytes)):
            raise ValueError(f"the model of L2 cannot have {l2_bytes} bytes")
        for tensor in watch:
            self.library.emulation_watch(
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_int64(tensor.numel() * tensor.element_size()),
            )
        recording = Recording()
        try:
            yield recording
        finally:
            result = json.loads(self.library.emulation_stop_recording())
            recording.launches = [Launch(**launch) for launch in result.pop("launches")]
            recording.watched = [(loaded, stored) for loaded, stored in result["watched"]]
            recording.memory_read = result["memory_read"]
            recording.memory_written = result["memory_written"]


@functools.cache
def operators(kind: build.Build | None = None) -> Emulation:
    """The library that holds ``torch.ops.cbam_emulated``, or what is of that kind."""
    build.load(kind)
    return Emulation(build.loaded_path() if kind is None else build.build(kind))
