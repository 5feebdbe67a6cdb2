"""What to compile, with which flags, and for which GPUs: the one place that decides it.

setup.py, the JIT loader and the diagnostics all ask here. Only the standard library is imported,
so that setup.py can use this file before torch is known to be there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 10)
FACTS = "build_info.json"  # the file beside the libraries that tells how they were built
# 11.8 miscompiles one of the kernels: gradients are wrong, and nothing complains.
MINIMUM_CUDA = 12
# The NVIDIA drivers that run what a CUDA of this major version makes, its runtime included.
DRIVER_SERIES = {12: 525, 13: 580}
# Brings a CUDA 13 toolkit, as the extra "cuda" does: nvcc, and by its requirements the rest.
PIP_TOOLKIT = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"

# -g0 because Python's own flags often ask for debug information, which triples the files.
CXX_FLAGS = ("-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra")
# USE_CUDA shows torch's CUDA shims; the host files of the CUDA library need it too.
CUDA_FLAG = "-DUSE_CUDA"
NVCC_FLAGS = ("-O3", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra", CUDA_FLAG)

# The first of each family: its machine code also runs on the later members (that of 8.0 on 8.6 and
# 8.9), and the PTX of the newest serves what comes later. Not more of them, since each costs about
# a minute of one core.
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0")

# The names that torch accepts in TORCH_CUDA_ARCH_LIST beside numbers.
NAMED_ARCHS = {
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class BuildError(RuntimeError):
    """Something that the build needs is missing or does not fit; the text says how to mend it."""


def cxx_flags(env: Mapping[str, str] = os.environ) -> list[str]:
    """Our flags for the C++ compiler, then those of CXXFLAGS, which so have the last word."""
    return [*CXX_FLAGS, *shlex.split(env.get("CXXFLAGS", ""))]


# --- sources -------------------------------------------------------------------------------------


def source_dir() -> Path:
    """The folder of the C++ and CUDA sources: beside the package in a checkout, else inside it."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "csrc"
    return checkout if (checkout / "sources.txt").is_file() else package / "csrc"


def sources(library: str) -> list[Path]:
    """The files of one library ("cpu" or "cuda") as listed in sources.txt."""
    folder = source_dir()
    files = []
    for line in (folder / "sources.txt").read_text().splitlines():
        words = line.partition("#")[0].split()
        if words and words[0] == library:
            files.append(folder / words[1])
    return files


def source_hash() -> str:
    """A short hash over everything in the source folder; two builds of the same code agree."""
    folder = source_dir()
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _HASHED_SUFFIXES):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_HASHED_SUFFIXES = {".cpp", ".h", ".inl", ".cu", ".cuh", ".txt"}


# --- CUDA toolkit --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root folder, version ("13.0"), and where headers and libraries lie."""

    home: Path
    version: str
    include: Path
    library: Path

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def find_toolkit(
    env: Mapping[str, str] = os.environ,
    usual_places: Path = Path("/usr/local"),
    packages: Iterable[Path] | None = None,
) -> tuple[Toolkit | None, str]:
    """Find a complete CUDA toolkit; without one, say in a phrase what was looked at.

    CUDA_HOME (or CUDA_PATH) decides alone when set. Otherwise the nvcc on PATH is asked where it
    lives, since it may be a wrapper script or a link, and then /usr/local/cuda* is looked at, and
    what pip has installed in `packages` (default: :func:`package_folders`).
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            toolkit, problem = _inspect(Path(env[name]))
            return toolkit, f"{name}={env[name]} {problem}"
    if packages is None:
        packages = package_folders(env)
    problems = []
    for home in _candidate_homes(env, usual_places, packages):
        toolkit, problem = _inspect(home)
        if toolkit:
            return toolkit, ""
        problems.append(f"{home} {problem}")
    nothing = f"no nvcc on PATH, no CUDA toolkit in {usual_places}, none from pip"
    return None, "; ".join(dict.fromkeys(problems)) or nothing


def package_folders(env: Mapping[str, str] = os.environ) -> list[Path]:
    """Where pip may have put packages for this process, or for the one that it builds for.

    A build in isolation sees its own packages alone: those of the interpreter it was started by,
    and of the active environment, are looked at all the same.
    """
    folders = [Path(entry) for entry in sys.path if entry]
    folders += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    if env.get("VIRTUAL_ENV"):
        folders += sorted(Path(env["VIRTUAL_ENV"]).glob("lib/python*/site-packages"))
    return list(dict.fromkeys(folders))


def _candidate_homes(
    env: Mapping[str, str], usual_places: Path, packages: Iterable[Path]
) -> Iterator[Path]:
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    if nvcc:
        yield from _homes_of_nvcc(nvcc)
    if (usual_places / "cuda").is_dir():
        yield usual_places / "cuda"
    yield from _newest_first(usual_places.glob("cuda-*"))
    for folder in packages:
        # The libraries that torch brings lie there too, mostly without a compiler.
        homes = folder.glob("nvidia/cu[0-9]*")
        yield from _newest_first(home for home in homes if (home / "bin" / "nvcc").is_file())


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted((f for f in folders if f.is_dir()), key=lambda f: _numbers(f.name), reverse=True)


def _homes_of_nvcc(nvcc: str) -> Iterator[Path]:
    # A dry run prints the folder of the real compiler, whatever script or link led to it.
    said = _output([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull])
    here = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    if here:
        yield Path(here.group(1).strip()).resolve().parent
    yield Path(nvcc).resolve().parent.parent


def _inspect(home: Path) -> tuple[Toolkit | None, str]:
    """The toolkit at this folder, or a phrase that says what the folder lacks."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return None, "has no bin/nvcc"
    include = _first(home, ("include", "targets/*/include"), "cuda_runtime.h")
    if include is None:
        return None, "has no include/cuda_runtime.h"
    folders = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    library = _first(home, folders, "libcudart_static.a")
    if library is None:
        return None, "has no libcudart_static.a"
    release = re.search(r"release (\d+\.\d+)", _output([str(nvcc), "--version"]))
    if release is None:
        return None, "has an nvcc that does not tell its version"
    toolkit = Toolkit(home, release.group(1), include, library)
    if toolkit.major < MINIMUM_CUDA:
        return None, (
            f"is CUDA {toolkit.version}, and {MINIMUM_CUDA}.0 or newer is needed (11.8 miscompiles "
            "one of the kernels)"
        )
    return toolkit, ""


def _first(home: Path, folders: tuple[str, ...], file: str) -> Path | None:
    found = (path.parent for folder in folders for path in sorted(home.glob(f"{folder}/{file}")))
    return next(found, None)


def _output(command: list[str]) -> str:
    """What a command prints on both streams; empty if it cannot run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def first_line(command: list[str]) -> str:
    """The first line that a command prints; empty if it cannot run."""
    return _output(command).partition("\n")[0].strip()


def version_tuple(version: str) -> tuple[int, ...]:
    """The release numbers of a version: "2.13.0+cpu" gives (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return _numbers(release.group()) if release else ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


# --- GPU architectures ---------------------------------------------------------------------------


@functools.cache
def nvcc_archs(nvcc: Path) -> tuple[str, ...]:
    """The capabilities that this nvcc can make code for, oldest first: ("7.5", "8.0", ...)."""
    names = re.findall(r"^sm_(\d+)$", _output([str(nvcc), "--list-gpu-code"]), re.MULTILINE)
    return tuple(f"{n // 10}.{n % 10}" for n in sorted(int(name) for name in names))


def cuda_archs(supported: tuple[str, ...], env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The architectures to build for, like ("8.0", "9.0+PTX").

    TORCH_CUDA_ARCH_LIST as torch understands it, else the defaults that `supported` (what the
    nvcc knows) contains, and the PTX of the newest. No GPU is asked for.
    """
    wanted = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not wanted:
        known = [arch for arch in DEFAULT_ARCHS if arch in supported] or list(supported[-1:])
        return (*known[:-1], known[-1] + "+PTX")
    archs: list[str] = []
    for word in re.split(r"[;,\s]+", wanted):
        for arch in NAMED_ARCHS.get(word.lower(), word).split(";"):
            _check_arch(arch, supported)
            if arch not in archs:
                archs.append(arch)
    return tuple(archs)


def _check_arch(arch: str, supported: tuple[str, ...]) -> None:
    match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
    if match is None:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: '{arch}' is not an architecture. Write compute capabilities, "
            'as in TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX".'
        )
    if match.group(1) not in supported:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: this nvcc cannot make code for {arch}; "
            f"it knows {', '.join(supported)}."
        )


def gencode_flags(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def arch_covers(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code built for `archs` runs on a device of this compute capability.

    Machine code runs on its own major version from its minor version up, PTX on everything
    newer; the "a" and "f" variants are taken as their own capability alone.
    """
    return any(_covers(arch, capability) for arch in archs)


def _covers(arch: str, capability: tuple[int, int]) -> bool:
    number = arch.removesuffix("+PTX")
    major, minor = _numbers(number)
    if number[-1] in "af":
        return (major, minor) == capability
    if arch.endswith("+PTX") and (major, minor) <= capability:
        return True
    return major == capability[0] and minor <= capability[1]


# --- with or without CUDA ------------------------------------------------------------------------


@dataclass(frozen=True)
class CudaPlan:
    """Build the CUDA library with `toolkit` for `archs`; or without one, because of `reason`.

    `remedy` says what to do for it to be built; empty where that was not wanted.
    """

    toolkit: Toolkit | None
    archs: tuple[str, ...]
    reason: str
    remedy: str = ""


def force_cuda(env: Mapping[str, str] = os.environ) -> bool | None:
    """FORCE_CUDA: True (must), False (never) or None (if a toolkit is there)."""
    value = env.get("FORCE_CUDA", "").strip()
    if value not in ("", "0", "1"):
        raise BuildError(f"FORCE_CUDA={value} is not understood: use 0, 1, or leave it unset.")
    return None if value == "" else value == "1"


def plan_cuda(
    torch_version: str,
    torch_cuda: str | None,
    env: Mapping[str, str] = os.environ,
    usual_places: Path = Path("/usr/local"),
    packages: Iterable[Path] | None = None,
) -> CudaPlan:
    """Decide about the CUDA library, built beside a torch of this version and CUDA `torch_cuda`.

    Only headers of that torch are used, and the CUDA runtime is linked in. So its CUDA need not be
    the toolkit's, and the library runs under any other torch.
    """
    forced = force_cuda(env)
    if forced is False:
        return CudaPlan(None, (), "FORCE_CUDA=0")
    if torch_cuda is None and not forced:
        return CudaPlan(
            None,
            (),
            f"torch {torch_version} is a build without CUDA",
            "install a CUDA build of torch (https://pytorch.org/get-started/locally), or set "
            "FORCE_CUDA=1, which builds them for another torch",
        )
    toolkit, missing = find_toolkit(env, usual_places, packages)
    if toolkit is not None:
        return CudaPlan(toolkit, cuda_archs(nvcc_archs(toolkit.nvcc), env), "")
    problem = f"no CUDA toolkit was found ({missing})"
    if forced:
        raise BuildError(f"FORCE_CUDA=1, but {problem}. To mend it, {TOOLKIT_REMEDY}.")
    return CudaPlan(None, (), problem, TOOLKIT_REMEDY)


TOOLKIT_REMEDY = (
    f'{PIP_TOOLKIT} (which is what "cbam_ext[cuda]" brings), or set CUDA_HOME to the folder of a '
    f"CUDA {MINIMUM_CUDA} toolkit or a newer one"
)
