"""Times of several modules on one problem, taken in turns."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from cbam_ext.cost.timing import SavedForBackward, Stopwatch, median_ratios, stopwatch

from .traffic import share

# Stages of ResNets and of smp's decoders.
SHAPES = (
    (8, 64, 56, 56),
    (8, 256, 28, 28),
    (4, 64, 112, 112),
    (8, 512, 7, 7),
    (2, 16, 256, 256),
    (8, 64, 128, 128),
    (1, 128, 64, 64),
)
# A GPU's cache holds most of those. These are several times larger than any.
LARGE_SHAPES = (
    (64, 64, 112, 112),
    (64, 256, 56, 56),
    (16, 16, 512, 512),
)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")
# What the caches of a GPU hold of a step's input when it begins: nothing, or all that they can.
CACHES = ("cold", "warm")


def default_shapes(device: torch.device) -> list[tuple[int, ...]]:
    """The shapes that are measured unless others are asked for."""
    return [*SHAPES, *(LARGE_SHAPES if device.type == "cuda" else ())]


@dataclass
class Row:
    """One problem: milliseconds by module, how many times slower than ours it is, bytes kept.

    On a CPU, whose caches are always warm, each problem has a row for each direction; on a GPU two.

    All are medians over the turns. That of the ratios is taken over the ratio within each turn: a
    machine that is slow for some seconds is so for every module of a turn. On a GPU
    ``milliseconds`` is the time that the device takes; ``call_milliseconds`` is what a program
    waits for that does nothing else, with the time to launch where that is longer.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: str
    direction: str
    cache: str = "warm"
    milliseconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    call_milliseconds: dict[str, float] = field(default_factory=dict)
    call_ratios: dict[str, float] = field(default_factory=dict)
    saved_over_input: dict[str, float] = field(default_factory=dict)
    input_bytes: int = 0

    def ratio(self, name: str) -> float | None:
        """How many times faster ours is than ``name``."""
        return self.ratios.get(name)

    def call_ratio(self, name: str) -> float | None:
        """The same for whole calls."""
        return self.call_ratios.get(name)

    def copies(self) -> float:
        """Our time in copies of the input."""
        return 1 / self.ratios["copy"]

    def bandwidth_share(self, bandwidth: float, passes: dict[str, int]) -> float:
        """The share of ``bandwidth`` (bytes a second) that so many passes in our time are."""
        seconds = 1e-3 * self.milliseconds["ours"]
        return share(passes[self.direction], self.input_bytes, seconds, bandwidth)

    def as_dict(self) -> dict:
        return asdict(self)

    def key(self) -> tuple:
        """What is measured: rows with equal keys are of one problem."""
        return self.shape, self.dtype, self.layout, self.direction, self.cache

    def complete(self, other: Row) -> None:
        """Takes from another row of the same problem what this one does not have."""
        for name in FIGURES:
            setattr(self, name, {**getattr(other, name), **getattr(self, name)})


# The fields of a Row that hold a number for each module.
FIGURES = ("milliseconds", "ratios", "call_milliseconds", "call_ratios", "saved_over_input")


def measure_problem(
    shape: tuple[int, ...],
    dtype: str,
    layout: str,
    modules: dict[str, Callable[[int], torch.nn.Module]],
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Both directions of one problem, on a GPU with caches cold and warm.

    ``modules`` are names and what builds them for a number of channels, "ours" among them. They
    run in turns, ``rounds`` times; every turn lasts some milliseconds, and the median over the
    turns counts. A module that fails, other than ours, is left out of the rows, and stderr says so.

    Cold is made by rotation: inputs, upstream gradients and results each go through more memory
    than twice the L2 cache. Warm are steps that use the same memory again and again.
    """
    caches = {"warm": 1}
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        caches = {"cold": buffers_beyond(cache_bytes, _bytes(shape, DTYPES[dtype])), **caches}
    first = torch.randn(shape, device=device).to(DTYPES[dtype])
    first = first.contiguous(memory_format=LAYOUTS[layout])
    built = {}
    for name, build in modules.items():
        with _left_out_if_it_fails(name):
            built[name] = build(shape[1]).to(device, DTYPES[dtype])
    watch = stopwatch(device)
    rows = []
    for cache, count in caches.items():
        inputs = [first, *(first.clone() for _ in range(count - 1))]
        for direction in DIRECTIONS:
            row = Row(shape, dtype, layout, direction, cache, input_bytes=first.nbytes)
            steps = _steps(direction, built, inputs)
            # Whole calls are launches as much as memory: once is enough.
            times, calls = _interleaved(steps, rounds, watch, calls=cache == next(iter(caches)))
            row.milliseconds, row.ratios = _medians(times), median_ratios(times, "ours")
            row.call_milliseconds, row.call_ratios = _medians(calls), median_ratios(calls, "ours")
            if direction != "forward":
                row.saved_over_input = {
                    name: _saved_bytes(built[name], first) / first.nbytes
                    for name in times
                    if name not in ("copy", "compile", "autotuned")
                }
            rows.append(row)
    return rows


def buffers_beyond(cache_bytes: int, buffer_bytes: int) -> int:
    """How many buffers to rotate through so that a cache has forgotten each when it comes again."""
    return 2 + 2 * cache_bytes // buffer_bytes


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a tensor several times the size of L2."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    source = torch.empty(max(2**29, 8 * cache), dtype=torch.uint8, device=device)
    copies = {"copy": _copy([source])}
    times, _ = _interleaved(copies, 9, stopwatch(device))
    return 2 * source.nbytes / (1e-3 * _medians(times)["copy"])


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


# --- steps: what is timed -------------------------------------------------------------------------


def _steps(
    direction: str, modules: dict[str, torch.nn.Module], inputs: list[Tensor]
) -> dict[str, Callable[[], None]]:
    """A step of each module, and one that copies."""
    steps = {}
    gradients = [] if direction == "forward" else [torch.randn_like(x) for x in inputs]
    for name, module in modules.items():
        if direction == "forward":
            steps[name] = _forward(module, inputs)
        else:
            steps[name] = _forward_backward(module, inputs, gradients)
    steps["copy"] = _copy(inputs)
    return steps


@contextlib.contextmanager
def _left_out_if_it_fails(name: str) -> Iterator[None]:
    """For what is of others: a compiler that is missing costs a column and not the table."""
    try:
        yield
    except Exception as error:
        if name in ("ours", "copy"):
            raise
        first = str(error).strip().partition("\n")[0]
        print(f"leaving out {name}: {type(error).__name__}: {first}", file=sys.stderr)


class _Kept:
    """Keeps the last results alive, so that the allocator gives the next one other memory.

    On a CPU there is one input, and nothing is kept.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self._results: list[Tensor | None] = [None] * (len(inputs) - 1)
        self._next = 0

    def keep(self, result: Tensor | None) -> None:
        if self._results:
            self._results[self._next] = result
            self._next = (self._next + 1) % len(self._results)


def _forward(module: torch.nn.Module, inputs: list[Tensor]) -> Callable[[], None]:
    turn, outputs = cycle(inputs), _Kept(inputs)

    @torch.no_grad()
    def step() -> None:
        outputs.keep(module(next(turn)))

    return step


def _forward_backward(
    module: torch.nn.Module, inputs: list[Tensor], gradients: list[Tensor]
) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    turn, outputs, found = cycle(zip(leaves, gradients, strict=True)), _Kept(inputs), _Kept(inputs)

    def step() -> None:
        x, gradient = next(turn)
        output = module(x)
        output.backward(gradient)
        outputs.keep(output.detach())
        found.keep(x.grad)
        x.grad = None

    return step


def _copy(inputs: list[Tensor]) -> Callable[[], None]:
    targets = [torch.empty_like(x) for x in inputs]
    turn = cycle(zip(targets, inputs, strict=True))

    def step() -> None:
        target, source = next(turn)
        target.copy_(source)

    return step


def _interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, watch: Stopwatch, *, calls: bool = False
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each step in every turn, and, where they differ, of whole calls if asked for."""
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        with _left_out_if_it_fails(name):
            repeats[name] = watch.prepare(step)
    calls = calls and watch.times_calls
    times: dict[str, list[float]] = {name: [] for name in repeats}
    whole: dict[str, list[float]] = {name: [] for name in repeats if calls}
    for _ in range(rounds):
        for name in repeats:
            times[name].append(watch.time(steps[name], repeats[name]))
            if calls:
                whole[name].append(watch.time_calls(steps[name], repeats[name]))
    return times, whole


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _saved_bytes(module: torch.nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, the input counted, parameters not."""
    with SavedForBackward(without=module.parameters()) as saved:
        output = module(x.clone().requires_grad_())  # keeps what is saved alive until counted
    del output
    return saved.bytes
