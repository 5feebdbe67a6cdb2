"""Control flow of a kernel's machine code: blocks, calls, natural loops."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.machine_code.sass import Instruction, Kernel

_JUMPS = ("BRA", "JMP", "UBRA")
_INDIRECT_JUMPS = ("BRX", "BRXU", "JMX", "JMXU")
_ENDS = ("EXIT", "RET", "KILL")


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    # Functions that it calls, by address; None where the address is in a register.
    calls: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header, and its blocks with those of the loops in it."""

    header: int
    blocks: frozenset[int]


@dataclass
class Flow:
    """A kernel's blocks by address, and the loops of the kernel and of the functions in it."""

    blocks: dict[int, Block]
    loops: list[Loop]
    functions: dict[int, frozenset[int]]  # the blocks of each, the kernel's own at its address
    faults: list[str]  # what cannot be analysed


def analyse(kernel: Kernel) -> Flow:
    """The control flow of a kernel."""
    if not kernel.instructions:
        return Flow({}, [], {}, ["has no instructions"])
    functions = _functions(kernel)
    blocks, faults = _blocks(kernel, functions)
    flow = Flow(blocks, [], {}, faults)
    for entry in (kernel.instructions[0].address, *sorted(functions)):
        order = _reverse_postorder(blocks, entry)
        flow.functions[entry] = frozenset(order)
        loops, side_doors = _loops(blocks, order)
        flow.loops += loops
        flow.faults += [f"has a loop with two entries at {at:#x}" for at in side_doors]
    return flow


# --- functions -----------------------------------------------------------------------------------


def _functions(kernel: Kernel) -> set[int]:
    """The addresses of functions that the kernel calls.

    Compilers also leave loops by a call that never returns, where a jump would do. A function is
    what comes to a RET.
    """
    code = {each.address: i for i, each in enumerate(kernel.instructions)}
    targets = {
        each.target for each in kernel.instructions if each.name == "CALL" and each.target in code
    }
    return {target for target in targets if _returns(kernel, code, target)}


def _returns(kernel: Kernel, code: dict[int, int], start: int) -> bool:
    seen: set[int] = set()
    waiting = [code[start]]
    while waiting:
        at = waiting.pop()
        if at in seen or at >= len(kernel.instructions):
            continue
        seen.add(at)
        each = kernel.instructions[at]
        if each.name == "RET":
            return True
        targets, falls_through = _next(kernel, each)
        waiting += [code[target] for target in targets if target in code]
        if falls_through:
            waiting.append(at + 1)
    return False


# --- blocks --------------------------------------------------------------------------------------


def _next(kernel: Kernel, each: Instruction) -> tuple[tuple[int, ...], bool]:
    """Where an instruction leads, and whether also to the one behind it. Calls come back.

    BRA.DIV does not jump: it leaves for code that does what comes next with a warp that has
    diverged, one part after the other. BSYNC stands before the place that its BSSY names.
    """
    if each.name in _ENDS:
        return (), bool(each.predicate)
    if each.name in _JUMPS and "DIV" not in each.modifiers:
        conditional = bool(each.predicate) or len(each.operands) > 1
        return (each.target,) if each.target is not None else (), conditional
    if each.name in _INDIRECT_JUMPS:
        return kernel.jump_tables.get(each.address, ()), bool(each.predicate)
    return (), True


def _blocks(kernel: Kernel, functions: set[int]) -> tuple[dict[int, Block], list[str]]:
    code = kernel.instructions
    known = {each.address for each in code}
    leaders = {code[0].address} | functions
    leads: dict[int, tuple[list[int], bool]] = {}
    faults = []
    for i, each in enumerate(code):
        targets, falls_through = _next(kernel, each)
        if each.name == "CALL" and each.target in known and each.target not in functions:
            targets, falls_through = (each.target,), bool(each.predicate)
        elif each.name in _INDIRECT_JUMPS and not targets:
            faults.append(f"jumps from {each.address:#x} to where a register says")
        leads[each.address] = ([t for t in targets if t in known], falls_through)
        leaders.update(leads[each.address][0])
        if i + 1 < len(code) and (targets or not falls_through):
            leaders.add(code[i + 1].address)
    blocks: dict[int, Block] = {}
    block = Block([])
    for i, each in enumerate(code):
        if each.address in leaders:
            block = blocks[each.address] = Block([])
        block.instructions.append(each)
        if each.name == "CALL" and (each.target in functions or each.target not in known):
            block.calls.append(each.target if each.target in functions else None)
        targets, falls_through = leads[each.address]
        behind = code[i + 1].address if i + 1 < len(code) else None
        if behind is None or behind in leaders:
            block.successors = [*targets, *([behind] if falls_through and behind else [])]
    return blocks, faults


# --- loops ---------------------------------------------------------------------------------------


def _reverse_postorder(blocks: dict[int, Block], entry: int) -> list[int]:
    order: list[int] = []
    seen = {entry}
    stack = [(entry, iter(blocks[entry].successors))]
    while stack:
        at, successors = stack[-1]
        new = next((s for s in successors if s not in seen), None)
        if new is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(blocks[new].successors)))
    return order[::-1]


def _dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, int]:
    """Of each block the nearest that all ways to it pass (Cooper, Harvey and Kennedy, 2001)."""
    index = {at: i for i, at in enumerate(order)}
    nearest = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [p for p in before[at] if p in nearest]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if index[new] > index[other]:
                        new = nearest[new]
                    else:
                        other = nearest[other]
            changed |= nearest.get(at) != new
            nearest[at] = new
    return nearest


def _loops(blocks: dict[int, Block], order: list[int]) -> tuple[list[Loop], list[int]]:
    """The natural loops, and where there are others, entered past the header."""
    index = {at: i for i, at in enumerate(order)}
    before: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for successor in blocks[at].successors:
            before[successor].append(at)
    nearest = _dominators(order, before)

    def dominates(one: int, other: int) -> bool:
        while index[other] > index[one]:
            other = nearest[other]
        return one == other

    bodies: dict[int, set[int]] = {}
    side_doors = []
    for at in order:
        for header in blocks[at].successors:
            if index[header] > index[at]:
                continue
            if not dominates(header, at):
                side_doors.append(header)
                continue
            body = bodies.setdefault(header, {header})
            waiting = [at]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block]
    return [Loop(h, frozenset(b)) for h, b in sorted(bodies.items())], side_doors
