"""How long a step takes: by the clock on a CPU, by events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

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

    times_calls = False  # whether `time_calls` says something else than `time`

    def prepare(self, step: Step) -> int:
        """Warm the step up (it compiles, allocates, fills caches); how often a turn repeats it."""
        timer = self._timer(step)
        timer.timeit(3)
        return max(1, int(self.TURN / max(timer.timeit(1).mean, 1e-6)))

    def time(self, step: Step, repeats: int) -> float:
        """Seconds that one step takes, over so many in a row."""
        return float(self._timer(step).timeit(repeats).mean)

    def time_calls(self, step: Step, repeats: int) -> float:
        return self.time(step, repeats)

    def _timer(self, step: Step) -> Timer:
        return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())


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
