"""What models cost, as numbers and as a table."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from .._text import in_bytes
from .timing import median_ratios


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


# --- how numbers are written ----------------------------------------------------------------------


def _count(number: int) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _bytes(number: int | None, sign: str = "") -> str:
    return "-" if number is None else in_bytes(number, sign)


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
