"""bench/machine_code on short pieces of machine code, as cuobjdump would print them. What it makes
of compiled kernels, test_hot_loops.py asks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pytest

from bench.machine_code import tables
from bench.machine_code.flow import analyse
from bench.machine_code.limits import ARCHS, Inspected, Limits, complaints, inspect
from bench.machine_code.loops import HotLoop, hot_loops
from bench.machine_code.names import Name, take_apart
from bench.machine_code.sass import Kernel, parse

MAIN = Name("sweep", "Pool", "float32", "NCHW", 4)
LIMITS = Limits(cost=10, mean_cost=8, uncounted=0)


def dump(code: str, *, arch: str = "sm_90", stack: int = 0, attributes: Sequence[str] = ()) -> str:
    """What cuobjdump prints of a kernel. A line of code may begin with a label; {label} is its
    address."""
    lines = [
        re.fullmatch(r"(?:(\w+):)?\s*(.+)", line.strip()).groups()
        for line in code.splitlines()
        if line.strip()
    ]
    labels = {label: f"{16 * i:#x}" for i, (label, _) in enumerate(lines) if label}
    return "\n".join(
        [
            f"arch = {arch}",
            ".nv.info.toy",
            "\tAttribute:\tEIATTR_MAX_THREADS",
            "\tFormat:\tEIFMT_SVAL",
            "\tValue:\t0x100 0x1 0x1",
            *(f"\t\t{attribute.format(**labels)}" for attribute in attributes),
            " Function toy:",
            f"  REG:32 STACK:{stack} SHARED:16 LOCAL:0 CONSTANT[0]:384",
            f"\tcode for {arch}",
            "\t\tFunction : toy",
            *(
                f"        /*{16 * i:04x}*/  {text.format(**labels)} ;  /* 0x0000000000007918 */"
                for i, (_, text) in enumerate(lines)
            ),
        ]
    )


def kernel(code: str, **of_dump: object) -> Kernel:
    (found,) = parse(dump(code, **of_dump))
    return found


def loops(code: str, **of_dump: object) -> list[HotLoop]:
    found = kernel(code, **of_dump)
    flow = analyse(found)
    assert flow.faults == []
    return hot_loops(found, flow)


def loop(code: str, **of_dump: object) -> HotLoop:
    (found,) = loops(code, **of_dump)
    return found


def around(body: str) -> str:
    """A loop with this body, to which the jump back is added."""
    return f"MOV R1, RZ\ntop: NOP\n{body}\n@!P0 BRA {{top}}\nEXIT"


# ------------------------------------------------------------------------------------ what is read


def test_attributes() -> None:
    found = kernel("STL [R1], R2\nLDL R2, [R1]\nLDL R3, [R1+0x4]\nEXIT", stack=8)
    assert (found.name, found.arch, found.registers) == ("toy", "sm_90", 32)
    assert (found.stack, found.shared, found.threads) == (8, 16, 256)
    assert (found.count("STL"), found.count("LDL")) == (1, 2)


def test_a_cubin_names_its_architecture_late() -> None:
    text = dump("EXIT").replace("arch = sm_90\n", "")
    assert [each.arch for each in parse(text)] == ["sm_90"]


def test_each_architecture_has_its_kernel() -> None:
    found = parse(dump("EXIT", arch="sm_80") + "\n" + dump("NOP\nEXIT", arch="sm_90a"))
    assert [(each.arch, len(each.instructions)) for each in found] == [("sm_80", 1), ("sm_90a", 2)]


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR8][R2.64+0x10]", [4], {2}),
        ("@!P0 LDG.E.ENL2.256 R8, R4, desc[UR8][R2.64]", [8, 4], {2}),
        ("STG.E.128 desc[UR8][R2.64], R4", [], {2, 4}),
        ("FADD R4, R4.reuse, -R5", [4], {4, 5}),
        ("ISETP.GE.AND P0, PT, R10, R20, PT", [], {10, 20}),
        ("LOP3.LUT P0, R7, R4, 0xff, RZ, 0xc0, !PT", [7], {4}),
        ("IADD3 R20, P1, R36, c[0x0][0x160], RZ", [20], {36}),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", [5], {4}),
        ("R2UR UR4, R6", [], {6}),
        ("S2R R0, SR_TID.X", [0], set()),
    ],
)
def test_registers(text: str, written: list[int], read: set[int]) -> None:
    (instruction,) = kernel(text).instructions
    assert (instruction.written, instruction.read) == (written, read)


@pytest.mark.parametrize(
    ("operation", "sixteens"),
    [
        ("LDG.E.128.STRONG.SM", 1),
        ("LDG.E.EF.128", 1),
        ("LDG.E.LTC128B.64", 0),
        ("LDG.E.ENL2.256", 2),
        ("LDGSTS.E.BYPASS.LTC128B.128", 1),
        ("LDG.E.U16", 0),
    ],
)
def test_widths(operation: str, sixteens: int) -> None:
    (instruction,) = kernel(f"{operation} R4, [R2.64]").instructions
    assert instruction.sixteens == sixteens


# ------------------------------------------------------------------------------ loads in flight

LOAD_A, LOAD_B = "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]"
USE_A, USE_B = "FADD R20, R5, R20", "FADD R20, R8, R20"
ASYNC, COMMIT = "LDGSTS.E.BYPASS.128 [R13], desc[UR6][R8.64]", "LDGDEPBAR"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R2"


@pytest.mark.parametrize(
    ("body", "in_flight"),
    [
        ([LOAD_A, LOAD_B, USE_A, USE_B], 2),
        ([LOAD_A, USE_A, LOAD_B, USE_B], 1),
        ([LOAD_A, "FADD R5, RZ, RZ", LOAD_B, USE_B], 1),  # overwritten, not used
        # Loads for the next turn, before and after this turn's uses.
        ([USE_A, USE_B, LOAD_A, LOAD_B], 2),
        ([LOAD_A, USE_B, LOAD_B, USE_A], 2),
        # A copy of the register is where it is waited for.
        ([LOAD_A, "MOV R24, R5", LOAD_B, USE_B], 1),
        # A predicate may be false, but then nothing waits longer.
        ([f"@P1 {LOAD_A}", f"@P2 {LOAD_B}", f"@P1 {USE_A}"], 2),
        ([ASYNC, COMMIT, "DEPBAR.LE SB0, 0x0"], 1),
        ([ASYNC, COMMIT, "DEPBAR.LE SB0, 0x2"], 3),
        ([ASYNC, ASYNC, COMMIT, "DEPBAR.LE SB0, 0x1"], 4),
        ([ASYNC, WAIT, ASYNC, WAIT], 1),
    ],
)
def test_in_flight(body: list[str], in_flight: int) -> None:
    found = loop(around("\n".join(body)))
    assert found.in_flight == in_flight
    assert found.sixteens == sum("128" in line for line in body)


def test_a_turn_begins_at_the_header() -> None:
    found = loop(f"""
        BRA {{header}}
        rest: {LOAD_A}
        {LOAD_B}
        {USE_A}
        {USE_B}
        @P0 BRA {{out}}
        header: {LOAD_A}
        {USE_A}
        BRA {{rest}}
        out: EXIT
    """)
    assert (found.start, found.in_flight) == (0x60, 1)


# ------------------------------------------------------------------------------ what is counted


def test_everything_in_the_loop_counts() -> None:
    found = loop(
        around(f"""
            {LOAD_A}
            @P1 FADD R20, R4, R20
            UIADD3 UR4, UR4, 0x1, URZ
            @P2 BRA {{other}}
            MOV R21, R4
            BRA {{join}}
            other: MOV R21, R5
            join: LDG.E R22, [R2.64]
        """)
    )
    assert (found.start, found.instructions, found.sixteens) == (0x10, 10, 1)
    assert (found.cost, found.narrow, found.way) == (10, 1, "LDG")


def test_wider_loads_count_twice() -> None:
    found = loop(around("LDG.E.ENL2.256 R8, R4, desc[UR8][R2.64]\nFADD R20, R11, R20"))
    assert (found.instructions, found.sixteens, found.cost) == (4, 2, 2)


def test_ways_to_go_on() -> None:
    """Several jumps back to one place are one loop; a predicate may be an operand."""
    found = loop(f"top: {LOAD_A}\nBRA P0, {{top}}\n{USE_A}\n@!P1 BRA P2, {{top}}\nEXIT")
    assert (found.start, found.instructions) == (0, 4)


def test_an_exit_inside() -> None:
    found = loop(around(f"{LOAD_A}\n@P3 EXIT\n{USE_A}"))
    assert found.instructions == 5


def test_loads_outside_are_not_of_the_loop() -> None:
    assert loops(f"{LOAD_A}\n{around(USE_A)}") == []


def test_two_loops() -> None:
    found = loops(f"""
        first: {LOAD_A}
        @P0 BRA {{first}}
        second: {LOAD_B}
        {USE_B}
        @P0 BRA {{second}}
        EXIT
    """)
    assert [(each.start, each.instructions) for each in found] == [(0, 2), (0x20, 3)]


def test_the_innermost_with_loads() -> None:
    """The outer loop loads what the inner needs; it is not what is hot."""
    found = loop(f"""
        outer: {LOAD_A}
        inner: {LOAD_B}
        {USE_B}
        @P0 BRA {{inner}}
        @P1 BRA {{outer}}
        EXIT
    """)
    assert (found.start, found.instructions, found.nested) == (0x10, 3, 0)


def test_a_loop_without_loads_inside() -> None:
    found = loop(f"""
        outer: {LOAD_A}
        inner: {USE_A}
        @P0 BRA {{inner}}
        @P1 BRA {{outer}}
        EXIT
    """)
    assert (found.start, found.instructions, found.nested) == (0, 4, 1)


def test_bulk_copies() -> None:
    """How much comes is not known: what is read of it counts. Waiting is not a loop inside."""
    found = loop(
        around("""
            UBLKCP.S.G [UR8], [UR6], UR5
            wait: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R2
            @!P0 BRA {wait}
            LDS.128 R8, [R0]
            LDS.128 R12, [R0+0x10]
            FADD R9, R8, R9
        """)
    )
    assert (found.way, found.sixteens, found.in_flight, found.nested) == ("LDS", 2, 2, 0)


def test_what_was_copied_is_used_in_a_loop_of_its_own() -> None:
    """Both are hot: the one that copies, and the one that reads what was copied."""
    use = "LDS.128 R4, [R0]\n" + "\n".join([USE_A] * 8)
    copy, read = loops(f"first: {ASYNC}\n@P0 BRA {{first}}\n{around(use)}")
    assert (copy.way, copy.sixteens, copy.cost) == ("LDGSTS", 1, 2)
    assert (read.way, read.sixteens, read.cost) == ("LDS", 1, 11)
    assert loops(around(use)) == []  # nothing was copied


def test_what_was_copied_is_used_in_a_loop_inside() -> None:
    found = loop(around(f"{ASYNC}\nin: LDS.128 R4, [R0]\n{USE_A}\n@P1 BRA {{in}}"))
    assert (found.way, found.instructions, found.nested) == ("LDS", 3, 0)


def test_stores_by_bulk_copies_are_none() -> None:
    assert loops(around("UBLKCP.G.S [UR8], [UR6], UR5\nLDS.128 R8, [R0]")) == []


# ------------------------------------------------------------------------------ control flow

FUNCTION = "function: FADD R9, R9, R9\nRET.REL.NODEC R20 0x0"


def test_calls() -> None:
    found = loop(around(f"{LOAD_A}\nCALL.REL.NOINC {{function}}") + f"\n{FUNCTION}")
    assert (found.instructions, found.sixteens, found.calls, found.hidden) == (4, 1, 1, 0)


def test_loads_of_functions() -> None:
    """Also those of a function that a function calls."""
    found = loop(
        around("CALL.REL.NOINC {first}")
        + "\nfirst: CALL.REL.NOINC {second}\nRET.REL.NODEC R20 0x0"
        + f"\nsecond: {LOAD_A}\n{USE_A}\nRET.REL.NODEC R22 0x0"
    )
    assert (found.instructions, found.sixteens, found.calls, found.hidden) == (3, 1, 2, 1)


def test_a_loop_in_a_function() -> None:
    found = loop(
        f"CALL.REL.NOINC {{walk}}\nEXIT\nwalk: NOP\ntop: {LOAD_A}\n{USE_A}\n@P0 BRA {{top}}\n"
        "RET.REL.NODEC R20 0x0"
    )
    assert (found.start, found.instructions, found.calls, found.hidden) == (0x30, 3, 0, 0)


def test_calls_of_what_is_elsewhere() -> None:
    found = loop(around(f"{LOAD_A}\nCALL.ABS.NOINC R6"))
    assert (found.instructions, found.calls) == (4, 1)


def test_calls_that_leave_a_loop_never_to_return() -> None:
    found = loop(f"top: {LOAD_A}\n@P0 CALL.REL.NOINC {{out}}\nBRA {{top}}\nout: {USE_A}\nEXIT")
    assert (found.instructions, found.calls) == (3, 0)


def test_calls_that_only_jump() -> None:
    found = loop(
        f"top: {LOAD_A}\n@P0 CALL.REL.NOINC {{rest}}\nBRA {{out}}\n"
        f"rest: {USE_A}\n@P1 BRA {{top}}\nout: EXIT"
    )
    assert (found.instructions, found.calls) == (4, 0)


def test_what_is_for_a_diverged_warp() -> None:
    found = loop(
        f"top: {LOAD_A}\nBRA.DIV UR4, {{aside}}\nSHFL.BFLY PT, R5, R4, 0x1, 0x1f\n"
        f"back: @P0 BRA {{top}}\nEXIT\naside: CALL.REL.NOINC {{function}}\nBRA {{back}}\n{FUNCTION}"
    )
    assert (found.instructions, found.calls) == (4, 0)


TABLE = "top: NOP\nBRX R2 -0x20\nfirst: BRA {join}\nsecond: NOP\njoin: " + LOAD_A
TABLE += "\n@P0 BRA {top}\nEXIT"


def test_jump_tables() -> None:
    of_jump = "Offset of Indirect Branch: 0x10\t Number of targets: 2"
    found = loop(TABLE, attributes=[of_jump, "Targets: {first} {second} "])
    assert (found.start, found.instructions) == (0, 6)


def test_jumps_to_anywhere_are_told() -> None:
    assert analyse(kernel(TABLE)).faults == ["jumps from 0x10 to where a register says"]


def test_loops_with_two_entries_are_told() -> None:
    code = f"@P0 BRA {{middle}}\ntop: {LOAD_A}\nmiddle: {USE_A}\n@P1 BRA {{top}}\nEXIT"
    (fault,) = analyse(kernel(code)).faults
    assert "two entries" in fault


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "void cbam::cuda::sweep_kernel<cbam::cuda::GateGrads<cbam::Half, true>, "
            "(cbam::Layout)1, 8>(cbam::cuda::GateGrads<cbam::Half, true>, cbam::cuda::Sweep)",
            Name("sweep", "GateGrads<true>", "float16", "NHWC", 8),
        ),
        (
            "void cbam::cuda::sweep_kernel<cbam::cuda::Pool<float>, (cbam::Layout)0, (int)1>(int)",
            Name("sweep", "Pool", "float32", "NCHW", 1),
        ),
        (
            "void cbam::cuda::gate_kernel<cbam::BFloat16, (cbam::Layout)0, 8>(int)",
            Name("gate", "", "bfloat16", "NCHW", 8),
        ),
        (
            "void cbam::cuda::(anonymous namespace)::joined_stats_kernel<double>(X<double>)",
            Name("joined_stats", "", "float64"),
        ),
        (
            "void mixed_kernel<(bool)1, 3, Body<5, float>, 7>()",
            Name("mixed", "true, 3, Body<5>", "float32", "", 7),
        ),
        ("plain(int)", Name("plain")),
        ("_ZN4cbam3fooE", Name("_ZN4cbam3fooE")),
    ],
)
def test_names(text: str, name: Name) -> None:
    assert take_apart(text) == name


@pytest.mark.parametrize(
    ("name", "is_main"),
    [
        (MAIN, True),
        (Name("new", "", "float16", "NHWC", 8), True),
        (Name("sweep", "Pool", "float16", "NCHW", 4), True),
        (Name("sweep", "Pool", "float16", "NCHW", 1), False),
        (Name("sweep", "Pool", "float64", "NCHW", 2), False),
        (Name("map_grads", "", "float32", "", 4), False),
    ],
)
def test_main_kernels(name: Name, is_main: bool) -> None:
    assert name.is_main == is_main


def test_a_name_reads_well() -> None:
    assert str(MAIN) == "sweep<Pool> float32 NCHW W=4"
    assert str(Name("plain")) == "plain"


# ------------------------------------------------------------------------------ limits

LEAN = around(f"{LOAD_A}\n{LOAD_B}\n{USE_A}\n{USE_B}")
COSTLY = around(LOAD_A + "\n" + "\n".join([USE_A] * 8))  # 11 instructions


def inspected(code: str, name: Name = MAIN, **of_dump: object) -> Inspected:
    return inspect(kernel(code, **of_dump), name)


def test_a_lean_kernel_is_fine() -> None:
    assert complaints([inspected(LEAN)], LIMITS) == []


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (COSTLY, "takes 11 instructions for 1 times 16 bytes in its loop at 0x10: 11, more"),
        (f"{LOAD_A}\n{around(USE_A)}", "has no loop with 128-bit loads; 1 are elsewhere"),
        (around("LDG.E.64 R4, [R2.64]"), "has no loop with 128-bit loads; 0 are elsewhere"),
        (
            around("CALL.REL.NOINC {f}") + f"\nf: {LOAD_A}\nRET.REL.NODEC R20 0x0",
            "has 1 128-bit loads in functions that its loop at 0x10 calls",
        ),
        (around(f"{LOAD_A}\nCALL.REL.NOINC {{function}}") + f"\n{FUNCTION}", "call functions in"),
        (around(f"{LOAD_A}\nin: {USE_A}\n@P1 BRA {{in}}"), "or have loops inside them"),
        (LEAN + "\nBRX R2 -0x20", "jumps from"),
        (LEAN.replace("NOP", "STL [R1], R2"), "0 bytes of stack, with 1 stores and 0 loads"),
    ],
)
def test_complaints(code: str, complaint: str) -> None:
    assert complaint in "\n".join(complaints([inspected(code)], LIMITS))


def test_spills_count_for_all_kernels_and_architectures() -> None:
    narrow = Name("joined_stats", "", "float64")
    for arch in ARCHS:
        kernels = [
            inspected(LEAN),
            inspected("EXIT", narrow, stack=8, arch="sm_" + arch.replace(".", "")),
        ]
        (complaint,) = complaints(kernels, LIMITS)
        assert complaint.startswith(f"joined_stats float64 ({arch}) uses 8 bytes of stack")
        allowing = dataclasses.replace(LIMITS, stack={arch: 8})
        assert complaints(kernels, allowing) == []
        assert complaints(kernels, dataclasses.replace(LIMITS, stack={arch: 4})) != []


def test_the_mean() -> None:
    """Of 3 and of 11, which is within a limit of its own."""
    kernels = [inspected(LEAN), inspected(COSTLY)]
    limits = Limits(cost=11, mean_cost=5.8, uncounted=0)
    assert complaints(kernels, limits) == []
    (complaint,) = complaints(kernels, dataclasses.replace(limits, mean_cost=5.7))
    assert "9.0 take 5.7 instructions for each 16 bytes in geometric mean" in complaint


@pytest.mark.parametrize(
    ("arch", "name"),
    [("sm_86", MAIN), ("sm_90", Name("sweep", "Pool", "float64", "NCHW", 2))],
)
def test_costs_are_held_to_limits_where_speed_counts(arch: str, name: Name) -> None:
    kernels = [inspected(LEAN), inspected(COSTLY, name, arch=arch)]
    assert complaints(kernels, LIMITS) == []


def test_occupancy() -> None:
    text = dump(LEAN).replace("REG:32", "REG:72")  # for 256 threads: 3 blocks of the 8
    (found,) = parse(text)
    (complaint,) = complaints([inspect(found, MAIN)], LIMITS)
    assert complaint.endswith("fills 38% of a multiprocessor")


def test_that_there_is_nothing_to_look_at_is_told() -> None:
    assert complaints([inspected(LEAN, Name("renamed"))], LIMITS) == ["there is no main kernel"]


# ------------------------------------------------------------------------------ the kept table


def test_the_kept_table_follows_the_kernels() -> None:
    kernels = [inspected(LEAN, arch="sm_80"), inspected(LEAN, stack=8), inspected(COSTLY)]
    kernels[2] = dataclasses.replace(kernels[2], name=Name("gate", "", "float16", "NHWC", 8))
    kept = tables.kept_text(kernels, "13.0.88")
    assert "| gate |  | float16 | NHWC | 8 |  |  |  |  | 11 / 1 = 11 | 1 | 0 |  |" in kept
    sweep = "| sweep | `Pool` | float32 | NCHW | 4 |"
    assert f"{sweep} 6 / 2 = 3 | 2 | 0 |  | 6 / 2 = 3 | 2 | 0 |  |" in kept
    assert f"{sweep} 32 | 32 +8 |" in kept
    assert tables.kept_is_stale(kernels, "13.0.88", kept) is False
    assert tables.kept_is_stale(kernels[::-1], "13.0.88", kept) is False
    assert tables.kept_is_stale(kernels[:2], "13.0.88", kept) is True
    assert tables.kept_is_stale(kernels, "13.1.2", kept) is None
