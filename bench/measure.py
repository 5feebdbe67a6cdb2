"""Times of several modules on one problem, taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer

from .baselines import MODULES

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
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")


@dataclass
class Row:
    """One problem: milliseconds by module (medians), and bytes kept for backward."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    direction: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    saved_over_input: dict[str, float] = field(default_factory=dict)

    def ratio(self, name: str) -> float | None:
        """How many times faster ours is than ``name``."""
        time = self.milliseconds.get(name)
        return None if time is None else time / self.milliseconds["ours"]

    def copies(self) -> float:
        """Our time in copies of the input."""
        return self.milliseconds["ours"] / self.milliseconds["copy"]

    def as_dict(self) -> dict:
        return asdict(self)


def measure_problem(
    shape: tuple[int, ...],
    dtype: str,
    layout: str,
    modules: list[str],
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Both directions of one problem.

    The modules run in turns, ``rounds`` times; every turn lasts some milliseconds, and the median
    over the turns counts. On a GPU the inputs rotate through more memory than its L2 cache holds.
    """
    inputs = _inputs(shape, DTYPES[dtype], LAYOUTS[layout], device)
    built = {name: MODULES[name](shape[1]).to(device, DTYPES[dtype]) for name in modules}
    rows = []
    for direction in DIRECTIONS:
        row = Row(shape, dtype, layout, direction)
        steps = {
            name: _step(module, inputs, backward=direction != "forward")
            for name, module in built.items()
        }
        steps["copy"] = _copy(inputs)
        row.milliseconds = _interleaved(steps, rounds, device)
        if direction != "forward":
            row.saved_over_input = {
                name: _saved_bytes(module, inputs[0]) / inputs[0].nbytes
                for name, module in built.items()
                if name != "compile"
            }
        rows.append(row)
    return rows


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> list[Tensor]:
    first = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = 2 + 2 * cache // first.nbytes
    return [first, *(first.clone() for _ in range(count - 1))]


def _step(module: torch.nn.Module, inputs: list[Tensor], backward: bool) -> Callable[[], None]:
    if not backward:
        plain: Iterator[Tensor] = cycle(inputs)

        @torch.no_grad()
        def forward() -> None:
            module(next(plain))

        return forward

    leaves = cycle([x.clone().requires_grad_() for x in inputs])
    gradient = torch.randn_like(inputs[0])

    def forward_backward() -> None:
        x = next(leaves)
        module(x).backward(gradient)
        x.grad = None

    return forward_backward


def _copy(inputs: list[Tensor]) -> Callable[[], None]:
    sources, target = cycle(inputs), torch.empty_like(inputs[0])
    return lambda: target.copy_(next(sources))


def _interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    repeats = {}
    for name, timer in timers.items():
        timer.timeit(3)  # compiles, allocates, fills caches
        repeats[name] = max(1, int(0.02 / max(timer.timeit(1).mean, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(repeats[name]).mean)  # synchronises CUDA itself
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _saved_bytes(module: torch.nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x.clone().requires_grad_())  # keeps what is saved alive until counted
    del output
    return sum(kept.values())
