"""Tables, JSON and the plot of a run."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import cbam_ext
from cbam_ext.cost.timing import device_name

from .measure import DIRECTIONS, Row
from .traffic import FEWEST_PASSES, STREAMING_PASSES

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
    'in our time would be of the bandwidth of a large copy; "of peak" is that of the floor over '
    "the memory's peak. A step finds nothing in the caches in rows that are cold; in warm ones it "
    "uses the same memory as the one before it."
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
    """The rows of one run, and what they are to be read by.

    ``bandwidth`` is bytes a second on a GPU: of a large "copy", measured, and of the memory at its
    "peak", where something tells that; ``peak_source`` says what.
    """

    rows: list[Row]
    baselines: list[str]
    device: torch.device
    bandwidth: dict[str, float] = field(default_factory=dict)
    peak_source: str = ""
    norm: str = ""  # of the spatial logits, training

    def table(self) -> str:
        """A Markdown table: a line for each problem, then geometric means."""
        columns = self._columns()
        on_gpu = self.device.type == "cuda"
        about = ["shape", "dtype", "layout", "direction", *(["cache"] if on_gpu else [])]
        lines = [[*about, *(column.name for column in columns)]]
        lines.append(["---"] * len(lines[0]))
        rows = self._ordered()
        for row in rows:
            problem = ["x".join(map(str, row.shape)), row.dtype, row.layout, row.direction]
            problem += [row.cache] if on_gpu else []
            lines.append([*problem, *(column.text(column.value(row)) for column in columns)])
        for *key, group in _groups(rows):
            means = [
                column.text(_geometric_mean([column.value(row) for row in group]))
                if column.has_mean
                else ""
                for column in columns
            ]
            lines.append(["geometric mean", *key[: len(about) - 1], *means])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |"
            for line in lines
        )

    def _ordered(self) -> list[Row]:
        """The rows by dtype, layout and shape, each in the order in which they first come."""
        places = [
            {value: place for place, value in enumerate(dict.fromkeys(values))}
            for values in zip(*((r.dtype, r.layout, r.shape) for r in self.rows), strict=True)
        ]

        def place(row: Row) -> list[int]:
            values = row.dtype, row.layout, row.shape
            return [known[value] for known, value in zip(places, values, strict=True)]

        return sorted(self.rows, key=place)

    def _columns(self) -> list[_Column]:
        columns = [
            _Column("ms", lambda row: row.milliseconds["ours"], "{:.3f}", has_mean=False),
            _Column("copies", Row.copies),
        ]
        shares = (
            ("streaming", "copy", STREAMING_PASSES),
            ("floor", "copy", FEWEST_PASSES),
            ("of peak", "peak", FEWEST_PASSES),
        )
        for name, speed, passes in shares:
            if speed in self.bandwidth:
                value = partial(Row.bandwidth_share, bandwidth=self.bandwidth[speed], passes=passes)
                columns.append(_Column(name, value, "{:.0%}"))
        columns += [_Column(f"x {name}", partial(Row.ratio, name=name)) for name in self.baselines]
        if self.device.type == "cuda":
            columns.append(
                _Column(
                    "call ms",
                    lambda row: row.call_milliseconds.get("ours"),
                    "{:.3f}",
                    has_mean=False,
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

    def about(self) -> dict[str, str | int]:
        """Where and how this was measured."""
        about = environment(self.device)
        for name, speed in self.bandwidth.items():
            about[name] = f"{speed / 1e9:.0f} GB/s"
        if "peak" in self.bandwidth:
            about["peak"] = f"{about['peak']} by {self.peak_source}"
        if self.norm:
            about["norm of the spatial logits"] = f"{self.norm}, training"
        return about

    def write(self, stem: Path) -> list[Path]:
        """Writes ``stem``.json and .md; returns the paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        about = self.about()
        written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
        rows = [row.as_dict() for row in self.rows]
        data = {"environment": about, "bandwidth": self.bandwidth, "rows": rows}
        written[0].write_text(json.dumps(data, indent=1) + "\n")
        facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
        legend = LEGEND + (CUDA_LEGEND if self.bandwidth else "")
        written[1].write_text(
            f"# cbam_ext on {about['device']}\n\n{facts}\n\n{legend}\n\n{self.table()}\n"
        )
        return written

    def resume(self, path: Path) -> None:
        """Begins with the rows of a JSON file that an earlier run of the same code here wrote."""
        data = json.loads(path.read_text())
        ours = environment(self.device)
        for name in ("device", "torch", "commit"):
            if data["environment"][name] != ours[name]:
                raise ValueError(f"{path} was measured with another {name}")
        self.rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in data["rows"]]
        earlier = dict.fromkeys(name for row in self.rows for name in row.ratios)
        known = ("ours", "copy", *self.baselines)
        self.baselines = [*(name for name in earlier if name not in known), *self.baselines]

    def put(self, row: Row) -> None:
        """Adds a row, or takes the place of an earlier one of the same problem.

        It then has the modules of both. Each ratio is of the run that measured it; a time that
        both measured is that of the later.
        """
        for place, earlier in enumerate(self.rows):
            if earlier.key() == row.key():
                row.complete(earlier)
                self.rows[place] = row
                return
        self.rows.append(row)

    def draw(self, path: Path) -> Path | None:
        """The plot of the ratios; None where there is no matplotlib."""
        try:
            from matplotlib import pyplot as plt
        except ImportError:
            return None
        about = self.about()
        where = f"{about['device']}, torch {about['torch']}"
        if self.norm:
            where += f"; with {self.norm}"
        figure, axes = plt.subplots(
            len(DIRECTIONS), 1, figsize=(12, 8), layout="constrained", squeeze=False, sharex=True
        )
        for axis, direction in zip(axes[:, 0], DIRECTIONS, strict=True):
            first = self.rows[0].cache
            rows = [row for row in self.rows if (row.direction, row.cache) == (direction, first)]
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


def _groups(rows: list[Row]) -> list[tuple[str, str, str, str, list[Row]]]:
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.layout, row.direction, row.cache), []).append(row)
    return [(*key, group) for key, group in groups.items()]


def _geometric_mean(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known else None
