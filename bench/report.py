"""Tables, JSON and the plot of a run."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from pathlib import Path

import torch

import cbam_ext

from .measure import DIRECTIONS, Row


def environment(device: torch.device) -> dict[str, str | int]:
    """What a reader needs to know to place the numbers."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cbam_ext": cbam_ext.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(rows: list[Row], baselines: list[str]) -> str:
    """A Markdown table: a line for each problem, then geometric means."""
    head = ["shape", "dtype", "layout", "direction", "ms", "copies"]
    head += [f"x {name}" for name in baselines] + ["saved"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        saved = row.saved_over_input.get("ours")
        lines.append(
            [
                "x".join(map(str, row.shape)),
                row.dtype,
                row.layout,
                row.direction,
                f"{row.milliseconds['ours']:.3f}",
                f"{row.copies():.1f}",
                *(_number(row.ratio(name)) for name in baselines),
                "" if saved is None else f"{saved:.3f}",
            ]
        )
    for dtype, layout, direction, group in _groups(rows):
        copies = statistics.geometric_mean(row.copies() for row in group)
        means = [_geometric_mean([row.ratio(name) for row in group]) for name in baselines]
        lines.append(
            ["geometric mean", dtype, layout, direction, "", f"{copies:.1f}"]
            + [_number(mean) for mean in means]
            + [""]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def write(rows: list[Row], baselines: list[str], device: torch.device, stem: Path) -> list[Path]:
    """Writes ``stem``.json, .md and, where matplotlib is there, .png; returns what was written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    about = environment(device)
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    written[0].write_text(
        json.dumps({"environment": about, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n"
    )
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    written[1].write_text(
        f"# cbam_ext on {about['device']}\n\n{facts}\n\n"
        '"x eager" says how many times faster this operator is than eager PyTorch, and so on; '
        '"copies" is its time over that of copying the input; "saved" is what autograd keeps for '
        "backward over the size of the input, the input itself included.\n\n"
        f"{table(rows, baselines)}\n"
    )
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return written
    figure, axes = plt.subplots(
        len(DIRECTIONS), 1, figsize=(12, 8), layout="constrained", squeeze=False
    )
    for axis, direction in zip(axes[:, 0], DIRECTIONS, strict=True):
        _plot(axis, [row for row in rows if row.direction == direction], baselines, direction)
    figure.suptitle(f"Times faster than ... ({about['device']}, torch {about['torch']})")
    written.append(stem.with_suffix(".png"))
    figure.savefig(written[-1], dpi=100)
    plt.close(figure)
    return written


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
        f"{'x'.join(map(str, row.shape))}\n{row.dtype}\n{row.layout.replace('_', ' ')}"
        for row in rows
    ]
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], labels, fontsize=6)
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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
