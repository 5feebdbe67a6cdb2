"""Tables, JSON and the plot of a run."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import cbam_ext
from cbam_ext.cost.timing import device_name

from .measure import DIRECTIONS, FEWEST_PASSES, STREAMING_PASSES, Row

LEGEND = (
    '"x eager" says how many times faster this operator is than eager PyTorch, and so on; "copies" '
    'is its time over that of copying the input; "saved" is what autograd keeps for backward over '
    "the size of the input, the input itself included."
)
CUDA_LEGEND = (
    ' Times are the device\'s own; those of "call" include the time to launch where it is longer. '
    f'"streaming" ({STREAMING_PASSES["forward"]} passes over the feature map forward, '
    f'{STREAMING_PASSES["forward+backward"]} with backward) and "floor" '
    f"({FEWEST_PASSES['forward']} and {FEWEST_PASSES['forward+backward']}) are what so many passes "
    "in our time would be of the bandwidth of a large copy."
)


def environment(device: torch.device) -> dict[str, str | int]:
    """What a reader needs to know to place the numbers."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cbam_ext": cbam_ext.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass
class Results:
    """The rows of one run, and what they are to be read by."""

    rows: list[Row]
    baselines: list[str]
    device: torch.device
    bandwidth: float | None = None  # bytes a second of a large copy, measured on GPUs
    norm: str = ""  # of the spatial logits, training

    def table(self) -> str:
        """A Markdown table: a line for each problem, then geometric means."""
        columns = self._columns()
        lines = [["shape", "dtype", "layout", "direction", *(column.name for column in columns)]]
        lines.append(["---"] * len(lines[0]))
        for row in self.rows:
            problem = ["x".join(map(str, row.shape)), row.dtype, row.layout, row.direction]
            lines.append([*problem, *(column.text(column.value(row)) for column in columns)])
        for dtype, layout, direction, group in _groups(self.rows):
            means = [
                column.text(_geometric_mean([column.value(row) for row in group]))
                if column.has_mean
                else ""
                for column in columns
            ]
            lines.append(["geometric mean", dtype, layout, direction, *means])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |"
            for line in lines
        )

    def _columns(self) -> list[_Column]:
        columns = [
            _Column("ms", lambda row: row.milliseconds["ours"], "{:.3f}", has_mean=False),
            _Column("copies", Row.copies),
        ]
        if self.bandwidth is not None:
            columns += [
                _Column(name, partial(Row.bandwidth_share, bandwidth=self.bandwidth, passes=passes))
                for name, passes in (("streaming", STREAMING_PASSES), ("floor", FEWEST_PASSES))
            ]
            for column in columns[-2:]:
                column.format = "{:.0%}"
        columns += [_Column(f"x {name}", partial(Row.ratio, name=name)) for name in self.baselines]
        if self.device.type == "cuda":
            columns.append(
                _Column(
                    "call ms", lambda row: row.call_milliseconds["ours"], "{:.3f}", has_mean=False
                )
            )
            columns += [
                _Column(f"call x {name}", partial(Row.call_ratio, name=name))
                for name in self.baselines
            ]
        columns.append(
            _Column("saved", lambda row: row.saved_over_input.get("ours"), "{:.3f}", has_mean=False)
        )
        return columns

    def write(self, stem: Path) -> list[Path]:
        """Writes ``stem``.json, .md and, where matplotlib is there, .png; returns the paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        about = environment(self.device)
        if self.bandwidth is not None:
            about["copy"] = f"{self.bandwidth / 1e9:.0f} GB/s"
        if self.norm:
            about["norm of the spatial logits"] = f"{self.norm}, training"
        written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
        rows = [row.as_dict() for row in self.rows]
        written[0].write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
        facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
        legend = LEGEND + (CUDA_LEGEND if self.bandwidth is not None else "")
        written[1].write_text(
            f"# cbam_ext on {about['device']}\n\n{facts}\n\n{legend}\n\n{self.table()}\n"
        )
        where = f"{about['device']}, torch {about['torch']}"
        if self.norm:
            where += f"; with {self.norm}"
        picture = self._draw(stem.with_suffix(".png"), where)
        return written + ([picture] if picture else [])

    def _draw(self, path: Path, where: str) -> Path | None:
        try:
            from matplotlib import pyplot as plt
        except ImportError:
            return None
        figure, axes = plt.subplots(
            len(DIRECTIONS), 1, figsize=(12, 8), layout="constrained", squeeze=False, sharex=True
        )
        for axis, direction in zip(axes[:, 0], DIRECTIONS, strict=True):
            rows = [row for row in self.rows if row.direction == direction]
            _plot(axis, rows, self.baselines, direction)
        figure.suptitle(f"Times faster than ... ({where})")
        figure.savefig(path, dpi=100)
        plt.close(figure)
        return path


@dataclass
class _Column:
    """One number of every row."""

    name: str
    value: Callable[[Row], float | None]
    format: str = "{:.1f}"
    has_mean: bool = True

    def text(self, value: float | None) -> str:
        return "" if value is None else self.format.format(value)


def _plot(axis, rows: list[Row], baselines: list[str], title: str) -> None:
    width = 0.8 / max(1, len(baselines))
    for i, name in enumerate(baselines):
        heights = [row.ratio(name) or 0 for row in rows]
        axis.bar([x + i * width for x in range(len(rows))], heights, width, label=name)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylabel("ratio")
    axis.set_title(title)
    labels = [
        f"{'x'.join(map(str, row.shape))} {row.dtype} {row.layout.replace('_', ' ')}"
        for row in rows
    ]
    middles = [x + 0.4 - width / 2 for x in range(len(rows))]
    axis.set_xticks(middles, labels, fontsize=7, rotation=90)
    axis.legend()


def _groups(rows: list[Row]) -> list[tuple[str, str, str, list[Row]]]:
    keys = dict.fromkeys((row.dtype, row.layout, row.direction) for row in rows)
    return [
        (*key, [row for row in rows if (row.dtype, row.layout, row.direction) == key])
        for key in keys
    ]


def _geometric_mean(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known else None
