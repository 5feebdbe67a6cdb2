"""The tools of CUDA, and from sources and binaries to kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cbam_ext.building import decisions

from bench.machine_code.sass import Kernel, parse


class InspectionError(RuntimeError):
    """Something that the inspection needs is missing; the text says what."""


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


def kernel_sources() -> list[Path]:
    """The sources that nvcc compiles, those that take longest first."""
    files = [path for path in decisions.sources("cuda") if path.suffix == ".cu"]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def nvcc_version() -> str:
    """What nvcc calls itself, like "13.0.88"."""
    said = subprocess.run([_toolkit().nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if found is None:
        raise InspectionError(f"an nvcc that does not tell its version:\n{said}")
    return found.group(1)


def known_archs(archs: Iterable[str]) -> list[str]:
    """Those of these architectures that nvcc knows."""
    known = decisions.nvcc_archs(_toolkit().nvcc)
    return [arch for arch in archs if arch in known]


def kernels_of(
    files: Iterable[Path], archs: Iterable[str], read_archs: Iterable[str] = ()
) -> list[Kernel]:
    """The kernels of .cu files, compiled for these architectures, and of compiled files.

    Of the latter only those for ``read_archs``, if any are named.
    MAX_JOBS bounds how many are compiled at once; without it, the cores do.
    """
    cuobjdump = find_cuobjdump()
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        work = []
        for file in files:
            if file.suffix == ".cu":
                for arch in archs:
                    target = Path(folder) / f"{len(work)}.fatbin"
                    work.append(pool.submit(_compile_and_read, file, arch, target, cuobjdump))
            else:
                for arch in list(read_archs) or [""]:
                    work.append(pool.submit(_read, file, cuobjdump, arch))
        return [kernel for each in work for kernel in each.result()]


def kernels_of_build(library: Path, archs: Iterable[str]) -> list[Kernel]:
    """Those of a built library; none if it is of other sources, or of another nvcc."""
    try:
        facts = json.loads((library.parent / decisions.FACTS).read_text())
    except OSError:
        return []
    here = {"source_hash": decisions.source_hash(), "cuda": _toolkit().version}
    here["cuda_flags"] = " ".join(decisions.NVCC_FLAGS)
    if any(facts[name] != value for name, value in here.items()) or not library.is_file():
        return []
    wanted = {machine_name(arch) for arch in archs}
    return [kernel for kernel in _read(library, find_cuobjdump()) if kernel.arch in wanted]


def machine_name(arch: str) -> str:
    """What a kernel's ``arch`` is for a compute capability: "sm_80" for "8.0"."""
    return f"sm_{arch.replace('.', '')}"


def _compile_and_read(source: Path, arch: str, target: Path, cuobjdump: Path) -> list[Kernel]:
    """With the flags of the build."""
    toolkit = _toolkit()
    done = subprocess.run(
        [
            str(toolkit.nvcc),
            "-std=c++17",
            *decisions.NVCC_FLAGS,
            *decisions.gencode_flags((arch,)),
            f'-DCBAM_CUDA_ARCHS="{arch}"',
            f"-I{toolkit.include}",
            *_torch_includes(),
            "-fatbin",
            str(source),
            "-o",
            str(target),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise InspectionError(f"{source} does not compile for {arch}:\n{done.stdout}")
    return _read(target, cuobjdump)


def _toolkit() -> decisions.Toolkit:
    toolkit, missing = decisions.find_toolkit()
    if toolkit is None:
        raise InspectionError(f"no CUDA toolkit: {missing}")
    return toolkit


def _torch_includes() -> list[str]:
    # Kernels know nothing of torch, but the diagnostics beside them do. Not imported: that takes
    # longer than a small file's compilation.
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch else ()
    return [f"-I{folder}/include" for folder in folders]


def _read(binary: Path, cuobjdump: Path, arch: str = "") -> list[Kernel]:
    """The kernels in a library, object, fatbin or cubin; for one architecture, or all."""
    only = ["-arch", machine_name(arch)] if arch else []
    done = subprocess.run(
        [str(cuobjdump), *only, "-res-usage", "-elf", "-sass", str(binary)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    if done.returncode:
        raise InspectionError(f"{cuobjdump} cannot read {binary}:\n{done.stdout[-2000:]}")
    kernels = parse(done.stdout)
    if arch and not kernels:
        raise InspectionError(f"{binary} has no kernels for {arch}")
    return kernels
