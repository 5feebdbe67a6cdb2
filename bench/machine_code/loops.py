"""Hot loops: those that walk over a feature map, which is to say load 16 bytes at once.

A hot loop has wide loads, itself or in functions that it calls, and no loop inside it has any. What
is counted are the instructions of its blocks, each once: also those under a predicate (a warp
issues them either way), those of the uniform datapath (they take an issue slot as well), those of
both sides of a branch, and those of loops inside it. So it is what a turn costs in which a warp
goes through all parts, once. A loop for what is left over after an unrolled one is a hot loop like
any other. What a compiler sets aside for a warp that has diverged (BRA.DIV) does not count, nor do
functions: a loop that calls some, or has loops inside, costs more than is counted, and says so.

A kernel that copies into shared memory aside from its threads (LDGSTS, UBLKCP) may use what came in
a loop of its own, and how much a bulk copy brings is known at run time only. So there a loop is hot
also where it loads 16 bytes at once from shared memory, and those are counted if it has no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.machine_code.flow import Flow, Loop
from bench.machine_code.sass import Instruction, Kernel


@dataclass(frozen=True)
class HotLoop:
    """One of a kernel's hot loops."""

    start: int  # address
    instructions: int
    sixteens: int  # how many times 16 bytes a thread loads in a turn
    in_flight: int  # loads issued before the first of them is used
    way: str  # the instructions that load: LDG, LDGSTS, LDS
    narrow: int  # other loads from global memory
    nested: int  # loops inside it, but for those that issue bulk copies or wait for them
    calls: int  # functions that it calls
    hidden: int  # wide loads in those functions, counted above

    @property
    def cost(self) -> float:
        """Warp instructions for each 16 bytes that a thread loads."""
        return self.instructions / self.sixteens


def is_wide(kernel: Kernel) -> Callable[[Instruction], bool]:
    """What a wide load is in this kernel."""
    if any(each.loads_bulk or _copies_wide(each) for each in kernel.instructions):
        return lambda each: each.sixteens > 0 and (each.loads_global or each.name == "LDS")
    return lambda each: each.sixteens > 0 and each.loads_global


def _copies_wide(each: Instruction) -> bool:
    return each.name == "LDGSTS" and each.sixteens > 0


def hot_loops(kernel: Kernel, flow: Flow) -> list[HotLoop]:
    """The hot loops of a kernel and of the functions in it, by address."""
    wide = is_wide(kernel)
    hot = [loop for loop in flow.loops if _loads(flow, loop, wide)]
    innermost = [one for one in hot if not any(o.blocks < one.blocks for o in hot)]
    return [_measure(flow, loop, wide) for loop in innermost]


def _instructions(flow: Flow, blocks: Iterable[int]) -> list[Instruction]:
    return [each for at in sorted(blocks) for each in flow.blocks[at].instructions]


def _callees(flow: Flow, blocks: Iterable[int]) -> set[int | None]:
    found: set[int | None] = set()
    waiting = [entry for at in blocks for entry in flow.blocks[at].calls]
    while waiting:
        entry = waiting.pop()
        if entry not in found:
            found.add(entry)
            for at in flow.functions.get(entry, ()):
                waiting += flow.blocks[at].calls
    return found


def _loads(flow: Flow, loop: Loop, wide: Callable[[Instruction], bool]) -> list[Instruction]:
    """The wide loads of a loop, also those of functions that it calls; from shared memory only
    if there are no others."""
    blocks = set(loop.blocks)
    for entry in _callees(flow, loop.blocks):
        blocks |= flow.functions.get(entry, frozenset())
    found = [each for each in _instructions(flow, blocks) if wide(each)]
    return [each for each in found if each.loads_global] or found


def _measure(flow: Flow, loop: Loop, wide: Callable[[Instruction], bool]) -> HotLoop:
    body = _instructions(flow, loop.blocks)
    # From the header on, should the compiler have put a part of the loop before it.
    first = next(i for i, each in enumerate(body) if each.address == loop.header)
    body = body[first:] + body[:first]
    loads = _loads(flow, loop, wide)
    inside = [other for other in flow.loops if other.blocks < loop.blocks]
    return HotLoop(
        start=loop.header,
        instructions=len(body),
        sixteens=sum(each.sixteens for each in loads),
        in_flight=_in_flight(body, frozenset(loads)),
        way="+".join(sorted({each.name for each in loads})),
        narrow=sum(each.loads_global and not each.sixteens for each in body),
        nested=sum(not any(map(_is_of_bulk, _instructions(flow, o.blocks))) for o in inside),
        calls=len(_callees(flow, loop.blocks)),
        hidden=len(set(loads).difference(body)),
    )


def _in_flight(body: list[Instruction], loads: frozenset[Instruction]) -> int:
    """How many of these loads are on their way when a turn first waits for one of them.

    The turns before are played through, so that loads count which are issued for a later turn. A
    load into registers is waited for where one of them is read; one into shared memory where
    the group that it was committed to must be there.
    """
    waits = [int(each.operands[1], 16) for each in body if _waits_for_groups(each)]
    on_the_way: dict[int, set[int]] = {}  # number of the load: its registers
    groups: list[set[int]] = [set()]  # of loads into shared memory; the last is still open
    number = 0
    for _turn in range(2 + max(waits, default=0)):
        first = None
        for each in body:
            arrived = [load for load, registers in on_the_way.items() if registers & each.read]
            if _waits_for_groups(each):
                keep = max(len(groups) - 1 - int(each.operands[1], 16), 0)
                arrived += [load for group in groups[:keep] for load in group]
                del groups[:keep]
            elif _waits_at_barrier(each):
                arrived += [load for group in groups for load in group]
                groups = [set()]
            if arrived and first is None:
                first = len(on_the_way)
            for load in arrived:
                on_the_way.pop(load, None)
            written = set(each.written)
            if each in loads:
                number += 1
                written = {r + i for r in written for i in range(4)}
            on_the_way = {n: r for n, r in on_the_way.items() if not r or not r & written}
            if each in loads:
                on_the_way[number] = written
                if each.name == "LDGSTS":
                    groups[-1].add(number)
            elif each.name == "LDGDEPBAR":
                groups.append(set())
    return len(loads.intersection(body)) if first is None else first


def _waits_for_groups(each: Instruction) -> bool:
    return each.name == "DEPBAR" and each.operands[:1] == ("SB0",) and len(each.operands) == 2


def _is_of_bulk(each: Instruction) -> bool:
    return each.loads_bulk or _waits_at_barrier(each)


def _waits_at_barrier(each: Instruction) -> bool:
    return each.name == "SYNCS" and "PHASECHK" in each.modifiers
