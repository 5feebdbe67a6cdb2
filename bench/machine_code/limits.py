"""What kernels must not do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cbam_ext.building import decisions

from bench.machine_code.flow import analyse
from bench.machine_code.loops import HotLoop, hot_loops, is_wide
from bench.machine_code.names import Name
from bench.machine_code.sass import Kernel

# What builds have machine code for by default, which runs on all that lie between; and those whose
# hot loops are held to LIMITS.
ARCHS = decisions.DEFAULT_ARCHS
ARCHS_OF_LOOPS = ("8.0", "9.0")


@dataclass(frozen=True)
class Limits:
    """The most that is allowed: about what an H100 can issue while memory delivers 16 bytes."""

    cost: float  # warp instructions for each 16 bytes that a thread loads, in any hot loop
    mean_cost: float  # the geometric mean over an architecture's hot loops
    uncounted: int  # an architecture's main kernels with calls or loops inside hot loops
    stack: Mapping[str, int] = field(default_factory=dict)  # bytes of a kernel's stack; else none


LIMITS = Limits(cost=100, mean_cost=50, uncounted=0)
LEAST_OCCUPANCY = 0.5

_REGISTERS = 65536
# Threads, and blocks, that a multiprocessor holds, by architecture.
_RESIDENT = {
    "7.5": (1024, 16),
    "8.0": (2048, 32),
    "8.6": (1536, 16),
    "8.9": (1536, 24),
    "9.0": (2048, 32),
    "10.0": (2048, 32),
    "12.0": (1536, 24),
}


@dataclass(frozen=True)
class Inspected:
    """A kernel, and what was found out about it."""

    name: Name
    arch: str  # like "9.0"
    kernel: Kernel
    loops: list[HotLoop]
    faults: list[str]

    @property
    def occupancy(self) -> float:
        """Of a multiprocessor's threads, the share that the kernel's registers allow."""
        threads, blocks = _RESIDENT.get(self.arch.rstrip("af"), (2048, 32))
        warps = -(-self.kernel.threads // 32)
        # Registers come in lots of 256 for a warp, from one of four parts of the register file.
        lot = -(-max(self.kernel.registers, 1) * 32 // 256) * 256
        by_registers = (_REGISTERS // 4 // lot) * 4 // warps
        return min(by_registers, threads // 32 // warps, blocks) * warps / (threads // 32)


def inspect(kernel: Kernel, name: Name) -> Inspected:
    """Find out about a kernel."""
    digits = kernel.arch.removeprefix("sm_")
    number = digits.rstrip("af")
    arch = f"{number[:-1]}.{number[-1]}{digits[len(number) :]}"
    flow = analyse(kernel)
    return Inspected(name, arch, kernel, hot_loops(kernel, flow), flow.faults)


def geometric_mean(costs: Iterable[float]) -> float:
    """Of some numbers; 0 if there are none."""
    logarithms = [math.log(cost) for cost in costs]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 0.0


def costs_by_arch(kernels: Iterable[Inspected]) -> dict[str, list[float]]:
    """What the hot loops of kernels cost that are there for speed."""
    costs: dict[str, list[float]] = {}
    for each in kernels:
        if each.name.is_for_speed:
            costs.setdefault(each.arch, []).extend(loop.cost for loop in each.loops)
    return {arch: found for arch, found in costs.items() if found}


def complaints(kernels: list[Inspected], limits: Limits = LIMITS) -> list[str]:
    """What is wrong with kernels; that there is no main kernel among them is wrong, too."""
    if not any(each.name.is_main for each in kernels):
        return ["there is no main kernel"]
    found = [
        f"{each.name} ({each.arch}) {problem}"
        for each in kernels
        for problem in _problems(each, limits)
    ]
    for arch, costs in costs_by_arch(kernels).items():
        if arch not in ARCHS_OF_LOOPS:
            continue
        mean = geometric_mean(costs)
        if mean > limits.mean_cost:
            found.append(
                f"the hot loops for {arch} take {mean:.1f} instructions for each 16 bytes in "
                f"geometric mean, more than {limits.mean_cost:g}"
            )
        uncounted = sorted(str(k.name) for k in kernels if k.arch == arch and _costs_more(k))
        if len(uncounted) > limits.uncounted:
            found.append(
                f"{len(uncounted)} main kernels for {arch} call functions in hot loops or have "
                f"loops inside them, more than {limits.uncounted}: {', '.join(uncounted)}"
            )
    return found


def _costs_more(each: Inspected) -> bool:
    """Whether a main kernel's hot loops do more than is counted."""
    return each.name.is_main and any(loop.calls or loop.nested for loop in each.loops)


def _problems(each: Inspected, limits: Limits) -> list[str]:
    kernel, found = each.kernel, list(each.faults)
    stores, loads = kernel.count("STL"), kernel.count("LDL")
    allowed = limits.stack.get(each.arch, 0)
    if kernel.stack > allowed or (not allowed and stores + loads):
        found.append(f"uses {kernel.stack} bytes of stack, with {stores} stores and {loads} loads")
    if each.name.is_for_speed and each.arch in ARCHS_OF_LOOPS:
        found += [
            f"takes {loop.instructions} instructions for {loop.sixteens} times 16 bytes in its "
            f"loop at {loop.start:#x}: {loop.cost:.0f}, more than {limits.cost:g}"
            for loop in each.loops
            if loop.cost > limits.cost
        ]
    if each.name.is_main:
        found += [
            f"has {loop.hidden} 128-bit loads in functions that its loop at {loop.start:#x} calls"
            for loop in each.loops
            if loop.hidden
        ]
        if each.occupancy < LEAST_OCCUPANCY:
            found.append(f"fills {each.occupancy:.0%} of a multiprocessor")
        if not each.loops:
            wide = sum(map(is_wide(kernel), kernel.instructions))
            found.append(f"has no loop with 128-bit loads; {wide} are elsewhere")
    return found
