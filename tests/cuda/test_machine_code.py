"""What bench/machine_code reads in short pieces of machine code. What it makes of compiled kernels,
test_hot_loops.py asks; what it says of names and limits, test_machine_code_limits.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbam_ext.building import decisions

from bench.machine_code import compilation
from bench.machine_code.flow import analyse
from bench.machine_code.loops import HotLoop, hot_loops
from bench.machine_code.sass import Kernel, parse
from support.machine_code import (
    FUNCTION,
    LOAD_A,
    LOAD_B,
    USE_A,
    USE_B,
    around,
    dump,
    kernel,
)


def loops(code: str, **of_dump: object) -> list[HotLoop]:
    found = kernel(code, **of_dump)
    flow = analyse(found)
    assert flow.faults == []
    return hot_loops(found, flow)


def loop(code: str, **of_dump: object) -> HotLoop:
    (found,) = loops(code, **of_dump)
    return found


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


@pytest.mark.parametrize("other", [{"source_hash": "0"}, {"cuda": "12.8"}, {"cuda_flags": "-O0"}])
def test_library_of_another_build_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    """What is checked are the kernels of these sources, as this nvcc compiles them."""
    toolkit = decisions.Toolkit(tmp_path, "13.0", tmp_path, tmp_path)
    monkeypatch.setattr(compilation, "_toolkit", lambda: toolkit)
    monkeypatch.setattr(compilation, "find_cuobjdump", lambda: tmp_path)
    monkeypatch.setattr(
        compilation, "_read", lambda *_: [Kernel("k", "sm_80"), Kernel("k", "sm_90")]
    )
    library = tmp_path / "lib.so"
    library.touch()
    assert compilation.kernels_of_build(library, ["8.0"]) == []
    facts = {
        "source_hash": decisions.source_hash(),
        "cuda": "13.0",
        "cuda_flags": " ".join(decisions.NVCC_FLAGS),
    }
    (tmp_path / decisions.FACTS).write_text(json.dumps(facts))
    assert [each.arch for each in compilation.kernels_of_build(library, ["8.0"])] == ["sm_80"]
    (tmp_path / decisions.FACTS).write_text(json.dumps(facts | other))
    assert compilation.kernels_of_build(library, ["8.0"]) == []
