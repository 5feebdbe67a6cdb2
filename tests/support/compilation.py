"""Compiles what the tests have in C++, once for every state of its sources."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cbam_ext.building import compile, decisions

from .kept_objects import delete_old
from .packages import CHECKOUT

CSRC = decisions.source_dir()

JOBS = 2

_HEADERS = {".h", ".cuh", ".inl"}


@dataclass(frozen=True)
class Library:
    """A shared library, or a program, and all that it is compiled from."""

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    linked: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()  # what else it depends on
    kernel_flags: tuple[str, ...] = ()  # of .cu files, behind the others
    program: bool = False


def headers_in(*folders: Path) -> tuple[Path, ...]:
    """Every header in the folders and below."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")))
    return tuple(path for path in paths if path.suffix in _HEADERS)


def product_flags(*more: str, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The flags of the product, less those that begin like `without`; more; those of CXXFLAGS."""
    flags = [flag for flag in decisions.CXX_FLAGS if not flag.startswith(without)]
    flags += [f"-ffile-prefix-map={CHECKOUT}{os.sep}=", "-std=c++17", "-fPIC", *more]
    return (*flags, *shlex.split(os.environ.get("CXXFLAGS", "")))


def build(library: Library, cache: Path) -> Path:
    """The library in the folder, compiled if anything about it has changed."""
    command = [*compiler(), *library.flags]
    facts = (command, compiler_version(), library.linked, library.facts)
    common = hashlib.sha256(repr(facts).encode())
    for path in library.headers:
        _feed(common, path)
    cache.mkdir(parents=True, exist_ok=True)
    objects = []
    flags = {path: library.kernel_flags if path.suffix == ".cu" else () for path in library.sources}
    for source in library.sources:
        digest = common.copy()
        _feed(digest, source)
        digest.update(repr(flags[source]).encode())
        objects.append(cache / f"{source.stem}-{digest.hexdigest()[:16]}.o")
    digest = hashlib.sha256("".join(path.name for path in objects).encode())
    target = cache / f"lib{library.name}-{digest.hexdigest()[:16]}.so"
    if library.program:
        target = cache / f"{library.name}-{digest.hexdigest()[:16]}.run"
    with _lock(cache / "lock"):
        if not target.exists():
            with ThreadPoolExecutor(JOBS) as pool:
                jobs = [
                    pool.submit(_compile_one, [*command, *flags[source]], source, object_file)
                    for source, object_file in zip(library.sources, objects, strict=True)
                    if not object_file.exists()
                ]
                for job in jobs:
                    job.result()
            kind = () if library.program else ("-shared",)
            _link([*command, *kind], objects, library.linked, target)
        _delete_old_files(cache, {target, *objects})
    return target


def compiler() -> list[str]:
    return shlex.split(compile.find_compiler())


def compiler_version() -> str:
    return decisions.first_line([*compiler(), "--version"])


# Of libraries that a process loads which was started with sanitizer_environment().
SANITIZED = (
    "-O0",  # compiling takes a multiple of the time otherwise, and more than it saves
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",  # wants the run-time types of classes that torch keeps to itself
    "-fno-sanitize-recover=all",
)


def sanitizer_link_flags() -> tuple[str, ...]:
    return ("-shared-libasan",) if _is_clang() else ()


def sanitizer_environment() -> dict[str, str]:
    """The environment for a process that loads a library with SANITIZED."""
    libraries = ["libasan.so", "libstdc++.so.6"]
    if _is_clang():
        libraries[0] = f"libclang_rt.asan-{os.uname().machine}.so"
    # The interpreter is not linked with libstdc++, and libasan wants to find its functions for
    # exceptions at once.
    found = [decisions.first_line([*compiler(), f"-print-file-name={name}"]) for name in libraries]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _is_clang() -> bool:
    return "clang" in compiler_version()


def _compile_one(command: Sequence[str], source: Path, target: Path) -> None:
    unfinished = target.with_suffix(".tmp")
    _run([*command, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
    unfinished.rename(target)


def _link(
    command: Sequence[str], objects: Sequence[Path], linked: Sequence[str], target: Path
) -> None:
    unfinished = target.with_suffix(".tmp")
    _run([*command, *map(str, objects), *linked, "-o", str(unfinished)])
    unfinished.rename(target)


def _run(command: Sequence[str]) -> None:
    # The compiler itself needs no sanitizer.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    if done.returncode != 0:
        raise decisions.BuildError(
            f"a library of the tests does not compile:\n{shlex.join(command)}\n{done.stdout}"
        )
    if done.stdout.strip():  # warnings
        print(done.stdout, file=sys.stderr)


# --------------------------------------------------------------------------------------- cache


def _feed(digest: hashlib._Hash, path: Path) -> None:
    # By its place in the checkout: copies of that share a cache.
    place = path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path
    digest.update(place.as_posix().encode() + b"\0")
    digest.update(path.read_bytes() + b"\0")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds, the others wait for it: the workers of a parallel test run."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete_old_files(cache: Path, used: set[Path]) -> None:
    for path in used:
        if path.exists():
            os.utime(path)
    delete_old(path for path in cache.glob("*-*.*") if path not in used)
