"""Whether a program of the toy kernel `follow` has a race, by the definition.

Every step of every thread is written out as an event, with an edge for each thing that orders two
of them; then all pairs of accesses are tried. `runtime/races.h` says what the edges are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

STORES = {"store", "write", "write-byte", "add"}
LOADS = {"ldcg", "read", "read-byte"}
SHARED = {"read", "write", "read-byte", "write-byte"}
WARP = 32


@dataclass(frozen=True)
class Program:
    """Launches of grids of two blocks of 64 threads; those with "~" may overlap the one before."""

    launches: list[str]


@dataclass(frozen=True)
class Event:
    number: int  # they are numbered in the order in which they run
    launch: int
    block: int
    thread: int
    what: str
    place: int

    @property
    def bytes(self) -> set[tuple[object, int]]:
        """What it accesses."""
        if self.what not in STORES | LOADS:
            return set()
        memory = (self.launch, self.block) if self.what in SHARED else "global"
        if self.what.endswith("byte"):
            return {(memory, self.place)}
        return {(memory, 4 * self.place + i) for i in range(4)}


def race_of(program: Program) -> tuple[Event, Event] | None:
    """Two accesses that nothing puts in an order, or None."""
    events = _events(program)
    after = _order(events)
    seen = _Launches(program, events, after)
    for a, b in itertools.combinations(events, 2):
        if not a.bytes & b.bytes or {a.what, b.what} <= LOADS or a.what == b.what == "add":
            continue
        if a.launch != b.launch:
            ordered = seen.is_complete(a.launch, b)
        else:
            ordered = b.number in after[a.number] or _observed(a, b, events, after)
        if not ordered:
            return a, b
    return None


def _observed(a: Event, b: Event, events: list[Event], after: list[set[int]]) -> bool:
    """An atomic comes before what follows a later one on the same word."""
    return a.what == "add" and any(
        e.what == "add"
        and (e.launch, e.place) == (a.launch, a.place)
        and e.number > a.number
        and b.number in after[e.number]
        for e in events
    )


def _events(program: Program) -> list[Event]:
    """The steps in the order in which the emulation runs them, by default."""
    events: list[Event] = []
    for launch, text in enumerate(program.launches):
        steps = [_parse(step) for step in text.lstrip("~ ").split(";")]
        for block in range(2):
            own = [step for step in steps if step[0] in (-1, block)]
            for between_barriers in _split(own, "barrier"):
                for warp in range(2):
                    for between_syncs in _split(between_barriers, "syncwarp"):
                        for thread in range(warp * WARP, (warp + 1) * WARP):
                            for _, who, what, place in between_syncs:
                                if who in (-1, thread):
                                    number = len(events)
                                    event = Event(number, launch, block, thread, what, place)
                                    events.append(event)
    return events


def _parse(text: str) -> tuple[int, int, str, int]:
    words = text.split()
    block, _, thread = words.pop(0).partition(".") if words[0][0].isdigit() else ("-1", "", "")
    return int(block), int(thread or -1), words[0], int(words[1]) if len(words) > 1 else -1


def _split(
    steps: list[tuple[int, int, str, int]], at: str
) -> list[list[tuple[int, int, str, int]]]:
    """Runs of steps; each ends with the step `at`, but for the last."""
    runs: list[list[tuple[int, int, str, int]]] = [[]]
    for step in steps:
        runs[-1].append(step)
        if step[2] == at:
            runs.append([])
    return runs


def _order(events: list[Event]) -> list[set[int]]:
    """For each event those that come after it, within its launch."""
    edges: set[tuple[int, int]] = set()
    by_thread: dict[tuple[int, int, int], list[Event]] = {}
    for event in events:
        by_thread.setdefault((event.launch, event.block, event.thread), []).append(event)
    for own in by_thread.values():
        edges |= {(a.number, b.number) for a, b in itertools.pairwise(own)}
    # Events of one barrier, or of one __syncwarp: what comes before one comes before all others.
    met: dict[tuple[object, ...], list[Event]] = {}
    for (launch, block, thread), own in by_thread.items():
        for what in ("barrier", "syncwarp"):
            warp = thread // WARP if what == "syncwarp" else None
            for count, event in enumerate(e for e in own if e.what == what):
                met.setdefault((launch, block, warp, what, count), []).append(event)
    edges |= {
        (a.number, b.number) for group in met.values() for a in group for b in group if a is not b
    }
    while True:
        after = _closure(len(events), edges)
        more = _between_fences(events, after) - edges
        if not more:
            return after
        edges |= more


def _between_fences(events: list[Event], after: list[set[int]]) -> set[tuple[int, int]]:
    """From a fence before an atomic to a fence after a later atomic on the word."""
    fences = [event for event in events if event.what == "fence"]
    atomics = [event for event in events if event.what == "add"]
    edges = set()
    for a, b in itertools.combinations(atomics, 2):
        if (a.launch, a.place) == (b.launch, b.place):
            first = [f for f in fences if a.number in after[f.number]]
            last = [f for f in fences if f.number in after[b.number]]
            edges |= {(f.number, g.number) for f in first for g in last}
    return edges


def _closure(count: int, edges: set[tuple[int, int]]) -> list[set[int]]:
    next_ones: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        next_ones[a].append(b)
    after = []
    for start in range(count):
        reached: set[int] = set()
        waiting = [start]
        while waiting:
            for b in next_ones[waiting.pop()]:
                if b not in reached:
                    reached.add(b)
                    waiting.append(b)
        after.append(reached)
    return after


class _Launches:
    """Which launches are complete for an event of a later one."""

    def __init__(self, program: Program, events: list[Event], after: list[set[int]]) -> None:
        self.events, self.after = events, after
        self.dependent = [text.startswith("~") for text in program.launches]

    def is_complete(self, launch: int, for_event: Event) -> bool:
        now = for_event.launch
        waits = self._of(now, "wait")
        waited = any(for_event.number in self.after[wait.number] for wait in waits)
        return launch in (self._after_wait(now) if waited else self._at_start(now))

    def _of(self, launch: int, what: str) -> list[Event]:
        return [e for e in self.events if (e.launch, e.what) == (launch, what)]

    def _at_start(self, launch: int) -> set[int]:
        if not self.dependent[launch]:
            return set(range(launch))
        complete = set(range(launch - 1))
        for block in range(2):
            waits = [e for e in self._of(launch - 1, "wait") if e.block == block]
            triggers = [e for e in self._of(launch - 1, "trigger") if e.block == block]
            if triggers:  # the first counts
                first = triggers[0].number
                waits = [wait for wait in waits if first in self.after[wait.number]]
            known = self._after_wait(launch - 1) if waits else self._at_start(launch - 1)
            complete &= known
        return complete

    def _after_wait(self, launch: int) -> set[int]:
        if not self.dependent[launch]:
            return set(range(launch))
        waited = bool(self._of(launch - 1, "wait"))
        known = self._after_wait(launch - 1) if waited else self._at_start(launch - 1)
        return {launch - 1} | known
