"""From what cuobjdump prints to kernels and their instructions (SASS)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Predicates: P0, !P1, UP2, PT; a comparison writes two of them.
PREDICATE = re.compile(r"!?U?P[\dT]")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
_BARE_REGISTER = re.compile(r"R\d+(?:\.64|\.reuse)*")


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``operation`` has its modifiers, as in LDG.E.128."""

    address: int
    predicate: str
    operation: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.operation.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.operation.split(".")[1:]

    @property
    def target(self) -> int | None:
        """Where a jump or call leads; None where that is in a register."""
        last = self.operands[-1] if self.operands else ""
        return int(last, 16) if re.fullmatch(r"0x[0-9a-f]+", last) else None

    @property
    def sixteens(self) -> int:
        """How many times 16 bytes each thread moves at once: 1 or 2; 0 if it moves less."""
        return max(self.modifiers.count("128"), 2 * self.modifiers.count("256"))

    @property
    def loads_global(self) -> bool:
        """Whether it brings a thread something from global memory, into registers or shared."""
        return self.name in ("LD", "LDG", "LDGSTS")

    @property
    def loads_bulk(self) -> bool:
        """Whether it copies a block of global memory into shared memory, for all threads."""
        return self.name in ("UBLKCP", "UTMALDG") and ".G.S" not in self.operation

    @property
    def written(self) -> list[int]:
        """The registers that it names as its results, without those that follow from its width."""
        if _WITHOUT_RESULT.fullmatch(self.name):
            return []
        found = []
        for operand in self.operands:
            if PREDICATE.fullmatch(operand):
                continue
            if not _BARE_REGISTER.fullmatch(operand):
                break
            found.append(_register(operand))
            if "256" not in self.modifiers:  # whose results have two names
                break
        return found

    @property
    def read(self) -> set[int]:
        """The registers that it names as inputs, those of addresses included."""
        named = [int(number) for word in self.operands for number in _REGISTER.findall(word)]
        for register in self.written:
            named.remove(register)
        return set(named)


# Their first register is an input.
_WITHOUT_RESULT = re.compile(
    r"ST[GSL]?|STAS|SUST|RED[GS]?|FCHK|R2P|BRX|JMX|CALL|RET|BAR|WARPSYNC|NANOSLEEP|\w*SETP\d?"
)


def _register(operand: str) -> int:
    return int(_REGISTER.match(operand).group(1))


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 1024
    instructions: list[Instruction] = field(default_factory=list)
    # Of a jump whose target is in a register, by its address: where it can lead.
    jump_tables: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def count(self, name: str, *, wide: bool = False) -> int:
        """How many instructions have this name; with ``wide``, those that move 16 bytes or more."""
        return sum(i.name == name and (not wide or i.sixteens > 0) for i in self.instructions)


_ARCH = re.compile(r"^(?:arch = |\tcode for )(sm_\w+)")
_CODE = re.compile(r"^\tcode for (sm_\w+)", re.MULTILINE)
_NAME = re.compile(r"^\.nv\.info\.(\S+)|^ Function (\S+):$|^\t\tFunction : (\S+)")
_USAGE = re.compile(r"^  REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INDIRECT = re.compile(r"Offset of Indirect Branch: (0x[0-9a-f]+)")
_TARGETS = re.compile(r"^\s+Targets: (.*)")
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*[;}]"
)


def parse(dump: str) -> list[Kernel]:
    """The kernels in what cuobjdump prints: attributes, then resources, then instructions."""
    kernels: dict[tuple[str, str], Kernel] = {}
    # A cubin names its architecture late; what has several names each before what it has of it.
    late = _CODE.search(dump)
    arch, kernel, awaits_threads, jump = late.group(1) if late else "", None, False, 0
    for line in dump.splitlines():
        if match := _ARCH.match(line):
            arch = match.group(1)
        elif match := _NAME.match(line):
            name = next(filter(None, match.groups()))
            kernel = kernels.setdefault((name, arch), Kernel(name, arch))
        elif kernel is None:
            continue
        elif match := _USAGE.match(line):
            kernel.registers, kernel.stack, kernel.shared = map(int, match.groups())
        elif "EIATTR_MAX_THREADS" in line or "EIATTR_REQNTID" in line:
            awaits_threads = True
        elif awaits_threads and "Value:" in line:
            sizes = [int(word, 16) for word in line.partition("Value:")[2].split()]
            kernel.threads = sizes[0] * sizes[1] * sizes[2]
            awaits_threads = False
        elif match := _INDIRECT.search(line):
            jump = int(match.group(1), 16)
        elif match := _TARGETS.match(line):
            kernel.jump_tables[jump] = tuple(int(word, 16) for word in match.group(1).split())
        elif match := _INSTRUCTION.search(line):
            kernel.instructions.append(_instruction(*match.groups()))
    return [kernel for kernel in kernels.values() if kernel.registers]


def _instruction(address: str, predicate: str | None, operation: str, rest: str) -> Instruction:
    # BRX names a register and what it counts from in one word; the rest stands between commas.
    operands = tuple(word.strip() for word in rest.split(",")) if rest else ()
    return Instruction(int(address, 16), predicate or "", operation, operands)
