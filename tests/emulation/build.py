"""Compiles the emulated kernels, once for every state of their sources.

CBAM_EMULATION_CACHE     where objects and libraries are kept (default: build/emulation)
CBAM_EMULATION_SANITIZE  1: load() takes the build with AddressSanitizer and UBSan; the process must
                         have been started with sanitizer_environment()
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cbam_ext.building import compile, decisions

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
CSRC = CHECKOUT / "csrc"

JOBS = 2
KEPT_DAYS = 3  # a file of the cache that was not used for so long is deleted

_HEADERS = {".h", ".cuh", ".inl"}
# The GPU's compiler lets kernels see one buffer as several types, so must this one.
_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-Wno-unknown-pragmas",
    "-Wno-uninitialized",
    "-fno-strict-aliasing",
)
_FAST = ("-O2", "-g0")
_SANITIZED = (
    "-O0",  # compiling takes a multiple of the time otherwise, and more than it saves
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",  # wants the run-time types of classes that torch keeps to itself
    "-fno-sanitize-recover=all",
)


@dataclass(frozen=True)
class _Library:
    name: str
    sources: tuple[Path, ...]
    header_folders: tuple[Path, ...]
    torch: bool


_RUNTIME = tuple(sorted((HERE / "runtime").glob("*.cpp")))


def _toys() -> _Library:
    folders = (HERE / "include", HERE / "runtime")
    return _Library("toys", (HERE / "toys.cu", *_RUNTIME), folders, torch=False)


def _operators() -> _Library:
    names = ("forward.cu", "backward.cu", "apply_backward.cu", "plan.cpp")
    kernels = [CSRC / "cuda" / name for name in names]
    arguments = [CSRC / "torch" / name for name in ("checks.cpp", "tensors.cpp")]
    sources = (*kernels, *arguments, HERE / "library.cpp", *_RUNTIME)
    return _Library("operators", sources, (HERE / "include", HERE / "runtime", CSRC), torch=True)


def build(sanitize: bool = False) -> Path:
    """The library of the emulated operators, compiled if its sources have changed."""
    return _build_library(_operators(), sanitize)


def build_toys(sanitize: bool = False) -> Path:
    """The library of the toy kernels, which need no torch."""
    return _build_library(_toys(), sanitize)


def load() -> None:
    """Makes ``torch.ops.cbam_emulated`` exist, without its Python half."""
    if not torch._C._jit_get_schemas_for_operator("cbam_emulated::forward"):
        torch.ops.load_library(str(loaded_path()))


@functools.cache
def loaded_path() -> Path:
    """The library that load() takes in this process."""
    return build(sanitize=os.environ.get("CBAM_EMULATION_SANITIZE") == "1")


def sanitizer_environment() -> dict[str, str]:
    """The environment for a process that loads a build with sanitizers."""
    compiler = _compiler()
    libraries = ["libasan.so", "libstdc++.so.6"]
    if "clang" in _compiler_version(compiler):
        libraries[0] = f"libclang_rt.asan-{os.uname().machine}.so"
    # The interpreter is not linked with libstdc++, and libasan wants to find its functions for
    # exceptions at once.
    found = [decisions.first_line([*compiler, f"-print-file-name={name}"]) for name in libraries]
    return {
        **os.environ,
        "CBAM_EMULATION_SANITIZE": "1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


# ----------------------------------------------------------------------------------- compiling


def _build_library(library: _Library, sanitize: bool) -> Path:
    compiler = _compiler()
    flags = _flags(library, sanitize)
    facts = (compiler, _compiler_version(compiler), flags, torch.__version__)
    common = hashlib.sha256(repr(facts).encode())
    for folder in library.header_folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in _HEADERS):
            _feed(common, path)
    cache = _cache_folder()
    objects = []
    for source in library.sources:
        digest = common.copy()
        _feed(digest, source)
        objects.append(cache / f"{source.stem}-{digest.hexdigest()[:16]}.o")
    digest = hashlib.sha256("".join(path.name for path in objects).encode())
    target = cache / f"lib{library.name}-{digest.hexdigest()[:16]}.so"
    with _lock(cache / "lock"):
        if not target.exists():
            with ThreadPoolExecutor(JOBS) as pool:
                jobs = [
                    pool.submit(_compile_one, [*compiler, *flags], source, object_file)
                    for source, object_file in zip(library.sources, objects, strict=True)
                    if not object_file.exists()
                ]
                for job in jobs:
                    job.result()
            _link([*compiler, *flags], objects, library.torch, target)
        _delete_old_files(cache, {target, *objects})
    return target


def _flags(library: _Library, sanitize: bool) -> list[str]:
    flags = [f for f in decisions.CXX_FLAGS if not f.startswith(("-O", "-g"))]
    flags += [*_FLAGS, *(_SANITIZED if sanitize else _FAST)]
    flags += [f"-I{HERE / 'include'}", f"-ffile-prefix-map={CHECKOUT}{os.sep}="]
    if library.torch:
        # The one folder: enough for the stable ABI. As system headers they give no warnings.
        flags += ["-isystem", str(_torch_folder() / "include")]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def _compile_one(command: Sequence[str], source: Path, target: Path) -> None:
    unfinished = target.with_suffix(".tmp")
    _run([*command, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
    unfinished.rename(target)


def _link(command: Sequence[str], objects: Sequence[Path], with_torch: bool, target: Path) -> None:
    unfinished = target.with_suffix(".tmp")
    libraries = ["-ldl"]
    if with_torch:
        folder = _torch_folder() / "lib"
        libraries += [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10"]
    if "-fsanitize=address,undefined" in command and "clang" in _compiler_version(_compiler()):
        libraries.append("-shared-libasan")
    _run([*command, "-shared", *map(str, objects), *libraries, "-o", str(unfinished)])
    unfinished.rename(target)


def _run(command: Sequence[str]) -> None:
    # The compiler itself needs no sanitizer.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    if done.returncode != 0:
        raise decisions.BuildError(
            f"the emulated kernels do not compile:\n{shlex.join(command)}\n{done.stdout}"
        )
    if done.stdout.strip():  # warnings
        print(done.stdout, file=sys.stderr)


def _compiler() -> list[str]:
    return shlex.split(compile.find_compiler())


def _compiler_version(compiler: Sequence[str]) -> str:
    return decisions.first_line([*compiler, "--version"])


def _torch_folder() -> Path:
    return Path(torch.__file__).resolve().parent


# --------------------------------------------------------------------------------------- cache


def _cache_folder() -> Path:
    chosen = os.environ.get("CBAM_EMULATION_CACHE")
    folder = Path(chosen) if chosen else CHECKOUT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _feed(digest: hashlib._Hash, path: Path) -> None:
    digest.update(path.relative_to(CHECKOUT).as_posix().encode() + b"\0")
    digest.update(path.read_bytes() + b"\0")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds, the others wait for it: the workers of a parallel test run."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete_old_files(cache: Path, used: set[Path]) -> None:
    now = time.time()
    for path in used:
        if path.exists():
            os.utime(path)
    for path in cache.glob("*-*.*"):
        if path not in used and now - path.stat().st_mtime > KEPT_DAYS * 24 * 3600:
            path.unlink()
