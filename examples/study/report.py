"""What a study found, as a table in Markdown and as pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .runs import Outcome, Variant
from .statistics import Difference, paired_difference, spread

matplotlib.use("Agg")  # draws to a file, also where there is no screen
from matplotlib import pyplot as plt

EARLY = 4  # the loss of the first quarter of the steps tells how soon a model learns


@dataclass(frozen=True)
class Row:
    """A variant, and its differences to the variant that all are compared with."""

    variant: Variant
    ious: dict[int, float]  # by seed
    early: dict[int, float]
    losses: list[list[float]]
    iou_difference: Difference | None  # None: it is that variant itself
    early_difference: Difference | None


def rows_of(outcomes: Sequence[Outcome], baseline: Variant) -> list[Row]:
    """One for each variant, in the order of their first outcomes."""
    variants = list(dict.fromkeys(outcome.variant for outcome in outcomes))
    ious = {v: {o.seed: o.iou for o in outcomes if o.variant == v} for v in variants}
    early = {v: {o.seed: early_loss(o.losses) for o in outcomes if o.variant == v} for v in ious}
    comparisons = 2 * max(1, len(variants) - 1)  # two measures
    rows = []
    for variant in variants:
        compared = variant != baseline and not ious[variant].keys().isdisjoint(ious[baseline])
        iou_difference, early_difference = (
            paired_difference(found[variant], found[baseline], comparisons) if compared else None
            for found in (ious, early)
        )
        losses = [o.losses for o in outcomes if o.variant == variant]
        rows.append(
            Row(variant, ious[variant], early[variant], losses, iou_difference, early_difference)
        )
    return rows


def early_loss(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[: max(1, len(losses) // EARLY)])


# ------------------------------------------------------------------------------ the table


def table(rows: Sequence[Row], costs: Mapping[str, Any], baseline: Variant) -> str:
    """``costs`` is ``CostTable.as_dict()`` of one model for each place."""
    head = [
        "attention",
        "held-out IoU",
        f"beside {baseline}",
        "loss, first quarter",
        f"beside {baseline}",
        "training step",
        "memory for backward",
        "parameters",
    ]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        cells = [str(row.variant), _mean(row.ious), _difference(row.iou_difference)]
        cells += [_mean(row.early), _difference(row.early_difference)]
        lines.append(_line([*cells, *_cost(row.variant.place, costs["models"])]))
    return "\n".join(lines)


def _cost(place: str, models: Mapping[str, Any]) -> list[str]:
    """Three cells; of all but the first model what it adds to that."""
    mine, none = models[place], models["none"]
    if mine is none:
        return [
            f"{1e3 * none['training_seconds']:.1f} ms",
            f"{none['activation_bytes'] / 2**20:.1f} MiB",
            f"{none['parameters']:,}",
        ]
    added = added_milliseconds(place, models)
    # As in `python -m cbam_ext cost`: attention that takes time does so in three of four turns.
    is_noise = 4 * sum(each > 0 for each in added) < 3 * len(added)
    memory = (mine["activation_bytes"] - none["activation_bytes"]) / 2**20
    return [
        "lost in noise" if is_noise else f"{statistics.median(added):+.1f} ms",
        f"{memory:+.1f} MiB",
        f"{mine['parameters'] - none['parameters']:+,}",
    ]


def added_milliseconds(place: str, models: Mapping[str, Any]) -> list[float]:
    """To a training step without attention, in every turn in which both were timed."""
    turns = zip(models[place]["training_turns"], models["none"]["training_turns"], strict=True)
    return [1e3 * (seconds - none) for seconds, none in turns]


def conclusion(rows: Sequence[Row], baseline: Variant) -> str:
    """What the spread carries, in words."""
    lines = []
    for measure, sign, differences in (
        ("held-out IoU", 1, [(row.variant, row.iou_difference) for row in rows]),
        ("loss in the first quarter", -1, [(row.variant, row.early_difference) for row in rows]),
    ):
        compared = [(variant, each) for variant, each in differences if each is not None]
        if not compared:
            continue
        told = [(v, sign * d.mean) for v, d in compared if d.is_told]
        better = [str(v) for v, gain in sorted(told, key=lambda pair: -pair[1]) if gain > 0]
        worse = [str(v) for v, gain in sorted(told, key=lambda pair: pair[1]) if gain < 0]
        parts = [f"better than {baseline}: {'; '.join(better)}" if better else ""]
        parts.append(f"worse than {baseline}: {'; '.join(worse)}" if worse else "")
        rest = [str(v) for v, d in compared if not d.is_told]
        parts.append(f"not told apart from {baseline}: {'; '.join(rest)}" if rest else "")
        lines.append(f"- {measure}: {'. '.join(part for part in parts if part)}.")
    seeds = max(len(row.ious) for row in rows)
    if seeds == 1:
        lines.append("- One seed has no spread, and tells nothing: take more by `--seeds`.")
    lines.append(
        f"- Means and standard deviations over {seeds} seeds; differences are taken seed by seed, "
        "with intervals that all hold together in 95 % of such studies. They speak of other "
        "weights and crops of these images, not of other images."
    )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(values: Mapping[int, float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.3f}" if math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if math.isinf(difference.high):
        return f"{difference.mean:+.3f}"
    text = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    return f"**{text}**" if difference.is_told else text


# ------------------------------------------------------------------------------ the pictures


def draw_benefit(
    rows: Sequence[Row], costs: Mapping[str, Any], baseline: Variant, title: str, path: Path
) -> None:
    """What each variant gains in IoU over what it adds to a training step."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.axhline(0, color="gray", linewidth=1)
    axis.axvline(0, color="gray", linewidth=1)
    for number, row in enumerate(row for row in rows if row.iou_difference is not None):
        difference = row.iou_difference
        added = added_milliseconds(row.variant.place, costs["models"])
        low, middle, high = np.quantile(added, [0.25, 0.5, 0.75])
        has_interval = math.isfinite(difference.high)
        axis.errorbar(
            middle,
            difference.mean,
            xerr=[[middle - low], [high - middle]],
            yerr=[[difference.mean - difference.low], [difference.high - difference.mean]]
            if has_interval
            else None,
            color=f"C{number % 10}",
            marker="o",
            markerfacecolor=f"C{number % 10}" if difference.is_told else "white",
            capsize=3,
            label=str(row.variant),
        )
    axis.set_xlabel("milliseconds that it adds to a training step (half of the turns)")
    axis.set_ylabel(f"held-out IoU beside {baseline}")
    axis.set_title(title, fontsize=9)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(title="filled: its interval excludes 0", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(rows: Sequence[Row], title: str, path: Path) -> None:
    """The loss of every step, median and range over the seeds."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, row in enumerate(rows):
        losses = np.array([_smooth(each) for each in row.losses])
        steps = np.arange(1, losses.shape[1] + 1)
        color = "black" if row.variant.place == "none" else f"C{number % 10}"
        axis.plot(steps, np.median(losses, axis=0), color=color, label=str(row.variant))
        axis.fill_between(
            steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.12, linewidth=0
        )
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (median over the seeds, and their range)")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(losses: Sequence[float], width: int = 5) -> np.ndarray:
    """Means over a few steps, since every step sees other crops."""
    width = min(width, len(losses))
    padded = np.concatenate([[losses[0]] * (width // 2), losses, [losses[-1]] * ((width - 1) // 2)])
    return np.convolve(padded, np.ones(width) / width, mode="valid")
