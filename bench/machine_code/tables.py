"""How kernels are shown, and the table of them that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from bench.machine_code.limits import (
    ARCHS_OF_LOOPS,
    Inspected,
    costs_by_arch,
    geometric_mean,
)
from bench.machine_code.loops import HotLoop
from bench.machine_code.names import Name

KEPT = Path(__file__).resolve().parents[1] / "results" / "machine_code.md"

_NAME = ["kernel", "body", "dtype", "layout", "W"]


def resources(kernels: Sequence[Inspected]) -> str:
    """One line for each kernel and architecture; main ones bear a star."""
    lines = [["", *_NAME, "arch", "regs", "stack", "local", "shared", "threads"]]
    lines[0] += ["occupancy", "128-bit"]
    for each in kernels:
        kernel = each.kernel
        lines.append(
            [
                "*" if each.name.is_main else "",
                *_cells(each.name),
                each.arch,
                str(kernel.registers),
                str(kernel.stack),
                f"{kernel.count('STL')}/{kernel.count('LDL')}",
                str(kernel.shared),
                str(kernel.threads),
                f"{each.occupancy:.0%}",
                f"{kernel.count('LDG', wide=True)}/{kernel.count('STG', wide=True)}",
            ]
        )
    return _aligned(lines, left=1 + len(_NAME))


def hot_loops(kernels: Sequence[Inspected]) -> str:
    """One line for each hot loop."""
    lines = [["", *_NAME, "arch", "at", "way", "instructions", "16 bytes", "cost", "in flight"]]
    lines[0] += ["narrow", "loops inside", "calls"]
    for each in kernels:
        lines += [
            [
                "*" if each.name.is_main else "",
                *_cells(each.name),
                each.arch,
                f"{loop.start:#x}",
                loop.way,
                str(loop.instructions),
                str(loop.sixteens),
                f"{loop.cost:.0f}",
                str(loop.in_flight),
                str(loop.narrow),
                str(loop.nested),
                str(loop.calls),
            ]
            for loop in each.loops
        ]
    return _aligned(lines, left=1 + len(_NAME))


def summary(kernels: Sequence[Inspected]) -> list[str]:
    """For each architecture, how many hot loops there are and what they cost."""
    return [
        f"{arch}: {len(costs)} hot loops without float64, {geometric_mean(costs):.1f} instructions "
        f"for each 16 bytes in geometric mean, {max(costs):.1f} at most"
        for arch, costs in sorted(costs_by_arch(kernels).items(), key=lambda item: _order(item[0]))
    ]


def in_order(kernels: Sequence[Inspected]) -> list[Inspected]:
    """By name, then architecture."""
    return sorted(kernels, key=lambda each: (each.name, _order(each.arch)))


def kept_text(kernels: Sequence[Inspected], compiler: str) -> str:
    """The table that is kept; `compiler` is a version of nvcc."""
    lines = [
        "# The machine code of the CUDA kernels",
        "",
        f"{_first_line(compiler)} `python -m bench.inspect_cuda --write` writes it;",
        "[bench/README.md](../README.md#machine-code) tells what the columns mean.",
        "",
        "## Hot loops",
        "",
        *(f"- {line}" for line in summary(kernels) if line.split(":")[0] in ARCHS_OF_LOOPS),
        "",
        *_markdown(_loop_lines(kernels)),
        "",
        "## Registers",
        "",
        "Of a thread, by architecture; `+8` are 8 bytes of stack.",
        "",
        *_markdown(_register_lines(kernels)),
    ]
    return "\n".join(lines) + "\n"


def kept_is_stale(kernels: Sequence[Inspected], compiler: str, kept: str) -> bool | None:
    """Whether the kept table is not what the kernels give; None if another nvcc made it."""
    if _first_line(compiler) not in kept:
        return None
    return kept_text(kernels, compiler) != kept


def _first_line(compiler: str) -> str:
    return f"Compiled by nvcc {compiler}."


def _loop_lines(kernels: Sequence[Inspected]) -> list[list[str]]:
    lines = [list(_NAME)]
    for arch in ARCHS_OF_LOOPS:
        lines[0] += [arch, "in flight", "narrow", "notes"]
    for name, by_arch in _by_name(kernels).items():
        columns = [by_arch[arch].loops if arch in by_arch else [] for arch in ARCHS_OF_LOOPS]
        for loops in zip_longest(*columns):
            cells = [cell for loop in loops for cell in _loop_cells(loop)]
            lines.append([*_cells(name, "`"), *cells])
    return lines


def _loop_cells(loop: HotLoop | None) -> list[str]:
    if loop is None:
        return [""] * 4
    cost = f"{loop.instructions} / {loop.sixteens} = {loop.cost:.0f}"
    notes = [loop.way] if loop.way != "LDG" else []
    notes += [f"{loop.nested} inside"] if loop.nested else []
    notes += [f"{loop.calls} called"] if loop.calls else []
    return [cost, str(loop.in_flight), str(loop.narrow), ", ".join(notes)]


def _register_lines(kernels: Sequence[Inspected]) -> list[list[str]]:
    archs = sorted({each.arch for each in kernels}, key=_order)
    lines = [[*_NAME, *archs]]
    for name, by_arch in _by_name(kernels).items():
        lines.append([*_cells(name, "`"), *(_registers(by_arch.get(arch)) for arch in archs)])
    return lines


def _registers(each: Inspected | None) -> str:
    if each is None:
        return ""
    stack = f" +{each.kernel.stack}" if each.kernel.stack else ""
    return f"{each.kernel.registers}{stack}"


def _by_name(kernels: Sequence[Inspected]) -> dict[Name, dict[str, Inspected]]:
    found: dict[Name, dict[str, Inspected]] = {}
    for each in in_order(kernels):
        found.setdefault(each.name, {})[each.arch] = each
    return found


def _cells(name: Name, quote: str = "") -> list[str]:
    body = f"{quote}{name.body}{quote}" if name.body else ""
    return [name.kernel, body, name.dtype, name.layout, str(name.width or "")]


def _order(arch: str) -> tuple[float, str]:
    return float(arch.rstrip("af")), arch


def _markdown(lines: list[list[str]]) -> list[str]:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "|" + "|".join("---" if i < len(_NAME) else "---:" for i in range(len(lines[0]))) + "|"
    return [rows[0], rule, *rows[1:]]


def _aligned(lines: list[list[str]], left: int) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
