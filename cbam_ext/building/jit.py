"""Compiles the shipped sources at run time, for :func:`cbam_ext.load`.

For notebooks and for installs without a compiled part. The compiling happens in a process of its
own, so a notebook's output streams, a Ctrl-C or a crashing compiler do not touch this one. Results
are kept in a folder per user, named after everything that they depend on.

Each build has a folder of its own there, out of which its result is moved when all is done: a
process that is killed takes its lock with it but not its compilers, which may go on writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import _version
from . import decisions, library
from .decisions import BuildError, CudaPlan

_POLL_SECONDS = 0.5
_OWN_FOLDER = "build-"  # how the name of a build's own folder begins


def build(verbose: bool = False) -> tuple[Path, dict[str, Any]]:
    """The folder of libraries that fit this process, compiled if need be, and facts of their build.

    Raises:
        BuildError: something that the build needs is missing, or compiling fails.
    """
    plan = _plan()
    folder = cache_dir(plan)
    if not _is_complete(folder):
        _make_folder(folder)
        with _locked(folder / "lock"):
            if not _is_complete(folder):  # another process may have built it meanwhile
                _compile(folder, plan, verbose)
    file = _info_file(folder)
    # Without CUDA one build serves, whatever the reason was when it was made.
    return file.parent, json.loads(file.read_text()) | {"without_cuda_because": plan.reason or None}


def cache_root() -> Path:
    """The folder that holds all builds: TORCH_EXTENSIONS_DIR, else torch's own default."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "torch_extensions").absolute()


def cache_dir(plan: CudaPlan) -> Path:
    """The folder of the build that fits these sources, this torch and this plan."""
    depends_on = [
        decisions.source_hash(),
        decisions.cxx_flags(),
        decisions.NVCC_FLAGS,
        os.environ.get("CXX"),
        torch.__version__,
        torch.version.cuda,
        sys.implementation.cache_tag,
        plan.toolkit and plan.toolkit.version,
        plan.archs,
    ]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    return cache_root() / f"cbam_ext_{_version.__version__}_{sys.implementation.cache_tag}_{key}"


def _plan() -> CudaPlan:
    """Build for CUDA where it can be used here, for the GPUs that are here."""
    forced = decisions.force_cuda()
    if forced is None and not torch.cuda.is_available():
        return CudaPlan(None, (), "no GPU is available here")
    plan = decisions.plan_cuda(torch.__version__, torch.version.cuda)
    if plan.toolkit is None or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return plan
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    present = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices}
    if present and present <= set(decisions.nvcc_archs(plan.toolkit.nvcc)):
        return CudaPlan(plan.toolkit, tuple(sorted(present)), "")
    return plan


def _info_file(folder: Path) -> Path:
    return folder / "cbam_ext" / decisions.FACTS


def _is_complete(folder: Path) -> bool:
    # The build writes this file last, and is moved here as a whole.
    return _info_file(folder).is_file()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot make the build folder ({error}): set TORCH_EXTENSIONS_DIR to a folder "
            "that can be written"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an OS lock, which ends with its process; while waiting, say for what and how long."""
    from filelock import FileLock, Timeout  # takes its time, and is needed here alone

    lock = FileLock(str(path))
    with _Progress(f"cbam_ext: waiting for another process that compiles (lock: {path})") as line:
        while True:
            try:
                lock.acquire(timeout=_POLL_SECONDS)
                break
            except Timeout:
                line.show()
    try:
        yield
    finally:
        lock.release()


def _compile(folder: Path, plan: CudaPlan, verbose: bool) -> None:
    """Fills ``folder``, whose lock is held."""
    for left in folder.glob(f"{_OWN_FOLDER}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)  # its compilers, if they still run, give up
    log = folder / "build.log"
    log.unlink(missing_ok=True)  # such compilers go on writing in the old one
    with tempfile.TemporaryDirectory(
        prefix=_OWN_FOLDER, dir=folder, ignore_cleanup_errors=True
    ) as own:
        _compile_into(Path(own), log, plan, verbose)
        result = _info_file(folder).parent
        shutil.rmtree(result, ignore_errors=True)
        os.rename(_info_file(Path(own)).parent, result)


def _compile_into(folder: Path, log: Path, plan: CudaPlan, verbose: bool) -> None:
    what = "CPU and CUDA kernels" if plan.toolkit else f"CPU kernels ({plan.reason})"
    with log.open("w") as output, _Progress(f"cbam_ext: compiling {what}, log in {log}") as line:
        line.show()
        process = subprocess.Popen(
            [sys.executable, "-m", "cbam_ext.building.compile", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(plan),
            start_new_session=True,
        )
        try:
            _watch(process, log, line, verbose)
        finally:
            if process.poll() is None:  # Ctrl-C: the compilers go with it
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if process.returncode != 0:
        raise BuildError(f"compiling failed: {first_error(log.read_text())}\nFull log: {log}")


def _watch(process: subprocess.Popen[bytes], log: Path, line: _Progress, verbose: bool) -> None:
    with log.open() as reader:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if not verbose:
                line.show()
            elif new := reader.read():
                print(new, end="", file=sys.stderr, flush=True)
        if verbose:
            print(reader.read(), end="", file=sys.stderr, flush=True)


def _environment(plan: CudaPlan) -> dict[str, str]:
    changed: dict[str, str] = {"FORCE_CUDA": "1" if plan.toolkit else "0"}
    if plan.toolkit:
        changed["CUDA_HOME"] = str(plan.toolkit.home)
        changed["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.archs)
    # The new process must import what this one imports.
    changed["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, **changed}


def first_error(log: str) -> str:
    """The line of a build log that tells most: our own, else the first error, else the end."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (r"^cbam_ext: (?!building)", r"\berror\b\s*:", r"(?i)\berror\b"):
        for line in lines:
            if re.search(pattern, line):
                return line.removeprefix("cbam_ext: ")
    return "\n".join(lines[-3:]) or "the compiler said nothing"


def warn_if_sources_changed() -> None:
    """Warns the caller of :func:`cbam_ext.load` where the operators in use are of older sources."""
    built = library.status().info.get("source_hash")
    if built is not None and built != decisions.source_hash():
        warnings.warn(
            f"cbam_ext's sources in {decisions.source_dir()} have changed since the operators in "
            "use were built. A process can load them only once: restart the interpreter (the "
            "notebook kernel), and rebuild if this is an install with a compiled part.",
            stacklevel=3,
        )


class _Progress:
    """One line on stderr that counts seconds; rewritten in place where that is possible."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._start = time.monotonic()
        self._rewrites = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._shown = False

    def show(self) -> None:
        if self._rewrites:
            self._write(f"\r{self._text}: {self._elapsed()}")
        elif not self._shown:
            self._write(f"{self._text}\n")
        self._shown = True

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._shown and self._rewrites:
            self._write("\n")
        elif self._shown:
            self._write(f"cbam_ext: that took {self._elapsed()}\n")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._start:.0f} s"

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
