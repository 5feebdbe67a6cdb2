"""What a person reads first: PASS or FAIL of each step, values, times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..traffic import FEWEST_PASSES, share

MOST_FAULTS = 12  # results off, that are listed
# Modules of the benchmark beside ours, as far as they were measured.
OTHERS = ("eager", "compile", "autotuned", "timm", "scse")
BACKWARD_PASSES = FEWEST_PASSES["forward+backward"] - FEWEST_PASSES["forward"]

Table = list[list[str]]


def page(data: dict[str, Any], benchmark: dict[str, Any] | None) -> str:
    """The summary of a run.

    Args:
        data: what results.json holds.
        benchmark: what benchmark.json holds, if it is there already.
    """
    parts = [_head(data), _steps(data["steps"], data["still"])]
    found = data["found"]
    if found.get("smoke"):
        parts.append(_values(found["smoke"]["results"]))
    if benchmark:
        parts.append(_times(benchmark))
    return "\n\n".join(parts) + "\n"


def _head(data: dict[str, Any]) -> str:
    about = data["about"]
    facts = data["found"].get("facts") or {}
    failed = sum(step["outcome"] == "FAIL" for step in data["steps"])
    passed = sum(step["outcome"] == "PASS" for step in data["steps"])
    skipped = len(data["steps"]) - failed - passed
    counts = f"{failed} FAIL, {passed} PASS, {skipped} SKIP"
    if data["still"]:
        counts += f", {len(data['still'])} not ended"
    where = ", ".join(str(facts[name]) for name in ("device", "torch") if facts.get(name))
    return (
        f"cbam_ext {about['commit']} on {where or 'an unknown device'}, {about['date']}\n"
        f"{counts} in {about['seconds']:.0f} s"
    )


def _steps(steps: Sequence[dict[str, Any]], still: Sequence[str]) -> str:
    lines = [
        f"{step['outcome']:4}  {step['step']:10} {step['seconds']:4.0f} s  {step['says']}".rstrip()
        for step in steps
    ]
    if still:
        lines.append(f"not ended: {' '.join(still)}")
    return "\n".join(lines)


def _values(results: Sequence[dict[str, Any]]) -> str:
    """Results within their limits by dtype and layout, and those that are not."""
    off = [result for result in results if result["says"] != "ok"]
    layouts = list(dict.fromkeys(result["layout"] for result in results))
    table = [["values against float64", *layouts]]
    for dtype in dict.fromkeys(result["dtype"] for result in results):
        line = [dtype]
        for layout in layouts:
            group = [r for r in results if (r["dtype"], r["layout"]) == (dtype, layout)]
            good = sum(result["says"] == "ok" for result in group)
            line.append(f"{'ok' if good == len(group) else 'FAIL'} {good}/{len(group)}")
        table.append(line)
    lines = [_aligned(table)]
    for result in off[:MOST_FAULTS]:
        problem = " ".join(result[name] for name in ("operator", "dtype", "layout", "shape"))
        lines.append(f"  off: {problem}: {result['says']}")
    if len(off) > MOST_FAULTS:
        lines.append(f"  and {len(off) - MOST_FAULTS} more")
    return "\n".join(lines)


# --- times ----------------------------------------------------------------------------------------


@dataclass
class Direction:
    """Microseconds of one problem in one direction, by module, with caches cold and warm."""

    name: str  # fwd or bwd
    passes: int
    cold: dict[str, float] = field(default_factory=dict)
    warm: dict[str, float] = field(default_factory=dict)

    def ratio(self, name: str) -> float | None:
        """Times of ``name`` over ours: cold, unless there are warm ones only, as on a CPU."""
        times = self.cold or self.warm
        return times[name] / times["ours"] if {"ours", name} <= times.keys() else None

    def copies(self) -> float | None:
        ratio = self.ratio("copy")
        return None if ratio is None else 1 / ratio

    def of_peak(self, map_bytes: int, peak: float | None) -> float | None:
        if peak is None or "ours" not in self.cold:
            return None
        return share(self.passes, map_bytes, 1e-6 * self.cold["ours"], peak)


def directions(rows: Iterable[dict[str, Any]]) -> list[Direction]:
    """Forward and backward of the rows of one problem.

    Backward is a training step less a forward pass. A copy has no directions.
    """
    forward = Direction("fwd", FEWEST_PASSES["forward"])
    backward = Direction("bwd", BACKWARD_PASSES)
    by_kind = {(row["direction"], row["cache"]): row["milliseconds"] for row in rows}
    for cache in ("cold", "warm"):
        first = by_kind.get(("forward", cache), {})
        step = by_kind.get(("forward+backward", cache), {})
        for name, milliseconds in first.items():
            getattr(forward, cache)[name] = 1e3 * milliseconds
            if name == "copy":
                getattr(backward, cache)[name] = 1e3 * milliseconds
            elif step.get(name, 0) > milliseconds:
                getattr(backward, cache)[name] = 1e3 * (step[name] - milliseconds)
    return [forward, backward]


def _times(benchmark: dict[str, Any]) -> str:
    about, rows = benchmark["environment"], benchmark["rows"]
    peak = benchmark["bandwidth"].get("peak")
    problems: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = "x".join(map(str, row["shape"])), row["dtype"], row["layout"]
        problems.setdefault(key, []).append(row)
    found = [
        (key, group[0]["input_bytes"], direction)
        for key, group in problems.items()
        for direction in directions(group)
        if direction.cold or direction.warm
    ]
    names = [name for name in OTHERS if any(d.ratio(name) for _, _, d in found)]

    def cells(direction: Direction) -> list[str]:
        return [_number(direction.ratio(name), "{:.1f}") for name in names]

    header = ["shape", "dtype", "layout", "", "cold us", "warm us"]
    header += [*(f"x {name}" for name in names), "copies", "of peak"]
    table = [header]
    for (shape, dtype, layout), map_bytes, direction in found:
        table.append(
            [
                *(shape, dtype, layout, direction.name),
                _number(direction.cold.get("ours"), "{:.1f}"),
                _number(direction.warm.get("ours"), "{:.1f}"),
                *cells(direction),
                _number(direction.copies(), "{:.2f}"),
                _number(direction.of_peak(map_bytes, peak), "{:.0%}"),
            ]
        )
    for dtype, layout, name in dict.fromkeys((k[1], k[2], d.name) for k, _, d in found):
        group = [d for k, _, d in found if (k[1], k[2], d.name) == (dtype, layout, name)]
        means = [_mean(group, lambda d, other=other: d.ratio(other)) for other in names]
        table.append(
            [
                *("geometric mean", dtype, layout, name, "", ""),
                *(_number(mean, "{:.1f}") for mean in means),
                _number(_mean(group, Direction.copies), "{:.2f}"),
                "",
            ]
        )
    speeds = [f"{about[name]} {name}" for name in ("copy", "peak") if about.get(name)]
    lines = [
        f"times on {about['device']}" + (f": {', '.join(speeds)}" if speeds else ""),
        "x: how many times faster than that, cold; copies: our time over that of copying x;",
        "bwd: a training step less a forward pass; of peak: the fewest bytes (fwd read x, write y;",
        "bwd read x and g, write dx) in our time, cold, over the peak of the memory.",
        _aligned(table),
    ]
    return "\n".join(lines)


def _mean(group: Sequence[Direction], value: Callable[[Direction], float | None]) -> float | None:
    known = [found for found in map(value, group) if found is not None]
    return statistics.geometric_mean(known) if known else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _aligned(table: Table) -> str:
    """Columns with two spaces between them; what is a number stands to the right."""
    columns = []
    for place, column in enumerate(zip(*table, strict=True)):
        width = max(map(len, column))
        numbers = place > 0 and any(cell[:1].isdigit() for cell in column[1:])
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
