"""Counts and times models side by side: :func:`measure_cost`, :func:`compare_costs`."""

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

from .._inputs import Call, as_call
from .._progress import track
from .table import Cost, CostTable
from .timing import SavedForBackward, device_name, settle_allocator, stopwatch

ROUNDS = 9


def measure_cost(model: nn.Module, *inputs: Any, rounds: int = ROUNDS) -> Cost:
    """What a call of ``model`` with ``inputs`` costs on the model's device.

    The model stays as it was: parameters, gradients, buffers (the running statistics of a
    BatchNorm), training flags, and so do the random state and the inputs. It is not copied. Hooks
    of the model run as in any call. A training step is a call in train mode and a backward pass
    from all floating-point tensors in its result, from gradients of ones. To measure a block as
    it is inside of a network, whose input needs a gradient as well, give an input with
    ``requires_grad=True``. Under :class:`torch.autocast` it measures what runs there.

    Args:
        model: any module.
        *inputs: what the model takes: a tensor, or another single argument, such as a list for a
            model that takes a list of images; a tuple of the positional arguments, or several
            inputs that are these; a dict of the keyword arguments. They have to do for both modes:
            a detector wants its targets in training. Tensors in them are moved to its device.
        rounds: how often it is timed; the median counts.

    Raises:
        TypeError: ``model`` is not a module, or takes other inputs.
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
    *inputs: Any,
    rounds: int = ROUNDS,
    baseline: str | None = None,
) -> CostTable:
    """The costs of several models for the same inputs, timed in turns.

    In every round each model runs for some milliseconds, or once if that takes longer, so that all
    meet the same machine. What :func:`measure_cost` says of models and inputs holds here. All
    models are on one device at once.

    Args:
        models: names and modules.
        *inputs: what each of them takes, as in :func:`measure_cost`.
        rounds: how often each is timed.
        baseline: the name of the model to compare the others with; by default the first.

    Raises:
        TypeError: a model is not a module, or takes other inputs.
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
    call = as_call(inputs[0] if len(inputs) == 1 else inputs)
    device = _check(models, call, rounds)
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
        taken = call.map(lambda t: t.detach().to(device).clone().requires_grad_(t.requires_grad))
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


class _Subject:
    """A model with its inputs: what is counted once, and the steps that are timed."""

    def __init__(self, model: nn.Module, call: Call, device: torch.device) -> None:
        self.model = model
        self.call = call
        self.device = device
        self.facts: dict[str, int | None] = {}
        self.peak_bytes: int | None = None
        self.trains = True
        self._upstream: dict[tuple[int, torch.Size], Tensor] = {}

    def count(self) -> None:
        """All that is not time. These are the first calls of the model, and warm it up."""
        from .flops import FlopCounter  # brings Triton along, which takes longer than this package

        parameters, inputs = list(self.model.parameters()), self.call.tensors()
        self._leaves = [t for t in (*parameters, *inputs) if t.requires_grad]
        self.facts["parameters"] = sum(parameter.numel() for parameter in parameters)
        self.model.eval()
        with FlopCounter() as counter:
            self.forward()
        self.facts["flops"] = counter.get_total_flops()

        self.model.train()
        known = (*parameters, *self.model.buffers(), *inputs)
        with torch.enable_grad(), FlopCounter() as counter:
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
            self.call.run(self.model)

    def training_step(self) -> None:
        with torch.enable_grad():
            self._backward(self._results())

    def _results(self) -> list[Tensor]:
        """The tensors of the model's result that have a gradient to hand on."""
        result = self.call.run(self.model)
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


def _check(models: dict[str, nn.Module], call: Call, rounds: int) -> torch.device:
    """The device of the models, if the arguments are what they should be."""
    if not models:
        raise ValueError("models must have at least one model")
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"models[{name!r}] must be a torch.nn.Module, got {type(model).__name__}"
            )
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
    return next((tensor.device for tensor in call.tensors()), torch.device("cpu"))
