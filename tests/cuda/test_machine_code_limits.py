"""What the names of kernels say, what kernels must not do, and the table of them that is kept."""

from __future__ import annotations

import dataclasses

import pytest

from bench.machine_code import tables
from bench.machine_code.limits import ARCHS, Inspected, Limits, complaints, inspect
from bench.machine_code.names import Name, take_apart
from bench.machine_code.sass import parse
from support.machine_code import FUNCTION, LOAD_A, LOAD_B, USE_A, USE_B, around, dump, kernel

MAIN = Name("sweep", "Pool", "float32", "NCHW", 4)
LIMITS = Limits(cost=10, mean_cost=8, uncounted=0)

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
