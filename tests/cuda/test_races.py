"""The detector of races, on toy kernels: what orders accesses, what does not, and what it says.

Random programs are also judged by the definition, with the order of all their steps written out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from emulation import build
from emulation.build import Build
from emulation.control import ORDERS
from emulation.happens_before import Program, race_of
from emulation.races import Detection, Sync, detect
from emulation.toys import Toys


@pytest.fixture(scope="module")
def toys() -> Iterator[Toys]:
    toys = Toys(build.build_toys(Build.INSTRUMENTED))
    yield toys
    toys.set_order()


@pytest.fixture
def data() -> Tensor:
    return torch.zeros(64, dtype=torch.int32)


def _run(
    toys: Toys, data: Tensor, launches: str | list[str], order: str = "forward", **options: object
) -> Detection:
    """Launches of `follow`, one a line; those that may overlap the one before begin with "~"."""
    lines = [launches] if isinstance(launches, str) else launches
    with toys.order(order, 3), detect(toys, {"data": data}, **options) as found:  # type: ignore[arg-type]
        for line in lines:
            toys.follow(line.lstrip("~ "), data, dependent=line.startswith("~"))
    return found


def _findings(found: Detection) -> set[str]:
    return {conflict.finding for conflict in found.conflicts}


# ------------------------------------------------------------------------------- in shared memory


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("program", "races"),
    [
        ("0.0 write 1; 0.1 read 1", True),
        ("0.0 read 1; 0.1 write 1", True),
        ("0.0 write 1; 0.1 write 1", True),
        ("0.0 read 1; 0.1 read 1", False),
        ("0.0 write 1; 0.0 read 1; 0.0 write 1", False),
        ("0.0 write 1; 0.1 read 2", False),
        ("0.0 write 1; 1.0 read 1", False),  # each block has its own
        ("0.0 write 1; 0 barrier; 0.40 read 1", False),
        ("0.0 read 1; 0 barrier; 0.40 write 1", False),
        ("0.0 write 1; 1 barrier; 0.40 read 1", True),
        ("0 barrier; 0.0 write 1; 0.40 read 1; 0 barrier", True),
        ("0.0 write 1; 0 syncwarp; 0.31 read 1", False),
        ("0.0 write 1; 0 syncwarp; 0.32 read 1", True),
        ("0.0 write 1; 0 shuffle; 0.31 read 1", True),  # it hands on a value, no more
        # Reads are remembered as one; each of them counts.
        ("0.0 read 1; 0.1 read 1; 0 syncwarp; 0.2 write 1", False),
        ("0.0 read 1; 0.1 read 1; 0 syncwarp; 0.32 write 1", True),
        ("0.0 read 1; 0.1 read 1; 0.0 write 1", True),
        ("0.0 read 1; 0.32 read 1; 0 syncwarp; 0.0 write 1", True),
        ("0.0 read 1; 0.32 read 1; 0 barrier; 0.0 write 1", False),
        ("0 read 1; 0 barrier; 0.0 read 1; 0.0 write 1", False),
        ("0.0 write-byte 1; 0.1 write-byte 2", False),
        ("0.0 write-byte 3; 0.1 read-byte 3", True),
        ("0.0 write-byte 7; 0.1 read 1", True),
        ("0.0 write-byte 8; 0.1 read 1", False),
        ("0.0 write 1; 0.0 write-byte 4; 0.1 read-byte 7", True),  # with the first
        ("0.0 add-shared 1; 0.1 add-shared 1", False),
        ("0.0 add-shared 1; 0.1 read 1", True),
        ("0.0 add-shared 1; 0 barrier; 0.1 read 1", False),
    ],
)
def test_shared_memory(toys: Toys, data: Tensor, program: str, races: bool, order: str) -> None:
    found = _run(toys, data, program, order)
    assert _findings(found) == ({"race"} if races else set()), found.conflicts


# ------------------------------------------------------------------------------- in global memory

# Block 0 hands word 5 to block 1, which comes later here.
PUBLISH = "0.0 store 5; 0.0 fence; 0.0 add 0"
GLOBAL = [
    ("0.0 store 5; 1.0 store 5", {"race"}),
    ("0.0 store 5; 1.0 ldcg 5", {"race"}),
    ("0.0 ldcg 5; 1.0 store 5", {"race"}),
    ("0.0 store 5; 0.0 ldca 5; 1.0 ldcg 6", set()),
    ("0.0 store 5; barrier; 1.0 ldcg 5", {"race"}),
    ("0.0 add 0; 1.0 add 0", set()),
    ("0.0 add 0; 1.0 ldcg 0", {"race"}),
    ("0.0 ldcg 0; 0.0 add 0; 1.0 add 0", {"race"}),  # with the load
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", set()),
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.0 store 5", set()),
    (f"{PUBLISH}; 1.0 add 1; 1.0 fence; 1.0 ldcg 5", {"race"}),  # another word
    (f"{PUBLISH}; 1.0 fence; 1.0 add 0; 1.0 ldcg 5", {"race"}),
    (f"{PUBLISH}; 1.0 add 0; 1.0 ldcg 5", {"race"}),
    ("0.0 store 5; 0.0 add 0; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", {"race"}),
    ("0.0 store 5; 0.0 add 0; 0.0 fence; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", {"race"}),
    ("0.0 fence; 0.0 store 5; 0.0 add 0; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", {"race"}),
    # Barriers hand on what a fence has done, before and after.
    ("0.9 store 5; 0 barrier; 0.0 fence; 0.0 add 0; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", set()),
    ("0.9 store 5; 0 fence; 0 barrier; 0.0 add 0; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", set()),
    ("0.9 store 5; 0.0 fence; 0 barrier; 0.0 add 0; 1.0 add 0; 1.0 fence; 1.0 ldcg 5", {"race"}),
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1 barrier; 1.40 ldcg 5", set()),
    (f"{PUBLISH}; 1.0 add 0; 1 barrier; 1.40 fence; 1.40 ldcg 5", set()),
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.40 ldcg 5", {"race"}),
    (f"{PUBLISH}; 1.0 add 0; 1 barrier; 1.39 fence; 1.40 ldcg 5", {"race"}),
    # Over a block in between, by the same word and by another.
    (f"{PUBLISH}; 1.0 add 0; 2.0 add 0; 2.0 fence; 2.0 ldcg 5", set()),
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.0 add 1; 2.0 add 1; 2.0 fence; 2.0 ldcg 5", set()),
    (f"{PUBLISH}; 1.0 add 0; 1.0 add 1; 2.0 add 1; 2.0 fence; 2.0 ldcg 5", {"race"}),
    # Who has seen the last atomic may use the counter as plain memory again.
    ("0.0 add 0; 1.0 add 0; 1.0 store 0", set()),
    ("0.0 add 0; 1.0 add 0; 1 barrier; 1.40 store 0", set()),
    ("0.0 add 0; 1.0 add 0; 1.40 store 0", {"race"}),
    ("0.0 add 0; 1.0 add 1; 1.0 store 0", {"race"}),
    # What is ordered may still be read past the L1 cache alone, and never by the read-only path.
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.0 ldca 5", {"stale L1"}),
    (f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.0 ldg 5", {"read-only path"}),
    ("0.0 store 5; 0.0 ldg 5", {"read-only path"}),
    ("0.0 ldg 5; 0.0 store 5", {"read-only path"}),
    ("0.0 ldg 5; 0.0 ldca 5; 0.0 store 5", {"read-only path"}),
]


@pytest.mark.parametrize(("program", "findings"), GLOBAL)
def test_global_memory(toys: Toys, data: Tensor, program: str, findings: set[str]) -> None:
    with detect(toys, {"data": data}) as found:
        toys.follow(program, data, grid=3)
    assert _findings(found) == findings, found.conflicts


@pytest.mark.parametrize("order", ORDERS)
def test_dependence_on_the_order_of_blocks_is_a_race(toys: Toys, order: str) -> None:
    """Where a value happens to be right as well."""
    with toys.order(order, 1), detect(toys) as found:
        toys.fault("order of blocks", grid=4)
    assert _findings(found) == {"race"}


# ------------------------------------------------------------------------------- between launches

LAUNCHES = [
    (["0.0 store 5", "1.0 ldca 5"], set()),
    (["0.0 store 5", "1.0 ldg 5"], set()),
    (["0.0 store 5", "~ 1.0 ldca 5"], {"race"}),
    (["0.0 ldca 5", "~ 1.0 store 5"], {"race"}),
    (["0.0 store 5", "~ wait; 1.0 ldca 5"], set()),
    (["0.0 store 5", "~ 1.0 ldca 5; wait"], {"race"}),
    (["0.0 store 5", "~ 0 wait; 1.0 ldca 5"], {"race"}),
    (["0.0 store 5", "~ 1.0 wait; 1 barrier; 1.40 ldca 5"], set()),
    (["0.0 store 5", "~ 1.0 wait; 1 syncwarp; 1.2 ldca 5"], set()),
    (["0.0 store 5", "~ 1.0 wait; 1 syncwarp; 1.40 ldca 5"], {"race"}),
    # What is read through the read-only path must not change while the kernel runs.
    (["0.0 store 5", "~ wait; 1.0 ldg 5"], {"read-only path"}),
    # A launch may begin when all blocks of the one before have triggered or ended, but what those
    # have left is there after the wait alone.
    (["trigger; 0.0 store 5", "~ 1.0 ldca 5"], {"race"}),
    (["0.0 store 5; trigger", "~ 1.0 ldca 5"], {"race"}),
    (["0.0 store 5", "~ wait; trigger", "~ 1.0 ldca 5"], set()),
    (["0.0 store 5", "~ trigger; wait", "~ 1.0 ldca 5"], {"race"}),
    (["0.0 store 5", "~ trigger; wait; trigger", "~ 1.0 ldca 5"], {"race"}),  # the first counts
    (["0.0 store 5", "~ 0 wait; 0 trigger; 1 trigger", "~ 1.0 ldca 5"], {"race"}),
    (["0.0 store 5", "~ wait", "~ 1.0 ldca 5"], set()),
    (["0.0 store 5", "~ trigger; wait", "~ wait; 1.0 ldca 5"], set()),
    # The end of one that did not wait says nothing of those before it.
    (["0.0 store 5", "~ trigger", "~ wait; 1.0 ldca 5"], {"race"}),
    (["0.0 store 5", "~ trigger", "1.0 ldca 5"], set()),
    (["0.0 ldg 5", "~ wait; 0.0 store 5"], set()),
]


@pytest.mark.parametrize(("launches", "findings"), LAUNCHES)
def test_launches(toys: Toys, data: Tensor, launches: list[str], findings: set[str]) -> None:
    found = _run(toys, data, launches)
    assert _findings(found) == findings, found.conflicts


def test_launches_of_others(toys: Toys, data: Tensor) -> None:
    with detect(toys, {"data": data}) as found:
        found.foreign_launch("producer", data)
        toys.follow("wait; 0.0 ldcg 5", data, dependent=True)
    assert not found.conflicts
    with detect(toys, {"data": data}) as found:
        found.foreign_launch("producer", data)
        toys.follow("0.0 ldcg 5; wait", data, dependent=True)
    (conflict,) = found.conflicts
    assert (conflict.first.kernel, conflict.where) == ("producer", "data + 20")


def test_memset_is_no_launch_to_overlap(toys: Toys, data: Tensor) -> None:
    for dependent in (False, True):
        with detect(toys) as found:
            toys("memset", data, 0, 256)
            toys.follow("wait; 0.0 ldcg 5", data, dependent=dependent)
        assert _findings(found) == ({"overlap"} if dependent else set())
    with detect(toys) as found:
        toys.follow("wait; 0.0 ldcg 5", data, dependent=True)  # over whatever there was
    assert _findings(found) == {"overlap"}


def test_what_nobody_wrote(toys: Toys, data: Tensor) -> None:
    with detect(toys) as found:
        toys("memset", data, 0, 256)
        toys("fresh", data, 128)
        toys.follow("0.0 ldcg 32; 0.0 store 3; 0.0 ldcg 3", data)
    assert not found.conflicts
    with detect(toys) as found:
        toys("fresh", data, 128)
        toys("memset", data[1:], 0, 4)
        toys.follow("0.0 add 1; 0.0 add 0", data)
    (conflict,) = found.conflicts
    assert (conflict.finding, conflict.where) == ("uninitialised", "the workspace + 0")


# -------------------------------------------------------------------------- what is said, controls


def test_both_accesses_are_named(toys: Toys, data: Tensor) -> None:
    found = _run(toys, data, ["1.33 store 5", "~ 0.2 ldcg 5; 0.3 write 4; 0.4 write 4"])
    race, shared = found.conflicts
    assert race.where == "data + 20"
    first, second = race.first, race.second
    assert (first.kernel, first.launch, first.block, first.thread) == ("follow", 1, 1, 33)
    assert (second.kernel, second.launch, second.block, second.thread) == ("follow", 2, 0, 2)
    assert (first.access, second.access) == ("stwb", "ldcg")
    lines = (build.HERE / "racing_toys.cu").read_text().splitlines()
    for access, text in ((first, "__stwb(data + step.place, total)"), (second, "__ldcg")):
        file, _, line = access.lines[0].partition(":")
        assert file == "racing_toys.cu"
        assert text in lines[int(line) - 1]
    assert shared.where == "shared memory + 16"
    assert (shared.first.thread, shared.second.thread) == (3, 4)
    assert "write by follow (launch 2), block 0, thread 4, at racing_toys.cu:" in str(shared)


def test_a_reader_that_races_is_named(toys: Toys, data: Tensor) -> None:
    """Of those that are remembered as one, and not the writer itself."""
    cases = [
        ("0.5 read 1; 0.6 read 1; 0.6 write 1", (5, 6)),
        ("0.0 read 1; 0.1 read 1; 0 shuffle; 0.0 write 1", (1, 0)),
        ("0.0 read 1; 0.32 read 1; 0 syncwarp; 0.33 write 1", (0, 33)),
        ("0.0 read 1; 0.1 read 1; 0.32 read 1; 0 syncwarp; 0.33 write 1", (0, 33)),
    ]
    for program, threads in cases:
        (race,) = _run(toys, data, program).conflicts
        assert (race.first.thread, race.second.thread) == threads
    with toys.order("reverse"), detect(toys) as found:
        toys.follow("0.0 read 1; 0.32 read 1; 0 syncwarp; 0.0 write 1", data)
    (race,) = found.conflicts
    assert (race.first.thread, race.second.thread) == (32, 0)


def test_each_sync_can_be_taken_away(toys: Toys, data: Tensor) -> None:
    programs = {
        "barrier": ["0.0 write 1; 0 barrier; 0.40 read 1"],
        "syncwarp": ["0.0 write 1; 0 syncwarp; 0.1 read 1"],
        "fence": [f"{PUBLISH}; 1.0 add 0; 1.0 fence; 1.0 ldcg 5"],
        "wait": ["0.0 store 5", "~ wait; 1.0 ldca 5"],
        "launch": ["0.0 store 5", "1.0 ldca 5"],
    }
    for what, launches in programs.items():
        found = _run(toys, data, launches)
        assert not found.conflicts, what
        (sync,) = [sync for sync in found.syncs if sync.what == what]
        assert sync.kernel == "follow"
        assert (sync.file, sync.line) == ("", 0) if what == "launch" else sync.line > 0
        without = _run(toys, data, launches, without=[sync])
        assert "race" in _findings(without), what
        assert without.syncs == found.syncs  # it happens all the same
    elsewhere = Sync("barrier", "another kernel", "racing_toys.cu", 1)
    assert not _run(toys, data, programs["barrier"], without=[elsewhere]).conflicts


def test_the_last_block_of_a_sum(toys: Toys) -> None:
    """The toy that csrc/cuda does likewise: right, and without each thing that it needs."""

    def sum_up(without: tuple[Sync, ...] = ()) -> Detection:
        arrived, partials, out = torch.zeros(1), torch.zeros(5), torch.zeros(1)
        with detect(toys, {"partials": partials}, without) as found:
            toys("sum", 5, 64, 1000, torch.randn(1000), partials, arrived, out, 0, 0)
        return found

    found = sum_up()
    assert {sync.what for sync in found.syncs} == {"barrier", "fence", "launch", "memset"}
    # It lacks the fence after the atomic.
    assert {conflict.where.split(" +")[0] for conflict in found.conflicts} == {"partials"}
    places = {(str(c.first.lines), str(c.second.lines)) for c in found.conflicts}
    for sync in found.syncs:
        if sync.what == "barrier":
            more = sum_up((sync,)).conflicts
            assert {(str(c.first.lines), str(c.second.lines)) for c in more} > places, sync


def test_nothing_is_left_of_a_launch_that_failed(toys: Toys, data: Tensor) -> None:
    with detect(toys) as found:
        with pytest.raises(RuntimeError, match="divergent barrier"):
            toys.follow("0.0 write 1; 0.3 barrier", data)
        toys.follow("0.1 read 1", data)
    assert not found.conflicts
    toys.follow("0.0 write 1; 0.1 read 1", data)  # nobody looks
    assert _findings(_run(toys, data, "0.0 write 1; 0.1 read 1")) == {"race"}


# ------------------------------------------------------------------------------ by the definition


def _random_program(choose: random.Random) -> Program:
    """A few launches of a few steps, most of which are about the same two words."""
    launches = []
    for number in range(choose.choice((1, 1, 2, 3))):
        steps = []
        for _ in range(choose.randint(3, 9)):
            block, thread = choose.randrange(2), choose.choice((0, 1, 32))
            what = choose.choice(
                ("store", "ldcg", "store", "ldcg", "read", "write", "read", "write", "read-byte")
                + ("write-byte", "add", "add", "add", "fence", "fence", "barrier", "syncwarp")
                + ("wait", "trigger") * (number > 0)
            )
            if what in ("barrier", "syncwarp"):
                steps.append(f"{block} {what}")
            elif what in ("fence", "wait", "trigger"):
                who = choose.choice((f"{block}.{thread}", f"{block}", ""))
                steps.append(f"{who} {what}".strip())
            else:
                byte = choose.randrange(8) if "byte" in what else choose.randrange(2)
                steps.append(f"{block}.{thread} {what} {byte}")
        dependent = number > 0 and choose.random() < 0.7
        launches.append(("~ " if dependent else "") + "; ".join(steps))
    return Program(launches)


@pytest.mark.parametrize(
    "count", [100, pytest.param(700, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_random_programs(toys: Toys, data: Tensor, generator: torch.Generator, count: int) -> None:
    choose = random.Random(int(torch.randint(2**31, (), generator=generator)))
    outcomes = set()
    for _ in range(count):
        program = _random_program(choose)
        race = race_of(program)
        found = [c for c in _run(toys, data, program.launches).conflicts if c.finding == "race"]
        assert (race is None) == (not found), (program.launches, race, found)
        outcomes.add(race is None)
    assert outcomes == {True, False}


def test_toys_without_faults_have_no_races(toys: Toys) -> None:
    n = 1000
    a, b, out = torch.randn(n), torch.randn(n), torch.empty(n)
    for order, dependent in itertools.product(ORDERS, (0, 1)):
        with toys.order(order, 2), detect(toys) as found:
            found.foreign_launch("producer", a)
            toys("add", 3, 64, n, a, b, out, dependent)
        assert bool(found.conflicts) == bool(dependent), found.conflicts  # it has no wait
