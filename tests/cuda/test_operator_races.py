"""The operators have no races, and would have them without any of their barriers and waits.

The fast build shows global memory; the slow tests have the instrumented one, which shows shared
memory too.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cbam_ext

from emulation import Emulation, build, exercise, operators
from emulation.build import Build
from emulation.control import ORDERS
from emulation.races import Detection, Sync, detect
from support import samples
from support.backends import SEED
from support.packages import CHECKOUT
from support.samples import PROBLEMS, Arguments, Problem

# Barriers that order nothing that something else does not order: the kernel, the file and the line
# before it; and why. Whoever adds one here may as well take the barrier away.
REDUNDANT: dict[tuple[str, str, str], str] = {}


@dataclass(frozen=True)
class Machine:
    """An emulated library, under its own namespace."""

    kind: Build
    device: Emulation
    ops: Any

    def detect(
        self,
        arguments: Arguments,
        generator: torch.Generator,
        without: tuple[Sync, ...] = (),
        chunked: bool = True,
    ) -> Detection:
        """What is found in all operators on these arguments, which a kernel has just written."""
        if chunked:  # a cache for one sample of x and g, on a device on which launches cost nothing
            x = arguments.input
            sample = x[:1].numel() * x.element_size()
            self.device.configure(multiprocessors=0, l2_bytes=2 * sample)
        else:
            self.device.configure()
        names = {
            name: tensor
            for name, tensor in zip(samples.NAMES, arguments, strict=True)
            if tensor is not None
        }
        with detect(self.device, names, without) as found:
            for name, tensor in names.items():
                found.foreign_launch(f"producer of {name}", tensor)
            exercise.run_all(self.ops, arguments, generator)
        return found


@pytest.fixture(
    params=[Build.FAST, pytest.param(Build.INSTRUMENTED, marks=pytest.mark.slow)],
    ids=lambda kind: kind.value,
)
def machine(request: pytest.FixtureRequest) -> Any:
    kind: Build = request.param
    device = operators(kind)
    namespace = build.NAMESPACES[kind]
    cbam_ext.ops.register(namespace)
    yield Machine(kind, device, getattr(torch.ops, namespace))
    device.configure()
    device.set_order()


def _family(kernel: str) -> str:
    """The kernel, and the body of a sweep, without the rest of the template's arguments."""
    match = re.match(r"\w+(<\w+(?=<))?", kernel.replace("cbam::cuda::", ""))
    assert match is not None, kernel
    return match[0]


# -------------------------------------------------------------------------------- as they are


@pytest.mark.parametrize("order", ORDERS)
def test_no_races_on_few(machine: Machine, generator: torch.Generator, order: str) -> None:
    # All that is shared is watched in any order, and takes its time: many runs see all pairs.
    first = (ORDERS.index(order) + SEED) % 3
    problems = samples.FEW[first::3] if machine.kind is Build.INSTRUMENTED else samples.FEW
    for problem in problems:
        arguments = samples.draw(problem, generator)
        with machine.device.order(order, 1):
            found = machine.detect(arguments, generator)
        assert not found.conflicts, _text(found)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Build.INSTRUMENTED], indirect=True)
@pytest.mark.parametrize("problem", PROBLEMS[SEED % 8 :: 8], ids=str)  # many runs see all of them
def test_no_races(machine: Machine, generator: torch.Generator, problem: Problem) -> None:
    """On the suite's samples, in one of the orders; in one chunk or several."""
    number = PROBLEMS.index(problem) + samples.DTYPES.index(problem.dtype)
    arguments = samples.draw(problem, generator)
    with machine.device.order(ORDERS[number % 3], number):
        found = machine.detect(arguments, generator, chunked=number % 2 == 1)
    assert not found.conflicts, _text(found)


def test_all_operators_are_called(machine: Machine, generator: torch.Generator) -> None:
    arguments = samples.draw(samples.FEW[0], generator)
    names = exercise.run_all(machine.ops, arguments, generator).keys()
    assert names == exercise.operator_names(machine.ops.forward._qualified_op_name.split("::")[0])


def _text(found: Detection) -> str:
    return "\n".join(map(str, found.conflicts))


# --------------------------------------------------------------------------- with one thing less

# What is for the order of launches, not of the threads of one.
BETWEEN_LAUNCHES = ("wait",)

# Sizes at which every barrier counts: several spans, several tiles, kernels too large to stage,
# more hidden units than a block takes at once.
EXACTING = [
    Problem((2, 9, 5, 7), 3, 2, layout="nhwc", biases="12c"),
    Problem((1, 8, 70, 10), 3, biases="12c"),
    Problem((1, 8, 70, 10), 3, layout="nhwc"),
    Problem((2, 3, 5, 5), 49),
    Problem((1, 300, 7, 7), 7, 4),
    Problem((1, 300, 7, 7), 7, 4, layout="nhwc"),
    Problem((3, 6, 5, 7), 3, 2, torch.float16, biases="c"),
    Problem((1, 40, 3, 5), 3, 300),
    Problem((1, 300, 2, 3), 3, 300),
    Problem((1, 300, 7, 7), 7, 4, gates="channel"),
    Problem((2, 9, 5, 7), 3, 2, layout="nhwc", gates="channel"),
    Problem((1, 8, 70, 10), 3, gates="spatial"),
]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Build.INSTRUMENTED], indirect=True)
def test_every_sync_is_needed(machine: Machine, generator: torch.Generator) -> None:
    """Each barrier and wait that runs, one at a time."""
    removed, missed = _remove_each(machine, EXACTING, generator, {"launch"})
    assert {site.what for site in removed} == {"barrier", "wait"}
    found = {(site.family, site.file, site.line_before) for site in missed}
    assert not found - REDUNDANT.keys(), f"no race without {missed}"
    assert not REDUNDANT.keys() - found, "these are needed, or gone"


def test_every_sync_of_global_memory_is_needed(
    machine: Machine, generator: torch.Generator
) -> None:
    problem = EXACTING[0]
    removed, missed = _remove_each(machine, [problem], generator, {"launch", "barrier"})
    assert {site.what for site in removed} == {"wait"}
    assert not missed


@dataclass(frozen=True)
class Site:
    """A line of a family of kernels that puts accesses in an order."""

    what: str
    family: str
    file: str
    line: int
    line_before: str


def _remove_each(
    machine: Machine, problems: list[Problem], generator: torch.Generator, but: set[str]
) -> tuple[set[Site], set[Site]]:
    """All that was taken away, and of it what nobody missed.

    A line is needed by a family of kernels if one of them needs it in one of the problems.
    """
    removed: set[Site] = set()
    needed: set[Site] = set()
    for problem in problems:
        arguments = samples.draw(problem, generator)
        present = machine.detect(arguments, generator).syncs
        left = [sync for sync in present if sync.what not in but and _site(sync) not in needed]
        removed |= set(map(_site, left))
        for together in _rounds(left):
            found = machine.detect(arguments, generator, together)
            needed |= {_site(sync) for sync in together if _is_missed(sync, found)}
    return removed, removed - needed


def _rounds(syncs: list[Sync]) -> list[tuple[Sync, ...]]:
    """What to take away at once: of barriers and fences one of each kernel."""
    by_kernel: dict[str, list[Sync]] = {}
    for sync in syncs:
        if sync.what not in BETWEEN_LAUNCHES:
            by_kernel.setdefault(sync.kernel, []).append(sync)
    alone = [(sync,) for sync in syncs if sync.what in BETWEEN_LAUNCHES]
    together = itertools.zip_longest(*by_kernel.values())
    return alone + [tuple(sync for sync in each if sync is not None) for each in together]


def _is_missed(sync: Sync, found: Detection) -> bool:
    """Whether something was found that comes of lacking it; of barriers, within the kernel."""
    conflicts = found.conflicts
    if sync.what not in BETWEEN_LAUNCHES:
        return any(
            c.finding == "race" and sync.kernel == c.first.kernel == c.second.kernel
            for c in conflicts
        )
    # Others may suffer, and not itself: what comes behind waits for it, and takes for done what was
    # before it.
    return any(c.finding == "race" and c.first.launch < c.second.launch for c in conflicts)


def _site(sync: Sync) -> Site:
    if not sync.file:
        return Site(sync.what, _family(sync.kernel), "", 0, "")
    path = Path(sync.file)
    before = (CHECKOUT / path).read_text().splitlines()[sync.line - 2].strip()
    function = re.match(r"inline .*?\w+\(", before)  # without its parameters
    before = function[0] if function else before
    return Site(sync.what, _family(sync.kernel), path.name, sync.line, before)


def test_the_producer_of_the_input_may_not_overlap(
    machine: Machine, generator: torch.Generator
) -> None:
    """The first launch of a call reads x before it waits, so it must not be a dependent one."""
    arguments = samples.draw(EXACTING[0], generator)
    x = arguments.input

    def pool(without: tuple[Sync, ...] = ()) -> Detection:
        with detect(machine.device, {"x": x}, without) as found:
            found.foreign_launch("producer", x)
            machine.ops._pool(x)
        return found

    found = pool()
    assert not found.conflicts
    first = next(sync for sync in found.syncs if sync.what == "launch")
    conflicts = pool((first,)).conflicts
    assert {c.finding for c in conflicts} == {"race"}
    assert {c.first.kernel for c in conflicts} == {"producer"}
    assert all(re.fullmatch(r"x \+ \d+", c.where) for c in conflicts)


def test_results_are_those_without_the_detector(
    machine: Machine, generator: torch.Generator
) -> None:
    arguments = samples.draw(EXACTING[0], generator)

    def run() -> list[Tensor]:
        state = generator.get_state()
        results = exercise.run_all(machine.ops, arguments, generator)
        generator.set_state(state)
        return [tensor for tensors in results.values() for tensor in tensors]

    plain = run()
    with detect(machine.device):
        watched = run()
    assert all(samples.same_bits(a, b) for a, b in zip(plain, watched, strict=True))
