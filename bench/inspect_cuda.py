"""``python -m bench.inspect_cuda``: what the compiler made of the CUDA kernels.

Reads machine code, so it needs no GPU: of the built library; of .cu files, which it compiles with
the flags of the build; or of compiled files.

    python -m bench.inspect_cuda                       # the built library
    python -m bench.inspect_cuda csrc/cuda/forward.cu --archs 9.0
    python -m bench.inspect_cuda some.cubin
    python -m bench.inspect_cuda --archs all --check   # all sources: what CI does
    python -m bench.inspect_cuda --write               # all sources, into the kept table

One line for each main kernel (those that walk over feature maps 16 bytes at once, not in float64)
and architecture:

  regs          registers of a thread
  stack         bytes of a thread's stack; spilled registers lie there
  local         instructions that store to / load from that memory, each a spill or an array that
                could not be kept in registers
  shared        bytes of static shared memory of a block
  threads       the largest block that the launch bounds allow
  occupancy     share of a multiprocessor's threads that fit by registers, at that block size
                (dynamic shared memory, which the launch decides, is not counted)
  128-bit       instructions that load from / store to global memory 16 bytes or more at once

and one for each of its hot loops, the innermost ones that load 16 bytes at once:

  at            where it begins
  way           the instructions that load: LDG, LDGSTS (cp.async), LDS (what was copied)
  instructions  of a turn, predicated ones and both sides of branches included
  16 bytes      how many times 16 bytes a thread loads in a turn
  cost          warp instructions for each 16 bytes that a thread loads
  in flight     wide loads that are on their way when a turn first waits for one of them
  narrow        other loads from global memory in a turn
  loops inside  loops without wide loads inside it, of which one turn is counted
  calls         functions that it calls, whose instructions are not counted

With ``--check`` the exit code is 1 where kernels do what they must not (LIMITS in
machine_code/limits.py): one that spills; a main one with an occupancy under one half, without a
hot loop, or with the loads of one in a function; for 8.0 and 9.0, a hot loop (not of float64) that
costs too much, a geometric mean of costs that is too high, and too many main kernels whose hot
loops do more than is counted. With all sources and architectures, also where the kept table is not
what they give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cbam_ext.building import decisions, library

from bench.machine_code import tables
from bench.machine_code.compilation import (
    InspectionError,
    kernel_sources,
    kernels_of,
    kernels_of_build,
    known_archs,
    machine_name,
    nvcc_version,
)
from bench.machine_code.limits import ARCHS, ARCHS_OF_LOOPS, complaints, inspect
from bench.machine_code.names import read_names

LIBRARY = library.PACKAGE / library.CUDA_LIBRARY


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        archs = known_archs(ARCHS) if options.archs == ["all"] else options.archs
        # What the build has compiled already is not compiled again.
        found = kernels_of_build(LIBRARY, archs) if options.all_sources else []
        rest = [arch for arch in archs if machine_name(arch) not in {each.arch for each in found}]
        found += kernels_of(options.files, rest, options.read_archs)
        compiler = nvcc_version() if options.all_sources else ""
    except (InspectionError, decisions.BuildError) as error:
        print(f"inspect_cuda: {error}", file=sys.stderr)
        return 2
    names = read_names(kernel.name for kernel in found)
    kernels = tables.in_order([inspect(kernel, names[kernel.name]) for kernel in found])
    shown = [each for each in kernels if options.all or each.name.is_main]
    print(tables.resources(shown), tables.hot_loops(shown), sep="\n\n")
    print("", *tables.summary(kernels), sep="\n")
    if options.write:
        tables.KEPT.write_text(tables.kept_text(kernels, compiler))
        print(f"written: {tables.KEPT}")
    if not options.check:
        return 0
    wrong = complaints(kernels)
    if options.all_sources:
        kept = tables.KEPT.read_text() if tables.KEPT.is_file() else ""
        stale = tables.kept_is_stale(kernels, compiler, kept)
        if stale is None:
            print(f"{tables.KEPT.name} is of another nvcc than {compiler}: not compared")
        elif stale:
            wrong.append(f"{tables.KEPT} is not what the sources give: look, and use --write")
    for complaint in wrong:
        print(f"inspect_cuda: {complaint}", file=sys.stderr)
    if wrong:
        return 1
    print(
        f"{len(kernels)} kernels, {sum(k.name.is_main for k in kernels)} main ones: as they must be"
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.inspect_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help=f".cu files, or compiled ones (default: {LIBRARY.name} of this package; its sources "
        "with --archs)",
    )
    parser.add_argument(
        "--archs",
        nargs="+",
        help=f"what to compile .cu files for (default: {' '.join(ARCHS_OF_LOOPS)}), and to read in "
        f"compiled ones (default: all that they have); all: {' '.join(ARCHS)}, as far as nvcc "
        "knows them",
    )
    parser.add_argument("--all", action="store_true", help="show all kernels, main ones with a *")
    parser.add_argument("--check", action="store_true", help="fail on what kernels must not do")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"compile all sources for all architectures, and write {tables.KEPT.name}",
    )
    options = parser.parse_args(arguments)
    if options.write and (options.files or options.archs):
        parser.error("--write is about all sources and architectures: name none")
    if options.write:
        options.archs = ["all"]
    options.read_archs = [] if options.archs == ["all"] else options.archs or []
    options.all_sources = options.archs == ["all"] and not options.files
    options.files = options.files or (kernel_sources() if options.archs else [LIBRARY])
    options.archs = options.archs or ARCHS_OF_LOOPS
    for file in options.files:
        if not file.is_file():
            parser.error(f"{file} does not exist")
    return options


if __name__ == "__main__":
    sys.exit(main())
