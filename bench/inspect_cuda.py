"""``python -m bench.inspect_cuda``: what the compiler made of the CUDA kernels.

Reads machine code, so it needs no GPU: from the built library, or from sources that it compiles
with the flags of the build. One line for each main kernel (see MAIN) and architecture:

  regs        registers of a thread
  stack       bytes of a thread's stack; spilled registers lie there
  local       instructions that store to / load from that memory, each a spill or an array that
              could not be kept in registers
  shared      bytes of static shared memory of a block
  threads     the largest block that the launch bounds allow
  occupancy   share of a multiprocessor's threads that fit by registers, at that block size
              (dynamic shared memory, which the launch decides, is not counted)
  128-bit     instructions that load from / store to global memory 16 bytes or more at once

With ``--check`` the exit code is 1 if a main kernel spills, has an occupancy under one half, or has
no 128-bit load.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cbam_ext.building import decisions, library

LIBRARY = library.PACKAGE / library.CUDA_LIBRARY

# The kernels that walk over feature maps, in the variants that move 16 bytes at once: their last
# template argument is the number of elements in 16 bytes. float64 is there for checks of gradients,
# not for speed, and needs twice the registers.
MAIN = r"^(sweep|gate)_kernel<(?!.*double).*, (4|8)>"
LEAST_OCCUPANCY = 0.5

REGISTERS = 65536
# Threads, and blocks, that a multiprocessor holds, by architecture.
RESIDENT = {
    "sm_75": (1024, 16),
    "sm_80": (2048, 32),
    "sm_86": (1536, 16),
    "sm_89": (1536, 24),
    "sm_90": (2048, 32),
    "sm_100": (2048, 32),
    "sm_120": (1536, 24),
}


class InspectionError(RuntimeError):
    """Something that the inspection needs is missing; the text says what."""


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 1024
    local_stores: int = 0
    local_loads: int = 0
    wide_loads: int = 0
    wide_stores: int = 0

    @property
    def occupancy(self) -> float:
        """Of a multiprocessor's threads, the share that its registers allow."""
        threads, blocks = RESIDENT.get(self.arch, (2048, 32))
        warps = -(-self.threads // 32)
        # Registers come in lots of 256 for a warp, from one of four parts of the register file.
        lot = -(-max(self.registers, 1) * 32 // 256) * 256
        by_registers = (REGISTERS // 4 // lot) * 4 // warps
        return min(by_registers, threads // 32 // warps, blocks) * warps / (threads // 32)

    def problems(self) -> list[str]:
        """What a main kernel must not have."""
        found = []
        if self.stack or self.local_stores or self.local_loads:
            found.append(
                f"uses {self.stack} bytes of stack, "
                f"with {self.local_stores} stores and {self.local_loads} loads"
            )
        if self.occupancy < LEAST_OCCUPANCY:
            found.append(f"fills {self.occupancy:.0%} of a multiprocessor")
        if self.wide_loads == 0:
            found.append("has no 128-bit load")
        return found


# --- tools ---------------------------------------------------------------------------------------


def find_cuobjdump() -> Path:
    """The toolkit's, the one on PATH, or the one that Triton carries."""
    looked_at = []
    toolkit, _ = decisions.find_toolkit()
    if toolkit:
        looked_at.append(toolkit.home / "bin")
    found = shutil.which("cuobjdump")
    if found:
        looked_at.append(Path(found).parent)
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations if triton else ():
        looked_at.append(Path(folder) / "backends" / "nvidia" / "bin")
    for folder in looked_at:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return folder / "cuobjdump"
    raise InspectionError(
        "no cuobjdump with nvdisasm beside it, neither in the CUDA toolkit, on PATH nor in Triton. "
        "To have them: pip install triton, or conda install -c nvidia cuda-cuobjdump cuda-nvdisasm"
    )


def compile_source(source: Path, archs: tuple[str, ...], folder: Path) -> Path:
    """The machine code of one .cu file, made with the flags of the build."""
    toolkit, missing = decisions.find_toolkit()
    if toolkit is None:
        raise InspectionError(f"no CUDA toolkit: {missing}")
    target = folder / f"{source.stem}.fatbin"
    command = [
        str(toolkit.nvcc),
        "-std=c++17",
        *decisions.NVCC_FLAGS,
        *decisions.gencode_flags(archs),
    ]
    command += ["--threads=0", f"-I{toolkit.include}", *_torch_includes()]
    done = subprocess.run(
        [*command, "-fatbin", str(source), "-o", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise InspectionError(f"{source} does not compile:\n{done.stdout}")
    return target


def _torch_includes() -> list[str]:
    # Kernels know nothing of torch, but the diagnostics beside them do. Not imported: that takes
    # longer than a small file's compilation.
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch else ()
    return [f"-I{folder}/include" for folder in folders]


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names; the mangled ones where there is no demangler."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return dict(zip(names, names, strict=True))
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return dict(zip(names, map(_shorten, done.stdout.splitlines()), strict=True))


def _shorten(name: str) -> str:
    """Without result, arguments and the namespaces that all share."""
    name = re.sub(r"\(anonymous namespace\)::|cbam::cuda::|cbam::", "", name)
    name = re.sub(r"\((?:int|unsigned int|long|bool|[\w:]+)\)(?=\d)", "", name)  # (int)3
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


# --- reading -------------------------------------------------------------------------------------


def read(binary: Path, cuobjdump: Path) -> list[Kernel]:
    """The kernels in a library, object, fatbin or cubin."""
    done = subprocess.run(
        [str(cuobjdump), "-res-usage", "-elf", "-sass", str(binary)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    if done.returncode:
        raise InspectionError(f"{cuobjdump} cannot read {binary}:\n{done.stdout[-2000:]}")
    return parse(done.stdout)


_ARCH = re.compile(r"^arch = (sm_\w+)|^\tcode for (sm_\w+)")
_NAME = re.compile(r"^\.nv\.info\.(\S+)|^ Function (\S+):$|^\t\tFunction : (\S+)")
_USAGE = re.compile(r"^  REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SIZE = re.compile(r"\.(128|256)(?:\.|$)")


def parse(dump: str) -> list[Kernel]:
    """The kernels in what cuobjdump prints: attributes, then resources, then instructions."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch, kernel, awaits_threads = "", None, False
    for line in dump.splitlines():
        if match := _ARCH.match(line):
            arch = match.group(1) or match.group(2)
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
        elif match := _INSTRUCTION.search(line):
            _count(kernel, match.group(1))
    return [kernel for kernel in kernels.values() if kernel.registers]


def _count(kernel: Kernel, instruction: str) -> None:
    operation = instruction.partition(".")[0]
    wide = _SIZE.search(instruction) is not None
    kernel.local_stores += operation == "STL"
    kernel.local_loads += operation == "LDL"
    kernel.wide_loads += operation == "LDG" and wide
    kernel.wide_stores += operation == "STG" and wide


# --- report --------------------------------------------------------------------------------------


def table(kernels: list[Kernel], main: re.Pattern[str]) -> str:
    """One line for each kernel; main ones bear a star."""
    lines = [["", "kernel", "arch", "regs", "stack", "local", "shared", "threads"]]
    lines[0] += ["occupancy", "128-bit"]
    for kernel in kernels:
        lines.append(
            [
                "*" if main.search(kernel.name) else "",
                kernel.name,
                kernel.arch,
                str(kernel.registers),
                str(kernel.stack),
                f"{kernel.local_stores}/{kernel.local_loads}",
                str(kernel.shared),
                str(kernel.threads),
                f"{kernel.occupancy:.0%}",
                f"{kernel.wide_loads}/{kernel.wide_stores}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = 3  # columns of text
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check(kernels: list[Kernel], main: re.Pattern[str]) -> list[str]:
    """The complaints about main kernels; that there are none to look at is one, too."""
    wanted = [kernel for kernel in kernels if main.search(kernel.name)]
    if not wanted:
        return [f"no kernel is called like {main.pattern}"]
    return [
        f"{kernel.name} ({kernel.arch}) {problem}"
        for kernel in wanted
        for problem in kernel.problems()
    ]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        cuobjdump = find_cuobjdump()
        with tempfile.TemporaryDirectory() as folder:
            kernels = []
            for file in options.files:
                source = file.suffix == ".cu"
                binary = compile_source(file, options.archs, Path(folder)) if source else file
                kernels += read(binary, cuobjdump)
    except (InspectionError, decisions.BuildError) as error:
        print(f"inspect_cuda: {error}", file=sys.stderr)
        return 2
    readable = demangle([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = readable[kernel.name]
    kernels.sort(key=lambda kernel: (kernel.name, kernel.arch))
    shown = [kernel for kernel in kernels if options.all or options.main.search(kernel.name)]
    print(table(shown, options.main))
    if not options.check:
        return 0
    complaints = check(kernels, options.main)
    for complaint in complaints:
        print(f"inspect_cuda: {complaint}", file=sys.stderr)
    if complaints:
        return 1
    count = sum(options.main.search(kernel.name) is not None for kernel in kernels)
    print(f"{count} main kernels (*): no spills, occupancy at least one half, 128-bit loads")
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
        help=f".cu files, or compiled ones (default: {LIBRARY.name} of this package)",
    )
    parser.add_argument(
        "--archs",
        nargs="+",
        default=("8.0", "9.0"),
        help="what to compile .cu files for (default: 8.0 9.0)",
    )
    parser.add_argument("--all", action="store_true", help="show all kernels, main ones with a *")
    parser.add_argument(
        "--check", action="store_true", help="fail on what main kernels must not do"
    )
    parser.add_argument(
        "--main",
        type=re.compile,
        default=MAIN,
        help="names of the main kernels (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    options.main = re.compile(options.main)
    options.files = options.files or [LIBRARY]
    for file in options.files:
        if not file.is_file():
            parser.error(f"{file} does not exist")
    return options


if __name__ == "__main__":
    sys.exit(main())
