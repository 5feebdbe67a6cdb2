"""How long a step takes, by the clock on a CPU and by events on a GPU, and what autograd keeps."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Step = Callable[[], None]


def settle_allocator() -> None:
    """Brings the C library's allocator to where it is in a program that has run for a while.

    glibc returns freed memory to the system above a threshold that grows with the largest block
    that was ever freed, up to 32 MB; below it, a program would be timed at touching fresh pages in
    every step, more or less of them after this problem or that.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class Stopwatch:
    """Times on a CPU. Turns are short, so that all modules of a round meet the same machine."""

    TURN = 0.005  # seconds
    # After the turn of another module, two steps that do not count fill the caches again. Steps
    # longer than this many seconds do so in their first part.
    LONG = 0.1

    times_calls = False  # whether `time_calls` says something else than `time`

    def __init__(self) -> None:
        self._long: set[Step] = set()

    def prepare(self, step: Step) -> int:
        """Warm the step up (it compiles, allocates, fills caches); how often a turn repeats it."""
        # Twice, because the first call may compile.
        if self._clock(step, 1) > self.LONG and self._clock(step, 1) > self.LONG:
            self._long.add(step)
            return 1
        self._clock(step, 4)
        return max(1, int(self.TURN / max(self.time(step, 1), 1e-6)))

    def time(self, step: Step, repeats: int) -> float:
        """Seconds that one step takes, over so many in a row."""
        if step not in self._long:
            self._clock(step, 2)
        return self._clock(step, repeats)

    def time_calls(self, step: Step, repeats: int) -> float:
        """The same for whole calls, with the time to launch them."""
        return self.time(step, repeats)

    def _clock(self, step: Step, repeats: int) -> float:
        collects = gc.isenabled()
        gc.disable()
        try:
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            return (time.perf_counter() - begin) / repeats
        finally:
            if collects:
                gc.enable()


class CudaStopwatch(Stopwatch):
    """Times on a GPU, between two events.

    For the device's own time the steps of a turn are queued while the device sleeps, so that it
    never waits for the program that launches them. Whole calls are timed without that.
    """

    times_calls = True
    TURN = 0.005  # seconds of the device's work
    # Launches that wait fill a queue of the driver (1024 on today's GPUs), and a full one blocks.
    MOST_REPEATS = 12
    CYCLES = 2.0e9  # a second of the sleep kernel, by the fastest clock of today's GPUs

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._launching: dict[Step, float] = {}

    def prepare(self, step: Step) -> int:
        with torch.cuda.device(self.device):
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(8):  # also brings the clocks up
                step()
            launched = time.perf_counter()
            torch.cuda.synchronize()
            ended = time.perf_counter()
        self._launching[step] = (launched - begin) / 8
        return min(self.MOST_REPEATS, max(2, int(8 * self.TURN / (ended - begin))))

    def time(self, step: Step, repeats: int) -> float:
        sleep = 1.5 * repeats * self._launching[step] + 1e-4
        for _ in range(4):
            seconds, waited = self._between_events(step, repeats, sleep)
            if not waited:
                break
            sleep *= 2  # the device was ready before everything stood in its queue
        return seconds

    def time_calls(self, step: Step, repeats: int) -> float:
        return self._between_events(step, repeats, 0)[0]

    def _between_events(self, step: Step, repeats: int, sleep: float) -> tuple[float, bool]:
        """Seconds for one step, and whether the device had begun before all were launched."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            if sleep:
                torch.cuda._sleep(int(sleep * self.CYCLES))
            begin.record()
            for _ in range(repeats):
                step()
            began = begin.query()
            end.record()
            torch.cuda.synchronize()
        return 1e-3 * begin.elapsed_time(end) / repeats, began


def stopwatch(device: torch.device) -> Stopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else Stopwatch()


def median_ratios(turns: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """Times of each name over those of ``base``: the median of the ratios within each turn.

    A machine that is slow for some seconds is so for everything in a turn.
    """
    return {
        name: statistics.median(
            value / other for value, other in zip(values, turns[base], strict=True)
        )
        for name, values in turns.items()
    }


class SavedForBackward(saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward while this context is open.

    A storage counts once and whole, those of ``without`` do not count. Keep the results of what
    runs inside alive until ``bytes`` has been read: memory that is free again may come twice.
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        self._without = {tensor.untyped_storage().data_ptr() for tensor in without}
        self._kept: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedForBackward:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return sum(self._kept.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._without:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive


def device_name(device: torch.device) -> str:
    """The processor or GPU, for people who read measurements."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()
