"""What a model costs: parameters, FLOPs, memory for backward, time; alone or beside others.

``python -m cbam_ext cost`` does this for models of smp with and without attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ._progress import track
from ._timing import (
    SavedForBackward,
    device_name,
    median_ratios,
    settle_allocator,
    stopwatch,
)

__all__ = ["Cost", "CostTable", "compare_costs", "measure_cost"]

ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model costs for one batch, on one device.

    The fields of training are None where nothing in the model, nor an input, needs a gradient.

    Attributes:
        parameters: how many numbers, frozen ones included, shared ones once.
        flops: of a forward pass: the multiplications and additions of matrix products and
            convolutions, as :class:`torch.utils.flop_counter.FlopCounterMode` counts them.
        training_flops: of a forward and backward pass.
        activation_bytes: what autograd keeps from forward to backward beside parameters, buffers
            and inputs.
        forward_seconds: of a forward pass in eval mode without gradients, median over the rounds.
        training_seconds: of a forward and backward pass in train mode, without an optimiser.
        peak_bytes: on a CUDA device, the most memory that a training step (or, where there is
            nothing to train, a forward pass) took beside all that was there before; else None.
    """

    parameters: int
    flops: int
    training_flops: int | None
    activation_bytes: int | None
    forward_seconds: float
    training_seconds: float | None
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class CostTable:
    """The costs of several models, measured in turns; ``str()`` is an aligned table.

    A machine that is slow for some seconds is so for every model of a turn. So compare by
    ``ratios`` and ``added``, which are taken within each turn, and not by the medians in ``costs``.

    Attributes:
        costs: by name, in the order in which the models were given.
        baseline: the name of the model that the others are compared with.
        forward_turns, training_turns: the times of each model in all rounds, in seconds.
            ``training_turns`` has those models alone that can be trained.
        device: what it ran on.
    """

    costs: dict[str, Cost]
    baseline: str
    forward_turns: dict[str, list[float]]
    training_turns: dict[str, list[float]]
    device: str

    def ratios(self, training: bool = False) -> dict[str, float]:
        """Times over those of the baseline: for each model the median over the turns.

        Args:
            training: of the training step instead of the forward pass. Empty where the baseline
                cannot be trained.
        """
        turns = self._turns(training)
        return median_ratios(turns, self.baseline) if self.baseline in turns else {}

    def added(self, training: bool = False) -> dict[str, float]:
        """Seconds beside those of the baseline: for each model the median over the turns."""
        return {name: statistics.median(d) for name, d in self._differences(training).items()}

    def times_added(self, name: str, than: str, training: bool = False) -> float | None:
        """How many times the time that ``than`` adds to the baseline ``name`` adds to it.

        None where the answer would be noise: where either was not slower than the baseline in
        three of four turns, or cannot be trained.
        """
        differences = self._differences(training)
        for each in (name, than):
            found = differences.get(each, [])
            if not found or 4 * sum(d > 0 for d in found) < 3 * len(found):
                return None
        added = self.added(training)
        if added[than] <= 0:
            return None
        return added[name] / added[than]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        models = {}
        for name, cost in self.costs.items():
            models[name] = {
                **dataclasses.asdict(cost),
                "forward_ratio": self.ratios().get(name),
                "forward_added_seconds": self.added().get(name),
                "forward_turns": self.forward_turns[name],
                "training_ratio": self.ratios(True).get(name),
                "training_added_seconds": self.added(True).get(name),
                "training_turns": self.training_turns.get(name, []),
            }
        return {"device": self.device, "baseline": self.baseline, "models": models}

    def __str__(self) -> str:
        head = ["", "parameters", "FLOPs", "activations", "added", "forward", "ratio", "added"]
        head += ["training", "ratio", "added"]
        on_cuda = any(cost.peak_bytes is not None for cost in self.costs.values())
        rows = [[*head, "peak"] if on_cuda else head]
        base = self.costs[self.baseline]
        for name, cost in self.costs.items():
            row = [name, _count(cost.parameters), _count(cost.flops), _bytes(cost.activation_bytes)]
            row.append("" if name == self.baseline else _added_bytes(cost, base))
            row += [*self._times(name, False), *self._times(name, True)]
            rows.append([*row, _bytes(cost.peak_bytes)] if on_cuda else row)
        return _aligned(rows)

    def _times(self, name: str, training: bool) -> list[str]:
        """The cells of a model for one direction: time, ratio, added."""
        cost = self.costs[name]
        seconds = cost.training_seconds if training else cost.forward_seconds
        cells = [_milliseconds(seconds)]
        ratio, added = self.ratios(training).get(name), self.added(training).get(name)
        cells.append("-" if ratio is None else f"{ratio:.2f}")
        if name == self.baseline:
            return [*cells, ""]
        return [*cells, "-" if added is None else _milliseconds(added, sign="+")]

    def _turns(self, training: bool) -> dict[str, list[float]]:
        return self.training_turns if training else self.forward_turns

    def _differences(self, training: bool) -> dict[str, list[float]]:
        turns = self._turns(training)
        base = turns.get(self.baseline)
        if base is None:
            return {}
        return {
            name: [value - other for value, other in zip(values, base, strict=True)]
            for name, values in turns.items()
        }


def measure_cost(model: nn.Module, *inputs: Tensor, rounds: int = ROUNDS) -> Cost:
    """What ``model(*inputs)`` costs on the model's device.

    The model stays as it was: parameters, gradients, buffers (the running statistics of a
    BatchNorm), training flags, and so do the random state and the inputs. It is not copied. Hooks
    of the model run as in any call. A training step is a call in train mode and a backward pass
    from all floating-point tensors in its result, from gradients of ones. To measure a block as
    it is inside of a network, whose input needs a gradient as well, give an input with
    ``requires_grad=True``. Under :class:`torch.autocast` it measures what runs there.

    Args:
        model: any module.
        *inputs: tensors of any shape that the model takes; moved to its device.
        rounds: how often it is timed; the median counts.

    Raises:
        TypeError: ``model`` is not a module, or an input not a tensor.
        ValueError: ``rounds`` is not a positive int.

    Example:
        >>> cost = measure_cost(nn.Linear(10, 5), torch.rand(4, 10), rounds=1)
        >>> cost.parameters, cost.flops, cost.activation_bytes
        (55, 400, 0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"measure_cost: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    return compare_costs({"model": model}, *inputs, rounds=rounds).costs["model"]


def compare_costs(
    models: Mapping[str, nn.Module],
    *inputs: Tensor,
    rounds: int = ROUNDS,
    baseline: str | None = None,
) -> CostTable:
    """The costs of several models for the same inputs, timed in turns.

    In every round each model runs for some milliseconds, or once if that takes longer, so that all
    meet the same machine. What :func:`measure_cost` says of models and inputs holds here. All
    models are on one device at once.

    Args:
        models: names and modules.
        *inputs: tensors that each of them takes; moved to their device.
        rounds: how often each is timed.
        baseline: the name of the model to compare the others with; by default the first.

    Raises:
        TypeError: a model is not a module, or an input not a tensor.
        ValueError: no models, models on different devices, an unknown baseline, or ``rounds`` is
            not a positive int.

    Example:
        >>> models = {"3x3": nn.Conv2d(8, 8, 3, padding=1), "1x1": nn.Conv2d(8, 8, 1)}
        >>> table = compare_costs(models, torch.rand(1, 8, 16, 16), rounds=1, baseline="1x1")
        >>> [cost.parameters for cost in table.costs.values()]
        [584, 72]
        >>> table.ratios()["1x1"]
        1.0
    """
    models = dict(models)
    device = _check(models, inputs, rounds)
    if baseline is None:
        baseline = next(iter(models))
    if baseline not in models:
        raise ValueError(f"baseline must be one of {', '.join(models)}, got {baseline!r}")

    cuda = [device] if device.type == "cuda" else []
    if device.type == "cpu":
        settle_allocator()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        for model in models.values():
            stack.enter_context(_unchanged(model))
        taken = [
            tensor.detach().to(device).clone().requires_grad_(tensor.requires_grad)
            for tensor in inputs
        ]
        subjects = {name: _Subject(model, taken, device) for name, model in models.items()}
        forward, training = _run(subjects, rounds, device)

    costs = {}
    for name, subject in subjects.items():
        times = training.get(name)
        costs[name] = Cost(
            **subject.facts,
            forward_seconds=statistics.median(forward[name]),
            training_seconds=None if times is None else statistics.median(times),
            peak_bytes=subject.peak_bytes,
        )
    return CostTable(costs, baseline, forward, training, device_name(device))


# --- what is run ----------------------------------------------------------------------------------


class _FlopCounter(FlopCounterMode):
    """For the total alone, without following who calls whom.

    The hooks that do so refuse ``torch.autograd.grad`` where a module is given a parameter or
    another leaf, and are heard by modules that ``torch.compile`` made.
    """

    class _NoTracker:
        parents = ("Global",)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = self._NoTracker()


class _Subject:
    """A model with its inputs: what is counted once, and the steps that are timed."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], device: torch.device) -> None:
        self.model = model
        self.inputs = inputs
        self.device = device
        self.facts: dict[str, int | None] = {}
        self.peak_bytes: int | None = None
        self.trains = True
        self._upstream: dict[tuple[int, torch.Size], Tensor] = {}

    def count(self) -> None:
        """All that is not time. These are the first calls of the model, and warm it up."""
        parameters = list(self.model.parameters())
        self._leaves = [t for t in (*parameters, *self.inputs) if t.requires_grad]
        self.facts["parameters"] = sum(parameter.numel() for parameter in parameters)
        self.model.eval()
        with _FlopCounter() as counter:
            self.forward()
        self.facts["flops"] = counter.get_total_flops()

        self.model.train()
        known = (*parameters, *self.model.buffers(), *self.inputs)
        with torch.enable_grad(), _FlopCounter() as counter:
            with SavedForBackward(without=known) as saved:
                results = self._results()
            self.trains = bool(results)
            kept = saved.bytes
            if self.trains:
                self._backward(results)
        self.facts["training_flops"] = counter.get_total_flops() if self.trains else None
        self.facts["activation_bytes"] = kept if self.trains else None
        del results
        if self.device.type == "cuda":
            self._measure_peak()

    def forward(self) -> None:
        with torch.no_grad():
            self.model(*self.inputs)

    def training_step(self) -> None:
        with torch.enable_grad():
            self._backward(self._results())

    def _results(self) -> list[Tensor]:
        """The tensors of the model's result that have a gradient to hand on."""
        result = self.model(*self.inputs)
        if dataclasses.is_dataclass(result):
            result = [getattr(result, field.name) for field in dataclasses.fields(result)]
        return [
            leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]

    def _backward(self, results: list[Tensor]) -> None:
        # grad() and not backward(): no .grad is written, and no hook that steps an optimiser runs.
        upstream = [self._ones(i, result) for i, result in enumerate(results)]
        torch.autograd.grad(results, self._leaves, upstream, allow_unused=True)

    def _ones(self, place: int, result: Tensor) -> Tensor:
        """Made once, so that making it is not measured."""
        key = place, result.shape
        if key not in self._upstream:
            self._upstream[key] = torch.ones_like(result)
        return self._upstream[key]

    def _measure_peak(self) -> None:
        step = self.training_step if self.trains else self.forward
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before


def _run(
    subjects: dict[str, _Subject], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The times of forward passes and of training steps in all rounds."""
    watch = stopwatch(device)
    forward: dict[str, list[float]] = {name: [] for name in subjects}
    training: dict[str, list[float]] = {}
    repeats: dict[Callable[[], None], int] = {}

    def time(turns: dict[str, list[float]], name: str, train: bool) -> None:
        subject = subjects[name]
        if train and not subject.trains:
            return
        subject.model.train(train)
        step = subject.training_step if train else subject.forward
        if step not in repeats:
            repeats[step] = watch.prepare(step)
            turns.setdefault(name, [])
            return
        turns[name].append(watch.time_calls(step, repeats[step]))

    jobs: list[Callable[[], None]] = [subject.count for subject in subjects.values()]
    for turns, train in ((forward, False), (training, True)):
        # The first time only warms up.
        for _ in range(1 + rounds):
            jobs += [partial(time, turns, name, train) for name in subjects]
    for job in track(jobs, "measuring", total=len(jobs)):
        job()
    return forward, training


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back what calls in train mode change: training flags and buffers."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    held = [(module, dict(module._buffers)) for module in modules]
    values = {
        buffer: buffer.clone()
        for _, buffers in held
        for buffer in buffers.values()
        if buffer is not None and not buffer.is_inference()
    }
    try:
        yield
    finally:
        model.train(flags[0])  # some do more than set the flag, such as merge weights
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values.items():
                # Some cannot be written, being views that repeat a number; those did not change.
                if not _same(buffer, value):
                    buffer.resize_(value.shape).copy_(value)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality that takes NaN for NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _check(models: dict[str, nn.Module], inputs: tuple[Tensor, ...], rounds: int) -> torch.device:
    """The device of the models, if the arguments are what they should be."""
    if not models:
        raise ValueError("models must have at least one model")
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"models[{name!r}] must be a torch.nn.Module, got {type(model).__name__}"
            )
    for place, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs[{place}] must be a tensor, got {type(tensor).__name__}")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds must be a positive int, got {rounds!r}")
    devices = {
        tensor.device
        for model in models.values()
        for tensor in (*model.parameters(), *model.buffers())
    }
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the models must be on one device to be compared, these are on {names}")
    if torch.device("meta") in devices:
        raise ValueError("the models must have memory to be timed, these are on the meta device")
    if devices:
        return devices.pop()
    return inputs[0].device if inputs else torch.device("cpu")


# --- how numbers are written ----------------------------------------------------------------------


def _count(number: int) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _bytes(number: int | None, sign: str = "") -> str:
    if number is None:
        return "-"
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= size:
            return f"{number / size:{sign}.1f} {unit}"
    return f"{number:{sign}} B"


def _added_bytes(cost: Cost, base: Cost) -> str:
    if cost.activation_bytes is None or base.activation_bytes is None:
        return "-"
    return _bytes(cost.activation_bytes - base.activation_bytes, sign="+")


def _milliseconds(seconds: float | None, sign: str = "") -> str:
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:{sign}.{digits}f} ms"


def _aligned(rows: list[list[str]]) -> str:
    """Columns that end below each other; the first, of names, begins so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
